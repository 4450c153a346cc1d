"""What Stage 2 costs on a model: seconds by step and unit, and memory."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console

from ..checkpoint import load_float_weights
from ..engine.calibration_set import CalibrationSet
from ..engine.stage_clock import StageClock, resident_megabytes
from ..layers import calibrate, freeze_activations, quantize_model
from ..progress import show_weight_ptq
from ..ptq import Progress, build_weight_ptq, quantize_weights
from ..quant import QuantPolicy
from .report import show
from .synthetic import architecture_of, float_model

CALIBRATION_IMAGES = 128
COLUMNS = {
    'step': '{step}',
    'seconds': '{seconds:.1f}',
    'CPU seconds': '{cpu}',
    'memory growth, MB': '{growth}',
}


def _random_batches(cfg: Config, count: int, batch_size: int) -> Iterator[dict]:
    _, image = architecture_of(cfg)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, batch_size):
        shape = (min(batch_size, count - start), *image)
        yield {'inputs': torch.randn(shape, generator=generator)}


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
        cfg: Config of a GPLQ run, or of a float model, which gets the default policy.
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
    model, _ = float_model(cfg)
    if weights is not None:
        load_float_weights(model, weights)
    policy = QuantPolicy.of(cfg.model.get('policy'))
    quantize_model(model, policy, None if compensation is None else {'type': compensation})
    model.requires_grad_(False)
    images = None
    if folder is not None:
        dataset = dict(type='mmpretrain.CustomDataset', data_root=folder, with_label=False)
        dataset['pipeline'] = cfg.test_dataloader.dataset.pipeline
        images = CalibrationSet(dataset, num_images, batch_size)
    clock, cpu, growth, units = StageClock(), {}, {}, {}

    def batches(count: int) -> Iterator[dict]:
        """The first images, preprocessed."""
        if images is None:
            yield from _random_batches(cfg, min(count, num_images), batch_size)
        else:
            yield from (model.data_preprocessor(batch, False) for batch in images.batches(count))

    def measured(name: str, run: Callable, *args) -> Any:
        before, cpu_before = resident_megabytes(), time.process_time()
        with clock.stage(name):
            result = run(*args)
        cpu[name] = time.process_time() - cpu_before
        growth[name] = clock.peak_memory_mb[name] - before
        return result

    def forward(data: dict) -> Any:
        return model(**data, mode='tensor')

    def run_pass(_index: int, _passes: int) -> None:
        for data in batches(CALIBRATION_IMAGES):
            forward(data)

    def read() -> Iterator[dict]:
        start = time.monotonic()
        yield from batches(num_images)
        clock.seconds['reading_images'] = time.monotonic() - start

    def note(progress: Progress) -> None:
        # What earlier reports have booked already is not this unit's.
        name, booked = progress.unit or 'finding the units', sum(units.values())
        units[name] = units.get(name, 0.0) + progress.elapsed - booked
        show_progress(progress)

    measured('calibration', calibrate, model, run_pass)
    freeze_activations(model)
    with show_weight_ptq() as show_progress:
        args = model, read(), forward, rounding, note
        scores = measured('weight_ptq', quantize_weights, *args)
    return {
        'images': num_images,
        'image_source': folder or 'random',
        'weights': weights or 'random',
        'batch_size': batch_size,
        'method': method,
        'compensation': compensation,
        'threads': torch.get_num_threads(),
        'seconds': clock.seconds,
        'cpu_seconds': cpu,
        'memory_growth_mb': growth,
        'units': units,
        'compensation_r2': scores,
    }


def show_cost(result: dict[str, Any], name: str, console: Console) -> None:
    """Prints what :func:`weight_ptq_cost` found of a model."""
    rows = []
    for step, cpu in result['cpu_seconds'].items():
        growth, seconds = f'{result["memory_growth_mb"][step]:.0f}', result['seconds'][step]
        rows.append(dict(step=step, seconds=seconds, cpu=f'{cpu:.1f}', growth=growth))
    for unit, seconds in result['units'].items():
        rows.append(dict(step=f'  {unit}', seconds=seconds, cpu='', growth=''))
    title = f'{name}, {result["images"]} images ({result["image_source"]}), '
    show(rows, f'{title}{result["threads"]} threads', COLUMNS, console)
