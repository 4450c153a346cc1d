"""The frozen FP32 model whose features and decisions the student keeps."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .feature_cache import FeatureCache
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
        cache: File of a :class:`FeatureCache`, or None.
        architecture: Config of the model; needed for ``cache``.

    Raises:
        ValueError: For another ``dtype``, or a cache for a model whose features are maps or are
            not needed.
    """

    def __init__(
        self,
        network: nn.Module,
        taps: bool,
        feature_layer: str | None = None,
        dtype: str = 'auto',
        cache: str | os.PathLike | None = None,
        architecture: Mapping | None = None,
    ):
        if dtype not in DTYPES:
            raise ValueError(f'teacher_dtype={dtype!r} must be one of {", ".join(DTYPES)}.')
        self.network = network.eval().requires_grad_(False)
        self.dtype = dtype
        self.tap = FeatureTap(feature_layer_of(network, feature_layer)) if taps else None
        self.feature_cache = None
        if cache is None:
            return
        if self.tap is None or self.tap.of_output:
            what = 'no features are taken' if self.tap is None else 'the features are maps'
            raise ValueError(
                f'teacher_cache keeps feature vectors and logits of classifiers, and here {what}; '
                'set teacher_cache=None.'
            )
        self.feature_cache = FeatureCache(
            cache, {**(architecture or {}), 'feature_layer': feature_layer}
        )

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

        def compute(x: Tensor) -> tuple:
            return tapped_outputs(network, tap, x)

        if self.feature_cache is None:
            return frozen_outputs(compute, images, dtype)
        return self.feature_cache.outputs(network, compute, images, dtype)

    def targets(self, images: Tensor) -> tuple:
        """:meth:`outputs` in the precision of training."""
        return self.outputs(images, resolve_dtype(self.dtype, images.device))
