"""Quantizer modules: they hold the learned or fixed parameters and know their state.

A quantizer passes through four ordered states: UNCALIBRATED -> OBSERVING -> LEARNING -> FROZEN.
The state is saved with the parameters, so a checkpoint can never be evaluated as something that
it is not.
"""

from enum import IntEnum

import torch
from torch import Tensor, nn

from ..distributed import rank_and_world_size
from ..errors import SettingError, StateError
from .code_state import level_bits_of
from .format import IntegerFormat
from .functional import to_steps
from .levels import LevelsFormat, check_levels, table_of, uniform_levels
from .observers import MinMaxObserver, build_observer
from .spec import ActSpec

# Scales are learned without a constraint; this floor keeps a bad step from reaching zero.
MIN_SCALE = 1e-8
# Dtypes of inputs that the ops of training take; another one is computed in its own precision.
CODED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class NotCalibratedError(StateError):
    """A quantizer was used before it had a scale."""


class QuantState(IntEnum):
    """Life of a learned quantizer, in order."""

    UNCALIBRATED = 0
    OBSERVING = 1
    LEARNING = 2
    FROZEN = 3


class LearnedQuantizer(nn.Module):
    """A quantizer with parameters that are learned, and the state of its life.

    Args:
        name: Full name of the site, for messages.
    """

    def __init__(self, name: str = ''):
        super().__init__()
        self.site = name
        self.register_buffer('state_code', torch.zeros((), dtype=torch.uint8))
        # Mirror of `state_code`: reading a device tensor in every forward would synchronise.
        self._state = QuantState.UNCALIBRATED

    @property
    def state(self) -> QuantState:
        """Where in its life the quantizer is."""
        return self._state

    def _set_state(self, state: QuantState) -> None:
        self._state = QuantState(state)
        self.state_code.fill_(int(state))
        for parameter in self.parameters():
            parameter.requires_grad_(state < QuantState.FROZEN)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        state = int(self.state_code)
        # A run that was killed while observing starts calibration again.
        if state == QuantState.OBSERVING:
            state = QuantState.UNCALIBRATED
        self._set_state(QuantState(state))


