"""Reductions over ranks. A single process is a group of one, so callers never ask."""

import pickle

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .last_words import wait_for


def is_distributed() -> bool:
    """Whether a process group with more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _buffer(tensor: Tensor) -> Tensor:
    # NCCL sends CUDA tensors only, gloo takes the tensor where it is.
    return tensor.cuda() if dist.get_backend() == 'nccl' else tensor.contiguous()


def _all_reduce(tensor: Tensor, op) -> Tensor:
    if is_distributed():
        buffer = _buffer(tensor)
        wait_for(dist.all_reduce(buffer, op=op, async_op=True))
        tensor.copy_(buffer)
    return tensor


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums ``tensor`` over ranks in place and returns it."""
    return _all_reduce(tensor, dist.ReduceOp.SUM if is_distributed() else None)


def all_reduce_min(tensor: Tensor) -> Tensor:
    """Elementwise minimum over ranks, in place."""
    return _all_reduce(tensor, dist.ReduceOp.MIN if is_distributed() else None)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Elementwise maximum over ranks, in place."""
    return _all_reduce(tensor, dist.ReduceOp.MAX if is_distributed() else None)


def average_(tensors: list[Tensor]) -> None:
    """Mean over ranks of floating tensors of one dtype and device, in place and in one message.

    Args:
        tensors: The same shapes on all ranks, in the same order.
    """
    if is_distributed() and tensors:
        flat = all_reduce_sum(torch.cat([tensor.flatten() for tensor in tensors]))
        flat /= dist.get_world_size()
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if is_distributed():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def broadcast_(tensors: list[Tensor]) -> None:
    """Overwrites ``tensors`` with rank 0's, in place."""
    if is_distributed():
        for tensor in tensors:
            buffer = _buffer(tensor)
            wait_for(dist.broadcast(buffer, 0, async_op=True))
            if buffer is not tensor:
                tensor.copy_(buffer)


def _all_gather(tensor: Tensor) -> list[Tensor]:
    buffer = _buffer(tensor)
    parts = [torch.empty_like(buffer) for _ in range(dist.get_world_size())]
    wait_for(dist.all_gather(parts, buffer, async_op=True))
    return [part.cpu() for part in parts]


def gather_objects(value):
    """List of every rank's ``value`` (plain data), by rank."""
    if not is_distributed():
        return [value]
    # A copy: a thread of gloo that lets go of Python's own bytes needs the interpreter.
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).clone()
    sizes = [int(size) for size in _all_gather(torch.tensor([len(data)]))]
    parts = _all_gather(F.pad(data, (0, max(sizes) - len(data))))
    return [
        pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)
    ]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks in order, on the CPU, where rank r has rows r, r + ranks, and so on.

    Args:
        rows: This rank's rows ``(n, ...)``, any dtype.
    """
    parts = gather_objects(rows.cpu())
    if len(parts) == 1:
        return parts[0]
    whole = rows.new_empty((sum(map(len, parts)), *rows.shape[1:]), device='cpu')
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def is_finite_everywhere(tensor: Tensor) -> bool:
    """Whether ``tensor`` is finite on all ranks (so that all of them stop together)."""
    finite = torch.isfinite(tensor).all().to(torch.float32).reshape(1)
    return bool(all_reduce_min(finite).item())
