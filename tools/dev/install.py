"""Installs everything that gplq_mm needs into ``.venv``; the Makefile calls it.

The argument says what the environment is for: ``classifiers`` need neither mmdet nor an operator
of mmcv, ``detectors`` mmdet and a few operators, and ``development`` the tools of tests and
documentation too. What is there already stays there.

Every step remembers what it was made from, so a second call repeats only the steps whose
inputs changed. mmcv's operators are compiled against the installed torch; the wheel is kept in
the user's cache, so that a second environment does not compile again.

Only the standard library is used, since nothing else is installed yet, in a syntax that
old Pythons read too, since they shall print the message about their version.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from mmcv_sources import DETECTOR_OPS, EXT, keep_ops
from steps import NO_COMPILER, NO_HEADERS, PYTHON, ROOT, VENV, Step, StepError, environment

SUPPORTED = ((3, 10), (3, 11), (3, 12))
STATE = VENV / 'installed.json'
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'gplq_mm' / 'wheels'
BUILD_TOOLS = ('setuptools', 'wheel', 'packaging', 'ninja')
LIBRARY_INPUTS = ('requirements.txt', 'constraints.txt', 'setup.py', 'gplq_mm/version.py')
KERNELS = ROOT / 'gplq_mm' / 'ops' / 'csrc'
# What tests find in a folder of its own: mmpretrain 1.3.6 cannot be imported beside transformers 5.
APART = VENV / 'transformers'
APART_PACKAGES = ('transformers', 'tokenizers', 'regex')
DONE = 'ok ({seconds} s)'
UNCHANGED = 'unchanged'

# Level -> extra of setup.py, and a module that needs what the level adds. A level has what those
# before it have.
LEVELS = {
    'classifiers': ('', 'mmpretrain.models'),
    'detectors': ('[detection]', 'mmcv.ops, mmdet.models'),
    'development': ('[dev]', 'pytest'),
}

# Prints what decides about mmcv's operators: torch, Python, a GPU's architecture, and whether
# there is a compiler of the CUDA version that torch was made with.
MMCV_TARGET = r"""
import json, os, re, subprocess, sys, torch
from torch.utils import cpp_extension
nvcc = os.path.join(cpp_extension.CUDA_HOME or '', 'bin', 'nvcc')
text = subprocess.check_output([nvcc, '-V']).decode() if os.path.exists(nvcc) else ''
release = re.search(r'release (\d+)', text)
cuda = (torch.version.cuda or '').split('.')[0]
gpu = torch.cuda.is_available()
print(json.dumps({
    'torch': torch.__version__,
    'python': 'cp%d%d' % sys.version_info[:2],
    'cuda': cuda,
    'nvcc': bool(release) and release.group(1) == cuda,
    'gpu': '%d.%d' % torch.cuda.get_device_capability() if gpu else '',
}))
"""

# Loads the operators alone: the packages that mmcv imports come in a later step.
LOAD_MMCV_OPS = """
import glob, importlib.util, os, sysconfig, torch
folder = sysconfig.get_path('platlib') + '/mmcv/'
assert os.path.exists(folder + '__init__.py')
for path in glob.glob(folder + '_ext*.so') + glob.glob(folder + '_compiled_ops*.so'):
    name = 'mmcv.' + os.path.basename(path).split('.')[0]
    spec = importlib.util.spec_from_file_location(name, path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def ask(code):
    """Runs Python code in the environment; returns what it prints, or None if it fails."""
    pipe = subprocess.PIPE
    try:
        answer = subprocess.run(
            [str(PYTHON), '-c', code],
            env=environment({}),
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
        )
    except OSError:
        return None
    return None if answer.returncode else answer.stdout.decode().strip()


def pinned(*packages):
    """Returns the lines of constraints.txt about some packages."""
    lines = (ROOT / 'constraints.txt').read_text().splitlines()
    return [line for line in lines if line.partition('==')[0] in packages]


def digest(*parts):
    """Returns a short hash of strings and of the content of files (given as paths)."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode()
        sha.update(data + b'\0')
    return sha.hexdigest()[:16]


def finished():
    """Returns the steps that are done: name to what the step was made from."""
    try:
        return json.loads(STATE.read_text())
    except (OSError, ValueError):
        return {}


def remember(name, made_from):
    """Notes that a step is done."""
    new = STATE.with_suffix('.new')
    new.write_text(json.dumps(dict(finished(), **{name: made_from}), indent=1))
    os.replace(str(new), str(STATE))


def at_least(level):
    """Returns the level that was installed before, if it has more than the given one."""
    return max(level, finished().get('level', level), key=list(LEVELS).index)


def use_supported_python():
    """Goes on with another Python of this machine if this one is not supported."""
    if sys.version_info[:2] in SUPPORTED:
        return
    names = ['python{}.{}'.format(*numbers) for numbers in SUPPORTED]
    for name in reversed(names):
        if shutil.which(name):
            os.execvp(name, [name, str(Path(__file__).resolve()), *sys.argv[1:]])
    sys.exit(
        'Python {} is not supported: install {} (or name one with `make PYTHON=...`), '
        'then run make again.'.format(platform.python_version(), ' or '.join(names))
    )


def create_environment(step, level):
    """Step 1: the virtual environment, and what building needs."""
    if not (Path(sysconfig.get_path('include')) / 'Python.h').exists():
        raise StepError(NO_HEADERS)
    if not shutil.which((os.environ.get('CXX') or 'c++').split()[0]):
        raise StepError(NO_COMPILER)
    if ask(f'import sys, pip; assert sys.version_info[:2] in {SUPPORTED}') is None:
        for entry in VENV.iterdir():
            if entry.is_symlink() or entry.is_file():
                entry.unlink()
            elif entry != step.log.parent:
                shutil.rmtree(str(entry))
        step.run(sys.executable, '-m', 'venv', VENV)
    made_from = digest(*pinned(*BUILD_TOOLS))
    if finished().get('environment') == made_from:
        return UNCHANGED
    step.pip_install('-c', 'constraints.txt', *BUILD_TOOLS)
    remember('environment', made_from)
    return DONE


def install_torch(step, level):
    """Step 2: torch, which mmcv is compiled against."""
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    packages = [line for line in lines if re.match(r'(torch|torchvision|numpy)\b', line)]
    made_from = digest(*(packages + pinned('torch', 'torchvision', 'numpy')))
    result = UNCHANGED
    if finished().get('torch') != made_from:
        step.pip_install('-c', 'constraints.txt', *packages)
        remember('torch', made_from)
        result = DONE
    version = ask('import importlib.metadata as m; print(m.version("torch"))')
    step.title = f'torch {version}'
    return result


def mmcv_ops(target, level, env):
    """Decides which of mmcv's operators to install.

    Args:
        target: what :data:`MMCV_TARGET` prints, as a dict.
        level: one of :data:`LEVELS`.
        env: the environment variables.

    Returns:
        A name for the set, as it stands in the wheel's cache key (``none``, ``few``, ``cpu`` for
        all, ``cuda-ARCHITECTURES`` for all on both), and why it was chosen.

    Raises:
        StepError: If the variables ask for what cannot be made here.
    """
    choice = env.get('GPLQ_MM_MMCV_OPS', '')
    if choice not in ('', 'all'):
        raise StepError(f'GPLQ_MM_MMCV_OPS={choice} is unknown: set it to `all` or not at all.')
    forced = env.get('FORCE_CUDA', '0') == '1'
    if forced and not target['nvcc']:
        raise StepError(
            'FORCE_CUDA=1 needs nvcc of CUDA {}, the version of torch: install it or set '
            'CUDA_HOME, then run make again.'.format(target['cuda'] or '(torch has none)')
        )
    if level == 'classifiers' and not forced and not choice:
        return 'none', ''
    if target['nvcc'] and (forced or target['gpu']):
        arch = env.get('TORCH_CUDA_ARCH_LIST') or target['gpu'] or 'every'
        reason = 'as FORCE_CUDA=1 asks' if forced else 'for the GPU of this machine'
        return 'cuda-' + re.sub('[^0-9A-Za-z.+]', '-', arch), reason
    if choice:
        return 'cpu', 'as GPLQ_MM_MMCV_OPS=all asks'
    without = ' (for the CPU only: there is {})'.format(
        'no nvcc of CUDA {}'.format(target['cuda'])
        if target['gpu']
        else 'no GPU; FORCE_CUDA=1 compiles for CUDA'
    )
    return 'few', 'which detectors call' + (without if target['gpu'] or target['nvcc'] else '')


def includes(installed, wanted):
    """Returns whether one set of operators serves where another is wanted."""
    order = ('none', 'few', 'cpu', 'cuda')
    return installed == wanted or (
        order.index(installed.partition('-')[0]) > order.index(wanted.partition('-')[0])
    )


def install_mmcv(step, level):
    """Step 3: mmcv with the operators that are needed, from the user's wheel cache or built."""
    answer = ask(MMCV_TARGET)
    if answer is None:
        raise StepError('The installed torch does not start: run `make distclean`, then try again.')
    target = json.loads(answer)
    ops, reason = mmcv_ops(target, at_least(level), os.environ)
    (pin,) = pinned('onedl-mmcv')
    libc = ''.join(platform.libc_ver())
    torch = 'torch-{}'.format(target['torch'])
    parts = (pin.replace('==', '-'), torch, target['python'], libc, platform.machine())
    base = '_'.join(parts) + '_'
    done = finished().get('mmcv', '')
    have = done[len(base) :].partition('_')[0] if done.startswith(base) else ''
    key = base + ops
    if ops in ('none', 'few'):
        key += '_' + digest(EXT, EXT.with_name('mmcv_sources.py'))
    serves = done == key or (have and have != ops and includes(have, ops))
    if serves and ask(LOAD_MMCV_OPS) is not None:
        return UNCHANGED

    folder = CACHE / key
    for wheel in folder.glob('*.whl'):
        if install_wheel(step, wheel):
            remember('mmcv', key)
            return 'ok, built earlier ({seconds} s)'
        wheel.unlink()
    if not install_wheel(step, build_mmcv(step, pin, folder, ops, reason)):
        raise StepError('The compiled mmcv does not load: run `make distclean`, then try again.')
    remember('mmcv', key)
    return DONE


