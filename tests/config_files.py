"""Configs as they are in the files, whatever is set on this machine."""

import os
from pathlib import Path

import pytest
from mmengine.config import Config

__all__ = ['CONFIGS', 'load']

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'


def load(path: Path) -> Config:
    """A config without the environment variables that users set for ours, ``GPLQ_*``."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith('GPLQ_')]:
            patch.delenv(name)
        return Config.fromfile(path)
