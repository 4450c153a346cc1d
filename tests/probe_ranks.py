"""One rank of a linear probe that two ranks make together."""

import torch

from gplq_mm.distributed.reduce import gather_rows
from gplq_mm.evaluation import linear_probe


def probe_data(noise: float = 0.1) -> tuple[tuple, tuple]:
    """91 and 45 points ``(n, 4)`` around three corners, with their labels."""
    generator = torch.Generator().manual_seed(3)
    parts = []
    for count in (91, 45):
        labels = torch.arange(count) % 3
        features = torch.eye(4)[labels] + noise * torch.randn(count, 4, generator=generator)
        parts.append((features, labels))
    return tuple(parts)


def probe_on_rank(rank: int, folder: str) -> None:
    """Process ``rank`` of two, each with every other point; writes what it found."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    train, val = ([part[rank::2] for part in parts] for parts in probe_data(noise=0.6))
    found = gather_rows(train[0]), linear_probe(tuple(train), tuple(val))
    torch.save(found, f'{folder}/{rank}.pth')
    torch.distributed.destroy_process_group()
