"""The installer: which operators of mmcv it compiles, when, and what it says about that."""

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DEV = ROOT / 'tools' / 'dev'
DEV_MODULES = ('install', 'steps', 'mmcv_sources')
CPU = {'torch': '2.12.1', 'python': 'cp311', 'cuda': '13', 'nvcc': False, 'gpu': ''}
BINDINGS = """#include <torch/extension.h>
Tensor nms(Tensor boxes);
void roi_align_forward(Tensor input);
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("get_compiler_version", &get_compiler_version, "get_compiler_version");
  m.def("nms", &nms, "nms (CPU/CUDA) ", py::arg("boxes"),
        py::arg("offset"));
  m.def("nms_rotated", &nms_rotated, "NMS", py::arg("dets"));
  m.def("get_indice_pairs_2d_forward", &get_indice_pairs_forward<2>,
        "get_indice_pairs_2d_forward", py::arg("indices"));
  m.def("roi_align_forward", &roi_align_forward, "roi_align forward",
        py::arg("input"));
}
"""


@pytest.fixture
def install(monkeypatch):
    """The installer, which is no package."""
    monkeypatch.syspath_prepend(DEV)
    for name in DEV_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module('install')
    for name in DEV_MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def sources(tmp_path):
    """A function that writes what matters of mmcv's sources into an empty folder."""

    def write(folder):
        csrc = folder / 'mmcv' / 'ops' / 'csrc' / 'pytorch'
        (csrc / 'cpu').mkdir(parents=True)
        (folder / 'setup.py').write_text("import torch\next_name = 'mmcv._ext'\n")
        (csrc / 'pybind.cpp').write_text(BINDINGS)
        (csrc / 'info.cpp').write_text('std::string get_compiler_version() {\n}\n')
        (csrc / 'nms.cpp').write_text('Tensor nms(Tensor boxes) {\n}\n')
        (csrc / 'nms_rotated.cpp').write_text('Tensor nms_rotated(Tensor dets) {\n}\n')
        (csrc / 'roi_align.cpp').write_text('void roi_align_forward(Tensor input) {\n}\n')
        (csrc / 'cpu' / 'nms.cpp').write_text('Tensor nms_cpu(Tensor boxes) {\n}\n')
        return folder

    return write


class FakeStep:
    """Stands for a step whose pip answers at once; keeps what it was asked to do."""

    title = 'mmcv'

    def __init__(self, sources):
        self.sources = sources
        self.calls, self.said = [], []
        self.installed = None

    def say(self, text):
        """Keeps the line."""
        self.said.append(text)

    def pip_install(self, *arguments):
        """Installs the wheel."""
        self.calls.append('install')
        self.installed = Path(arguments[-1]).read_text()

    def pip(self, command, *arguments, **options):
        """Downloads the sources, or writes the wheel, whose content is its kind."""
        self.calls.append(command)
        self.env = options['env']
        if command == 'download':
            folder = Path(arguments[arguments.index('-d') + 1])
            tree = self.sources(folder / 'made' / 'onedl_mmcv-2')
            with tarfile.open(folder / 'onedl_mmcv-2.tar.gz', 'w:gz') as archive:
                archive.add(tree, 'onedl_mmcv-2')
            shutil.rmtree(folder / 'made')
        else:
            folder, source = Path(arguments[-2]), Path(arguments[-1])
            compiled = 'torch' in (source / 'setup.py').read_text()
            few = (source / 'mmcv' / '_ext.py').exists()
            kind = ('few' if few else 'all') if compiled else 'none'
            (folder / 'onedl_mmcv-2.whl').write_text(kind)


@pytest.fixture
def machine(install, sources, tmp_path, monkeypatch):
    """A machine without mmcv: its environment, its cache and its step."""
    step = FakeStep(sources)
    facts = dict(CPU)

    def ask(code):
        if code == install.MMCV_TARGET:
            return json.dumps(facts)
        return None if step.installed in (None, 'damaged') else ''

    monkeypatch.setattr(install, 'ask', ask)
    monkeypatch.setattr(install, 'CACHE', tmp_path / 'cache')
    monkeypatch.setattr(install, 'STATE', tmp_path / 'first.json')
    for name in ('GPLQ_MM_MMCV_OPS', 'FORCE_CUDA', 'TORCH_CUDA_ARCH_LIST'):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(step=step, facts=facts, cache=tmp_path / 'cache')


