"""Builds gplq_mm; the configs and the tools travel inside the package.

OpenMMLab packages keep both under ``<package>/.mim``, where ``mim`` looks for them. A wheel gets
a copy, written straight into the build folder; an editable install gets links to the folders of
the checkout.
"""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_ENTRIES = ('configs', 'tools', 'model-index.yml')
NOT_SHIPPED = shutil.ignore_patterns('__pycache__', '*.pyc', 'dev')
DEV_REQUIREMENTS = ['hypothesis', 'pytest', 'pytest-timeout', 'ruff']


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
    extras_require={'dev': DEV_REQUIREMENTS},
    cmdclass={'build_py': BuildPyWithMim},
    zip_safe=False,
)
