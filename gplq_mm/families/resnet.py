"""ResNets: their residual blocks work on feature maps."""

from ..layers.family import Family
from ..registry import FAMILIES


@FAMILIES.register_module()
class ResNet(Family):
    """ResNet of mmpretrain, mmdet and torchvision, and what is derived from it."""

    blocks = {
        f'{module}.{name}': 1
        for module in (
            'mmpretrain.models.backbones.resnet',
            'mmdet.models.backbones.resnet',
            'torchvision.models.resnet',
        )
        for name in ('BasicBlock', 'Bottleneck')
    }
