from itertools import chain

import numpy as np
import pytest
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
from PIL import Image

from gplq_mm.datasets import ImageNetFolder, LoadImageOrFail
from gplq_mm.datasets.imagenet_folder import fold_of, wnid_to_index
from gplq_mm.errors import DataError, SettingError

# A few known pairs, so that neither list of names can shift unnoticed.
KNOWN = {'n01440764': 0, 'n02102040': 217, 'n02979186': 482, 'n03888257': 701, 'n15075141': 999}


def write_image(path, value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 10, 3), value, np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    write_image(tmp_path / 'n03888257' / 'b.JPEG')
    write_image(tmp_path / 'n03888257' / 'a.png')
    write_image(tmp_path / 'n01440764' / 'c.Jpg')
    (tmp_path / 'n01440764' / 'notes.txt').write_text('no image')
    (tmp_path / '.cache').mkdir()
    return tmp_path


def test_wnids_and_names_are_in_the_same_order():
    indices = wnid_to_index()
    assert list(indices) == sorted(indices)
    assert len(indices) == 1000
    assert {wnid: indices[wnid] for wnid in KNOWN} == KNOWN
    assert IMAGENET_CATEGORIES[217].lower().startswith('english springer')
    assert IMAGENET_CATEGORIES[701].lower().startswith('parachute')


def test_labels_are_1000_way_and_order_is_fixed(folder):
    dataset = ImageNetFolder(data_root=str(folder))
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    names = [info['img_path'].rsplit('/', 1)[1] for info in infos]
    assert names == ['c.Jpg', 'a.png', 'b.JPEG']
    assert [info['gt_label'] for info in infos] == [0, 701, 701]
    assert len(dataset.metainfo['classes']) == 1000


def test_data_prefix_is_below_data_root(folder):
    dataset = ImageNetFolder(data_root=str(folder.parent), data_prefix=folder.name)
    assert len(dataset) == 3


def test_pipeline(folder):
    pipeline = [dict(type='gplq_mm.LoadImageOrFail'), dict(type='PackInputs')]
    packed = ImageNetFolder(data_root=str(folder), pipeline=pipeline)[2]
    assert packed['inputs'].shape == (3, 8, 10)
    assert packed['data_samples'].gt_label.tolist() == [701]


def test_max_images_is_a_seeded_draw(tmp_path):
    for i in range(30):
        write_image(tmp_path / 'n01440764' / f'{i:02d}.png')

    def draw(seed):
        dataset = ImageNetFolder(data_root=str(tmp_path), max_images=10, seed=seed)
        return [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]

    assert draw(0) == draw(0) == sorted(draw(0))
    assert len(set(draw(0))) == 10
    assert draw(0) != draw(1)


def names(root, **kwargs) -> list[str]:
    dataset = ImageNetFolder(data_root=str(root), **kwargs)
    return [dataset.get_data_info(i)['img_path'].rsplit('/', 1)[1] for i in range(len(dataset))]


def test_folds_part_the_photos_and_a_photo_stays_in_its_own(tmp_path):
    for i in range(60):
        write_image(tmp_path / ('n01440764', 'n01443537')[i % 2] / f'{i:02d}.png')
    folds = [names(tmp_path, fold=f'{i}/3') for i in range(3)]
    assert sorted(chain(*folds)) == [f'{i:02d}.png' for i in range(60)]
    assert all(10 < len(fold) < 30 for fold in folds)
    rest = names(tmp_path, without_fold='1/3')
    assert sorted(rest) == sorted(folds[0] + folds[2])
    assert names(tmp_path, without_fold='1/3', fold='0/2') == [
        name for name in rest if name in names(tmp_path, fold='0/2')
    ]
    for i in range(60, 80):
        write_image(tmp_path / 'n01440764' / f'{i:02d}.png')
    assert set(folds[0]) <= set(names(tmp_path, fold='0/3'))
    assert len(names(tmp_path, fold='0/3', max_images=3)) == 3


@pytest.mark.parametrize('fold', ['5/5', '0', '0/1', '1/0', '-1/5', 'a/b', '0/5/5', ''])
@pytest.mark.parametrize('argument', ['fold', 'without_fold'])
def test_no_fold(folder, argument, fold):
    with pytest.raises(SettingError, match='is not of the form INDEX/COUNT'):
        ImageNetFolder(data_root=str(folder), **{argument: fold})


@pytest.mark.parametrize('argument', ['fold', 'without_fold'])
def test_empty_fold(tmp_path, argument):
    own = fold_of(write_image(tmp_path / 'n01440764' / 'a.png'), 2)
    empty = f'{1 - own if argument == "fold" else own}/2'
    with pytest.raises(DataError, match=rf'no photo of .* is left with {argument}={empty}'):
        ImageNetFolder(data_root=str(tmp_path), **{argument: empty})


@pytest.mark.parametrize('max_images', [0, -1, 4])
def test_max_images_out_of_range(folder, max_images):
    with pytest.raises(ValueError, match=rf'max_images={max_images} is not in 1\.\.3'):
        ImageNetFolder(data_root=str(folder), max_images=max_images)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nowhere does not exist.*GPLQ_IMAGENETTE.*cfg-op'):
        ImageNetFolder(data_root=str(tmp_path / 'nowhere'))


def test_parent_of_train_and_val(tmp_path):
    write_image(tmp_path / 'train' / 'n01440764' / 'a.png')
    with pytest.raises(FileNotFoundError, match=r'WordNet id such as n01440764.*\.\.\./train'):
        ImageNetFolder(data_root=str(tmp_path))


@pytest.mark.parametrize('name', ['n00000001', 'tench'])
def test_unknown_class_folder(folder, name):
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=rf'1 subfolder.*no ImageNet-1k class \({name}\)'):
        ImageNetFolder(data_root=str(folder))


def test_no_images(tmp_path):
    (tmp_path / 'n01440764').mkdir()
    with pytest.raises(FileNotFoundError, match=r'hold no \.jpg/\.jpeg/\.png file'):
        ImageNetFolder(data_root=str(tmp_path))


@pytest.mark.parametrize('fault', ['truncated', 'empty', 'text', 'missing'])
@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_bad_image_file_is_named(tmp_path, fault, suffix):
    path = tmp_path / f'photo{suffix}'
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    if fault == 'truncated':
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif fault == 'empty':
        path.write_bytes(b'')
    elif fault == 'text':
        path.write_text('<html>404</html>')
    else:
        path.unlink()
    with pytest.raises(ValueError, match=rf'photo\{suffix} cannot be read as an image'):
        LoadImageOrFail()(dict(img_path=str(path)))


def test_imagenette(shared_data):
    dataset = ImageNetFolder(data_root=str(shared_data / 'imagenette'), data_prefix='val')
    labels = dataset.get_gt_labels()
    assert len(dataset) == 500
    assert sorted(set(labels)) == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
