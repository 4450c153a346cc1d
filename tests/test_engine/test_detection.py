"""Both stages on a detector: shared heads, images of several sizes, AP after each stage."""

import copy
import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from tiny_detection import detection_config, train_fp32, write_coco
from tiny_runs import (
    ROOT,
    KillAt,
    Killed,
    KillHook,
    assert_same_weights,
    build_runner,
    die_in_weight_ptq,
    load,
    load_tool,
    read_summary,
    run,
    run_ranks,
    weights,
)

from gplq_mm.checkpoint import CheckpointError
from gplq_mm.errors import DataError, SettingError
from gplq_mm.layers import QuantConvTranspose2d, quant_layers, quantizers_disabled
from gplq_mm.quant import PolicyError

STAGES = {'fp32', 'ptq_w4a4', 'w32a4', 'latent_fp32', 'w4a4'}


def mimicking(cfg):
    """Switches the mimicking of the pyramid's levels on."""
    cfg.model.update(feature_layer='neck', mimic=dict(cfg.gplq_mimic_maps, num_components=4))
    return cfg


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
    runner = run(mimicking(detection_config(work_dir, data, pretrained)))
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


def test_a_killed_run_ends_like_an_undisturbed_one(whole, data, pretrained, tmp_path, monkeypatch):
    cfg = mimicking(detection_config(tmp_path, data, pretrained))
    with pytest.raises(Killed):
        run(cfg, KillHook(6))
    # Then between the stages, and in Weight-PTQ.
    with pytest.raises(Killed):
        run(cfg, KillAt('before_save_checkpoint'), resume=True)
    assert not (tmp_path / 'w32a4.pth').exists()
    with monkeypatch.context() as patch:
        die_in_weight_ptq(patch, 3)
        with pytest.raises(Killed):
            run(cfg, resume=True)
    assert (tmp_path / 'last_checkpoint').read_text().endswith('w32a4.pth')
    run(cfg, resume=True)
    assert_same_weights(weights(tmp_path), weights(whole[0]))
    for name in ('bbox_mAP', 'segm_mAP'):
        assert read_summary(tmp_path)[name] == read_summary(whole[0])[name]


def test_mimicking_has_one_basis_for_all_levels(whole):
    summary = read_summary(whole[0])
    assert summary['pca']['num_components'] == 4
    assert len(summary['pca']['spectrum']) == 16
    assert 0 < summary['pca']['explained_variance'] <= 1
    # No single decision to compare.
    assert summary['feature_distance'] == {}


def test_mimicking_reads_the_neck(whole, data, pretrained, tmp_path):
    model = build_runner(mimicking(detection_config(tmp_path, data, pretrained))).model
    model.init_weights()
    image = torch.randn(1, 3, 64, 96)
    maps, again = model.eval().teacher_outputs(image)
    assert [tuple(m.shape[1:]) for m in maps][:2] == [(16, 16, 24), (16, 8, 12)]
    assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))
    wanted = model.teacher.neck(model.teacher.backbone(image))
    assert all(torch.equal(a, b) for a, b in zip(maps, wanted, strict=True))


def test_mimicking_is_off_by_default(data, pretrained, tmp_path):
    model = build_runner(detection_config(tmp_path, data, pretrained)).model
    assert model.mimic_loss is None
    assert model.mimicry.tap is None


def test_losses_of_every_level_are_weighed(data, pretrained, tmp_path):
    runner = build_runner(detection_config(tmp_path, data, pretrained))
    model = runner.model
    model.init_weights()
    batch = model.data_preprocessor(next(iter(runner.train_dataloader)), True)
    found = []
    for weight in (1.0, 0.25):
        model.mimicry.task_weight = weight
        # Proposals are drawn at random.
        torch.manual_seed(0)
        np.random.seed(0)
        with quantizers_disabled(model):
            losses = model(**copy.deepcopy(batch), mode='loss')
        found.append({key: value for key, value in losses.items() if 'loss' in key})
    assert isinstance(found[0]['loss_rpn_cls'], list)
    for key, value in found[0].items():
        values = value if isinstance(value, list) else [value]
        weighed = found[1][key] if isinstance(value, list) else [found[1][key]]
        torch.testing.assert_close(weighed, [0.25 * part for part in values])


