"""The frozen FP32 model whose features and decisions the student keeps."""

import torch
from torch import Tensor, nn

from ..errors import SettingError
from .feature_tap import FeatureTap, feature_layer_of, tapped_outputs
from .frozen import DTYPES, frozen_outputs, resolve_dtype

__all__ = ['Teacher']


class Teacher:
    """A frozen model, in eval mode. It is no module, so nothing saves or trains it.

    Args:
        network: The float model.
        taps: Whether features are taken from it.
        feature_layer: As in :class:`GPLQ`.
        dtype: Precision of :meth:`targets`: ``'float32'``, ``'bfloat16'`` (autocast), or
            ``'auto'``, which is bfloat16 where :func:`has_fast_bf16`, and float32 elsewhere.

    Raises:
        SettingError: For another ``dtype``.
    """

    def __init__(
        self,
        network: nn.Module,
        taps: bool,
        feature_layer: str | None = None,
        dtype: str = 'auto',
    ):
        if dtype not in DTYPES:
            raise SettingError(f'teacher_dtype={dtype!r} must be one of {", ".join(DTYPES)}.')
        self.network = network.eval().requires_grad_(False)
        self.dtype = dtype
        self.tap = FeatureTap(feature_layer_of(network, feature_layer)) if taps else None

    def outputs(self, images: Tensor, dtype: torch.dtype = torch.float32) -> tuple:
        """Features ``(N, D)`` and logits ``(N, classes)``, constants; or the maps, twice.

        Args:
            images: Preprocessed images ``(N, C, H, W)``.
            dtype: Precision. The default makes figures that do not depend on the device.
        """
        network, tap = self.network, self.tap
        if tap.of_output:
            maps = frozen_outputs(lambda x: tapped_outputs(network, tap, x)[0], images, dtype)
            return maps, maps

        return frozen_outputs(lambda x: tapped_outputs(network, tap, x), images, dtype)

    def targets(self, images: Tensor) -> tuple:
        """:meth:`outputs` in the precision of training."""
        return self.outputs(images, resolve_dtype(self.dtype, images.device))
