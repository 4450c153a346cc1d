"""What tests of the documentation read: pages, their code, and the messages of the source."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'
# What a reader of the repository reads.
PAGES = sorted([ROOT / 'README.md', *DOCS.rglob('*.md'), *(ROOT / 'configs').glob('*/README.md')])
BLOCK = re.compile(r'^( *)```(\w*)\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)
SPAN = re.compile(r'`([^`\n]+)`')
LINK = re.compile(r'(?<!\\)\[[^\]]*\]\(([^)\s]+)\)')
HEADING = re.compile(r'^#+ (.+)$', re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """A fenced block: its language, its text, and the line of the page that it begins at."""

    language: str
    text: str
    line: int


def name_of(page: Path) -> str:
    """Path from the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Code]:
    """Fenced blocks of a page."""
    text = page.read_text(encoding='utf-8')
    found = []
    for match in BLOCK.finditer(text):
        line = text.count('\n', 0, match.start(3)) + 1
        found.append(Code(match.group(2), match.group(3), line))
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return BLOCK.sub('', page.read_text(encoding='utf-8'))


def spans(page: Path) -> list[str]:
    """Inline code of a page."""
    return SPAN.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as Git hosts and mkdocs both make them."""
    titles = HEADING.findall(prose(page))
    plain = (re.sub(r'[^\w\s-]', '', title.replace('`', '').lower()) for title in titles)
    return {re.sub(r'\s+', '-', title.strip()) for title in plain}


def _text_of(node: ast.AST) -> str | None:
    """A string of the source, with a gap for every value that is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return ''.join(
            part.value if isinstance(part, ast.Constant) else '\0' for part in node.values
        )
    return None


def strings_of(path: Path) -> Iterator[str]:
    """Strings of a module that are no docstrings."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    docstrings, parts = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            docstrings.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            parts |= {id(part) for part in node.values}
    for node in ast.walk(tree):
        text = None if id(node) in docstrings | parts else _text_of(node)
        if text is not None:
            yield text


def shell_commands(page: Path) -> Iterator[str]:
    """Commands of the bash blocks, continued lines joined, comments taken off."""
    for block in blocks(page):
        if block.language != 'bash':
            continue
        for line in block.text.replace('\\\n', ' ').splitlines():
            command = re.sub(r'(^|\s)#.*', '', line).strip()
            if command:
                yield command
