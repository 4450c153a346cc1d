"""RepQ-ViT in the pipeline of a run: files, resume, tools, and training on top of it."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_detection import detection_config, train_fp32, write_coco
from tiny_runs import (
    ARCHITECTURES,
    INTERVAL,
    KillAt,
    Killed,
    KillHook,
    assert_same_weights,
    comparable,
    gplq_config,
    load,
    load_tool,
    read_summary,
    run,
    weights,
)

from gplq_mm.checkpoint import CheckpointError
from gplq_mm.engine import unwrap
from gplq_mm.layers import act_quantizers

NORMS = {'vit': 4, 'swin': 7}


def repq_config(work_dir: Path, pretrained_file: Path, arch: str, **options):
    cfg = gplq_config(work_dir, pretrained_file, arch)
    cfg.model.policy = dict(preset='repq')
    cfg.model.update(mimic=None, compensation=None)
    cfg.train_cfg.update(max_epochs=0, baseline=None)
    cfg.train_cfg.weight_ptq = dict(type='RoundToNearest', num_images=16, batch_size=16)
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return cfg


@pytest.fixture(scope='module')
def repq(tmp_path_factory, float_checkpoints) -> dict[str, Path]:
    """Work dirs of complete runs, by architecture."""
    work_dirs = {arch: tmp_path_factory.mktemp(f'repq_{arch}') for arch in ARCHITECTURES}
    for arch, work_dir in work_dirs.items():
        run(repq_config(work_dir, float_checkpoints[arch], arch))
    return work_dirs


@pytest.mark.parametrize('arch', ARCHITECTURES)
class TestWholeRun:
    def test_function_of_the_latent_weights_is_that_of_the_teacher(self, repq, undisturbed, arch):
        summary = read_summary(repq[arch])
        assert set(summary['top1']) == {'fp32', 'w32a4', 'latent_fp32', 'w4a4'}
        assert summary['top1']['latent_fp32'] == summary['top1']['fp32']
        assert summary['top1']['fp32'] == read_summary(undisturbed[arch])['top1']['fp32']
        distance = summary['feature_distance']
        assert distance['latent_fp32']['relative_l2'] < 1e-5
        assert distance['w32a4']['relative_l2'] > 0.01
        assert summary['weight_drift']['mae'] < 1e-8
        assert summary['policy']['activations']['linear']['reparametrize']
        assert summary['images']['seen'] == 32 + 16

    def test_norms_were_reparametrized(self, repq, float_checkpoints, arch):
        state = weights(repq[arch])
        grids = [key for key in state if key.endswith('channel_scale')]
        assert len(grids) == NORMS[arch]
        before = load(float_checkpoints[arch])['state_dict']
        for key in grids:
            layer = key.removesuffix('.act_quantizer.channel_scale')
            old = before[f'{layer.removeprefix("architecture.")}.weight'].double()
            scale = state[key].double()
            expected = old * (scale / scale.mean())
            torch.testing.assert_close(
                state[f'{layer}.weight'].double(), expected, rtol=1e-6, atol=0
            )
            assert state[f'{layer}.act_quantizer.scale'].item() == pytest.approx(
                scale.mean().item()
            )

    def test_every_scale_is_one_of_a_tensor(self, repq, arch):
        state = weights(repq[arch])
        scales = [v for k, v in state.items() if k.endswith(('act_quantizer.scale', 'probs.scale'))]
        assert len(scales) > 10
        assert all(scale.numel() == 1 for scale in scales)

    @pytest.mark.parametrize(
        ('name', 'options', 'state'),
        [
            ('calibrated', ('--latent',), 'latent_fp32'),
            ('w32a4', (), 'w32a4'),
            ('w4a4', (), 'w4a4'),
            ('w4a4', ('--latent',), 'latent_fp32'),
        ],
    )
    def test_tool_measures_the_same(self, repq, tmp_path, arch, name, options, state):
        cfg = repq_config(repq[arch], tmp_path / 'gone.pth', arch)
        cfg.experiment_name = tmp_path.name
        cfg.dump(tmp_path / 'config.py')
        tool = load_tool('test')
        arguments = [tmp_path / 'config.py', repq[arch] / f'{name}.pth', '--work-dir', tmp_path]
        result = tool.evaluate(tool.parse_args([*map(str, arguments), *options]))
        assert result['state'] == state
        assert result['top1'] == read_summary(repq[arch])['top1'][state]

    @pytest.mark.parametrize('count', [1, 2])
    def test_resumed_run_ends_alike(self, repq, float_checkpoints, tmp_path, arch, count):
        cfg = repq_config(tmp_path, float_checkpoints[arch], arch)
        with pytest.raises(Killed):
            run(cfg, KillAt('before_save_checkpoint', count))
        run(cfg, resume=True)
        for name in ('calibrated', 'w32a4', 'w4a4'):
            assert_same_weights(weights(tmp_path, name), weights(repq[arch], name))
        assert comparable(read_summary(tmp_path)) == comparable(read_summary(repq[arch]))


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_training_on_top_resumes_bit_by_bit(tmp_path, float_checkpoints, arch):
    runs = {}
    for name in ('whole', 'killed'):
        runs[name] = repq_config(
            tmp_path / name, float_checkpoints[arch], arch, train_cfg__max_epochs=1
        )
    run(runs['whole'])
    with pytest.raises(Killed):
        run(runs['killed'], KillHook(INTERVAL + 1))
    run(runs['killed'], resume=True)
    first, second = (weights(tmp_path / name) for name in runs)
    assert_same_weights(first, second)
    summary = read_summary(tmp_path / 'whole')
    # In the float model's terms: the factors of the reparametrization are no drift.
    assert 0 < summary['weight_drift']['mae'] < 5e-3


def test_qwt_follows(tmp_path, float_checkpoints):
    cfg = repq_config(tmp_path, float_checkpoints['swin'], 'swin')
    cfg.model.compensation = dict(type='QwT')
    run(cfg)
    assert read_summary(tmp_path)['weight_ptq']['compensation_r2']


def deploy(tmp_path, cfg, checkpoint) -> Path:
    cfg.dump(tmp_path / 'config.py')
    out = tmp_path / 'packed.safetensors'
    arguments = (tmp_path / 'config.py', checkpoint, '--out', out)
    load_tool('deploy').main([str(argument) for argument in arguments])
    return out


def test_raw_weights_are_not_packed(repq, tmp_path):
    cfg = repq_config(tmp_path, tmp_path / 'gone.pth', 'swin')
    with pytest.raises(SystemExit, match=r'DeployError: .*layout "raw"') as caught:
        deploy(tmp_path, cfg, repq['swin'] / 'w4a4.pth')
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_folded_weights_are_packed(tmp_path, float_checkpoints, arch, capsys):
    options = dict(model__policy__weight=dict(layout='folded'))
    cfg = repq_config(tmp_path / 'run', float_checkpoints[arch], arch, **options)
    run(cfg)
    # It compares the packed model with the simulated one before it puts the file into place.
    assert deploy(tmp_path, cfg, tmp_path / 'run' / 'w4a4.pth').is_file()
    assert 'probs is log_sqrt2' in capsys.readouterr().out


def test_backbone_takes_the_checkpoint(repq, float_checkpoints, tmp_path):
    from mmengine.registry import MODELS
    from tiny_runs import BACKBONES

    from gplq_mm.engine import load_run_weights

    cfg = repq_config(tmp_path, float_checkpoints['swin'], 'swin')
    path = str(repq['swin'] / 'w4a4.pth')
    backbone = MODELS.build(
        dict(
            type='gplq_mm.QuantBackbone',
            backbone=copy.deepcopy(BACKBONES['swin']),
            checkpoint=path,
            policy=dict(preset='repq'),
            frozen=True,
        )
    )
    backbone.init_weights()
    model = MODELS.build({**cfg.model, 'teacher': False}).eval()
    load_run_weights(model, load(path), path)
    x = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(backbone.eval()(x)[0], model.architecture.backbone(x)[0])


def test_new_task_begins_with_a_reparametrized_backbone(repq, tmp_path):
    """Calibrated again on other data: what the first calibration has moved stays where it is."""
    cfg = repq_config(tmp_path, tmp_path / 'gone.pth', 'swin')
    cfg.model.update(pretrained=None, backbone_from=str(repq['swin'] / 'w32a4.pth'))
    runner = run(cfg)
    model = unwrap(runner.model)
    assert model.teacher.backbone.stages[0].downsample.reduction.bias is not None
    assert read_summary(tmp_path)['weight_drift']['mae'] < 1e-8
    distance = read_summary(tmp_path)['feature_distance']
    assert distance['latent_fp32']['relative_l2'] < 1e-5


def test_another_preset_is_another_policy(repq, tmp_path, float_checkpoints):
    cfg = gplq_config(repq['vit'], float_checkpoints['vit'])
    with pytest.raises(CheckpointError, match='another policy'):
        run(cfg, resume=True)


def test_detector(tmp_path):
    """Images of several sizes, whose windows are padded; box and mask AP after every stage."""
    write_coco(tmp_path, 'train', 6, seed=0)
    write_coco(tmp_path, 'val', 3, seed=1)
    train_fp32(tmp_path, tmp_path / 'float.pth', steps=30)
    cfg = detection_config(tmp_path / 'run', tmp_path, tmp_path / 'float.pth')
    cfg.model.policy = dict(preset='repq', rules=cfg.gplq_policy.rules)
    cfg.model.compensation = None
    cfg.train_cfg.update(max_epochs=0, baseline=None)
    cfg.train_cfg.weight_ptq.type = 'RoundToNearest'
    runner = run(cfg)
    summary = read_summary(tmp_path / 'run')
    for metric in ('bbox_mAP', 'segm_mAP'):
        assert summary[metric]['latent_fp32'] == pytest.approx(summary[metric]['fp32'], abs=1.0)
    quantizers = act_quantizers(unwrap(runner.model).architecture)
    done = [name for name, q in quantizers.items() if q.channel_scale is not None]
    # Two LayerNorms a block, and three mergings.
    assert len(done) == 4 * 2 + 3
    assert all(name.startswith('backbone.') for name in done)
