"""The Triton kernels' cases (triton_*cases.py), and how CUDA tensors reach the kernels."""

import ast
import logging
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gplq_mm.ops import (
    cuda,
    device,
    reference,
    training,
    training_attention,
    training_mlp,
    training_reference,
)
from gplq_mm.ops.library import SCHEMAS

FOLDER = Path(__file__).parent
CASES = [FOLDER / 'triton_cases.py', FOLDER / 'triton_training_cases.py']
ROOT = FOLDER.parents[1]
needs_triton = pytest.mark.skipif(find_spec('triton') is None, reason='triton is not installed')


def case_names() -> list[str]:
    return [
        node.name
        for path in CASES
        for node in ast.parse(path.read_text(encoding='utf-8')).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith('test_')
    ]


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory) -> dict[str, list[str]]:
    """Name of a case to the texts of its failures, after all ran in one interpreter process."""
    report = tmp_path_factory.mktemp('triton') / 'report.xml'
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *map(str, CASES)]
    run = subprocess.run(
        [*command, f'--junitxml={report}'],
        cwd=ROOT,
        env={**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert report.exists(), run.stdout + run.stderr
    found: dict[str, list[str]] = {}
    for case in ET.parse(report).iter('testcase'):
        failures = found.setdefault(case.get('name').partition('[')[0], [])
        failures += [
            f'{case.get("name")}: {child.tag}\n{child.text}'
            for child in case
            if child.tag in ('failure', 'error', 'skipped')
        ]
    return found


@needs_triton
def test_the_training_kernels_are_found(fresh_backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    backend = cuda.training_backend()
    assert backend.__name__.endswith('triton_training')
    assert set(backend.__all__) == set(training_reference.__all__)


@needs_triton
@pytest.mark.parametrize('name', case_names())
def test_in_the_interpreter(name, outcomes):
    assert name in outcomes, 'the case did not run'
    assert not outcomes[name], '\n'.join(outcomes[name])


def test_every_op_is_registered_for_cuda():
    # Attention and MLPs of training are made of other ops.
    composed = {*training_attention.__all__, *training_mlp.__all__}
    for name in {*SCHEMAS, *training.SCHEMAS} - composed:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f'gplq_mm::{name}', 'CUDA')


def test_importing_the_ops_imports_no_triton():
    code = (
        'import sys, torch; before = "triton" in sys.modules\n'
        'import gplq_mm.ops\n'
        'assert before or "triton" not in sys.modules\n'
        'assert not any(name.startswith("gplq_mm.ops.triton") for name in sys.modules)\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, timeout=120)


@pytest.fixture
def fresh_backend():
    caches = (cuda.cuda_backend, cuda.training_backend, device._warn_no_cuda)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


BACKENDS = [
    (cuda.cuda_backend, reference, 'int4 ops'),
    (cuda.training_backend, training_reference, 'training ops'),
]


@pytest.mark.parametrize(('backend', 'fallback', 'what'), BACKENDS)
def test_without_triton_the_reference_runs_and_says_so_once(
    backend, fallback, what, fresh_backend, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, 'triton', None)
    for name in [name for name in sys.modules if name.startswith('gplq_mm.ops.triton_')]:
        monkeypatch.delitem(sys.modules, name)
    for name in ('triton_ops', 'triton_training'):
        monkeypatch.delattr(f'gplq_mm.ops.{name}', raising=False)
    with caplog.at_level(logging.WARNING):
        assert backend() is fallback
        assert backend() is fallback
    (record,) = caplog.records
    assert record.message.startswith(what)
    assert 'triton cannot be imported' in record.message


@pytest.mark.parametrize(('backend', 'fallback', 'what'), BACKENDS)
def test_an_old_device_gets_the_reference(
    backend, fallback, what, fresh_backend, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (7, 5))
    with caplog.at_level(logging.WARNING):
        assert backend() is fallback
    assert what in caplog.text
    assert 'compute capability 7.5' in caplog.text


def test_cuda_without_a_gpu_means_cpu_and_says_so_once(fresh_backend, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with caplog.at_level(logging.WARNING):
        assert device.resolve_device('cuda') == torch.device('cpu')
        assert device.resolve_device('cuda:1') == torch.device('cpu')
        assert device.resolve_device('cpu') == torch.device('cpu')
    assert len(caplog.records) == 1


def test_devices_that_do_not_exist_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert device.resolve_device('cuda') == torch.device('cuda')
    with pytest.raises(ValueError, match='1 CUDA devices'):
        device.resolve_device('cuda:1')
    with pytest.raises(ValueError, match="'cpu' or 'cuda'"):
        device.resolve_device('meta')
    with pytest.raises(ValueError, match='not a device'):
        device.resolve_device('gpu')


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_the_benchmark_needs_a_gpu_and_says_so_in_a_line():
    run = subprocess.run(
        [sys.executable, 'benchmarks/gpu.py'], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1
    assert 'needs an NVIDIA GPU' in run.stderr
    assert run.stderr.count('\n') == 1
