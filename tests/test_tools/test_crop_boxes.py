"""Boxes of a detection data set as folders of a classification data set."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_detection import write_coco
from tiny_runs import load_tool

tool = load_tool('crop_boxes')


@pytest.fixture
def data(tmp_path):
    write_coco(tmp_path / 'data', 'train', 12, seed=0)
    write_coco(tmp_path / 'data', 'val', 6, seed=1)
    return tmp_path / 'data'


def crop(data, out, *options) -> None:
    arguments = [str(out)]
    for split in ('train', 'val'):
        arguments += [f'--{split}', str(data / split), str(data / f'{split}.json')]
    tool.main([*arguments, '--min-size', '8', *options])


@pytest.mark.parametrize(
    ('box', 'expected'),
    [
        ([10, 20, 30, 30], (10, 20, 40, 50)),
        ([10, 20, 30, 10], (10, 10, 40, 40)),
        ([0, 0, 10, 40], (0, 0, 40, 40)),
        ([95, 30, 5, 20], (80, 30, 100, 50)),
        ([5, 0, 90, 60], (5, 0, 95, 60)),
        ([-5, -5, 10, 10], (0, 0, 10, 10)),
    ],
)
def test_a_crop_is_a_square_inside_the_image(box, expected):
    assert tool.square(box, 100, 60) == expected


def test_every_box_becomes_an_image_of_its_class(data, tmp_path):
    crop(data, tmp_path / 'out')
    for split in ('train', 'val'):
        content = json.loads((data / f'{split}.json').read_text())
        names = {c['id']: c['name'] for c in content['categories']}
        for item in content['annotations']:
            path = tmp_path / 'out' / split / names[item['category_id']] / f'{item["id"]}.png'
            with Image.open(path) as image:
                pixels = np.asarray(image)
            assert pixels.shape[:2] == (max(item['bbox'][2:]),) * 2
        files = list((tmp_path / 'out' / split).glob('*/*.png'))
        assert len(files) == len(content['annotations'])


def test_counts_are_limited_and_both_sets_have_the_same_classes(data, tmp_path):
    path = data / 'val.json'
    content = json.loads(path.read_text())
    bright = [a for a in content['annotations'] if a['category_id'] == 1]
    content['annotations'] = [a for a in content['annotations'] if a not in bright[1:]]
    path.write_text(json.dumps(content))
    crop(data, tmp_path / 'one', '--max-images', '3')
    assert len(list((tmp_path / 'one/train/bright').iterdir())) == 3
    assert len(list((tmp_path / 'one/val/bright').iterdir())) == 1
    crop(data, tmp_path / 'two', '--min-images', '2')
    for split in ('train', 'val'):
        assert [p.name for p in (tmp_path / 'two' / split).iterdir()] == ['dark']


def test_an_existing_folder_is_kept(data, tmp_path):
    (tmp_path / 'out').mkdir()
    with pytest.raises(SystemExit, match='exists already: give a new folder'):
        crop(data, tmp_path / 'out')


def test_classes_without_images_are_told(data, tmp_path):
    with pytest.raises(SystemExit, match='lower --min-images'):
        crop(data, tmp_path / 'out', '--min-images', '1000')


@pytest.mark.parametrize(
    ('file', 'text'),
    [
        ('train/train_0.png', 'cannot be cut .* repair it'),
        ('val.json', 'cannot be read .* correct'),
    ],
)
def test_damaged_files_are_named(data, tmp_path, file, text):
    (data / file).write_bytes(b'{}')
    with pytest.raises(SystemExit, match=f'{file} {text}'):
        crop(data, tmp_path / 'out')
