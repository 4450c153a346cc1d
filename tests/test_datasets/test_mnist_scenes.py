import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

from gplq_mm.datasets import MNISTScenes, SeededDataset
from gplq_mm.registry import DATASETS


@pytest.fixture(scope='module')
def scenes():
    return MNISTScenes(split='val', num_scenes=40, serialize_data=False)


def test_boxes_and_masks_fit_the_digits(scenes):
    for scene in scenes:
        assert scene['img'].shape == (96, 96)
        assert scene['img'].dtype == np.uint8
        assert 1 <= len(scene['instances']) <= 6
        covered = np.zeros((96, 96), int)
        for instance in scene['instances']:
            mask = coco_mask.decode(instance['mask']).astype(bool)
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert instance['bbox'] == box
            assert (scene['img'][mask] >= 64).all()
            covered += mask
        # Every pixel of ink belongs to exactly one digit.
        assert np.array_equal(covered, (scene['img'] >= 64).astype(int))


def test_all_classes_occur(scenes):
    labels = {instance['bbox_label'] for scene in scenes for instance in scene['instances']}
    assert labels == set(range(10))


def test_scene_depends_on_seed_split_and_index_only(scenes):
    np.random.seed(5)
    longer = MNISTScenes(split='val', num_scenes=41, serialize_data=False)
    assert np.array_equal(longer[7]['img'], scenes[7]['img'])
    assert longer[7]['instances'] == scenes[7]['instances']
    for other in (dict(split='train'), dict(split='val', seed=1)):
        scene = MNISTScenes(num_scenes=8, serialize_data=False, **other)[7]
        assert not np.array_equal(scene['img'], scenes[7]['img'])


def packed(**kwargs):
    pipeline = [
        dict(type='Resize', scale=(96, 96), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(
            type='PackDetInputs',
            meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances'),
        ),
    ]
    with DefaultScope.overwrite_default_scope('mmdet'):
        return DATASETS.build(
            dict(type='gplq_mm.MNISTScenes', num_scenes=4, pipeline=pipeline, **kwargs)
        )


def test_mmdet_pipeline():
    dataset = SeededDataset(packed(split='train'), seed=0)
    sample = dataset[2]
    truth = sample['data_samples'].gt_instances
    assert sample['inputs'].shape == (1, 96, 96)
    assert len(truth.bboxes) == len(truth.masks) == len(dataset.get_data_info(2)['instances'])


@pytest.mark.parametrize('shift', [0, 3])
def test_coco_metric_needs_no_file(shift):
    """The truth as prediction has AP 1; moved by three pixels it has less."""
    dataset = packed(split='val')
    metric = CocoMetric(metric=['bbox', 'segm'])
    metric.dataset_meta = dataset.metainfo
    for sample in dataset:
        element = sample['data_samples']
        truth = element.gt_instances
        masks = np.roll(truth.masks.masks, shift, 2).astype(bool)
        element.pred_instances = InstanceData(
            bboxes=truth.bboxes.tensor + shift,
            labels=truth.labels,
            scores=truth.labels * 0 + 1.0,
            masks=torch.from_numpy(masks),
        )
        metric.process({}, [element.to_dict()])
    result = metric.evaluate(len(dataset))
    for key in ('coco/bbox_mAP', 'coco/segm_mAP'):
        assert result[key] == 1.0 if shift == 0 else result[key] < 0.9


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(split='test', num_scenes=1), "'train' and 'val', got split='test'"),
        (dict(split='val', num_scenes=0), 'num_scenes >= 1.*got 0'),
        (dict(split='val', num_scenes=1, size=31), 'size >= 32'),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        MNISTScenes(**options)
