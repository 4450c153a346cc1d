"""Calibration and PCA read any number of images and hold a few batches of them."""

import gc
import weakref

import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmengine.registry import MODELS
from tiny_runs import build_runner, gplq_config
from torch import nn

from gplq_mm.engine import CalibrationHook, CalibrationSet, PCABasisHook
from gplq_mm.engine.stage_clock import _peak_megabytes, _reset_peak
from gplq_mm.models import Stage
from gplq_mm.registry import DATASETS, TRANSFORMS

BATCH = 8
FEW, MANY = 64, 320
PIXELS = 224
MEGABYTES = 3 * PIXELS**2 * 4 / 2**20


class Living:
    """Counts objects that are alive."""

    def __init__(self) -> None:
        self.now = self.peak = self.made = 0

    def add(self, item) -> None:
        self.now += 1
        self.made += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(item, self._drop)

    def _drop(self) -> None:
        self.now -= 1


living = Living()


@DATASETS.register_module()
class LazyImages(BaseDataset):
    """Images that exist once they are asked for."""

    def __init__(self, first: int, count: int, **kwargs):
        self.span = range(first, first + count)
        super().__init__(serialize_data=False, **kwargs)

    def load_data_list(self) -> list[dict]:
        return [{'img_path': str(number)} for number in self.span]


@TRANSFORMS.register_module()
class MakeImage(BaseTransform):
    """Noise of the image's own brightness, as the float tensor that the model will see."""

    def transform(self, results: dict) -> dict:
        seed = int(results['img_path'])
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(3, PIXELS, PIXELS, generator=generator).add_(seed % 7)
        living.add(image)
        return {'inputs': image, 'data_samples': results['img_path']}


@pytest.fixture
def runner(tmp_path):
    """Before training, with everything built; images of 0.6 MB."""
    cfg = gplq_config(tmp_path / 'run', tmp_path / 'float.pth')
    cfg.model.architecture.backbone.update(
        img_size=PIXELS, patch_size=56, in_channels=3, drop_rate=0.0
    )
    cfg.model.mimic.multiple = 4
    cfg.data_preprocessor = dict(num_classes=10)
    model = MODELS.build({**cfg.model.architecture, 'data_preprocessor': cfg.data_preprocessor})
    model.init_weights()
    torch.save(model.state_dict(), tmp_path / 'float.pth')
    data = dict(type='gplq_mm.LazyImages', pipeline=[dict(type='gplq_mm.MakeImage')])
    cfg.train_dataloader.dataset.dataset = dict(data, first=0, count=2 * MANY)
    cfg.val_dataloader.dataset = dict(data, first=2 * MANY, count=10)
    cfg.test_dataloader = cfg.val_dataloader
    runner = build_runner(cfg)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner._val_loop = runner.build_val_loop(runner._val_loop)
    runner._init_model_weights()
    return runner


def measure(runner, kind: type, images: int) -> tuple[int, float]:
    """Most images that were alive at once, and MB by which memory has peaked.

    Every call begins with a model that knows nothing.
    """
    model = runner.model
    model.stage_code.fill_(int(Stage.FLOAT))
    model.mimic_loss.num_components.zero_()
    gc.collect()
    _reset_peak()
    before = _peak_megabytes()
    living.__init__()
    kind(num_images=images, batch_size=BATCH).before_train(runner)
    # The last one shows what is in float.
    wanted = 2 * images + 1 if kind is CalibrationHook else images
    assert living.made == wanted
    return living.peak, _peak_megabytes() - before


@pytest.mark.parametrize('kind', [CalibrationHook, PCABasisHook])
def test_images_are_streamed(runner, kind):
    measure(runner, kind, BATCH)
    few, memory_of_few = measure(runner, kind, FEW)
    many, memory_of_many = measure(runner, kind, MANY)
    # The batch at work, and the next one while it is read.
    assert many == few <= 2 * BATCH
    # Neither the images nor anything made from them, in whatever form.
    assert memory_of_many < memory_of_few + 0.2 * (MANY - FEW) * MEGABYTES


class Gram(nn.Module):
    """Multiplies activations, and no family knows."""

    def forward(self, x):
        return x + (x @ x.transpose(1, 2)) @ x


def test_products_that_no_family_knows_are_logged(runner, monkeypatch):
    lines = []
    monkeypatch.setattr(runner.logger, 'warning', lines.append)
    layer = runner.model.architecture.backbone.layers[1]
    for norm in (layer.ln1, nn.Sequential(layer.ln1, Gram())):
        assert lines == []
        layer.ln1 = norm
        runner.model.stage_code.fill_(int(Stage.FLOAT))
        CalibrationHook(num_images=BATCH, batch_size=BATCH).before_train(runner)
    (line,) = lines
    assert '1 x Gram, such as backbone.layers.1.ln1.1 (' in line


def test_basis_of_the_stream_is_that_of_all_features(runner):
    PCABasisHook(num_images=100, batch_size=BATCH).before_train(runner)
    mimic = runner.model.mimic_loss
    features = []
    for batch in CalibrationSet.from_runner(runner, 100).batches():
        data = runner.model.data_preprocessor(batch, False)
        features.append(runner.model.teacher_outputs(data['inputs'])[0])
    features = torch.cat(features).double()
    torch.testing.assert_close(mimic.mean.double(), features.mean(0), rtol=1e-4, atol=1e-5)
    count = int(mimic.num_components)
    features = features - features.mean(0)
    values = torch.linalg.svdvals(features).square()
    kept = (features @ mimic.components[:, :count].double()).square().sum(0)
    torch.testing.assert_close(kept, values[:count], rtol=1e-3, atol=1e-6)
