"""What is shipped and installed: the wheel, the requirements, the Makefile, the installer."""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gplq_mm

ROOT = Path(__file__).resolve().parents[1]
PACKAGING_FILES = (
    'Makefile',
    'setup.py',
    'pyproject.toml',
    'requirements.txt',
    'constraints.txt',
    'MANIFEST.in',
    '.gitignore',
    '.ci/run',
    '.pre-commit-config.yaml',
    'tools/dev/install.py',
    'tools/dev/steps.py',
    'tools/dev/mmcv_sources.py',
    'tools/dev/mmcv_ext.py',
    'tools/dist_train.sh',
    'tools/dist_test.sh',
    'tools/slurm_train.sh',
)
DEV_MODULES = ('install', 'steps', 'mmcv_sources')


def read_requirements(name):
    """Returns the requirements of a file in the project root."""
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith('#')]


def pins_for(python_version):
    """Returns package name to pinned version on a Python version such as ``3.10``."""
    environment = {**default_environment(), 'python_version': python_version}
    pins = {}
    for pin in read_requirements('constraints.txt'):
        if pin.marker is None or pin.marker.evaluate(environment):
            (specifier,) = pin.specifier
            assert specifier.operator == '=='
            assert canonicalize_name(pin.name) == pin.name
            assert pin.name not in pins, f'{pin.name} is pinned twice'
            pins[pin.name] = specifier.version
    return pins


@pytest.fixture
def load_tool(monkeypatch):
    """A function that imports a module of ``tools/dev``, which is no package."""
    monkeypatch.syspath_prepend(ROOT / 'tools' / 'dev')
    for name in DEV_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in DEV_MODULES:
        sys.modules.pop(name, None)


def copy_tree(source):
    """Copies what a build reads into an empty folder."""
    junk = shutil.ignore_patterns('__pycache__', '.mim', '*.so')
    for name in ('gplq_mm', 'configs', 'tools'):
        shutil.copytree(ROOT / name, source / name, ignore=junk)
    for name in ('setup.py', 'pyproject.toml', 'requirements.txt', 'LICENSE', 'MANIFEST.in'):
        shutil.copy2(ROOT / name, source / name)


