"""A detector whose neck and heads are quantized, too, from an inherited config to a packed file."""

import numpy as np
import pytest
import torch
from builders import calibrated, randomize
from mmdet.apis import inference_detector
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from packed_models import ROOT, assert_close_but_for_flips
from torch import nn
from torchvision.ops import box_iou

from gplq_mm.deploy import load, save
from gplq_mm.layers import Int4ConvTranspose2d, Int4WeightLayer, quantize_model
from gplq_mm.ptq import RoundToNearest, quantize_weights
from gplq_mm.quant import QuantPolicy


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Grey, 96 x 96."""
    return list(np.random.default_rng(seed).integers(0, 255, (count, 96, 96), dtype=np.uint8))


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    cfg = Config.fromfile(ROOT / 'configs/quickstart-det/gplq_mask-rcnn_mnist.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = randomize(MODELS.build(cfg.model.architecture)).eval()
        model.cfg = cfg

        class Whole(nn.Module):
            """Calibration and rounding see every part, as at inference."""

            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, images):
                return inference_detector(model, images)

        quantize_model(model, QuantPolicy(**cfg.model.policy))
        calibrated(Whole(), pictures(2))
        with torch.no_grad():
            quantize_weights(model, [pictures(2)], Whole(), RoundToNearest())
    path = tmp_path_factory.mktemp('packed') / 'detector.safetensors'
    save(model, cfg, path, {'classes': tuple('0123456789')})
    return model, load(path)


def test_every_layer_is_packed(detector):
    _, loaded = detector
    assert not loaded.deploy_report.simulated
    for part in (
        loaded.neck,
        loaded.rpn_head,
        loaded.roi_head.bbox_head,
        loaded.roi_head.mask_head,
    ):
        layers = [m for m in part.modules() if isinstance(m, Int4WeightLayer)]
        assert layers
        assert not any(isinstance(m, nn.Linear | nn.Conv2d) for m in part.modules())
    assert isinstance(loaded.roi_head.mask_head.upsample, Int4ConvTranspose2d)


def test_predictions_are_those_of_the_simulation(detector):
    model, loaded = detector
    images = torch.randn(2, 1, 96, 96)
    with torch.no_grad():
        for a, b in zip(loaded.extract_feat(images), model.extract_feat(images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            # mmcv's RoIAlign reads the memory of a map without its strides.
            assert a.is_contiguous()
    with DefaultScope.overwrite_default_scope('mmdet'):
        expected = inference_detector(model, pictures(3, seed=1))
        found = inference_detector(loaded, pictures(3, seed=1))
    assert sum(len(sample.pred_instances) for sample in expected) > 0
    for a, b in zip(found, expected, strict=True):
        # The classes of an untrained head are nearly ties, so labels may change places.
        assert len(a.pred_instances) == len(b.pred_instances)
        assert_close_but_for_flips(a.pred_instances.scores, b.pred_instances.scores)
        overlap = box_iou(b.pred_instances.bboxes, a.pred_instances.bboxes).amax(1)
        assert float((overlap > 0.9).float().mean()) >= 0.9