@pytest.mark.parametrize(
    ('settings', 'text'),
    [
        (dict(mimic={}, feature_layer='second_neck'), 'no layer of the architecture'),
        (dict(mimic={}, feature_layer='backbone'), r'set mimic\.dim'),
        (dict(distill={}, feature_layer='neck'), 'distill=None'),
    ],
)
def test_mimicking_of_what_there_is_not(settings, text, data, pretrained, tmp_path):
    cfg = detection_config(tmp_path, data, pretrained)
    cfg.model.update(settings)
    with pytest.raises(ValueError, match=text):
        build_runner(cfg)


def test_a_detector_mimics_its_neck_unless_told_otherwise(data, pretrained, tmp_path):
    cfg = mimicking(detection_config(tmp_path, data, pretrained))
    cfg.model.pop('feature_layer')
    model = build_runner(cfg).model
    assert model.mimicry.taps_maps
    assert model.mimic_loss is not None


def test_two_ranks_have_the_basis_of_one(data, pretrained, tmp_path):
    """Ranks see images of other sizes, so other numbers of places."""
    for ranks in (1, 2):
        cfg = mimicking(detection_config(tmp_path / str(ranks), data, pretrained))
        cfg.env_cfg.dist_cfg.backend = 'gloo'
        cfg.train_cfg.update(baseline=None)
        cfg.custom_hooks[-1].num_images = 7
        path = tmp_path / f'{ranks}.py'
        cfg.dump(path)
        result = run_ranks(ranks, tmp_path, ROOT / 'tests' / 'pca_ranks.py', str(path))
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = (load(tmp_path / str(ranks) / 'basis.pth') for ranks in (1, 2))
    assert int(one['num_components']) == 4
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5, msg=key)


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


def test_neck_policy_on_a_model_without_neck(data, pretrained, tmp_path):
    cfg = detection_config(tmp_path, data, pretrained)
    cfg.model.policy = cfg.gplq_policy_backbone_neck
    cfg.model.architecture.neck = None
    with pytest.raises(PolicyError, match=r"'\^neck.*matches"):
        build_runner(cfg)


@pytest.mark.parametrize('part', ['train', 'val'])
def test_data_set_with_another_number_of_classes(part, data, pretrained, tmp_path):
    cfg = detection_config(tmp_path, data, pretrained)
    dataset = cfg[f'{part}_dataloader'].dataset
    dataset = dataset.dataset if part == 'train' else dataset
    dataset.metainfo = dict(classes=('bright', 'dark', 'grey'))
    wanted = rf'bbox_head predicts 2 classes .* {part}_dataloader has 3 \(bright, dark, grey\)'
    with pytest.raises(SettingError, match=wanted):
        build_runner(cfg).train()
    assert not list(tmp_path.glob('*.pth'))


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


def make_odd(folder, split) -> None:
    """Nothing to find, box outside or of no width, masks of no area, odd sizes of images.

    These are one pixel, a long strip, and 12 megapixels.
    """
    path = folder / f'{split}.json'
    content = json.loads(path.read_text())
    kept = [a for a in content['annotations'] if a['image_id'] != 0]
    kept[0].update(bbox=[500, 500, 20, 20], segmentation=[[500, 500, 520, 500, 520, 520]])
    kept[1].update(segmentation=[[10, 10, 10, 10, 10, 10]])
    if split == 'train':
        kept[2].update(segmentation=[[10, 10, 20, 20]])
    kept[3].update(bbox=[5, 5, 0, 10])
    for number, (height, width) in ((3, (1, 1)), (4, (8, 900)), (5, (3000, 4000))):
        image = content['images'][number]
        image.update(height=height, width=width)
        pixels = np.zeros((height, width, 3), np.uint8)
        cv2.imwrite(str(folder / split / image['file_name']), pixels)
    content['annotations'] = kept
    path.write_text(json.dumps(content))


def test_images_without_and_with_odd_annotations(data, pretrained, tmp_path):
    write_coco(tmp_path, 'train', 6, seed=3)
    shutil.copytree(data / 'val', tmp_path / 'val')
    shutil.copy(data / 'val.json', tmp_path)
    make_odd(tmp_path, 'train')
    run(mimicking(detection_config(tmp_path / 'run', tmp_path, pretrained)))
    assert read_summary(tmp_path / 'run')['act_qat_iterations'] == 6