def build_wheel(folder, **env):
    """Builds a wheel from a copy of the tree; returns its path."""
    source = folder / 'source'
    copy_tree(source)
    options = ['--no-deps', '--no-build-isolation', '--no-index', '--wheel-dir', str(folder)]
    command = [sys.executable, '-m', 'pip', 'wheel', *options, str(source)]
    env = {**os.environ, **env}
    built = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob('gplq_mm-*.whl')
    assert not (source / 'gplq_mm' / '.mim').exists(), 'the build wrote into the source tree'
    return path


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel without kernels, whose compilation takes minutes; opened."""
    path = build_wheel(tmp_path_factory.mktemp('wheel'), GPLQ_MM_NO_EXT='1')
    with zipfile.ZipFile(path) as opened:
        yield opened


@pytest.mark.slow
def test_one_wheel_with_kernels_serves_every_python(tmp_path):
    path = build_wheel(tmp_path, GPLQ_MM_NO_EXT='')
    assert '-cp310-abi3-linux_' in path.name
    with zipfile.ZipFile(path) as opened:
        opened.extract('gplq_mm/_C.abi3.so', tmp_path)
    env = {**os.environ, 'GPLQ_MM_LIBRARY': str(tmp_path / 'gplq_mm' / '_C.abi3.so')}
    code = 'from gplq_mm.ops import native; print(native.backend(), native.available_isas())'
    shown = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, env=env
    )
    assert 'portable' in shown.stdout


def setup_py(source, *arguments, **env):
    """Runs setup.py in a copy of the tree; returns the exit status and what it printed."""
    env = {**os.environ, 'GPLQ_MM_NO_EXT': '', **env}
    command = [sys.executable, 'setup.py', '-q', *arguments]
    ran = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, env=env)
    return ran.returncode, ran.stdout + ran.stderr


def test_a_build_without_compiler_or_torch_says_what_to_do(tmp_path):
    source = tmp_path / 'source'
    copy_tree(source)
    status, output = setup_py(source, 'build_ext', CXX='no-such-compiler')
    assert status != 0
    assert "'no-such-compiler' was not found" in output
    assert 'GPLQ_MM_NO_EXT=1' in output
    assert 'Traceback' not in output

    (tmp_path / 'torch.py').write_text('raise ImportError("no torch")')
    status, output = setup_py(source, 'build_ext', PYTHONPATH=str(tmp_path))
    assert status != 0
    assert 'install torch, then run' in output
    assert 'Traceback' not in output
    status, output = setup_py(source, 'egg_info', PYTHONPATH=str(tmp_path))
    assert status == 0, output


def test_wheel_holds_every_module(wheel):
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'gplq_mm').rglob('*.py')}
    shipped = set(wheel.namelist())
    assert {m for m in modules if '/.mim/' not in m} <= shipped


@pytest.mark.parametrize('folder', ['configs', 'tools'])
def test_wheel_holds_configs_and_tools_as_openmmlab_packages_do(wheel, folder):
    wanted = {
        f'gplq_mm/.mim/{path.relative_to(ROOT).as_posix()}'
        for path in (ROOT / folder).rglob('*')
        if path.is_file() and not {'__pycache__', 'dev', 'zoo', 'zoo.py'} & set(path.parts)
    }
    prefix = f'gplq_mm/.mim/{folder}/'
    assert {name for name in wheel.namelist() if name.startswith(prefix)} == wanted


def test_wheel_has_the_version_of_the_package(wheel):
    (metadata,) = [name for name in wheel.namelist() if name.endswith('.dist-info/METADATA')]
    assert f'\nVersion: {gplq_mm.__version__}\n' in wheel.read(metadata).decode()


def test_installed_version_is_the_one_of_the_sources():
    assert importlib.metadata.version('gplq_mm') == gplq_mm.__version__


def test_editable_links_stay_out_of_git():
    if not (ROOT / '.git').exists():
        pytest.skip('not a git checkout')
    ignored = ['gplq_mm/.mim/configs', 'gplq_mm.egg-info/PKG-INFO', '.venv/bin/python', 'build/x']
    command = ['git', 'check-ignore', *ignored]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.stdout.split() == ignored


@pytest.mark.parametrize('python_version', ['3.10', '3.11', '3.12'])
def test_every_range_admits_its_tested_version(python_version):
    pins = pins_for(python_version)
    for requirement in read_requirements('requirements.txt'):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_every_installed_package_is_pinned():
    pins = pins_for('{}.{}'.format(*sys.version_info))
    todo, seen = [Requirement('gplq_mm[dev]')], set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        if name != 'gplq-mm':
            assert name in pins, f'{name} is missing in constraints.txt'
        for line in distribution.requires or ():
            needed = Requirement(line)
            extras = requirement.extras or {''}
            if not needed.marker or any(needed.marker.evaluate({'extra': e}) for e in extras):
                todo.append(needed)
    assert len(seen) > 50


def test_a_classifier_needs_nothing_that_detectors_install():
    code = """
import sys
for name in ('mmdet', 'pycocotools', 'shapely', 'terminaltables', 'imagecorruptions'):
    sys.modules[name] = None
from mmengine.config import Config
from mmengine.registry import DATASETS, RUNNERS, init_default_scope
from gplq_mm.registry import HOOKS, LOOPS, MODELS
init_default_scope('mmpretrain')
cfg = Config.fromfile('configs/quickstart/gplq_vit_mnist.py')
MODELS.build(cfg.model)
assert len(DATASETS.build(cfg.train_dataloader.dataset)) == 4000
for registry, kind in ((RUNNERS, cfg.runner_type), (LOOPS, cfg.train_cfg.type)):
    assert registry.get(kind) is not None, kind
