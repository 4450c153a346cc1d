"""Compensation of weight rounding: a linear map beside every block, in closed form.

QwT (Fu et al., 2024, arXiv 2411.13918): ``y = block_q(x) + W x + b`` with W and b the ridge
regression of the block's rounding error on its input. QwT-v2 (arXiv 2505.20932) replaces the
matrix by a per-channel affine map. Statistics are sums, so memory does not depend on the number
of calibration images and ranks add theirs.
"""

import math

import torch
from torch import Tensor, nn

from ..distributed import all_reduce_sum, rank_and_world_size
from ..errors import DataError, SettingError
from ..registry import COMPENSATORS, build_registered

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# 4 MB of float64: the copies of a chunk stay in a core's cache.
CHUNK_ELEMENTS = 2**19


class Compensation(nn.Module):
    """Base of the maps. Empty (adds nothing) until fitted.

    The sums are kept in two folds, of images with even and with odd numbers. The ridge is
    chosen, and the map kept or dropped, by the error on the fold that was not fitted; then both
    folds are fitted together.

    Args:
        ridge: Ridge relative to the mean diagonal of the Gram matrix, or ``'auto'``.
        axis: Channel axis of the block's input and output: -1 for tokens, 1 for feature maps.
    """

    buffers_of_map: tuple[str, ...] = ('weight', 'bias')

    def __init__(self, ridge: float | str = 'auto', axis: int = -1):
        super().__init__()
        if ridge != 'auto' and not (isinstance(ridge, (int, float)) and ridge >= 0):
            raise SettingError(f'compensation.ridge={ridge!r} must be "auto" or a number >= 0.')
        self.ridges = RIDGES if ridge == 'auto' else (float(ridge),)
        self.axis = axis
        self.enabled = True
        self._folds: list[dict[str, Tensor]] = []
        self._images = 0
        for name in self.buffers_of_map:
            self.register_buffer(name, None)
        # Says where the module is while it is empty, so that loading fills it there.
        self.register_buffer('_anchor', torch.empty(0), persistent=False)

    @property
    def is_fitted(self) -> bool:
        """Whether the map exists (a dropped map is fitted to zero and does not exist)."""
        return self.weight is not None

    def start(self) -> None:
        """Forgets map and statistics."""
        self._folds, self._images = [{}, {}], 0
        for name in self.buffers_of_map:
            setattr(self, name, None)

    @torch.no_grad()
    def update(self, x: Tensor, residual: Tensor) -> None:
        """Adds a batch to the sums.

        Args:
            x: Input of the quantized block, images on the first axis, channels on ``axis``.
            residual: Output with FP32 weights minus output with quantized weights, same shape.
        """
        rank, world_size = rank_and_world_size()
        x, residual = (t.movedim(self.axis, -1) for t in (x, residual))
        # Ranks take turns, so that image i of this one is image i * ranks + rank: the folds do
        # not depend on how the images are dealt out to ranks and batches.
        first = (self._images * world_size + rank) % 2
        self._images += len(x)
        if world_size % 2:
            self._add(first, x[::2], residual[::2])
            self._add(1 - first, x[1::2], residual[1::2])
        else:
            self._add(first, x, residual)

    def _add(self, fold: int, x: Tensor, residual: Tensor) -> None:
        if not x.numel():
            return
        known = self._folds[fold]
        rows = max(1, CHUNK_ELEMENTS // x.shape[-1])
        parts = (t.flatten(0, -2).split(rows) for t in (x, residual))
        for part, rest in zip(*parts, strict=True):
            for key, value in self._sums(part.double(), rest.double()).items():
                known[key] = known[key].add_(value) if key in known else value

    def _sums(self, x: Tensor, residual: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _solve(self, sums: dict[str, Tensor], ridge: float) -> Tensor:
        raise NotImplementedError

    def _error(self, solution: Tensor, sums: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def _store(self, solution: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def fit(self) -> float:
        """Solves for the map and drops the statistics.

        Returns:
            Share of the squared rounding error that the map explains on held-out data (R^2,
            against no compensation). At or below 0 the map is dropped.

        Raises:
            DataError: If no data was seen.
        """
        if not self._folds or not any(self._folds):
            raise DataError('compensation saw no calibration data; give it at least one image.')
        zeros = {key: torch.zeros_like(value) for key, value in max(self._folds, key=len).items()}
        folds = [fold or zeros for fold in self._folds]
        for fold in folds:
            for value in fold.values():
                all_reduce_sum(value)
        total = {key: folds[0][key] + folds[1][key] for key in folds[0]}
        self._folds = []
        energy = float(total['energy'])
        if energy == 0.0:
            return 0.0
        # With a single image there is nothing to hold out.
        pairs = [(folds[0], folds[1]), (folds[1], folds[0])]
        if float(folds[1]['count']) == 0.0 or float(folds[0]['count']) == 0.0:
            pairs = [(total, total)]
        scores = []
        for ridge in self.ridges:
            maps = [self._solve_half(fit, ridge) for fit, _ in pairs]
            error = sum(
                float(self._error(solution, test))
                for solution, (_, test) in zip(maps, pairs, strict=True)
            )
            scores.append(1.0 - error / energy if math.isfinite(error) else -math.inf)
        best = max(range(len(scores)), key=scores.__getitem__)
        solution = self._solve_half(total, self.ridges[best])
        if scores[best] > 0.0 and bool(solution.isfinite().all()):
            self._store(solution)
            return scores[best]
        return min(scores[best], 0.0)

    def _solve_half(self, sums: dict[str, Tensor], ridge: float) -> Tensor:
        """The solution as half precision will hold it; what overflows there becomes infinite."""
        return self._solve(sums, ridge).to(torch.float16).double()

    def correction(self, x: Tensor) -> Tensor:
        """What is added to the block's output; shape and dtype of ``x``."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in self.buffers_of_map:
            saved = state_dict.get(prefix + name)
            if saved is not None:
                saved = torch.empty_like(saved, device=self._anchor.device)
            setattr(self, name, saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@COMPENSATORS.register_module()
class QwT(Compensation):
    """Full linear map: ``weight`` ``(C_out, C_in)`` and ``bias`` ``(C_out,)`` in float16.

    ``W* = (Y - Y_Z) X^T (X X^T + lambda I)^-1`` on inputs with a constant 1 appended for the
    bias, which is not penalised.
    """

    def _sums(self, x: Tensor, residual: Tensor) -> dict[str, Tensor]:
        x = torch.cat((x, x.new_ones(len(x), 1)), 1)
        return {
            'count': torch.tensor([float(len(x))], dtype=torch.float64, device=x.device),
            'gram': x.T @ x,
            'cross': x.T @ residual,
            'energy': residual.square().sum().reshape(1),
        }

    def _solve(self, sums: dict[str, Tensor], ridge: float) -> Tensor:
        penalty = (ridge * sums['gram'].diagonal()[:-1].mean()).clamp(min=1e-12)
        diagonal = penalty.repeat(len(sums['gram']))
        # Not penalised, yet the matrix stays invertible when a fold is empty.
        diagonal[-1] = 1e-12
        return torch.linalg.lstsq(sums['gram'] + diagonal.diag(), sums['cross']).solution

    def _error(self, solution: Tensor, sums: dict[str, Tensor]) -> Tensor:
        fitted = (solution * (sums['gram'] @ solution)).sum()
        return sums['energy'] - 2 * (solution * sums['cross']).sum() + fitted

    def _store(self, solution: Tensor) -> None:
        # QwT keeps the map in half precision; the simulation uses what will be deployed.
        self.weight = solution[:-1].T.to(torch.float16).contiguous()
        self.bias = solution[-1].to(torch.float16)

    def correction(self, x: Tensor) -> Tensor:
        rows = x.movedim(self.axis, -1)
        out = nn.functional.linear(rows, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return out.movedim(-1, self.axis)


@COMPENSATORS.register_module()
class QwTv2(Compensation):
    """Per-channel affine map: ``weight`` and ``bias`` ``(C,)`` in float16."""

    def _sums(self, x: Tensor, residual: Tensor) -> dict[str, Tensor]:
        return {
            'count': torch.tensor([float(len(x))], dtype=torch.float64, device=x.device),
            'x': x.sum(0),
            'xx': x.square().sum(0),
            'r': residual.sum(0),
            'xr': (x * residual).sum(0),
            'rr': residual.square().sum(0),
            'energy': residual.square().sum().reshape(1),
        }

    def _solve(self, sums: dict[str, Tensor], ridge: float) -> Tensor:
        count = sums['count'].clamp(min=1)
        mean_x, mean_r = sums['x'] / count, sums['r'] / count
        variance = sums['xx'] / count - mean_x.square()
        covariance = sums['xr'] / count - mean_x * mean_r
        slope = covariance / (variance + (ridge * variance.mean()).clamp(min=1e-12))
        return torch.stack((slope, mean_r - slope * mean_x))

    def _error(self, solution: Tensor, sums: dict[str, Tensor]) -> Tensor:
        slope, bias = solution
        error = sums['rr'] + slope.square() * sums['xx'] + bias.square() * sums['count']
        error = error - 2 * (slope * sums['xr'] + bias * sums['r'] - slope * bias * sums['x'])
        return error.sum()

    def _store(self, solution: Tensor) -> None:
        self.weight, self.bias = solution.to(torch.float16).unbind(0)

    def correction(self, x: Tensor) -> Tensor:
        rows = x.movedim(self.axis, -1)
        return (rows * self.weight.to(x.dtype) + self.bias.to(x.dtype)).movedim(-1, self.axis)


def build_compensation(cfg: dict, axis: int) -> Compensation:
    """Compensation of ``dict(type='QwT' | 'QwTv2', ridge=...)``."""
    return build_registered(COMPENSATORS, {**cfg, 'axis': axis})


def block_input(args: tuple, kwargs: dict) -> Tensor:
    """First input of a block, the one that its compensation sees."""
    return args[0] if args else next(iter(kwargs.values()))


def _add_correction(block: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    compensation = block.compensation
    if not (compensation.enabled and compensation.is_fitted):
        return output
    return output + compensation.correction(block_input(args, kwargs))


def attach_compensation(block: nn.Module, compensation: Compensation) -> None:
    """Puts ``compensation`` in parallel to ``block`` without changing the block's keys.

    Its buffers are saved under ``<block>.compensation``; it sees the block's first input.
    """
    block.add_module('compensation', compensation)
    block.register_forward_hook(_add_correction, with_kwargs=True)
