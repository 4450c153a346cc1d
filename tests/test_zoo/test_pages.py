"""A page whose table is not that of its metafile is found, and named to the cell."""

from pathlib import Path

import pytest
from zoo_checkout import PAGE, measured

from tools.zoo.files import ZooError
from tools.zoo.metafile import put_entry
from tools.zoo.pages import check_pages, write_pages

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def written(root) -> Path:
    """A checkout whose page shows its one model."""
    put_entry(root, 'tiny', root / 'configs' / 'demo' / 'tiny.py', measured())
    assert write_pages(root) == [root / 'README.md']
    return root


def edit(root: Path, old: str, new: str) -> None:
    page = root / 'README.md'
    text = page.read_text()
    assert text.count(old) == 1
    page.write_text(text.replace(old, new))


def test_our_own_pages_are_as_measured():
    assert check_pages(ROOT) == []


def test_a_table_stands_between_its_markers(written):
    assert (written / 'README.md').read_text() == (
        '# Demo\n\nBefore.\n\n<!-- zoo: tiny -->\n\n'
        '| model | bits | top-1 | distance |\n|---|---|---|---|\n'
        '| FP32 | W32A32 | 72.0 | |\n'
        '| plain PTQ | W4A4 | 51.6 | 0.703 |\n'
        '| Stage 1 | W32A4 | 68.6 | 0.475 |\n'
        '| Stage 2 | W4A4 | 66.0 | 0.518 |\n\n'
        'Measured: commit 7765805; Xeon, 2 cores; nette, 3,000 + 500 images; 564 s.\n\n'
        '```bash\npython tools/train.py configs/demo/tiny.py\n```\n\n'
        '<!-- /zoo -->\n\nAfter.\n'
    )
    assert check_pages(written) == []


def test_writing_again_changes_nothing(written):
    assert write_pages(written) == []


def test_without_a_measurement_nothing_stands_there(root):
    assert write_pages(root) == []
    assert (root / 'README.md').read_text() == PAGE
    assert check_pages(root) == []


@pytest.mark.parametrize(
    ('old', 'new', 'changes'),
    [
        (
            '| 51.6 |',
            '| 61.6 |',
            ['- | plain PTQ | W4A4 | 61.6 | 0.703 |', '+ | plain PTQ | W4A4 | 51.6 | 0.703 |'],
        ),
        ('| 72.0 | |', '| 72.0 | 0.1 |', ['- | FP32 | W32A32 | 72.0 | 0.1 |']),
        ('| Stage 1 | W32A4 | 68.6 | 0.475 |\n', '', ['+ | Stage 1 | W32A4 | 68.6 | 0.475 |']),
        (
            '| Stage 2 |',
            '| Stage 3 | W4A4 | 1 | 1 |\n| Stage 2 |',
            ['- | Stage 3 | W4A4 | 1 | 1 |'],
        ),
        ('| top-1 |', '| top-5 |', ['- | model | bits | top-5 | distance |']),
    ],
)
def test_an_edited_table_is_named_to_the_row(written, old, new, changes):
    edit(written, old, new)
    (message,) = check_pages(written)
    where, *lines = message.split('\n')
    assert where == 'README.md: line 5: table tiny, page - and metafiles +'
    assert set(changes) <= set(lines)
    assert len(lines) <= 2
    write_pages(written)
    assert check_pages(written) == []


def test_an_edited_caption_is_found(written):
    edit(written, '564 s', '56 s')
    (message,) = check_pages(written)
    assert '- Measured: commit 7765805; Xeon, 2 cores; nette, 3,000 + 500 images; 56 s.' in message
    assert '+ Measured: commit 7765805; Xeon, 2 cores; nette, 3,000 + 500 images; 564 s.' in message


def test_a_changed_metafile_is_found(written):
    content = measured()
    content['stages']['w4a4']['top1'] = 66.1
    put_entry(written, 'tiny', written / 'configs' / 'demo' / 'tiny.py', content)
    (message,) = check_pages(written)
    assert message.split('\n')[1:] == [
        '- | Stage 2 | W4A4 | 66.0 | 0.518 |',
        '+ | Stage 2 | W4A4 | 66.1 | 0.518 |',
    ]


def test_rows_in_another_order_are_found(written):
    first = '| Stage 1 | W32A4 | 68.6 | 0.475 |\n'
    second = '| Stage 2 | W4A4 | 66.0 | 0.518 |\n'
    edit(written, first + second, second + first)
    assert len(check_pages(written)) == 1


def test_a_table_that_no_page_shows_is_found(written):
    (written / 'README.md').write_text('# Demo\n')
    assert check_pages(written) == ['no page shows the table tiny: add its markers']


def test_pages_in_all_folders_count(written):
    for name in ('docs/deep/x.md', 'configs/demo/README.md'):
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        (written / name).write_text(PAGE)
    messages = check_pages(written)
    assert {message.partition(':')[0] for message in messages} == {
        'docs/deep/x.md',
        'configs/demo/README.md',
    }
    assert len(write_pages(written)) == 2


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        ('zoo: tiny', 'zoo: tinny', r"README.md: line 5: no tables.yml has a table 'tinny'"),
        ('<!-- /zoo -->\n', '', 'README.md: line 5: <!-- zoo: tiny --> has no partner'),
        ('After.', '<!-- /zoo -->', r'README.md: line \d+: <!-- /zoo --> has no partner'),
        ('<!-- /zoo -->', '<!-- zoo: tiny -->', 'line 5: <!-- zoo: tiny --> has no partner'),
        ('zoo: tiny -->', 'zoo tiny -->', 'line 5: <!-- zoo tiny --> has no partner'),
    ],
)
def test_a_broken_marker_is_named_and_no_page_is_written(written, old, new, message):
    edit(written, old, new)
    before = (written / 'README.md').read_text()
    for call in (check_pages, write_pages):
        with pytest.raises(ZooError, match=message):
            call(written)
    assert (written / 'README.md').read_text() == before


def test_markers_in_fenced_code_are_examples(written):
    page = written / 'README.md'
    example = '```\n<!-- zoo: a -->\n```\n'
    page.write_text(example + page.read_text() + example.replace('```', '~~~~'))
    assert check_pages(written) == []
    edit(written, '| 51.6 |', '| 61.6 |')
    assert write_pages(written) == [page]
    assert page.read_text().startswith(example)
    assert '| 51.6 |' in page.read_text()
