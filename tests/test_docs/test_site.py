"""The documentation builds without a warning, needs no other host, and shows the whole API."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
from doc_pages import DOCS, ROOT

# Attributes by which a page loads something; a plain link loads nothing.
LOADING = {
    ('img', 'src'), ('script', 'src'), ('link', 'href'), ('iframe', 'src'), ('source', 'src'),
    ('source', 'srcset'), ('img', 'srcset'), ('object', 'data'), ('video', 'src'),
}  # fmt: skip


def build(folder: Path, config: Path = ROOT / 'mkdocs.yml') -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-f', config, '-d', folder]
    environment = {**os.environ, 'NO_MKDOCS_2_WARNING': '1'}
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('site')
    done = build(folder)
    assert done.returncode == 0, done.stdout
    assert not re.search('WARNING|ERROR', done.stdout), done.stdout
    return folder


class Loads(HTMLParser):
    """Collects what a page loads, and the ids that it has."""

    def __init__(self, page: Path):
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if (tag, name) in LOADING:
                self.loaded.append(value or '')
            if name == 'id':
                self.ids.add(value)


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob('*.html'))
    sources = {path.relative_to(DOCS).with_suffix('.html') for path in DOCS.rglob('*.md')}
    assert sources <= {page.relative_to(site) for page in pages}
    for page in pages:
        for target in Loads(page).loaded:
            assert not re.match(r'(https?:)?//', target), f'{page.name} loads {target}'
    for sheet in site.rglob('*.css'):
        loaded = re.findall(r'(?:url\(|@import)\s*["\']?([^"\')\s]+)', sheet.read_text())
        assert not [target for target in loaded if re.match(r'(https?:)?//', target)]


def test_files_that_pages_link_to_are_pages(site):
    for path in ('configs/gplq/index', 'gplq_mm/quant/arithmetic.py', 'index'):
        assert (site / 'repository' / f'{path}.html').is_file()
    listing = (site / 'repository/gplq_mm/quant/arithmetic.py.html').read_text()
    assert 'layer_norm' in listing


# Rooms behind one tool each; they are no interface.
BEHIND_A_TOOL = {'benchmark'}
ROOMS = sorted(
    {path.parent.name for path in (ROOT / 'gplq_mm').glob('*/__init__.py')} - BEHIND_A_TOOL
)


@pytest.mark.parametrize('room', ROOMS)
def test_the_api_reference_has_every_public_name(site, room):
    page = DOCS / 'api' / f'{room}.md'
    assert page.is_file(), f'write {page.relative_to(ROOT)} and name it in mkdocs.yml'
    ids = Loads(site / 'api' / f'{room}.html').ids
    names = import_module(f'gplq_mm.{room}').__all__
    missing = [name for name in names if not any(i.endswith(f'.{name}') for i in ids)]
    assert not missing


def test_roles_of_docstrings_are_gone(site):
    for page in (site / 'api').glob('*.html'):
        assert not re.findall(r':(?:class|func|meth|mod):', page.read_text()), page.name


def test_a_broken_link_fails(tmp_path):
    docs = tmp_path / 'docs'
    docs.mkdir()
    (docs / 'index.md').write_text('# A page\n\n[Nothing](nothing.md)\n')
    text = (ROOT / 'mkdocs.yml').read_text()
    text = re.sub(r'(?ms)^(nav|not_in_nav|hooks|plugins):.*?(?=^\S)', '', text)
    (tmp_path / 'mkdocs.yml').write_text(text)
    done = build(tmp_path / 'site', tmp_path / 'mkdocs.yml')
    assert done.returncode
    assert 'nothing.md' in done.stdout
