"""Models: the GPLQ wrapper, the quantized backbone, the mimic loss."""

from .feature_tap import FeatureTap
from .gplq import GPLQ
from .iteration_seed import seed_iteration
from .mimicry import Mimicry, prepare_training
from .network_outputs import NetworkOutputs
from .optim import Bf16OptimWrapper, GPLQOptimWrapperConstructor
from .pca_mimic_loss import PCAMimicLoss, feature_rows
from .quant_backbone import QuantBackbone
from .run_stage import Stage
from .simple_feature_pyramid import SimpleFeaturePyramid
from .steps import (
    calibrate_activations,
    first_image,
    fit_basis,
    run_weight_ptq,
    unknown_products,
)
from .timm_conversion import convert_timm_vit_state_dict
from .training_losses import NonFiniteLossError
from .weight_tuning import WeightTuning, tuning_settings

__all__ = [
    'GPLQ',
    'Bf16OptimWrapper',
    'FeatureTap',
    'GPLQOptimWrapperConstructor',
    'Mimicry',
    'NetworkOutputs',
    'NonFiniteLossError',
    'PCAMimicLoss',
    'QuantBackbone',
    'SimpleFeaturePyramid',
    'Stage',
    'WeightTuning',
    'calibrate_activations',
    'convert_timm_vit_state_dict',
    'feature_rows',
    'first_image',
    'fit_basis',
    'prepare_training',
    'run_weight_ptq',
    'seed_iteration',
    'tuning_settings',
    'unknown_products',
]