def install_wheel(step, wheel):
    """Installs an mmcv wheel and returns whether its operators load."""
    step.pip_install('--no-deps', '--force-reinstall', wheel)
    return ask(LOAD_MMCV_OPS) is not None


def announcement(ops, reason):
    """Returns what is about to be compiled, why, and for how long."""
    names = ', '.join(name for name in DETECTOR_OPS if name != 'info')
    what, duration = {
        'few': (f'its operators {names}', 'half a minute to two minutes'),
        'cpu': ('all its operators', 'about ten minutes on two cores'),
    }.get(ops, (f'all its operators for {ops}', 'long'))
    return f'compiling {what}, {reason}; once per machine, takes {duration}'


def build_mmcv(step, pin, folder, ops, reason):
    """Builds the mmcv wheel, moves it into the cache folder and returns its path."""
    if ops != 'none':
        step.say(f'{step.title}: {announcement(ops, reason)}')
    env = {'MAX_JOBS': os.environ.get('MAX_JOBS') or str(compile_jobs())}
    if not ops.startswith('cuda'):
        env.update(CUDA_VISIBLE_DEVICES='', FORCE_CUDA='0')

    def progress(output):
        done = re.findall(r'\[(\d+)/(\d+)\] ', output)
        return '{} of {} files compiled, '.format(*done[-1]) if done else ''

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=str(folder)) as scratch:
        # pip's own cache is left out: it does not know which torch a wheel was made for.
        options = ('--no-deps', '--no-build-isolation', '--no-cache-dir')
        step.pip('download', *options, '-d', scratch, '--no-binary', 'onedl-mmcv', pin, env=env)
        (archive,) = Path(scratch).glob('*.tar.gz')
        shutil.unpack_archive(str(archive), scratch)
        (source,) = [path for path in Path(scratch).iterdir() if path.is_dir()]
        if ops in ('none', 'few'):
            keep_ops(source, DETECTOR_OPS if ops == 'few' else ())
        step.pip('wheel', *options, '--verbose', '-w', scratch, source, env=env, progress=progress)
        (wheel,) = Path(scratch).glob('*.whl')
        os.replace(str(wheel), str(folder / wheel.name))
    return folder / wheel.name


