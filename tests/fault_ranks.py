"""Two ranks of which one raises, in a module that a spawned process can import."""

import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

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
    with patch.object(QwT, '_solve', _broken) if rank else nullcontext():
        _quantize(rank)


def _stream(rank: int) -> None:
    with patch.object(Stream, 'finish', _broken) if rank else nullcontext():
        _quantize(rank)


def _own_step(rank: int) -> None:
    with ranks_end_together():
        _broken() if rank else _calibrate(0)


FAULTS = {
    'nan': (_calibrate, 'DataError: calibration met a NaN'),
    'compensation': (_compensate, 'OSError: no space left'),
    'stream': (_stream, 'OSError: no space left'),
    'step': (_own_step, 'OSError: no space left'),
}


def fail_on_rank(rank: int, folder: str) -> None:
    """Process ``rank`` of two, which writes the last line of every traceback.

    It lives on until both have one: what ends a rank is not that the other's process ends.
    """
    torch.set_num_threads(1)
    for name, (fault, _) in FAULTS.items():
        rendezvous = f'file://{folder}/{name}-rendezvous'
        dist.init_process_group('gloo', init_method=rendezvous, rank=rank, world_size=2)
        files = [Path(folder, f'{name}-{r}.txt') for r in range(2)]
        try:
            fault(rank)
        except Exception:
            part = files[rank].with_suffix('.part')
            part.write_text(traceback.format_exc().splitlines()[-1])
            part.rename(files[rank])
        deadline = time.monotonic() + 60
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline, f'{name}: the other rank still waits'
            time.sleep(0.05)
        dist.destroy_process_group()
