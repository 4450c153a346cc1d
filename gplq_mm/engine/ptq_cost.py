"""What Stage 2 costs on a model: seconds by step and unit, and memory."""

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from ..checkpoint import load_float_weights
from ..layers import calibrate, freeze_activations, quantize_model
from ..ptq import Progress, build_weight_ptq, quantize_weights
from ..quant import QuantPolicy
from ..registry import MODELS
from .calibration_set import CalibrationSet
from .progress import show_weight_ptq
from .stage_clock import StageClock, resident_megabytes

__all__ = ['weight_ptq_cost']

CALIBRATION_IMAGES = 128


def _quantized(cfg: Config, weights: str | None, compensation: str | None) -> nn.Module:
    """The architecture of a config, quantized by its policy (the default one of a float config)."""
    torch.manual_seed(0)
    architecture = copy.deepcopy(cfg.model.get('architecture', cfg.model))
    # Training only, and it says so in the log.
    architecture.pop('train_cfg', None)
    model = MODELS.build(architecture).eval()
    if weights is not None:
        load_float_weights(model, weights)
    policy = QuantPolicy(**cfg.model.get('policy', {}))
    quantize_model(model, policy, None if compensation is None else {'type': compensation})
    return model.requires_grad_(False)


def _random_batches(cfg: Config, count: int, batch_size: int) -> Iterator[dict]:
    backbone = cfg.model.get('architecture', cfg.model).backbone
    size = backbone.get('img_size', 224)
    size = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, batch_size):
        shape = (min(batch_size, count - start), backbone.get('in_channels', 3), *size)
        yield {'inputs': torch.randn(shape, generator=generator)}


def _images(
    cfg: Config, model: nn.Module, folder: str | None, count: int, batch_size: int
) -> Callable[[int], Iterator[dict]]:
    """``batches(n)`` gives the first n images, preprocessed."""
    if folder is None:
        return lambda n: _random_batches(cfg, min(n, count), batch_size)
    dataset = {
        'type': 'mmpretrain.CustomDataset',
        'data_root': folder,
        'with_label': False,
        'pipeline': cfg.test_dataloader.dataset.pipeline,
    }
    images = CalibrationSet(dataset, count, batch_size)

    def batches(n: int) -> Iterator[dict]:
        for batch in images.batches(n):
            yield model.data_preprocessor(batch, False)

    return batches


class _Units:
    """Seconds by unit, from the reports of Stage 2; hands them on."""

    def __init__(self, show: Callable[[Progress], None]):
        self.show = show
        self.seconds: dict[str, float] = {}
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        name = progress.unit or 'finding the units'
        self.seconds[name] = self.seconds.get(name, 0.0) + progress.elapsed - self._last
        self._last = progress.elapsed
        self.show(progress)


@torch.no_grad()
def weight_ptq_cost(
    cfg: Config,
    num_images: int,
    batch_size: int = 16,
    folder: str | None = None,
    weights: str | None = None,
    method: str = 'GPTQ',
    compensation: str | None = 'QwT',
) -> dict[str, Any]:
    """Calibrates a model and runs Stage 2 on it.

    Weights and images may be random: statistics and accuracy then mean nothing, the cost is the
    same.

    Args:
        cfg: Config of a GPLQ run or of a float model.
        num_images: Images of Stage 2; calibration takes the first 128 of them.
        batch_size: Images at a time.
        folder: Folder of images, searched with its subfolders; they pass through the config's
            test pipeline. None for random numbers.
        weights: Checkpoint of the float model, or None for random weights.
        method: PTQ method.
        compensation: ``'QwT'``, ``'QwTv2'`` or None.

    Returns:
        ``images``, ``image_source``, ``weights``, ``batch_size``, ``method``, ``compensation``,
        ``threads``; ``seconds``, ``cpu_seconds`` (of all threads) and ``memory_growth_mb`` (peak
        of resident memory above its value before) of ``calibration`` and ``weight_ptq``, whose
        seconds include ``reading_images``; ``units``: seconds of each; ``compensation_r2``.
    """
    rounding = build_weight_ptq({'type': method})
    model = _quantized(cfg, weights, compensation)
    batches = _images(cfg, model, folder, num_images, batch_size)
    clock, cpu, growth = StageClock(), {}, {}

    def measured(name: str, run: Callable[[], Any]) -> Any:
        before, cpu_before = resident_megabytes(), time.process_time()
        with clock.stage(name):
            result = run()
        cpu[name] = time.process_time() - cpu_before
        growth[name] = clock.peak_memory_mb[name] - before
        return result

    def forward(data: dict) -> Any:
        return model(**data, mode='tensor')

    def run_pass(_index: int, _passes: int) -> None:
        for data in batches(CALIBRATION_IMAGES):
            forward(data)

    def run_ptq() -> dict[str, float]:
        return quantize_weights(model, read(), forward, rounding, units)

    def read() -> Iterator[dict]:
        start = time.monotonic()
        yield from batches(num_images)
        clock.seconds['reading_images'] = time.monotonic() - start

    measured('calibration', lambda: calibrate(model, run_pass))
    freeze_activations(model)
    with show_weight_ptq() as show:
        units = _Units(show)
        scores = measured('weight_ptq', run_ptq)
    return {
        'images': num_images,
        'image_source': 'random' if folder is None else str(Path(folder)),
        'weights': 'random' if weights is None else str(weights),
        'batch_size': batch_size,
        'method': method,
        'compensation': compensation,
        'threads': torch.get_num_threads(),
        'seconds': clock.seconds,
        'cpu_seconds': cpu,
        'memory_growth_mb': growth,
        'units': units.seconds,
        'compensation_r2': scores,
    }