def compile_jobs():
    """Returns how many files to compile at a time: one a core, 1.5 GB of memory each."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / 1.5e9)))


def install_libraries(step, level):
    """Step 4: the other libraries, and gplq_mm itself, editable, with its kernels compiled."""
    inputs = [ROOT / name for name in LIBRARY_INPUTS]
    inputs += sorted(path for path in KERNELS.rglob('*') if path.suffix in ('.cpp', '.h'))
    # Kernels fit the torch that they were compiled against, and no other.
    torch_version = str(ask('import torch; print(torch.__version__)'))
    without_kernels = os.environ.get('GPLQ_MM_NO_EXT', '')
    made_from = digest(str(ROOT), torch_version, without_kernels, *inputs)
    built = without_kernels or list((ROOT / 'gplq_mm').glob('_C.*so'))
    done = finished()
    level = at_least(level)
    if done.get('libraries') == made_from and level == done.get('level') and built:
        return UNCHANGED
    jobs = {'MAX_JOBS': os.environ.get('MAX_JOBS') or str(compile_jobs())}
    package = f'.{LEVELS[level][0]}'
    step.pip_install('--no-build-isolation', '-c', 'constraints.txt', '-e', package, env=jobs)
    # imaug asks for both OpenCV packages, which write the same files. The one without a
    # display has to come last, or `import cv2` needs libGL.
    if ask('import cv2; assert cv2.version.headless') is None:
        step.pip_install('--no-deps', '--force-reinstall', *pinned('opencv-python-headless'))
    remember('libraries', made_from)
    remember('level', level)
    return DONE


def install_apart(step, level):
    """Step 5 of a development installation: the packages of :data:`APART`."""
    packages = pinned(*APART_PACKAGES)
    if finished().get('apart') == digest(*packages):
        return UNCHANGED
    shutil.rmtree(APART, ignore_errors=True)
    step.pip_install('--no-deps', '--target', APART, *packages)
    remember('apart', digest(*packages))
    return DONE


def check_imports(step, level):
    """Last step: what was installed can be imported."""
    made_from = digest(
        *[f'{name} {value}' for name, value in finished().items() if name != 'imports']
    )
    if finished().get('imports') == made_from:
        return UNCHANGED
    names = list(LEVELS)[: list(LEVELS).index(at_least(level)) + 1]
    modules = ', '.join(LEVELS[name][1] for name in names)
    step.run(PYTHON, '-c', f'import gplq_mm, {modules}')
    remember('imports', made_from)
    return DONE


def main():
    """Runs the steps in order; the exit status says whether all went well."""
    use_supported_python()
    level = sys.argv[1]
    if level not in LEVELS:
        sys.exit(f'{level} is none of {", ".join(LEVELS)}.')
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    apart = [('transformers', 'transformers, apart from the environment', install_apart)]
    steps = (
        ('environment', 'environment .venv', create_environment),
        ('torch', 'torch', install_torch),
        (
            'mmcv',
            ' '.join(pinned('onedl-mmcv')).replace('onedl-', '').replace('==', ' '),
            install_mmcv,
        ),
        ('libraries', 'OpenMMLab, other libraries, gplq_mm', install_libraries),
        *(apart if level == 'development' else ()),
        ('imports', 'check that everything can be imported', check_imports),
    )
    for number, (name, title, function) in enumerate(steps, 1):
        log = VENV / 'log' / f'{number}-{name}.log'
        step = Step(f'[{number}/{len(steps)}]', title, log)
        try:
            step.end(function(step, level))
        except StepError as error:
            step.fail(str(error))
            return 1
        except KeyboardInterrupt:
            step.end('interrupted; the next make goes on from here')
            return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
