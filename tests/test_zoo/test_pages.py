"""A page whose table is not that of its metafile is found, and named to the cell."""

from pathlib import Path

import pytest
from zoo_checkout import PAGE, measured

from gplq_mm.zoo.files import ZooError
from gplq_mm.zoo.metafile import put_entry
from gplq_mm.zoo.pages import check_pages, find_blocks, write_pages

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
    ('old', 'new', 'message'),
    [
        (
            '| 51.6 |',
            '| 61.6 |',
            "README.md: table tiny: row 'plain PTQ', column 'top-1': the page says '61.6', "
            "the metafile '51.6'",
        ),
        (
            '| 72.0 | |',
            '| 72.0 | 0.1 |',
            "README.md: table tiny: row 'FP32', column 'distance': the page says '0.1', "
            "the metafile ''",
        ),
        (
            '| Stage 1 | W32A4 | 68.6 | 0.475 |\n',
            '',
            "README.md: table tiny: row 'Stage 1' is missing",
        ),
        (
            '| Stage 2 |',
            '| Stage 3 | W4A4 | 1 | 1 |\n| Stage 2 |',
            "README.md: table tiny: row 'Stage 3' is in no metafile",
        ),
        (
            '| plain PTQ | W4A4 |',
            '| plain PTQ |',
            "README.md: table tiny: row 'plain PTQ' has 3 cells instead of 4",
        ),
        (
            '| top-1 |',
            '| top-5 |',
            "README.md: table tiny: the page has the columns ['model', 'bits', 'top-5', "
            "'distance'], the metafiles give ['model', 'bits', 'top-1', 'distance']",
        ),
    ],
)
def test_an_edited_table_is_named_to_the_cell(written, old, new, message):
    edit(written, old, new)
    assert check_pages(written) == [message]
    write_pages(written)
    assert check_pages(written) == []


def test_an_edited_caption_is_found(written):
    edit(written, '564 s', '56 s')
    (message,) = check_pages(written)
    assert "the page says 'Measured: commit 7765805; Xeon, 2 cores;" in message
    assert '56 s' in message


def test_a_changed_metafile_is_found(written):
    content = measured()
    content['stages']['w4a4']['top1'] = 66.1
    put_entry(written, 'tiny', written / 'configs' / 'demo' / 'tiny.py', content)
    (message,) = check_pages(written)
    assert "row 'Stage 2', column 'top-1': the page says '66.0', the metafile '66.1'" in message


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
        ('<!-- /zoo -->\n', '', r"README.md: line 5: the marker of 'tiny' is not closed"),
        ('After.', '<!-- /zoo -->', r'README.md: line \d+: <!-- /zoo --> closes nothing'),
        ('<!-- /zoo -->', '<!-- zoo: tiny -->', r"line 5: the marker of 'tiny' is not closed"),
        ('zoo: tiny -->', 'zoo tiny -->', 'line 5: .* is no marker'),
    ],
)
def test_a_broken_marker_is_named_and_no_page_is_written(written, old, new, message):
    edit(written, old, new)
    before = (written / 'README.md').read_text()
    for call in (check_pages, write_pages):
        with pytest.raises(ZooError, match=message):
            call(written)
    assert (written / 'README.md').read_text() == before


def test_markers_in_fenced_code_are_examples():
    text = '```\n<!-- zoo: a -->\n```\n<!-- zoo: b -->\n```bash\nx\n```\n<!-- /zoo -->'
    (block,) = find_blocks(text.split('\n'))
    assert (block.name, block.start, block.end) == ('b', 4, 7)
