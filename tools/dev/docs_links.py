"""mkdocs hook: links from the documentation to other files of the repository.

Pages link to files outside ``docs/`` by relative paths, as the Git host wants them. On the site
such a file is a page below ``repository/``: Markdown as it is, other text as a listing.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
FOLDER = 'repository'
# A link or image of Markdown, relative: text, path, anchor.
LINK = re.compile(r'(\[[^\]\n]*\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))')
FENCE = re.compile(r'^(`{3,}|~{3,})')
LANGUAGES = {'.py': 'python', '.cpp': 'cpp', '.h': 'cpp', '.sh': 'bash', '.yml': 'yaml'}


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines outside of fenced code, with their numbers from 0."""
    fence = None
    for number, line in enumerate(text.split('\n')):
        mark = FENCE.match(line.strip())
        if mark and fence is None:
            fence = mark.group(1)
        elif mark and line.strip() == fence:
            fence = None
        elif fence is None:
            yield number, line


def repository_path(uri: str) -> str:
    """Path in the repository of what the site has at ``uri``."""
    if uri.startswith(f'{FOLDER}/'):
        path = uri.removeprefix(f'{FOLDER}/')
        return path if (ROOT / path).is_file() else path.removesuffix('.md')
    return f'docs/{uri}'


def site_uri(path: str) -> str:
    """Inverse of :func:`repository_path`."""
    if path.startswith('docs/'):
        return path.removeprefix('docs/')
    return f'{FOLDER}/{path}' if path.endswith('.md') else f'{FOLDER}/{path}.md'


def linked_path(uri: str, link: str) -> str:
    """Path in the repository that a link of a page leads to."""
    folder = posixpath.dirname(repository_path(uri))
    return posixpath.normpath(posixpath.join(folder, link))


def relinked(text: str, uri: str) -> str:
    """The page with links to the places that the site has for files of the repository."""

    def change(match: re.Match) -> str:
        path = linked_path(uri, match.group(2))
        if not (ROOT / path).is_file():
            return match.group()
        target = posixpath.relpath(site_uri(path), posixpath.dirname(uri) or '.')
        return f'{match.group(1)}{target}{match.group(3) or ""}'

    lines = text.split('\n')
    for number, line in prose_lines(text):
        lines[number] = LINK.sub(change, line)
    return '\n'.join(lines)


def listing(path: Path) -> str:
    """A page that shows a text file."""
    name = path.relative_to(ROOT).as_posix()
    language = LANGUAGES.get(path.suffix, 'text')
    code = path.read_text(encoding='utf-8')
    hidden = '---\nsearch:\n  exclude: true\n---\n\n'
    return f'{hidden}# {path.name}\n\n`{name}`\n\n`````{language}\n{code}\n`````\n'


def on_files(files, config):
    """Adds a page for every file outside ``docs/`` that a page links to, and so on."""
    waiting = [(f.src_uri, f.content_string) for f in files if f.src_uri.endswith('.md')]
    while waiting:
        uri, text = waiting.pop()
        for _, line in prose_lines(text):
            for match in LINK.finditer(line):
                path = linked_path(uri, match.group(2))
                target = site_uri(path)
                known = files.get_file_from_path(target) is not None
                if known or path.startswith('docs/') or not (ROOT / path).is_file():
                    continue
                source = ROOT / path
                markdown = source.suffix == '.md'
                page = source.read_text(encoding='utf-8') if markdown else listing(source)
                files.append(File.generated(config, target, content=page))
                if markdown:
                    waiting.append((target, page))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of a page."""
    return relinked(markdown, page.file.src_uri)
