"""Fixtures shared by all tests."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from mmengine.registry import DefaultScope

ROOT = Path(__file__).resolve().parent.parent

# How fast examples are made depends on what else the machine does.
settings.register_profile(
    'shared machine', deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile('shared machine')


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """Folder of real development data beside the project; skips where it is absent."""
    path = ROOT.parent / 'shared' / 'data'
    if not path.is_dir():
        pytest.skip('the real development data is not beside the project')
    return path


@pytest.fixture(scope='module')
def transformers():
    """The package, from its folder beside the environment: mmpretrain 1.3.6 cannot be imported
    where transformers 5 is installed."""
    # Decides by what is installed at this moment what it imports.
    import mmpretrain.utils.dependency  # noqa: F401

    apart = str(Path(sys.prefix) / 'transformers')
    sys.path.append(apart)
    import transformers

    yield transformers
    sys.path.remove(apart)


@pytest.fixture(autouse=True)
def fixed_state(request) -> None:
    """Every test starts from the same random state, and in the scope of mmpretrain.

    A runner leaves its scope behind.
    """
    torch.manual_seed(0)
    current = DefaultScope.get_current_instance()
    if current is None or current.scope_name != 'mmpretrain':
        DefaultScope.get_instance(request.node.nodeid, scope_name='mmpretrain')


@pytest.fixture(scope='session')
def float_checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of tiny float models on digits, by architecture, trained for a moment."""
    from tiny_runs import ARCHITECTURES, train_fp32

    folder = tmp_path_factory.mktemp('float')
    paths = {arch: folder / f'{arch}.pth' for arch in ARCHITECTURES}
    for arch, path in paths.items():
        train_fp32(path, arch)
    return paths


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory, float_checkpoints) -> dict[str, Path]:
    """Work dirs of complete GPLQ runs, by architecture."""
    from tiny_runs import ARCHITECTURES, gplq_config, run

    work_dirs = {arch: tmp_path_factory.mktemp(f'gplq_{arch}') for arch in ARCHITECTURES}
    for arch, work_dir in work_dirs.items():
        run(gplq_config(work_dir, float_checkpoints[arch], arch))
    return work_dirs