for hook in cfg.custom_hooks:
    HOOKS.build(hook)
"""
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_help_lists_every_target():
    rules = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    shown = subprocess.run(['make', 'help'], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r'^  make ([a-z-]+) +\S', shown.stdout, re.MULTILINE)
    assert listed == rules
    assert {'quickstart', 'test', 'test-slow', 'lint', 'clean'} <= set(listed)


@pytest.mark.parametrize('name', PACKAGING_FILES)
def test_no_file_names_an_index_or_a_machine_path(name):
    text = (ROOT / name).read_text()
    assert not re.search(r'index-url|find-links|pypi\.|pythonhosted|/home/|/root/|/work/', text)


@pytest.mark.parametrize(
    ('output', 'remedy'),
    [
        ('x.cpp:1:10: fatal error: Python.h: No such file or directory', 'python3-dev'),
        ('not created successfully because ensurepip is not\navailable.', 'python3-venv'),
        ('/usr/bin/python3: No module named venv', 'python3-venv'),
        ('/bin/sh: 1: c++: not found', 'build-essential'),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'g++'", 'build-essential'),
        ('c++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('[Errno -3] Temporary failure in name resolution', 'network'),
        (
            'NewConnectionError: Connection refused\nERROR: No matching distribution found for x',
            'network',
        ),
        ('ERROR: No matching distribution found for torch>=2.11', 'found no release'),
        ('OSError: [Errno 28] No space left on device', 'disk is full'),
        ('something else', 'lines above'),
    ],
)
def test_a_failing_step_says_what_to_do(load_tool, output, remedy):
    assert remedy in load_tool('steps').hint(output)


def test_a_step_prints_one_line_or_the_reason(load_tool, tmp_path, monkeypatch, capsys):
    steps = load_tool('steps')
    monkeypatch.setattr(steps, 'ROOT', tmp_path)
    step = steps.Step('[1/2]', 'first', tmp_path / 'log' / 'first.log')
    step.run(sys.executable, '-c', 'print("noise")')
    step.end('ok ({seconds} s)')
    assert re.fullmatch(r'\[1/2\] first \.\.\. ok \(\d+ s\)\n', capsys.readouterr().out)

    step = steps.Step('[2/2]', 'second', tmp_path / 'log' / 'second.log')
    with pytest.raises(steps.StepError, match='network') as error:
        step.run(sys.executable, '-c', 'raise SystemExit("ReadTimeout: no answer")')
    step.fail(str(error.value))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '[2/2] second ... failed'
    assert lines[1].strip() == 'ReadTimeout: no answer'
    assert lines[-1].startswith('The package index cannot be reached')


@pytest.mark.parametrize('name', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_launchers_explain_themselves_without_arguments(name):
    script = ROOT / 'tools' / name
    answer = subprocess.run([script], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert f'Usage: tools/{name}' in answer.stderr


def test_launchers_pass_their_arguments_on(tmp_path):
    for program in ('torchrun', 'srun'):
        fake = tmp_path / program
        fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        fake.chmod(0o755)
    env = {'PATH': f'{tmp_path}:/usr/bin:/bin'}
    calls = {
        'dist_train.sh': ['a b.py', '2', '--amp'],
        'dist_test.sh': ['a b.py', 'c.pth', '2', '--out', 'x'],
        'slurm_train.sh': ['part', 'job', 'a b.py', 'dir', '--amp'],
    }
    for name, arguments in calls.items():
        command = [ROOT / 'tools' / name, *arguments]
        shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        words = shown.stdout.splitlines()
        script = str(ROOT / 'tools' / ('test.py' if 'test' in name else 'train.py'))
        assert words[words.index(script) + 1] == 'a b.py'
        assert words[words.index('--launcher') + 1] == ('slurm' if 'slurm' in name else 'pytorch')
        assert words[-1] == arguments[-1]
