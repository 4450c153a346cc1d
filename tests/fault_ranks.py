"""Two ranks of which one raises, in a module that a spawned process can import."""

import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from builders import build_quantized, images

from gplq_mm.distributed import ranks_end_together
from gplq_mm.layers import QwT, calibrate
from gplq_mm.ptq import RoundToNearest, quantize_weights
from gplq_mm.ptq.stream import Stream


def _broken(*_args, **_kwargs):
    raise OSError('no space left')


def _calibrate(rank: int) -> None:
    model = build_quantized('vit', freeze=False)
    batch = images()
    if rank:
        batch[0, 0, 3, 4] = float('nan')
    with torch.no_grad():
        calibrate(model, lambda *_: model(batch))


def _quantize(_rank: int) -> None:
    model = build_quantized('vit', compensation=dict(type='QwT'))
    quantize_weights(model, [images(seed=1), images(seed=2)], model, RoundToNearest())


def _compensate(rank: int) -> None:
    if rank:
        QwT._solve = _broken
    _quantize(rank)


def _stream(rank: int) -> None:
    if rank:
        Stream.finish = _broken
    _quantize(rank)


def _own_step(rank: int) -> None:
    with ranks_end_together():
        _broken() if rank else _calibrate(0)


FAULTS = {
    'nan': (_calibrate, 'DataError: calibration met a NaN'),
    'compensation': (_compensate, 'OSError: no space left'),
    'stream': (_stream, 'OSError: no space left'),
    'own step': (_own_step, 'OSError: no space left'),
}


def fail_on_rank(rank: int, folder: str, fault: str) -> None:
    """Process ``rank`` of two; writes its traceback, and lives on until both have one."""
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    try:
        FAULTS[fault][0](rank)
    except Exception:
        Path(folder, f'{rank}.part').write_text(traceback.format_exc())
        Path(folder, f'{rank}.part').rename(Path(folder, f'{rank}.txt'))
    deadline = time.monotonic() + 60
    while not all(Path(folder, f'{r}.txt').exists() for r in range(2)):
        assert time.monotonic() < deadline, 'the other rank still waits'
        time.sleep(0.05)
    dist.destroy_process_group()
