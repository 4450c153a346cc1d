"""The pictures of the documentation are those that their script draws."""

import importlib.util
from xml.etree import ElementTree

import pytest
from doc_pages import DOCS, ROOT

SCRIPT = ROOT / 'tools' / 'dev' / 'docs_pictures.py'
spec = importlib.util.spec_from_file_location('docs_pictures', SCRIPT)
docs_pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs_pictures)


@pytest.mark.parametrize('name', docs_pictures.PICTURES)
def test_the_file_is_what_the_script_draws(name):
    drawn = str(docs_pictures.PICTURES[name]())
    assert (DOCS / 'pictures' / name).read_text(encoding='utf-8') == drawn


@pytest.mark.parametrize('name', docs_pictures.PICTURES)
def test_everything_lies_on_the_paper(name):
    root = ElementTree.fromstring(str(docs_pictures.PICTURES[name]()))
    _, _, width, height = map(float, root.get('viewBox').split())
    assert root.find('{*}title').text
    for element in root.iter('{http://www.w3.org/2000/svg}text'):
        # A letter is about half as wide as it is high.
        length = 0.5 * float(element.get('font-size')) * len(element.text)
        start = {'start': 0, 'middle': 0.5, 'end': 1}[element.get('text-anchor')]
        left = float(element.get('x')) - start * length
        assert left > 0, element.text
        assert left + length < width, element.text
        assert 0 < float(element.get('y')) < height
