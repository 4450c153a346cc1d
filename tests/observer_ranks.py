"""Calibration on two ranks, in a module that a spawned process can import."""

import torch

from gplq_mm.quant import ActSpec, build_observer

RANK_SPECS = [ActSpec(observer=name) for name in ('minmax', 'percentile', 'mse')]


def observe(spec, shape, batches):
    """Scale and offset that an observer finds."""
    observer = build_observer(spec, shape)
    for _ in range(observer.num_passes):
        for batch in batches:
            observer.update(batch)
        observer.end_pass()
    return observer.compute()


def rank_data():
    """What both ranks see together."""
    return torch.randn(120, 3, generator=torch.Generator().manual_seed(5)) * torch.arange(1, 4)


def observe_on_rank(rank, folder):
    """Process ``rank`` of two; writes what it found to ``<folder>/<rank>.pth``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    mine = (rank_data()[:50], rank_data()[50:])[rank]  # of different sizes
    found = [observe(spec, (3,), mine.split(25)) for spec in RANK_SPECS]
    # All of it on one rank, and nothing on the other.
    found += [observe(spec, (3,), [rank_data()] if rank else []) for spec in RANK_SPECS]
    torch.save(found, f'{folder}/{rank}.pth')
    torch.distributed.destroy_process_group()
