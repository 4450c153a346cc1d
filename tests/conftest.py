"""Fixtures shared by all tests."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """Folder of real development data beside the project; skips where it is absent."""
    path = ROOT.parent / 'shared' / 'data'
    if not path.is_dir():
        pytest.skip('the real development data is not beside the project')
    return path


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
