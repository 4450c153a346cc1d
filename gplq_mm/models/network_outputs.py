"""What a network gives for a batch, such that two of its states can be compared value by value."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .feature_tap import FeatureTap, feature_layer_of, tapped_outputs
from .gplq import GPLQ

__all__ = ['NetworkOutputs']


class NetworkOutputs:
    """Callable on a preprocessed batch; gives groups of tensors.

    Of a classifier they are ``'features'``, the input of its last Linear, and ``'logits'``. Of a
    detector they are ``'maps'`` of the neck, the outputs of its ``'dense_head'`` for all places,
    and of its ``'roi_head'``. Which proposals reach the latter is decided by a jump of scores, so
    they are those of the first call for a batch, until another batch comes.

    Args:
        model: Classifier or detector.

    Raises:
        ValueError: If it is neither, or a detector whose head does not read the maps alone (DETR).
    """

    def __init__(self, model: GPLQ):
        self.model, self.tap = model.architecture, None
        self._batch: Any = None
        self._proposals: list | None = None
        self.dense_head = getattr(self.model, 'rpn_head', getattr(self.model, 'bbox_head', None))
        if self.dense_head is None:
            if getattr(self.model, 'head', None) is None:
                raise ValueError(
                    'the analysis compares the outputs of classifiers and detectors, and the '
                    'architecture has neither a head nor an rpn_head or bbox_head.'
                )
            # Not the layer that a config may name for mimicking: what follows it would be left out.
            self.tap = FeatureTap(feature_layer_of(self.model, None))
            return
        try:
            signature(self.dense_head.forward).bind(())
        except TypeError as error:
            raise ValueError(
                'the analysis calls the dense head of a detector with the maps of the neck, and '
                f'{type(self.dense_head).__name__} needs more than these ({error}).'
            ) from error

    @property
    def is_detector(self) -> bool:
        """Whether the network is a detector."""
        return self.tap is None

    def __call__(self, batch: dict) -> dict[str, list[Tensor]]:
        """Outputs for a batch ``dict(inputs=..., data_samples=...)`` of the preprocessor."""
        if self.tap is not None:
            feature, logits = tapped_outputs(self.model, self.tap, batch['inputs'])
            return {'features': [feature], 'logits': [logits]}
        samples = batch['data_samples']
        maps = self.model.extract_feat(batch['inputs'])
        dense = self.dense_head(maps)
        outputs = {'maps': _tensors(maps), 'dense_head': _tensors(dense)}
        roi_head = getattr(self.model, 'roi_head', None)
        if roi_head is None:
            return outputs
        if batch is not self._batch:
            self._batch = batch
            metas = [sample.metainfo for sample in samples]
            self._proposals = self.dense_head.predict_by_feat(
                *dense, batch_img_metas=metas, rescale=False
            )
        return {**outputs, 'roi_head': _tensors(roi_head(maps, self._proposals, samples))}


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested lists, in order."""
    if torch.is_tensor(value):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]
