"""From timm's names of a vision transformer's weights to mmpretrain's."""

import re
from collections.abc import Mapping

from torch import Tensor

from ..errors import DataError

_BLOCK_LAYERS = {
    'norm1': 'ln1',
    'attn.qkv': 'attn.qkv',
    'attn.proj': 'attn.proj',
    'norm2': 'ln2',
    'mlp.fc1': 'ffn.layers.0.0',
    'mlp.fc2': 'ffn.layers.1',
}
_OUTER_LAYERS = {
    'patch_embed.proj': 'backbone.patch_embed.projection',
    'norm': 'backbone.ln1',
    'head': 'head.layers.head',
}
_TOKENS = ('cls_token', 'pos_embed')
_BLOCK_KEY = re.compile(r'blocks\.(\d+)\.')


def _key_map(depth: int, distilled: bool) -> dict[str, str]:
    layers = dict(_OUTER_LAYERS)
    for block in range(depth):
        for timm_name, mm_name in _BLOCK_LAYERS.items():
            layers[f'blocks.{block}.{timm_name}'] = f'backbone.layers.{block}.{mm_name}'
    tokens = _TOKENS
    if distilled:
        layers['head_dist'] = 'head.layers.head_dist'
        tokens = (*tokens, 'dist_token')
    keys = {token: f'backbone.{token}' for token in tokens}
    for timm_name, mm_name in layers.items():
        for kind in ('weight', 'bias'):
            keys[f'{timm_name}.{kind}'] = f'{mm_name}.{kind}'
    return keys


def _listing(keys: set[str]) -> str:
    names = sorted(keys)
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


def convert_timm_vit_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a timm ViT or DeiT for mmpretrain's ``ImageClassifier``.

    The result fits the backbone ``VisionTransformer`` with ``VisionTransformerClsHead``, or, when
    there is a distillation token, ``DistilledVisionTransformer`` with ``DeiTClsHead``. The tensors
    themselves are passed on, neither copied nor changed.

    Args:
        state_dict (Mapping[str, Tensor]): Under timm's names: ``patch_embed.proj.weight``,
            ``blocks.0.attn.qkv.weight``, ..., ``head.bias``.

    Returns:
        dict[str, Tensor]: The same tensors as ``backbone.*`` and ``head.layers.*``.

    Raises:
        DataError: If a key is missing, or has no counterpart; names the keys.
    """
    blocks = {int(found[1]) for key in state_dict if (found := _BLOCK_KEY.match(key))}
    # At least one block, so that a foreign file is reported with the names expected of it.
    keys = _key_map(depth=max(blocks, default=0) + 1, distilled='dist_token' in state_dict)
    missing = keys.keys() - state_dict.keys()
    unknown = state_dict.keys() - keys.keys()
    if missing or unknown:
        faults = [f'missing keys: {_listing(missing)}'] if missing else []
        faults += [f'unknown keys: {_listing(unknown)}'] if unknown else []
        raise DataError(
            f'These are not the weights of a plain timm ViT or DeiT with a classifier '
            f'({"; ".join(faults)}): give the state dict of a model such as vit_tiny_patch16_224.'
        )
    return {keys[key]: tensor for key, tensor in state_dict.items()}