class ActQuantizer(LearnedQuantizer):
    """Activation quantizer with learned parameters (LSQ, LSQ+); what a code stands for, its format
    says (:mod:`.format`).

    ``scale`` (and ``offset`` for a float zero-point) are parameters of their final shape from
    the start; calibration fills them in place, so an optimizer may already hold them.

    Args:
        spec: Format, bits, zero-point, granularity, observer.
        shape: Shape of scale and offset, broadcastable to the input, with at most one axis
            longer than 1.
        name: Full name of the site, for messages.
    """

    # Bytes a value of what backward is given, 1 or 2. With one, 4 bits of it are the rounding
    # residual, of levels 2 beside their position, and the gradient of a scale is a few percent off;
    # more than 4 bits take two.
    saved_bytes: int = 2

    def __init__(self, spec: ActSpec, shape: tuple[int, ...], name: str = ''):
        super().__init__(name)
        self.spec = spec
        self.format = spec.code_format
        self.qmin, self.qmax = spec.code_range
        self.enabled = True
        self.observer = None
        if self.format.learns_scale:
            self.scale = nn.Parameter(torch.ones(shape))
        else:
            self.register_buffer('scale', torch.ones(shape))
        if spec.zero_point == 'float':
            self.offset = nn.Parameter(torch.zeros(shape))
        else:
            self.register_parameter('offset', None)
        if spec.zero_point == 'integer':
            self.register_buffer('zero_point', torch.zeros(shape))
        # Scale and offset of every channel, both (K,), that a LayerNorm has brought to the one
        # scale of the tensor: by them weights here and there differ from the float model's.
        self.register_buffer('channel_scale', None)
        self.register_buffer('channel_offset', None)
        # The levels of the tensor, or of each head, uint8 (rows, 2**bits).
        levels = None
        if self.format.has_levels:
            rows = self.scale.numel() if spec.granularity == 'head' else 1
            levels = uniform_levels(spec.bits).repeat(rows, 1)
        self.register_buffer('levels', levels)
        self.register_buffer('_table', None, persistent=False)

    @property
    def row_relative(self) -> bool:
        """Whether the input must be scaled by its row's maximum (attention probabilities)."""
        return self.spec.row_relative

    @property
    def state_grid(self) -> list[int]:
        """Smallest and largest code, and the bits beside a code in what backward is given
        (:mod:`.code_state`)."""
        num_bytes = self.saved_bytes if self.spec.bits <= 4 else 2
        return [self.qmin, self.qmax, level_bits_of(self.qmin, self.qmax, num_bytes)]

    def keeps_codes(self, x: Tensor) -> bool:
        """Whether codes are all that backward needs of ``x``: the quantizer rounds to integers or
        levels, and not in float64. A subclass of the format rounds in its own way."""
        return (
            type(self.format) in (IntegerFormat, LevelsFormat)
            and self.enabled
            and self._state >= QuantState.LEARNING
            and x.dtype in CODED_DTYPES
        )

    @property
    def is_watched(self) -> bool:
        """Whether a hook waits for what the quantizer is given and what it makes of it."""
        return bool(self._forward_hooks)

    def table(self) -> Tensor | None:
        """Level of every position (:mod:`.levels`): uint8 ``(64,)``, with granularity ``'head'``
        ``(heads, 64)``; None where codes are the integers themselves."""
        if self.levels is None:
            return None
        if self._table is None:
            table = table_of(self.levels)
            self._table = table if self.spec.granularity == 'head' else table[0]
        return self._table

    def _tables(self) -> tuple[Tensor, ...]:
        """What the format is handed beside the grid."""
        table = self.table()
        return () if table is None else (table,)

    def observe(self, observer: MinMaxObserver | None = None) -> None:
        """Starts calibration: forward passes data through and only looks at it.

        Args:
            observer: Another one than that of the spec; :meth:`set_grid` then ends calibration.

        Raises:
            StateError: If the quantizer is frozen.
        """
        if self._state == QuantState.FROZEN:
            raise StateError(f'{self.site}: a frozen activation quantizer cannot be calibrated.')
        self.observer = observer or build_observer(self.spec, tuple(self.scale.shape))
        self.observer.to(self.scale.device)
        self._set_state(QuantState.OBSERVING)

    def finish_observing(self) -> None:
        """Writes scale and offset from what was observed; the quantizer may learn from now on."""
        self.set_grid(*self.observer.compute(), self.observer.levels)

    @torch.no_grad()
    def set_grid(self, scale: Tensor, offset: Tensor, levels: Tensor | None = None) -> None:
        """Ends calibration; the quantizer may learn from now on.

        Args:
            scale: Real value per integer step, of the quantizer's shape.
            offset: Real value of code 0, of the same shape; zero for a symmetric grid.
            levels: uint8 ``(rows, 2**bits)``, increasing, where the format has them.

        Raises:
            SettingError: For levels that are no codebook.
        """
        if self.levels is not None:
            check_levels(levels, self.spec.bits)
            self.levels = levels.to(self.levels)
            self._table = None
        self.scale.copy_(scale)
        if self.offset is not None:
            self.offset.copy_(offset)
        if self.spec.zero_point == 'integer':
            self.zero_point.copy_((-offset / scale).round())
        self.observer = None
        self._set_state(QuantState.LEARNING)

    def freeze(self) -> None:
        """Ends learning for good.

        Raises:
            NotCalibratedError: If there is nothing to freeze yet.
        """
        self._require_scale()
        with torch.no_grad():
            self.scale.clamp_(min=MIN_SCALE)
        self._set_state(QuantState.FROZEN)

    def _require_scale(self) -> None:
        if self._state < QuantState.LEARNING:
            raise NotCalibratedError(
                f'the activation quantizer {self.site or "(unnamed)"} has no scale yet. Run the '
                'calibration (tools/train.py with a GPLQ config), or load a checkpoint that was '
                'saved after it.'
            )

    def effective_scale(self) -> Tensor:
        """The scale in force, positive; its gradient is that of the parameter."""
        scale = self.scale
        if self._state != QuantState.FROZEN:
            # Straight through the floor: a scale that fell below it must be able to come back.
            # The difference is exactly zero, so the value is exactly the floor.
            scale = scale.detach().clamp(min=MIN_SCALE) + (scale - scale.detach())
        return self.format.constrain(scale)

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Effective scale (positive) and offset (None for a symmetric grid)."""
        scale = self.effective_scale()
        if self.spec.zero_point == 'integer':
            return scale, -scale * self.zero_point
        return scale, self.offset

    def _grad_scale(self, x: Tensor) -> float:
        # LSQ, section 2.2: balances the size of the update of a scale and that of weights.
        # A detector's head may get nothing: an image without a single object.
        # Counted over all ranks, which get equally much: the rate of a quantizer must not depend
        # on the number of ranks that a batch is dealt out to.
        count = max(x.numel(), 1) * rank_and_world_size()[1]
        return (count / self.scale.numel() * max(self.qmax, 1)) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        """Observes, or returns ``x`` on the grid, by state.

        Args:
            x: Floating tensor that the scale broadcasts to.

        Raises:
            NotCalibratedError: If the quantizer has no scale.
            SettingError: If the scale does not broadcast to ``x`` (per token: another number of
                tokens than the quantizer was made for).
        """
        if not self.enabled:
            return x
        if self._state == QuantState.OBSERVING:
            self.check_shape(x)
            self.observer.update(x)
            return x
        self._require_scale()
        self.check_shape(x)
        return self.format.fake_quantize(x, *self.grid(), self._grad_scale(x), *self._tables())

    def codes(self, x: Tensor) -> Tensor:
        """Codes of ``x`` in float32, or its levels; what the deployed model computes with."""
        self._require_scale()
        return self.format.codes(x.float(), *self.grid(), *self._tables())

    def clips(self, x: Tensor) -> Tensor:
        """Which values of ``x`` lie beyond the ends of the grid; bool, shape of ``x``."""
        return self.format.clips(x, *self.grid())

    def steps(self, x: Tensor) -> Tensor:
        """What :meth:`codes` rounds and clamps, float32."""
        self._require_scale()
        return to_steps(x.float(), *self.grid())

    def check_shape(self, x: Tensor) -> None:
        """Checks that the scale broadcasts to ``x``.

        Raises:
            SettingError: If it does not.
        """
        for axis, size in enumerate(reversed(self.scale.shape), start=1):
            if size not in (1, x.shape[-axis]):
                raise SettingError(
                    f'{self.site}: the quantizer has {size} scales along axis -{axis}, the '
                    f'input of shape {tuple(x.shape)} has {x.shape[-axis]}. A per-token '
                    'quantizer works for one input size only; use granularity "head".'
                )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in ('channel_scale', 'channel_offset'):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                saved = torch.empty_like(saved, device=self.scale.device)
            setattr(self, name, saved)
        saved = state_dict.get(prefix + 'levels')
        if self.levels is not None and saved is not None:
            check_levels(saved, self.spec.bits)
            self.levels = self.levels.new_empty(len(self.levels), saved.shape[1])
            self._table = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f'{self.spec.bits} bit, {self.spec.granularity}, {self._state.name}'
