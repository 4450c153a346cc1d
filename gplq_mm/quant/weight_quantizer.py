"""What holds the integers of a weight."""

import copy
import math

import torch
from torch import Tensor, nn

from ..errors import StateError
from .quantized_weight import QuantizedWeight
from .spec import WeightSpec


class WeightQuantizer(nn.Module):
    """Holds a quantized weight once Stage 2 has made it; empty before.

    The integers live in buffers beside the FP32 parameter, which stays what Stage 1 left: the
    latent weight can always be evaluated, and Stage 2 can be run again.

    Args:
        spec: Bits, layout, group size, observer.
        shape: ``(out, K)`` of the weight as a matrix.
        name: Full name of the layer, for messages.
    """

    def __init__(self, spec: WeightSpec, shape: tuple[int, int], name: str = ''):
        super().__init__()
        self.spec = spec
        self.shape = tuple(shape)
        self.site = name
        self.enabled = True
        for buffer in ('codes', 'row_scale', 'multiplier', 'permutation', 'bias'):
            self.register_buffer(buffer, None)
        # Direct QAT's learned quantizer (LearnedWeightQuantizer); it simulates before `set`.
        self.register_module('learned', None)
        # Says where the module is while it is empty, so that loading fills it there.
        self.register_buffer('_anchor', torch.empty(0), persistent=False)

    @property
    def group_size(self) -> int:
        """Columns that share a multiplier; a whole row in the raw layout."""
        return self.spec.group_width(self.shape[1])

    @property
    def is_quantized(self) -> bool:
        """Whether Stage 2 has filled this quantizer."""
        return self.codes is not None

    def set(self, weight: QuantizedWeight, bias: Tensor) -> None:
        """Stores the integers and the bias that belongs to them.

        Args:
            weight: Result of a PTQ method.
            bias: float32 ``(out,)``, with what the zero-points and the rounding contribute.

        Raises:
            ValueError: If shape, range, group size or kind of multipliers are not this
                quantizer's.
        """
        if tuple(weight.codes.shape) != self.shape or weight.group_size != self.group_size:
            raise ValueError(
                f'{self.site}: got integers of shape {tuple(weight.codes.shape)} in groups of '
                f'{weight.group_size}, the layer has {self.shape} in groups of {self.group_size}.'
            )
        codes = weight.codes.float()
        if not torch.equal(self.spec.code_format.round_(codes.clone()), codes):
            qmin, qmax = self.spec.code_range
            raise ValueError(
                f'{self.site}: weight codes leave [{qmin}, {qmax}] of {self.spec.format}.'
            )
        if weight.multiplier.is_floating_point() != self.spec.has_float_groups:
            raise ValueError(
                f'{self.site}: got multipliers of type {weight.multiplier.dtype}, which do not go '
                f'with group_scale={self.spec.group_scale!r}.'
            )
        self.codes = weight.codes.to(torch.int8)
        self.row_scale = weight.row_scale.float()
        self.multiplier = weight.multiplier.to(self.spec.multiplier_dtype)
        self.permutation = weight.permutation.to(torch.int32)
        self.bias = bias.float()
        self._forget()

    def clear(self) -> None:
        """Forgets the integers: the layer is back at its latent weight."""
        for buffer in ('codes', 'row_scale', 'multiplier', 'permutation', 'bias'):
            setattr(self, buffer, None)
        self._forget()

    @property
    def value(self) -> QuantizedWeight:
        """The stored integers.

        Raises:
            StateError: If Stage 2 has not filled the quantizer.
        """
        if self.codes is None:
            raise StateError(f'{self.site}: the weight is not quantized; run Stage 2 first.')
        return QuantizedWeight(
            self.codes, self.row_scale, self.multiplier, self.permutation.long(), self.group_size
        )

    def integers(self) -> Tensor:
        """``multiplier * code`` as float32 ``(out, K)`` in the weight's own column order.

        No integers with float group scales. Kept after the first call: it is the operand of every
        forward.
        """
        cached = self.__dict__.get('_integers')
        if cached is None or cached.device != self.codes.device:
            cached = self.value.integers().float()
            self.__dict__['_integers'] = cached
        return cached

    def largest_row_sum(self) -> int:
        """Largest sum over a row of the magnitudes of :meth:`integers`, rounded up; bounds every
        product."""
        cached = self.__dict__.get('_row_sum')
        if cached is None:
            rows = self.integers().double().abs().sum(1)
            cached = math.ceil(rows.max().item()) if len(rows) else 0
            self.__dict__['_row_sum'] = cached
        return cached

    def _forget(self) -> None:
        """Drops what was derived from the buffers."""
        for name in ('_integers', '_row_sum'):
            self.__dict__.pop(name, None)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for buffer in ('codes', 'row_scale', 'multiplier', 'permutation', 'bias'):
            saved = state_dict.get(prefix + buffer)
            if saved is not None:
                saved = torch.empty_like(saved, device=self._anchor.device)
            setattr(self, buffer, saved)
        self._forget()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __deepcopy__(self, memo):
        cached = self.__dict__.pop('_integers', None)
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if cached is not None:
            self.__dict__['_integers'] = cached
        return clone

    def extra_repr(self) -> str:
        state = 'quantized' if self.is_quantized else 'latent'
        return f'{self.spec.bits} bit, {self.spec.layout}, {state}'
