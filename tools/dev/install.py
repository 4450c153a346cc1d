"""Installs everything that gplq_mm needs into ``.venv``; the Makefile calls it.

Every step remembers what it was made from, so a second call repeats only the steps whose
inputs changed. mmcv is compiled against the installed torch; the wheel is kept in the
user's cache, so that a second environment does not compile again.

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

from steps import NO_COMPILER, NO_HEADERS, PYTHON, ROOT, VENV, Step, StepError, environment

SUPPORTED = ((3, 10), (3, 11), (3, 12))
STATE = VENV / 'installed.json'
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'gplq_mm' / 'wheels'
BUILD_TOOLS = ('setuptools', 'wheel', 'packaging', 'ninja')
LIBRARY_INPUTS = ('requirements.txt', 'constraints.txt', 'setup.py', 'gplq_mm/version.py')
KERNELS = ROOT / 'gplq_mm' / 'ops' / 'csrc'
DONE = 'ok ({seconds} s)'
UNCHANGED = 'unchanged'

# Prints what an mmcv wheel depends on: torch, Python, and the kind of operators. Operators
# for CUDA need a device and a compiler of the CUDA version that torch was made with.
MMCV_TARGET = r"""
import os, re, subprocess, sys, torch
from torch.utils import cpp_extension
ops = 'cpu'
if torch.cuda.is_available():
    nvcc = os.path.join(cpp_extension.CUDA_HOME or '', 'bin', 'nvcc')
    text = subprocess.check_output([nvcc, '-V']).decode() if os.path.exists(nvcc) else ''
    release = re.search(r'release (\d+)', text)
    if release and release.group(1) == (torch.version.cuda or '').split('.')[0]:
        arch = os.environ.get('TORCH_CUDA_ARCH_LIST')
        arch = arch or '%d.%d' % torch.cuda.get_device_capability()
        ops = 'cuda-' + re.sub('[^0-9A-Za-z.+]', '-', arch)
print(torch.__version__, 'cp%d%d' % sys.version_info[:2], ops)
"""

# Loads the operators alone: the packages that mmcv imports come in a later step.
LOAD_MMCV_OPS = """
import glob, importlib.util, sysconfig, torch
(path,) = glob.glob(sysconfig.get_path('platlib') + '/mmcv/_ext*.so')
spec = importlib.util.spec_from_file_location('mmcv._ext', path)
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


def use_supported_python():
    """Goes on with another Python of this machine if this one is not supported."""
    if sys.version_info[:2] in SUPPORTED:
        return
    names = ['python{}.{}'.format(*numbers) for numbers in SUPPORTED]
    for name in reversed(names):
        if shutil.which(name):
            os.execvp(name, [name, str(Path(__file__).resolve())])
    sys.exit(
        'Python {} is not supported: install {} (or name one with `make PYTHON=...`), '
        'then run make again.'.format(platform.python_version(), ' or '.join(names))
    )


def create_environment(step):
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
    step.pip('install', '-c', 'constraints.txt', *BUILD_TOOLS)
    remember('environment', made_from)
    return DONE


def install_torch(step):
    """Step 2: torch, which mmcv is compiled against."""
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    packages = [line for line in lines if re.match(r'(torch|torchvision|numpy)\b', line)]
    made_from = digest(*(packages + pinned('torch', 'torchvision', 'numpy')))
    result = UNCHANGED
    if finished().get('torch') != made_from:
        step.pip('install', '-c', 'constraints.txt', *packages)
        remember('torch', made_from)
        result = DONE
    version = ask('import importlib.metadata as m; print(m.version("torch"))')
    step.title = f'torch {version}'
    return result


def install_mmcv(step):
    """Step 3: mmcv with its operators, from the user's wheel cache or compiled."""
    target = ask(MMCV_TARGET)
    if target is None:
        raise StepError('The installed torch does not start: run `make distclean`, then try again.')
    torch_version, python_tag, ops = target.split()
    (pin,) = pinned('onedl-mmcv')
    libc = ''.join(platform.libc_ver())
    parts = (pin.replace('==', '-'), f'torch-{torch_version}', python_tag, libc)
    key = '_'.join([*parts, platform.machine(), ops])
    if finished().get('mmcv') == key and ask(LOAD_MMCV_OPS) is not None:
        return UNCHANGED

    folder = CACHE / key
    for wheel in folder.glob('*.whl'):
        if install_wheel(step, wheel):
            remember('mmcv', key)
            return 'ok, compiled earlier ({seconds} s)'
        wheel.unlink()
    if not install_wheel(step, compile_mmcv(step, pin, folder, ops)):
        raise StepError('The compiled mmcv does not load: run `make distclean`, then try again.')
    remember('mmcv', key)
    return DONE


