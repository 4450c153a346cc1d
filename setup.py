"""Builds gplq_mm: the C++ kernels, and the configs and tools that travel inside the package.

The kernels become ``gplq_mm/_C.abi3.so``, compiled against the installed torch: one wheel for
every Python and every CPU of an architecture, since the instruction set is chosen at run time.
``GPLQ_MM_NO_EXT=1`` installs without them; the ops then run in plain torch.

OpenMMLab packages keep configs and tools under ``<package>/.mim``, where ``mim`` looks for them.
A wheel gets a copy, written straight into the build folder; an editable install gets links to
the folders of the checkout.
"""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_ENTRIES = ('configs', 'tools', 'model-index.yml')
NOT_SHIPPED = shutil.ignore_patterns('__pycache__', '*.pyc', 'dev', 'zoo', 'zoo.py')
CSRC = Path('gplq_mm') / 'ops' / 'csrc'
# fp-contract: a product and a sum are rounded as the source says, on every machine.
COMPILE_FLAGS = [
    '-O3', '-g0', '-ffp-contract=off', '-fno-math-errno', '-fno-trapping-math',
    '-fvisibility=hidden',
]  # fmt: skip
# Commands that compile; the others must work without torch.
COMPILING = {'bdist_wheel', 'build', 'build_ext', 'develop', 'editable_wheel', 'install'}
NO_TORCH = (
    'The kernels of gplq_mm are compiled against the torch that they run with: install torch, '
    'then run `pip install --no-build-isolation .`; or set GPLQ_MM_NO_EXT=1 to install without '
    'kernels (the int4 ops then run in plain torch, slowly).'
)
NO_COMPILER = (
    'gplq_mm needs a C++ compiler for its kernels, and {!r} was not found: install one (on Debian '
    '`apt-get install build-essential`) or name it in CXX; or set GPLQ_MM_NO_EXT=1 to install '
    'without kernels (the int4 ops then run in plain torch, slowly).'
)
DETECTION_REQUIREMENTS = ['onedl-mmdetection>=3.5.1,<4.0']
ONNX_REQUIREMENTS = ['onnx>=1.18', 'onnxscript>=0.5']
# What tools/benchmark.py measures beside our own kernels.
BENCH_REQUIREMENTS = [*ONNX_REQUIREMENTS, 'nncf>=3.0', 'onnxruntime>=1.20', 'openvino>=2026.0']
DOCS_REQUIREMENTS = ['mkdocs>=1.6,<2.0', 'mkdocs-material>=9.7', 'mkdocstrings[python]>=1.0']
TENSORBOARD_REQUIREMENTS = ['tensorboard>=2.15']
DEV_REQUIREMENTS = [
    *DETECTION_REQUIREMENTS,
    *DOCS_REQUIREMENTS,
    *ONNX_REQUIREMENTS,
    *TENSORBOARD_REQUIREMENTS,
    'filelock>=3.12',
    'hypothesis',
    'model-index>=0.1.11',
    'onnxruntime>=1.20',
    'pytest',
    'pytest-timeout',
    'pytest-xdist',
    'ruff',
]


class BuildPyWithMim(build_py):
    """``build_py`` that adds ``gplq_mm/.mim``."""

    def run(self):
        super().run()
        entries = [name for name in MIM_ENTRIES if (ROOT / name).exists()]
        if self.editable_mode:
            self._link(entries)
        else:
            self._copy(entries)

    def _link(self, entries):
        mim = ROOT / 'gplq_mm' / '.mim'
        mim.mkdir(exist_ok=True)
        for name in entries:
            link = mim / name
            if link.is_symlink():
                link.unlink()
            link.symlink_to(os.path.join('..', '..', name))

    def _copy(self, entries):
        mim = Path(self.build_lib) / 'gplq_mm' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for name in entries:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, mim / name, ignore=NOT_SHIPPED)
            else:
                shutil.copy2(source, mim / name)


def kernel_build():
    """Returns the arguments of ``setup`` that build the C++ kernels."""
    if os.environ.get('GPLQ_MM_NO_EXT') == '1' or not COMPILING & set(sys.argv):
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit(NO_TORCH)

    class BuildKernels(BuildExtension):
        """``build_ext`` that says what is missing and keeps its objects for the next time."""

        def run(self):
            compiler = shlex.split(os.environ.get('CXX') or 'c++')[0]
            if not shutil.which(compiler):
                sys.exit(NO_COMPILER.format(compiler))
            if self.inplace or self.editable_mode:
                # pip's own folder is a new one each time. Objects of another torch do not fit.
                self.build_temp = str(ROOT / 'build' / f'kernels-{torch.__version__}')
            super().run()

    kernels = CppExtension(
        name='gplq_mm._C',
        sources=sorted(str(p.relative_to(ROOT)) for p in (ROOT / CSRC / 'cpu').glob('*.cpp')),
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / CSRC).rglob('*.h')),
        extra_compile_args=COMPILE_FLAGS + shlex.split(os.environ.get('GPLQ_MM_CXXFLAGS', '')),
        extra_link_args=shlex.split(os.environ.get('GPLQ_MM_LDFLAGS', '')),
        py_limited_api=True,
    )
    return {
        'ext_modules': [kernels],
        'cmdclass': {'build_ext': BuildKernels},
        'options': {'bdist_wheel': {'py_limited_api': 'cp310'}},
    }


def read_version():
    """Returns ``__version__`` without importing the package, which needs torch."""
    text = (ROOT / 'gplq_mm' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE).group(1)


def read_requirements():
    """Returns the lines of requirements.txt that name a package."""
    lines = (ROOT / 'requirements.txt').read_text(encoding='utf-8').splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith('#')]


def read_description():
    """Returns the README, or nothing where a checkout has none."""
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


KERNELS = kernel_build()

setup(
    name='gplq_mm',
    version=read_version(),
    description='GPLQ: 4-bit weights and activations for vision transformers in OpenMMLab',
    long_description=read_description(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=['computer vision', 'quantization', 'vision transformer', 'OpenMMLab'],
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['gplq_mm', 'gplq_mm.*']),
    include_package_data=True,
    python_requires='>=3.10,<3.13',
    install_requires=read_requirements(),
    extras_require={
        'bench': BENCH_REQUIREMENTS,
        'detection': DETECTION_REQUIREMENTS,
        'dev': DEV_REQUIREMENTS,
        'docs': DOCS_REQUIREMENTS,
        'onnx': ONNX_REQUIREMENTS,
        'tensorboard': TENSORBOARD_REQUIREMENTS,
    },
    ext_modules=KERNELS.get('ext_modules', []),
    options=KERNELS.get('options', {}),
    cmdclass={'build_py': BuildPyWithMim, **KERNELS.get('cmdclass', {})},
    zip_safe=False,
)
