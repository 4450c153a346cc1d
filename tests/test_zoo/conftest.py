"""A checkout of its own for every test of the zoo."""

import pytest
from zoo_checkout import make_checkout


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with a zoo, whose package counts as the one that is imported."""
    root = make_checkout(tmp_path / 'checkout')
    monkeypatch.setattr('tools.zoo.origin.IMPORTED', root.resolve())
    return root
