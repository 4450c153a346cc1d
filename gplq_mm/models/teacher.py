"""The frozen FP32 model whose features and decisions the student keeps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import SettingError
from .feature_tap import FeatureTap, feature_layer_of, tapped_outputs
from .frozen import DTYPES, frozen_outputs, resolve_dtype


class Teacher:
    """A frozen model, in eval mode. It is no module, so nothing saves or trains it.

    Args:
        network: The float model.
        taps: Whether features are taken from it.
        feature_layer: As in :class:`GPLQ`.
        dtype: Precision of :meth:`targets`: ``'float32'``, ``'bfloat16'`` (autocast), or
            ``'auto'``, which is bfloat16 where :func:`has_fast_bf16`, and float32 elsewhere.
        forward: ``forward(network, batch)``.

    Raises:
        SettingError: For another ``dtype``.
    """

    def __init__(
        self,
        network: nn.Module,
        taps: bool,
        feature_layer: str | None = None,
        dtype: str = 'auto',
        forward: Callable[[nn.Module, Any], Any] = nn.Module.__call__,
    ):
        if dtype not in DTYPES:
            raise SettingError(f'teacher_dtype={dtype!r} must be one of {", ".join(DTYPES)}.')
        self.network = network.eval().requires_grad_(False)
        self.dtype = dtype
        self.forward = forward
        self.tap = FeatureTap(feature_layer_of(network, feature_layer)) if taps else None

    def outputs(self, batch: Any, dtype: torch.dtype = torch.float32) -> tuple:
        """Features ``(N, D)`` and logits ``(N, classes)``, constants; or the maps, twice.

        Args:
            batch: What the forward takes, for a network of OpenMMLab preprocessed images
                ``(N, C, H, W)``.
            dtype: Precision. The default makes figures that do not depend on the device.
        """

        def compute() -> Any:
            feature, output = tapped_outputs(self.tap, lambda: self.forward(self.network, batch))
            return feature if self.tap.of_output else (feature, output)

        found = frozen_outputs(compute, self._device.type, dtype)
        return (found, found) if self.tap.of_output else found

    def targets(self, batch: Any) -> tuple:
        """:meth:`outputs` in the precision of training."""
        return self.outputs(batch, resolve_dtype(self.dtype, self._device))

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device
