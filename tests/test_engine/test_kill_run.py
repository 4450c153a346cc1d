"""Thirty times kill -9 at random, over both stages of a run of quickstart size."""

import os
import subprocess
import sys

import pytest
from tiny_runs import ROOT


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills(tmp_path):
    script = ROOT / 'tests' / 'kill_run.py'
    command = [sys.executable, script, '--kills', '30', '--work-dir', tmp_path / 'kill']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'TERM': 'dumb'}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    *lives, end = [line for line in result.stdout.splitlines() if 'kill' in line]
    assert len(lives) == 30
    assert '30 kills (20 in Stage 1, 10 in Stage 2' in end
    assert 'no file torn' in end
    assert 'are equal' in end