def test_a_classifier_compiles_nothing_and_a_detector_then_what_it_calls(install, machine):
    step = machine.step
    assert install.install_mmcv(step, 'classifiers') == install.DONE
    assert step.installed == 'none'
    assert step.said == []
    assert install.install_mmcv(step, 'detectors') == install.DONE
    assert step.installed == 'few'
    (line,) = step.said
    assert re.search('compiling its operators nms, roi_align, which detectors call; .* takes', line)
    calls = len(step.calls)
    for level in install.LEVELS:
        assert install.install_mmcv(step, level) == install.UNCHANGED
    assert len(step.calls) == calls


def test_a_level_is_installed_once_and_never_taken_back(install, machine, monkeypatch):
    step, extras = machine.step, []
    monkeypatch.setattr(step, 'pip_install', lambda *arguments, **_: extras.append(arguments[-1]))
    monkeypatch.setattr(install, 'ask', lambda code: '')
    install.remember('libraries', '')
    for level in ('classifiers', 'detectors', 'classifiers', 'development', 'detectors'):
        install.install_libraries(step, level)
    assert extras == ['.', '.[detection]', '.[dev]']


def test_the_wheel_is_kept_and_made_again_if_it_is_broken(install, machine, tmp_path, monkeypatch):
    step = machine.step
    install.install_mmcv(step, 'detectors')
    assert step.calls == ['download', 'wheel', 'install']
    assert step.env['CUDA_VISIBLE_DEVICES'] == ''
    (kept,) = machine.cache.rglob('*.whl')

    monkeypatch.setattr(install, 'STATE', tmp_path / 'second.json')
    assert 'built earlier' in install.install_mmcv(step, 'detectors')
    assert step.calls == ['download', 'wheel', 'install', 'install']

    kept.write_text('damaged')
    monkeypatch.setattr(install, 'STATE', tmp_path / 'third.json')
    assert install.install_mmcv(step, 'detectors') == install.DONE
    assert kept.read_text() == 'few'
    assert list(kept.parent.iterdir()) == [kept], 'the scratch folder stayed'


def test_all_operators_are_compiled_on_demand_and_stay(install, machine, monkeypatch):
    install.install_mmcv(machine.step, 'development')
    monkeypatch.setenv('GPLQ_MM_MMCV_OPS', 'all')
    assert install.install_mmcv(machine.step, 'development') == install.DONE
    assert machine.step.installed == 'all'
    assert 'all its operators, as GPLQ_MM_MMCV_OPS=all asks' in machine.step.said[-1]
    monkeypatch.delenv('GPLQ_MM_MMCV_OPS')
    assert install.install_mmcv(machine.step, 'development') == install.UNCHANGED


def test_another_torch_needs_another_wheel(install, machine):
    install.install_mmcv(machine.step, 'detectors')
    machine.facts['torch'] = '2.13.0'
    assert install.install_mmcv(machine.step, 'detectors') == install.DONE
    names = sorted(path.name for path in machine.cache.iterdir())
    assert ['torch-2.12.1' in names[0], 'torch-2.13.0' in names[1]] == [True, True]


def test_another_torch_leaves_the_operators_that_the_level_needs(install, machine):
    """A call for classifiers in an environment for detectors."""
    install.remember('level', 'detectors')
    assert install.install_mmcv(machine.step, 'classifiers') == install.DONE
    assert machine.step.installed == 'few'


def test_architectures_are_part_of_the_cache_key(install, machine, monkeypatch):
    machine.facts['nvcc'] = True
    monkeypatch.setenv('FORCE_CUDA', '1')
    for arch in ('8.0', '8.0;9.0+PTX'):
        monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', arch)
        assert install.install_mmcv(machine.step, 'detectors') == install.DONE
        assert 'CUDA_VISIBLE_DEVICES' not in machine.step.env
    assert machine.step.installed == 'all'
    names = sorted(path.name.rpartition('_')[2] for path in machine.cache.iterdir())
    assert names == ['cuda-8.0', 'cuda-8.0-9.0+PTX']


