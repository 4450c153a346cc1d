"""What packed layers share: the buffers that an op takes, made from a quantized layer.

A packed layer computes in inference only. It has no parameters, and its buffers keep their types
under ``.half()``: a code must not depend on the precision around it.
"""

import torch
from torch import Tensor, nn

from ..errors import GPLQError
from ..ops.reference import LAYER_FIELDS
from ..quant import QuantState
from ..quant.packing import pack_multiplier_panels, pack_panels
from .weight_layer import QuantWeightLayer

# The accumulators of an op are int32.
LARGEST_SUM = 2**31 - 1


class DeployError(GPLQError, RuntimeError):
    """A model or a file that cannot be deployed; the message says what to change."""


def move_only(module: nn.Module, fn) -> None:
    """Applies ``fn`` of ``nn.Module._apply`` to the buffers of one module without its casts."""
    for name, buffer in module._buffers.items():
        if buffer is not None:
            moved = fn(buffer)
            if moved.dtype != buffer.dtype:
                moved = buffer.to(moved.device)
            module._buffers[name] = moved


def table_operand(table: Tensor | None, device: torch.device) -> Tensor:
    """A table of levels (:meth:`.ActQuantizer.table`) as the ops take it: empty for None."""
    if table is None:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return table.contiguous()


def check_packable(layer: QuantWeightLayer) -> None:
    """Raises DeployError unless the layer has frozen integers of the ``folded`` layout, with
    integer multipliers."""
    quantizer, act = layer.weight_quantizer, layer.act_quantizer
    if not quantizer.is_quantized:
        raise DeployError(
            f'{layer.site}: the weight is not quantized yet. Only a model after Stage 2 can be '
            'deployed: finish the run with tools/train.py, or take its w4a4 checkpoint.'
        )
    for spec in (quantizer.spec, act.spec):
        if not spec.code_format.is_integer_product:
            raise DeployError(
                f'{layer.site}: {spec.format} is a simulation that no integer product can compute. '
                'Quantize weights and activations with format="integer", the default.'
            )
    if not layer.is_folded:
        raise DeployError(
            f'{layer.site}: layout "raw" is a simulation that no integer product can compute. '
            'Quantize with weight=dict(layout="folded"), the default of preset "gplq".'
        )
    if quantizer.spec.has_float_groups:
        raise DeployError(
            f'{layer.site}: float group scales are a simulation that no integer product can '
            'compute. Quantize with weight=dict(group_scale="integer"), the default.'
        )
    if not (quantizer.enabled and act.enabled):
        raise DeployError(f'{layer.site}: switched off; deploy the model with all quantizers on.')
    if act.state != QuantState.FROZEN:
        raise DeployError(
            f'{layer.site}: the activation quantizer is {act.state.name}, not frozen; finish '
            'Stage 1 and Stage 2 first.'
        )


class Int4WeightLayer(nn.Module):
    """Mixin with the buffers of a packed layer, see :mod:`gplq_mm.ops.reference`.

    ``weight`` holds nibbles for codes of up to 4 bits and bytes for wider ones.
    """

    # Attributes that a layer's forward reads.
    sizes: tuple[str, ...]

    @classmethod
    def from_quantized(cls, layer: QuantWeightLayer) -> 'Int4WeightLayer':
        """Packed twin of a layer after Stage 2.

        Raises:
            DeployError: If the layer cannot be packed.
        """
        packed = cls()
        for name in cls.sizes:
            setattr(packed, name, getattr(layer, name))
        packed._take(layer)
        return packed.eval()

    def _take(self, layer: QuantWeightLayer) -> None:
        """Fills the buffers from a layer after Stage 2.

        Raises:
            DeployError: If the layer has no integers, its layout is not ``folded``, its group
                scales are floats, or its quantizers are not frozen.
        """
        check_packable(layer)
        quantizer, act = layer.weight_quantizer, layer.act_quantizer
        value = quantizer.value
        low, high = act.qmin, act.qmax
        columns = value.codes.shape[1]
        if columns * 127 * (high - low) > LARGEST_SUM:
            raise DeployError(
                f'{layer.site}: a sum of {columns} products of {act.spec.bits}-bit codes may not '
                'fit 32 bits; exclude the layer, or give its input fewer bits.'
            )
        self.site = layer.site
        self.bits = (quantizer.spec.bits, act.spec.bits)
        self.grid = [low, high, quantizer.group_size]
        with torch.no_grad():
            scale, offset = layer.column_grid()
            # The very operations of functional.quantize, or codes at a border would differ.
            inverse = scale.reciprocal()
            buffers = {
                'inverse': inverse,
                'shift': offset * -inverse,
                'weight': pack_panels(value.codes, quantizer.spec.bits),
                'multiplier': pack_multiplier_panels(value.multiplier),
                # The inverse of the permutation.
                'position': value.permutation.argsort().to(torch.int32),
                'row_scale': value.row_scale,
                'bias': quantizer.bias,
                'correction': self._correction(layer, value.integers()),
                'table': table_operand(act.table(), scale.device),
            }
        for name in LAYER_FIELDS:
            self.register_buffer(name, buffers[name].detach().contiguous())

    @staticmethod
    def _correction(layer: QuantWeightLayer, integers: Tensor) -> Tensor:
        """What the simulation's operands differ from codes that start at 0, times the weight.

        An op's codes start at 0. The simulation's are ``code - zero_point`` for an integer
        zero-point and may be negative for a symmetric grid.
        """
        act = layer.act_quantizer
        difference = integers.new_full((1, integers.shape[1]), -act.qmin, dtype=torch.int64)
        if act.spec.zero_point == 'integer':
            zero_point = act.zero_point.round().long().flatten()
            taps = integers.shape[1] // max(zero_point.numel(), 1)
            difference += zero_point.repeat_interleave(taps)
        return (integers.long() * difference).sum(1).to(torch.int32)

    def operands(self) -> list[Tensor]:
        """The op's ``layer`` argument."""
        buffers = self._buffers
        return [buffers[name] for name in LAYER_FIELDS]

    def accumulate(self, x: Tensor) -> Tensor:
        """Integer accumulators, int32: those of :meth:`QuantWeightLayer.accumulate`."""
        raise NotImplementedError

    def _apply(self, fn, recurse: bool = True):
        move_only(self, fn)
        return self

    def extra_repr(self) -> str:
        weight, act = self.bits
        return f'{self._shape_repr()}, W{weight}A{act}, groups of {self.grid[2]}'

    def _shape_repr(self) -> str:
        raise NotImplementedError
