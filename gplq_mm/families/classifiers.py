"""Classifiers, of whatever family their network is: what is reported of them."""

from ..layers.family import Family
from ..registry import FAMILIES


@FAMILIES.register_module()
class Classifiers(Family):
    """Classifiers of mmpretrain. What they mimic is the input of the last Linear of their head,
    as of any model with a head."""

    headlines = {'accuracy/top1': ('top1', 1.0)}
    scopes = {
        'mmpretrain': r'models\.((backbones\.(?!timm_)|heads|losses|necks)\b|classifiers\.image$|'
        r'utils\.(data_preprocessor|norm)$)|datasets\.transforms\.'
    }
