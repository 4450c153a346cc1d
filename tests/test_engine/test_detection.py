"""Both stages on a detector: shared heads, images of several sizes, AP after each stage."""

import json
import shutil

import cv2
import numpy as np
import pytest
from tiny_detection import detection_config, train_fp32, write_coco
from tiny_runs import (
    Killed,
    KillHook,
    assert_same_weights,
    build_runner,
    read_summary,
    run,
    weights,
)

from gplq_mm.checkpoint import CheckpointError
from gplq_mm.layers import QuantConvTranspose2d, quant_layers
from gplq_mm.quant import PolicyError

STAGES = {'fp32', 'ptq_w4a4', 'w32a4', 'latent_fp32', 'w4a4'}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('coco')
    write_coco(folder, 'train', 12, seed=0)
    write_coco(folder, 'val', 6, seed=1)
    return folder


@pytest.fixture(scope='module')
def pretrained(data, tmp_path_factory):
    path = tmp_path_factory.mktemp('float') / 'float.pth'
    train_fp32(data, path)
    return path


@pytest.fixture(scope='module')
def whole(data, pretrained, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('whole')
    runner = run(detection_config(work_dir, data, pretrained))
    return work_dir, runner.model


def test_summary_has_the_ap_of_every_stage(whole):
    summary = read_summary(whole[0])
    for name in ('bbox_mAP', 'segm_mAP'):
        assert set(summary[name]) == STAGES
        assert all(-100 <= value <= 100 for value in summary[name].values())
        assert summary[name]['fp32'] == pytest.approx(
            100 * summary['metrics']['fp32'][f'coco/{name}']
        )


def test_everything_is_quantized_and_predictors_have_8_bits(whole):
    layers = quant_layers(whole[1].architecture)
    assert not whole[1].quant_report.excluded
    assert isinstance(layers['roi_head.mask_head.upsample'], QuantConvTranspose2d)
    eight = {name for name, layer in layers.items() if layer.weight_quantizer.spec.bits == 8}
    assert eight == {
        'backbone.patch_embed.projection',
        'rpn_head.rpn_cls',
        'rpn_head.rpn_reg',
        'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.fc_reg',
        'roi_head.mask_head.conv_logits',
    }
    assert all(layer.weight_is_quantized for layer in layers.values())
    assert len(whole[1].quant_report.blocks) == 4


def test_a_killed_run_ends_like_an_undisturbed_one(whole, data, pretrained, tmp_path):
    cfg = detection_config(tmp_path, data, pretrained)
    with pytest.raises(Killed):
        run(cfg, KillHook(6))
    run(cfg, resume=True)
    assert_same_weights(weights(tmp_path), weights(whole[0]))
    for name in ('bbox_mAP', 'segm_mAP'):
        assert read_summary(tmp_path)[name] == read_summary(whole[0])[name]


@pytest.mark.parametrize(
    ('policy', 'parts'),
    [
        ('backbone', {'backbone'}),
        ('backbone_neck', {'backbone', 'neck'}),
        ('strict', {'backbone', 'neck', 'rpn_head', 'roi_head'}),
    ],
)
def test_ready_policies(policy, parts, data, pretrained, tmp_path):
    cfg = detection_config(tmp_path, data, pretrained)
    cfg.model.policy = cfg[f'gplq_policy_{policy}']
    layers = quant_layers(build_runner(cfg).model.architecture)
    assert {name.split('.')[0] for name in layers} == parts
    if policy == 'strict':
        assert {layer.weight_quantizer.spec.bits for layer in layers.values()} == {4}


def test_policy_that_names_a_missing_neck(data, pretrained, tmp_path):
    cfg = detection_config(tmp_path, data, pretrained)
    cfg.model.policy = dict(rules=[dict(pattern=r'^second_neck\.', exclude=True)])
    with pytest.raises(PolicyError, match='second_neck'):
        build_runner(cfg)


def test_batch_sampler_of_mmdet_is_refused(data, pretrained, tmp_path):
    cfg = detection_config(tmp_path, data, pretrained)
    cfg.train_dataloader.batch_sampler = dict(type='AspectRatioBatchSampler')
    with pytest.raises(ValueError, match='batch_sampler=None'):
        build_runner(cfg).train()


def test_checkpoint_with_another_number_of_classes(data, pretrained, tmp_path):
    cfg = detection_config(tmp_path, data, pretrained)
    cfg.model.architecture.roi_head.bbox_head.num_classes = 3
    cfg.model.architecture.roi_head.mask_head.num_classes = 3
    with pytest.raises(CheckpointError, match=r'classifies 2 classes .*set num_classes .* to 2'):
        build_runner(cfg).train()


def test_images_without_and_with_odd_annotations(data, pretrained, tmp_path):
    """Nothing to find, a box outside of the image, a mask of no area, one pixel, a long strip."""
    write_coco(tmp_path, 'train', 5, seed=3)
    shutil.copytree(data / 'val', tmp_path / 'val')
    shutil.copy(data / 'val.json', tmp_path)
    content = json.loads((tmp_path / 'train.json').read_text())
    kept = [a for a in content['annotations'] if a['image_id'] != 0]
    kept[0].update(bbox=[500, 500, 20, 20], segmentation=[[500, 500, 520, 500, 520, 520]])
    kept[1].update(segmentation=[[10, 10, 10, 10, 10, 10]])
    for number, (height, width) in ((3, (1, 1)), (4, (8, 900))):
        image = content['images'][number]
        image.update(height=height, width=width)
        cv2.imwrite(
            str(tmp_path / 'train' / image['file_name']), np.zeros((height, width, 3), np.uint8)
        )
    content['annotations'] = kept
    (tmp_path / 'train.json').write_text(json.dumps(content))
    cfg = detection_config(tmp_path / 'run', tmp_path, pretrained)
    run(cfg)
    assert read_summary(tmp_path / 'run')['act_qat_iterations'] == 5
