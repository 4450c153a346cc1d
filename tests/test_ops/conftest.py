"""Fixtures of the op tests."""

from collections.abc import Callable, Iterator

import pytest
import torch
from packed_layers import ISAS

from gplq_mm.ops import native


@pytest.fixture(params=ISAS or ['torch'])
def isa(request) -> Iterator[str]:
    """Runs a test with each instruction set of this machine."""
    if request.param == 'torch':
        yield 'torch'
        return
    with native.use_isa(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; it is as before after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
