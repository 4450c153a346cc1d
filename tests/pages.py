"""Reads a page as a browser does, strictly."""

import base64
import io
from html.parser import HTMLParser
from urllib.parse import urlparse

from PIL import Image

VOID = {'meta', 'img', 'br', 'link', 'input', 'hr'}
LOADING = {'src', 'href', 'srcset', 'data', 'action', 'poster', 'background'}


class Page(HTMLParser):
    """Tags must match; collects text, table cells and everything that loads something."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ''
        assert source.startswith('<!DOCTYPE html>')
        self.feed(source)
        self.close()
        assert not self.open, f'not closed: {self.open}'

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for key, value in attrs if key in LOADING]
        if tag == 'table':
            self.tables.append([])
        elif tag == 'tr':
            self.tables[-1].append([])
        elif tag in ('td', 'th'):
            self.tables[-1][-1].append('')
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f'</{tag}> closes nothing'
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ('td', 'th'):
            self.tables[-1][-1][-1] += data
        if not {'style', 'script'} & set(self.open):
            self.text += data

    def pictures(self) -> list[Image.Image]:
        """All pictures; nothing else may be loaded."""
        pictures = []
        for source in self.loaded:
            assert urlparse(source).scheme == 'data', source[:80]
            head, _, data = source.partition(',')
            assert head == 'data:image/png;base64'
            pictures.append(read_png(base64.b64decode(data, validate=True)))
        return pictures


def read_png(data: bytes) -> Image.Image:
    """A PNG, decoded."""
    picture = Image.open(io.BytesIO(data))
    assert picture.format == 'PNG'
    picture.load()
    return picture
