"""Takes out of mmcv's sources what an installation does not need, before they are built.

mmcv compiles all of its operators or, without torch, none. A classifier calls none of them and a
detector a few, while all of them take ten minutes and more. Here an unpacked source distribution
loses the files of the other operators; what is left builds by mmcv's own ``setup.py``, with its
flags. ``mmcv._ext``, which mmcv imports, becomes ``mmcv_ext.py``: it offers what was compiled,
and says of every other operator how to compile it.

Only the standard library, in a syntax that old Pythons read too: see ``install.py``.
"""

import re
import shutil
from pathlib import Path

# Names of files in mmcv/ops/csrc/pytorch: what detectors call on a CPU. 'info' names the compiler.
DETECTOR_OPS = ('info', 'nms', 'roi_align')
# What builds mmcv where nothing is compiled; names and versions are in its pyproject.toml.
PLAIN_SETUP = 'from setuptools import setup\n\nsetup()\n'
COMPILED = 'mmcv._compiled_ops'
EXT = Path(__file__).with_name('mmcv_ext.py')


def keep_ops(source, ops):
    """Leaves some operators, or none, in an unpacked source distribution of mmcv.

    Args:
        source: its folder, which is changed.
        ops: names of files, without ``.cpp``, in ``mmcv/ops/csrc/pytorch``.

    Raises:
        ValueError: If the sources are not made as expected: another release of mmcv.
    """
    setup = source / 'setup.py'
    csrc = source / 'mmcv' / 'ops' / 'csrc'
    shutil.copyfile(str(EXT), str(source / 'mmcv' / '_ext.py'))
    if not ops:
        setup.write_text(PLAIN_SETUP)
        shutil.rmtree(str(csrc))
        return
    folder = csrc / 'pytorch'
    kept = [folder / f'{name}.cpp' for name in ops]
    missing = [path.name for path in kept if not path.is_file()]
    if missing:
        raise ValueError('mmcv has no {}'.format(', '.join(missing)))
    kept += [path for path in (folder / 'cpu' / path.name for path in kept) if path.is_file()]
    code = '\n'.join(path.read_text() for path in kept)
    functions = re.findall(r'^[\w:<> ]+?[ >](\w+)\(', code, re.MULTILINE)
    bindings = (folder / 'pybind.cpp').read_text()
    for path in [*folder.glob('*.cpp'), *folder.glob('cpu/*.cpp')]:
        path.unlink()
    # One file: most of the time goes into reading the headers of torch.
    (folder / 'pybind.cpp').write_text(code + keep_bindings(bindings, set(functions)))
    text = setup.read_text()
    if "'mmcv._ext'" not in text:
        raise ValueError('the setup.py of mmcv does not name mmcv._ext')
    setup.write_text(text.replace("'mmcv._ext'", repr(COMPILED)))


def keep_bindings(text, functions):
    """Returns C++ source without the ``m.def(...);`` of other functions."""

    def choose(match):
        return match.group(0) if match.group(1) in functions else ''

    return re.sub(r'\n  m\.def\("\w+",\s*&(\w+)\b.*?\);(?=\n)', choose, text, flags=re.DOTALL)
