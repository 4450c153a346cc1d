"""Model families: one file each, one entry in :data:`gplq_mm.registry.FAMILIES` each.

Models are known by the names of their classes, and no package of models is imported.
"""

from .classifiers import Classifiers
from .detectors import Detectors
from .hugging_face import HuggingFace
from .libraries import Libraries
from .resnet import ResNet
from .swin import Swin
from .timm import Timm
from .vit import ViT

__all__ = [
    'Classifiers',
    'Detectors',
    'HuggingFace',
    'Libraries',
    'ResNet',
    'Swin',
    'Timm',
    'ViT',
]
