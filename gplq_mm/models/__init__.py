"""Models: the GPLQ wrapper, the quantized backbone, the mimic loss."""

from .feature_tap import FeatureTap
from .gplq import GPLQ
from .network_outputs import NetworkOutputs
from .pca_mimic_loss import PCAMimicLoss, feature_rows
from .quant_backbone import QuantBackbone
from .run_stage import Stage
from .simple_feature_pyramid import SimpleFeaturePyramid
from .timm_conversion import convert_timm_vit_state_dict
from .training_losses import NonFiniteLossError

__all__ = [
    'GPLQ',
    'FeatureTap',
    'NetworkOutputs',
    'NonFiniteLossError',
    'PCAMimicLoss',
    'QuantBackbone',
    'SimpleFeaturePyramid',
    'Stage',
    'convert_timm_vit_state_dict',
    'feature_rows',
]
