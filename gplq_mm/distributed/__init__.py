"""What processes of one run share: reductions, layers over the batch of all ranks, lost ranks."""

from .last_words import LostRankError
from .lost_rank import end_program, one_of_the_ranks, ranks_end_together
from .rank_invariant import make_rank_invariant
from .reduce import (
    all_reduce_max,
    all_reduce_min,
    all_reduce_sum,
    average_,
    broadcast_,
    gather_objects,
    gather_rows,
    is_distributed,
    is_finite_everywhere,
    rank_and_world_size,
)

__all__ = [
    'LostRankError',
    'all_reduce_max',
    'all_reduce_min',
    'all_reduce_sum',
    'average_',
    'broadcast_',
    'end_program',
    'gather_objects',
    'gather_rows',
    'is_distributed',
    'is_finite_everywhere',
    'make_rank_invariant',
    'one_of_the_ranks',
    'rank_and_world_size',
    'ranks_end_together',
]