def evaluate(cfg, checkpoint, folder, *options) -> dict:
    """What tools/test.py finds."""
    folder.mkdir(exist_ok=True)
    cfg.experiment_name = folder.name
    cfg.dump(folder / 'config.py')
    out = folder / 'result.json'
    arguments = [folder / 'config.py', checkpoint, '--out', out, '--work-dir', folder, *options]
    load_tool('test').main([str(argument) for argument in arguments])
    return json.loads(out.read_text())


def test_odd_images_are_evaluated(whole, data, pretrained, tmp_path):
    write_coco(tmp_path, 'val', 8, seed=3)
    make_odd(tmp_path, 'val')
    cfg = mimicking(detection_config(tmp_path / 'run', tmp_path, pretrained))
    result = evaluate(cfg, whole[0] / 'w4a4.pth', tmp_path / 'evaluation')
    assert result['state'] == 'w4a4'
    assert 0 <= result['bbox_mAP'] <= 100


def test_decisions_are_those_of_classifiers(whole, data, pretrained, tmp_path):
    assert not (whole[0] / 'decisions.csv').exists()
    assert read_summary(whole[0])['difference_to_fp32'] == {}
    cfg = mimicking(detection_config(tmp_path / 'run', data, pretrained))
    file = tmp_path / 'decisions.csv'
    with pytest.raises(SystemExit, match=r'of classifiers only, .* leave --decisions out'):
        evaluate(cfg, whole[0] / 'w4a4.pth', tmp_path / 'evaluation', '--decisions', file)
    assert not file.exists()


def test_a_mask_that_cannot_be_evaluated(data, pretrained, tmp_path):
    shutil.copytree(data / 'val', tmp_path / 'val')
    content = json.loads((data / 'val.json').read_text())
    content['annotations'][2]['segmentation'] = [[10, 10, 20, 20]]
    (tmp_path / 'val.json').write_text(json.dumps(content))
    cfg = detection_config(tmp_path / 'run', tmp_path, pretrained)
    cfg.train_dataloader.dataset.dataset.data_root = str(data)
    with pytest.raises(DataError, match=r'1 annotation.* of val_evaluator .* id 3 of image 1: rem'):
        build_runner(cfg).train()
    assert not list(tmp_path.glob('run/*.pth'))


def test_evaluation_without_a_single_annotation(whole, data, pretrained, tmp_path):
    shutil.copytree(data / 'val', tmp_path / 'val')
    content = json.loads((data / 'val.json').read_text())
    (tmp_path / 'val.json').write_text(json.dumps({**content, 'annotations': []}))
    cfg = mimicking(detection_config(tmp_path / 'run', tmp_path, pretrained))
    result = evaluate(cfg, whole[0] / 'w4a4.pth', tmp_path / 'evaluation')
    # What COCO's evaluation says where there is nothing to measure.
    assert result['metrics']['coco/bbox_mAP'] == -1


def test_training_without_a_single_annotation(data, pretrained, tmp_path):
    shutil.copytree(data, tmp_path / 'data')
    content = json.loads((data / 'train.json').read_text())
    (tmp_path / 'data' / 'train.json').write_text(json.dumps({**content, 'annotations': []}))
    cfg = detection_config(tmp_path / 'run', tmp_path / 'data', pretrained)
    cfg.train_dataloader.dataset.dataset.filter_cfg = dict(filter_empty_gt=True)
    with pytest.raises(
        ValueError, match=r'no image is left in .*train\.json: correct .*filter_empty_gt'
    ):
        build_runner(cfg).train()


def test_evaluation_on_another_number_of_classes(whole, data, pretrained, tmp_path):
    cfg = mimicking(detection_config(tmp_path / 'run', data, pretrained))
    cfg.test_dataloader = copy.deepcopy(cfg.test_dataloader)
    cfg.test_dataloader.dataset.metainfo = dict(classes=('bright', 'dark', 'grey'))
    with pytest.raises(SystemExit, match=r'predicts 2 classes .* test_dataloader has 3'):
        evaluate(cfg, whole[0] / 'w4a4.pth', tmp_path / 'evaluation')
