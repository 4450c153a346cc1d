"""Imports point down only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = {'errors', 'registry', 'version', 'checkpoint'}
LOW = {'errors', 'registry', 'distributed', 'quant', 'layers'}
# room -> what it may import besides itself
ALLOWED = {
    'errors': set(),
    'registry': {'errors'},
    'version': set(),
    'checkpoint': {'errors'},
    'distributed': {'errors'},
    'quant': {'errors', 'registry', 'distributed'},
    'ops': {'errors', 'registry', 'quant'},
    'layers': {'errors', 'registry', 'distributed', 'quant', 'ops'},
    'families': LOW | {'ops', 'ptq', 'evaluation'},
    'ptq': LOW,
    'evaluation': LOW | {'ops'},
    'datasets': {'errors', 'registry'},
    'progress': {'ptq'},
    'models': LOW | {'checkpoint', 'ops', 'ptq', 'evaluation', 'progress'},
    'deploy': LOW | BASE | {'ops', 'ptq', 'models'},
    'engine': LOW | BASE | {'ops', 'ptq', 'evaluation', 'models', 'datasets', 'progress'},
    'analysis': LOW | BASE | {'ptq', 'evaluation', 'models', 'engine', 'progress'},
    'benchmark': LOW
    | BASE
    | {'ops', 'ptq', 'evaluation', 'models', 'engine', 'deploy', 'progress'},
    'api': LOW | BASE | {'evaluation', 'models', 'deploy'},
    '__init__': {'version', 'api'},
}
FRAMEWORKS = {'mmpretrain', 'mmdet', 'mmseg', 'timm', 'transformers'}
MAY_USE_FRAMEWORKS = {'models', 'datasets', 'families'}


def modules() -> list[Path]:
    return sorted((ROOT / 'gplq_mm').rglob('*.py'))


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """Absolute names, in parts, of everything a module imports, wherever in the file."""
    package = path.relative_to(ROOT).with_suffix('').parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split('.')) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = (*base, *(node.module.split('.') if node.module else ()))
            found |= {(*stem, alias.name) for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / 'gplq_mm').with_suffix('').parts[0]


def test_every_room_is_known():
    assert {room_of(path) for path in modules()} <= set(ALLOWED)
    assert {'quant', 'layers', 'models', 'engine'} <= {room_of(path) for path in modules()}


@pytest.mark.parametrize('path', modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    room = room_of(path)
    rooms = {parts[1] for parts in imports_of(path) if parts[0] == 'gplq_mm' and len(parts) > 1}
    assert rooms - {room} <= ALLOWED[room]


@pytest.mark.parametrize('path', modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_frameworks_stay_in_their_rooms(path):
    roots = {parts[0] for parts in imports_of(path)}
    assert 'tools' not in roots
    assert 'tests' not in roots
    if room_of(path) not in MAY_USE_FRAMEWORKS:
        assert not roots & FRAMEWORKS


def test_the_reader_of_imports_sees_all_forms(tmp_path, monkeypatch):
    monkeypatch.setattr(f'{__name__}.ROOT', tmp_path)
    file = tmp_path / 'gplq_mm' / 'quant' / 'x.py'
    file.parent.mkdir(parents=True)
    file.write_text(
        'import mmdet.models\nfrom ..engine import hooks\nfrom . import spec\n'
        'def f():\n    from gplq_mm.models.gplq import GPLQ\n    from .. import layers\n'
    )
    assert imports_of(file) == {
        ('mmdet', 'models'),
        ('gplq_mm', 'engine', 'hooks'),
        ('gplq_mm', 'quant', 'spec'),
        ('gplq_mm', 'models', 'gplq', 'GPLQ'),
        ('gplq_mm', 'layers'),
    }
