"""Errors that a user reads have one base class; the tools print them in one line."""

import ast
from pathlib import Path

import pytest

from gplq_mm.errors import DataError, SettingError, StateError, one_line_errors

ROOT = Path(__file__).resolve().parent.parent
# No user meets these: one ends a forward early, one tells a caller that a peer cannot run.
INTERNAL = {'_StopForward', 'PeerUnavailable'}


def test_kinds_are_builtins_too():
    assert issubclass(SettingError, ValueError)
    assert issubclass(DataError, ValueError)
    assert issubclass(StateError, RuntimeError)


@pytest.mark.parametrize('error', [SettingError('a\n  b'), FileNotFoundError('a b')])
def test_what_a_user_can_mend_is_one_line(error):
    with pytest.raises(SystemExit, match=f'^{type(error).__name__}: a b$'), one_line_errors():
        raise error


@pytest.mark.parametrize('error', [ValueError('x'), RuntimeError('x'), KeyError('x')])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)), one_line_errors():
        raise error


def test_every_error_class_of_the_package_derives_from_the_base():
    kinds = {'GPLQError', 'SettingError', 'DataError', 'StateError'}
    found = 0
    for path in [*(ROOT / 'gplq_mm').rglob('*.py'), *(ROOT / 'tools/zoo').rglob('*.py')]:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            bases = {ast.unparse(base) for base in getattr(node, 'bases', ())}
            if any(base.endswith(('Error', 'Exception')) for base in bases) and (
                path.name != 'errors.py' and node.name not in INTERNAL
            ):
                assert bases & kinds, f'{path}: {node.name}'
                found += 1
    assert found > 5