@pytest.mark.parametrize(
    ('facts', 'env', 'ops'),
    [
        ({}, {}, 'few'),
        ({'gpu': '9.0', 'nvcc': True}, {}, 'cuda-9.0'),
        ({'gpu': '9.0', 'nvcc': True}, {'TORCH_CUDA_ARCH_LIST': '8.0 9.0'}, 'cuda-8.0-9.0'),
        ({'gpu': '9.0', 'nvcc': True}, {'GPLQ_MM_MMCV_OPS': 'all'}, 'cuda-9.0'),
        ({'gpu': '9.0'}, {}, 'few'),
        ({'nvcc': True}, {}, 'few'),
        ({'nvcc': True}, {'FORCE_CUDA': '1'}, 'cuda-every'),
        ({}, {'FORCE_CUDA': '0', 'GPLQ_MM_MMCV_OPS': 'all'}, 'cpu'),
    ],
)
def test_operators_follow_the_machine_and_the_variables(install, facts, env, ops):
    assert install.mmcv_ops({**CPU, **facts}, 'detectors', env)[0] == ops


def test_operators_for_the_cpu_on_a_machine_with_cuda_are_said(install):
    reason = install.mmcv_ops({**CPU, 'nvcc': True}, 'detectors', {})[1]
    assert 'FORCE_CUDA=1' in reason
    reason = install.mmcv_ops({**CPU, 'gpu': '9.0'}, 'detectors', {})[1]
    assert 'no nvcc of CUDA 13' in reason


@pytest.mark.parametrize(
    ('env', 'message'),
    [
        ({'FORCE_CUDA': '1'}, 'needs nvcc of CUDA 13'),
        ({'GPLQ_MM_MMCV_OPS': 'nms'}, 'GPLQ_MM_MMCV_OPS=nms is unknown'),
    ],
)
@pytest.mark.parametrize('level', ['classifiers', 'detectors'])
def test_variables_that_cannot_be_followed_are_refused(install, level, env, message):
    with pytest.raises(sys.modules['steps'].StepError, match=message):
        install.mmcv_ops(CPU, level, env)


def test_only_the_chosen_operators_are_left_in_the_sources(install, sources, tmp_path):
    mmcv_sources = sys.modules['mmcv_sources']
    folder = sources(tmp_path / 'few')
    mmcv_sources.keep_ops(folder, ('info', 'nms'))
    csrc = folder / 'mmcv' / 'ops' / 'csrc' / 'pytorch'
    assert [path.name for path in csrc.rglob('*.cpp')] == ['pybind.cpp']
    code = (csrc / 'pybind.cpp').read_text()
    assert 'Tensor nms_cpu(' in code
    assert re.findall(r'm\.def\("(\w+)"', code) == ['get_compiler_version', 'nms']
    assert mmcv_sources.COMPILED in (folder / 'setup.py').read_text()


def test_an_operator_that_mmcv_lacks_is_refused(install, sources, tmp_path):
    with pytest.raises(ValueError, match=r'mmcv has no msda\.cpp'):
        sys.modules['mmcv_sources'].keep_ops(sources(tmp_path / 'few'), ('nms', 'msda'))


def test_an_operator_that_was_not_compiled_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv._compiled_ops', None)
    spec = importlib.util.spec_from_file_location('some_ext', DEV / 'mmcv_ext.py')
    ext = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ext)
    with pytest.raises(NotImplementedError, match=r'operator softnms .*GPLQ_MM_MMCV_OPS=all'):
        ext.softnms(torch.ones(1, 4), offset=0)
    assert not hasattr(ext, '__path__')


@pytest.mark.parametrize(
    ('target', 'level'),
    [
        ('quickstart', 'classifiers'),
        ('quickstart-det', 'detectors'),
        ('test', 'development'),
        ('test-slow', 'development'),
        ('lint', 'development'),
        ('docs', 'development'),
        ('install', 'development'),
    ],
)
def test_every_target_installs_what_it_needs(target, level, tmp_path):
    command = ['make', '-n', target, f'VENV={tmp_path}']
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r'install\.py (\w+)', shown.stdout) == [level]