def install_wheel(step, wheel):
    """Installs an mmcv wheel and returns whether its operators load."""
    step.pip('install', '--no-deps', '--force-reinstall', wheel)
    return ask(LOAD_MMCV_OPS) is not None


def compile_mmcv(step, pin, folder, ops):
    """Compiles the mmcv wheel, moves it into the cache folder and returns its path."""
    duration = 'about ten minutes on two cores' if ops == 'cpu' else 'long, for CUDA'
    step.say(f'{step.title}: compiling its operators, once per machine; takes {duration}')
    env = {'MMCV_WITH_OPS': '1', 'MAX_JOBS': os.environ.get('MAX_JOBS') or str(compile_jobs())}
    if ops == 'cpu':
        env.update(CUDA_VISIBLE_DEVICES='', FORCE_CUDA='0')

    def progress(output):
        done = re.findall(r'\[(\d+)/(\d+)\] ', output)
        return '{} of {} files compiled, '.format(*done[-1]) if done else ''

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=str(folder)) as scratch:
        # pip's own cache is left out: it does not know which torch a wheel was made for.
        build = ('--no-deps', '--no-build-isolation', '--no-cache-dir', '--verbose')
        source = ('--no-binary', 'onedl-mmcv', pin)
        step.pip('wheel', *build, '-w', scratch, *source, env=env, progress=progress)
        (wheel,) = Path(scratch).glob('*.whl')
        os.replace(str(wheel), str(folder / wheel.name))
    return folder / wheel.name


def compile_jobs():
    """Returns how many files to compile at a time: one a core, 1.5 GB of memory each."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / 1.5e9)))


def install_libraries(step):
    """Step 4: the other libraries, and gplq_mm itself, editable, with its kernels compiled."""
    inputs = [ROOT / name for name in LIBRARY_INPUTS]
    inputs += sorted(path for path in KERNELS.rglob('*') if path.suffix in ('.cpp', '.h'))
    # Kernels fit the torch that they were compiled against, and no other.
    torch_version = str(ask('import torch; print(torch.__version__)'))
    without_kernels = os.environ.get('GPLQ_MM_NO_EXT', '')
    made_from = digest(str(ROOT), torch_version, without_kernels, *inputs)
    built = without_kernels or list((ROOT / 'gplq_mm').glob('_C.*so'))
    if finished().get('libraries') == made_from and built:
        return UNCHANGED
    jobs = {'MAX_JOBS': os.environ.get('MAX_JOBS') or str(compile_jobs())}
    step.pip('install', '--no-build-isolation', '-c', 'constraints.txt', '-e', '.[dev]', env=jobs)
    # imaug asks for both OpenCV packages, which write the same files. The one without a
    # display has to come last, or `import cv2` needs libGL.
    if ask('import cv2; assert cv2.version.headless') is None:
        step.pip('install', '--no-deps', '--force-reinstall', *pinned('opencv-python-headless'))
    remember('libraries', made_from)
    return DONE


def check_imports(step):
    """Step 5: what was installed can be imported."""
    made_from = digest(
        *[f'{name} {value}' for name, value in finished().items() if name != 'imports']
    )
    if finished().get('imports') == made_from:
        return UNCHANGED
    step.run(PYTHON, '-c', 'import mmcv.ops, mmdet.models, mmpretrain.models, gplq_mm')
    remember('imports', made_from)
    return DONE


def main():
    """Runs the steps in order; the exit status says whether all went well."""
    use_supported_python()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    steps = (
        ('environment', 'environment .venv', create_environment),
        ('torch', 'torch', install_torch),
        (
            'mmcv',
            ' '.join(pinned('onedl-mmcv')).replace('onedl-', '').replace('==', ' '),
            install_mmcv,
        ),
        ('libraries', 'OpenMMLab, other libraries, gplq_mm', install_libraries),
        ('imports', 'check that everything can be imported', check_imports),
    )
    for number, (name, title, function) in enumerate(steps, 1):
        log = VENV / 'log' / f'{number}-{name}.log'
        step = Step(f'[{number}/{len(steps)}]', title, log)
        try:
            step.end(function(step))
        except StepError as error:
            step.fail(str(error))
            return 1
        except KeyboardInterrupt:
            step.end('interrupted; the next make goes on from here')
            return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
