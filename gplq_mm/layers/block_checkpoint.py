"""Gradient checkpointing of residual blocks: backward computes a block again from its input."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import SettingError
from .family import with_mixin
from .replace import find_blocks


class _CheckpointedBlock:
    """Mixin over a block's class."""

    def forward(self, *args, **kwargs):
        """The block's own forward; while gradients flow, only its input is kept."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        # The random state is restored for the second forward: drop path drops the same.
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


def checkpoint_blocks(model: nn.Module) -> list[str]:
    """Lets every residual block with quantized layers keep its input alone for backward.

    The blocks keep their parameters, keys and hooks.

    Args:
        model: Quantized model; changed in place.

    Returns:
        Names of the blocks.

    Raises:
        SettingError: If the model has no block of a known class.
    """
    names = find_blocks(model)
    if not names:
        raise SettingError(
            'gradient_checkpointing=True finds no residual block in this architecture; set it to '
            "False, or use the architecture's own switch (with_cp)."
        )
    for name in names:
        with_mixin(model.get_submodule(name), _CheckpointedBlock)
    return names
