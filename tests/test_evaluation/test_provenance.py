"""A measurement says on which machine it was taken, and of which code."""

import subprocess

import pytest

from gplq_mm.evaluation.provenance import code_commit, describe_machine, git


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one commit of code and a document."""
    (tmp_path / 'code.py').write_text('a = 1\n')
    (tmp_path / 'page.md').write_text('text\n')
    author = ['-c', 'user.name=a', '-c', 'user.email=a@example.org']
    for command in (['init', '-q'], ['add', '-A'], [*author, 'commit', '-q', '-m', 'first']):
        subprocess.run(['git', '-C', str(tmp_path), *command], check=True)
    return tmp_path


def test_machine():
    machine = describe_machine(['torch', 'no-such-package'])
    assert machine['versions'].keys() == {'torch', 'no-such-package'}
    assert machine['versions']['torch'].startswith('2.')
    assert machine['versions']['no-such-package'] is None
    assert machine['cores'] >= 1
    assert machine['cpu']


def test_commit_of_a_file(checkout):
    head = git(checkout, 'rev-parse', 'HEAD')
    assert len(head) == 40
    assert code_commit(checkout / 'code.py') == head


def test_only_code_makes_it_dirty(checkout):
    head = git(checkout, 'rev-parse', 'HEAD')
    (checkout / 'page.md').write_text('other text\n')
    assert code_commit(checkout / 'code.py') == head
    (checkout / 'code.py').write_text('a = 2\n')
    assert code_commit(checkout / 'code.py') == f'{head}-dirty'


def test_a_file_that_git_does_not_know_has_no_commit(checkout, tmp_path_factory):
    (checkout / 'new.py').write_text('')
    assert code_commit(checkout / 'new.py') is None
    assert git(tmp_path_factory.mktemp('none') / 'missing', 'status') is None
