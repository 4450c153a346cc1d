"""Layers whose training forward is one over the batch of all ranks.

Batch normalization averages over the images, and dropout draws one random number after the
other: both see more than an image, and with their own classes a batch that is dealt out to
several ranks trains another model than the same batch on one rank. The i-th image of rank r is
image ``i * ranks + r`` of the batch, as :class:`gplq_mm.datasets.ResumableSampler` deals them out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .reduce import all_reduce_sum, rank_and_world_size


def _kept(x: Tensor, shape: tuple[int, ...], share: float) -> Tensor:
    """Random choice of a ``share`` of the elements.

    Args:
        x: Names the device.
        shape: First axis: this rank's images.
        share: Probability of True.

    Returns:
        bool, of ``shape``: this rank's part of what is drawn for the images of all ranks. The
        generators of all ranks must be in one state.
    """
    rank, world_size = rank_and_world_size()
    everywhere = (shape[0] * world_size, *shape[1:])
    return torch.empty(everywhere, dtype=torch.bool, device=x.device).bernoulli_(share)[
        rank::world_size
    ]


class Dropout(nn.Dropout):
    """``nn.Dropout`` (mmcv's too); never in place."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, ...)`` to the same shape; N images."""
        if not self.training or self.p == 0 or not x.dim():
            return x
        if self.p == 1:
            return x * 0
        return x / (1 - self.p) * _kept(x, tuple(x.shape), 1 - self.p)


class DropPath(nn.Module):
    """Stochastic depth of mmcv and timm: all of an image, or nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, ...)`` to the same shape; N images."""
        if not self.training or not self.drop_prob:
            return x
        share = 1 - self.drop_prob
        kept = _kept(x, (x.shape[0], *(1,) * (x.dim() - 1)), share)
        # timm can leave the mean lower; mmcv always divides.
        return x * kept / share if getattr(self, 'scale_by_keep', True) else x * kept


class _Normalize(torch.autograd.Function):
    """Normalization by mean and variance over the images of all ranks, float32 ``(C,)``."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, count, eps):
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.constants = count, eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, variance = ctx.saved_tensors
        count, eps = ctx.constants
        shape = (1, -1, *(1,) * (x.dim() - 2))
        axes = [axis for axis in range(x.dim()) if axis != 1]
        inverse = (variance + eps).rsqrt()
        grad = grad.float()
        normalized = (x - mean.view(shape)) * inverse.view(shape)
        own = torch.stack((grad.sum(axes), (grad * normalized).sum(axes)))
        # Mean and variance carry every rank's loss to the images of every other.
        share = all_reduce_sum(own.clone()) / count
        grad_x = grad - share[0].view(shape) - normalized * share[1].view(shape)
        factor = inverse if weight is None else inverse * weight
        grad_bias, grad_weight = (None, None) if weight is None else own
        grad_x = (grad_x * factor.view(shape)).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


class _BatchNormOverRanks:
    """Mixed into the batch normalizations, whose buffers then stay the same on all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, ...)`` to the same shape."""
        if not self.training or rank_and_world_size()[1] == 1:
            return super().forward(x)
        self._check_input_dim(x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            axes = [axis for axis in range(x.dim()) if axis != 1]
            rows = x.detach().float()
            count = torch.full((1,), float(x.numel() // x.shape[1]), device=x.device)
            count = float(all_reduce_sum(count))
            mean = all_reduce_sum(rows.sum(axes)) / count
            centered = rows - mean.view(1, -1, *(1,) * (x.dim() - 2))
            variance = all_reduce_sum(centered.square().sum(axes)) / count
            if self.track_running_stats:
                self.num_batches_tracked.add_(1)
                share = self.momentum
                if share is None:
                    share = 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * count / max(count - 1, 1), share)
        return _Normalize.apply(x, self.weight, self.bias, mean, variance, count, self.eps)


class BatchNorm1d(_BatchNormOverRanks, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over the batch of all ranks."""


class BatchNorm2d(_BatchNormOverRanks, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the batch of all ranks."""


class BatchNorm3d(_BatchNormOverRanks, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` over the batch of all ranks."""


_BATCH_NORMS = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


def make_rank_invariant(model: nn.Module) -> None:
    """Gives dropout and batch normalization layers their class of this module, in place.

    Keys, and what the layers compute in evaluation, stay what they are.

    Args:
        model: Any model.
    """
    for module in model.modules():
        if type(module).forward is nn.Dropout.forward:
            module.__class__ = Dropout
        elif type(module).__name__ == 'DropPath' and hasattr(module, 'drop_prob'):
            module.__class__ = DropPath
        elif isinstance(module, _BatchNorm) and type(module) in _BATCH_NORMS:
            module.__class__ = _BATCH_NORMS[type(module)]
