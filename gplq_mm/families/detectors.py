"""Detectors of mmdet, of whatever family their backbone is: maps of the neck, heads, AP."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..layers.family import Family
from ..registry import FAMILIES


class DetectorOutputs:
    """Callable on a preprocessed batch; gives what a detector computes for all places.

    These are ``'maps'`` of the neck, the outputs of its ``'dense_head'``, and of its
    ``'roi_head'``. Which proposals reach the latter is decided by a jump of scores, so they are
    those of the first call for a batch, until another batch comes.

    Args:
        model: Detector.

    Raises:
        SettingError: If its head does not read the maps alone (DETR).
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._batch: Any = None
        self._proposals: list | None = None
        self.dense_head = getattr(model, 'rpn_head', getattr(model, 'bbox_head', None))
        try:
            signature(self.dense_head.forward).bind(())
        except (AttributeError, TypeError) as error:
            raise SettingError(
                'the analysis calls the dense head of a detector with the maps of the neck, and '
                f'{type(self.dense_head).__name__} needs more than these ({error}).'
            ) from error

    def __call__(self, batch: dict) -> dict[str, list[Tensor]]:
        """Outputs for a batch ``dict(inputs=..., data_samples=...)`` of the preprocessor."""
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


@FAMILIES.register_module()
class Detectors(Family):
    """Mask R-CNN, RetinaNet and whatever else of mmdet has a head on maps."""

    features = {
        'mmdet.models.detectors.base.BaseDetector': lambda model: getattr(model, 'neck', None)
    }
    outputs = {'mmdet.models.detectors.base.BaseDetector': DetectorOutputs}
    headlines = {'coco/bbox_mAP': ('bbox_mAP', 100.0), 'coco/segm_mAP': ('segm_mAP', 100.0)}
    scopes = {
        'mmdet': r'models\.(backbones|data_preprocessors|dense_heads\.(?!atss_vl)|'
        r'detectors\.(?!d2_|glip|grounding|kd_|lad)|layers|losses|necks|roi_heads|seg_heads|'
        r'task_modules\.(?!tracking))|datasets\.transforms\.(?!text_transf|generate_line)'
    }
