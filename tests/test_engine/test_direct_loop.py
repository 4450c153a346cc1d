"""Direct QAT on digits: the same run, files and summary as GPLQ, without the two stages."""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    ARCHITECTURES,
    INTERVAL,
    ITERATIONS,
    ITERATIONS_OF_EPOCH,
    ROOT,
    Killed,
    KillHook,
    assert_same_weights,
    comparable,
    direct_config,
    gplq_config,
    load,
    load_tool,
    read_summary,
    run,
    run_ranks,
    weights,
)

from gplq_mm.checkpoint import CheckpointError
from gplq_mm.engine import unwrap
from gplq_mm.layers import quant_layers
from gplq_mm.models import Stage
from gplq_mm.quant import QuantState

STAGES = {'fp32', 'ptq_w4a4', 'w4a4', 'latent_fp32'}


@pytest.fixture(scope='module')
def direct(tmp_path_factory, float_checkpoints) -> dict[str, Path]:
    """Work dirs of complete direct runs, by architecture."""
    work_dirs = {arch: tmp_path_factory.mktemp(f'direct_{arch}') for arch in ARCHITECTURES}
    for arch, work_dir in work_dirs.items():
        run(direct_config(work_dir, float_checkpoints[arch], arch))
    return work_dirs


@pytest.mark.parametrize('arch', ARCHITECTURES)
class TestWholeRun:
    def test_summary_is_that_of_gplq(self, direct, undisturbed, arch):
        summary, gplq = read_summary(direct[arch]), read_summary(undisturbed[arch])
        assert summary.keys() == gplq.keys()
        assert summary['direct'] == dict(granularity='row', init='observer')
        assert set(summary['top1']) == set(summary['stages'].values()) == STAGES
        assert summary['top1']['fp32'] == gplq['top1']['fp32']
        assert set(summary['feature_distance']) == STAGES - {'fp32'}
        assert summary['act_qat_iterations'] == ITERATIONS
        assert summary['calibration'] == gplq['calibration']
        steps = {'calibration', 'pca', 'baseline', 'direct_qat', 'diagnostics'}
        assert set(summary['seconds']) == steps | {f'evaluation_{name}' for name in STAGES}
        assert summary['weight_drift']['mae'] > 0
        assert set(summary['ptq_error']) == {'without_stage1', 'with_stage1'}

    def test_weights_and_all_scales_move(self, direct, arch):
        before, after = weights(direct[arch], 'calibrated'), weights(direct[arch])
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        for part in ('qkv.weight', 'act_quantizer.scale', 'weight_quantizer.learned.ratio'):
            # Pixels lie on their 8-bit grid already, so the scale of the image has no gradient.
            keys = [k for k in before if k.endswith(part) and 'projection.act_quantizer' not in k]
            assert keys
            assert set(keys) <= moved, part

    def test_checkpoints_describe_themselves(self, direct, arch):
        for name, stage in (('calibrated', 'CALIBRATED'), ('w4a4', 'WEIGHT_PTQ')):
            gplq = load(direct[arch] / f'{name}.pth')['gplq']
            assert gplq['stage'] == stage
            assert gplq['direct'] == read_summary(direct[arch])['direct']
        assert not (direct[arch] / 'w32a4.pth').exists()
        pointer = (direct[arch] / 'last_checkpoint').read_text()
        assert pointer == str(direct[arch] / 'w4a4.pth')


def test_last_forward_of_training_is_what_is_saved(tmp_path, float_checkpoints, monkeypatch):
    """Every weight, and the model's output, right before and right after the end."""
    from gplq_mm.models import GPLQ

    seen = {}
    freeze = GPLQ.freeze_learned_weights

    def look(model):
        model.eval()
        layers = quant_layers(model)
        seen['weights'] = {k: v.training_weight().detach().clone() for k, v in layers.items()}
        with torch.no_grad():
            seen['before'] = model(torch.ones(2, 1, 28, 28))[-1]
            freeze(model)
            seen['after'] = model(torch.ones(2, 1, 28, 28))[-1]

    monkeypatch.setattr(GPLQ, 'freeze_learned_weights', look)
    runner = run(direct_config(tmp_path, float_checkpoints['vit'], train_cfg__max_epochs=1))
    model = unwrap(runner.model)
    assert model.stage == Stage.WEIGHT_PTQ
    assert torch.equal(seen['before'], seen['after'])
    saved = weights(tmp_path)
    for name, layer in quant_layers(model).items():
        assert layer.weight_quantizer.learned.state == QuantState.FROZEN
        codes = saved[f'{name}.weight_quantizer.codes'].double()
        scale = saved[f'{name}.weight_quantizer.row_scale'].double()
        expected = layer.as_matrix(seen['weights'][name]).double()
        assert torch.equal((codes * scale[:, None]).float(), expected.float()), name
        assert codes.abs().max() <= 2 ** (layer.weight_quantizer.spec.bits - 1)


@pytest.mark.parametrize('iteration', [1, INTERVAL, ITERATIONS_OF_EPOCH + 3, ITERATIONS])
def test_death_and_resume(tmp_path, float_checkpoints, direct, iteration):
    cfg = direct_config(tmp_path, float_checkpoints['vit'])
    with pytest.raises(Killed):
        run(cfg, KillHook(iteration))
    run(cfg, resume=True)
    for name in ('calibrated', 'w4a4'):
        assert_same_weights(weights(tmp_path, name), weights(direct['vit'], name))
    assert comparable(read_summary(tmp_path)) == comparable(read_summary(direct['vit']))


def test_death_after_the_integers_were_saved(tmp_path, float_checkpoints, direct, monkeypatch):
    import gplq_mm.engine.loops.quant_loop as loop_module

    def die(*_args):
        raise Killed

    cfg = direct_config(tmp_path, float_checkpoints['vit'])
    monkeypatch.setattr(loop_module, 'weight_drift', die)
    with pytest.raises(Killed):
        run(cfg)
    monkeypatch.undo()
    assert (tmp_path / 'w4a4.pth').is_file()
    run(cfg, resume=True)
    assert_same_weights(weights(tmp_path), weights(direct['vit']))
    assert comparable(read_summary(tmp_path)) == comparable(read_summary(direct['vit']))


def test_no_epochs_is_plain_rounding(tmp_path, float_checkpoints):
    run(direct_config(tmp_path, float_checkpoints['vit'], train_cfg__max_epochs=0))
    summary = read_summary(tmp_path)
    assert summary['weight_drift']['mae'] == 0
    assert summary['feature_distance']['w4a4'] == summary['feature_distance']['ptq_w4a4']


@pytest.mark.parametrize(
    'direct', [dict(granularity='tensor'), dict(granularity='row', init='lsq')]
)
def test_granularity_and_start(tmp_path, float_checkpoints, direct):
    options = dict(model__direct=direct, train_cfg__max_iters=2)
    runner = run(direct_config(tmp_path, float_checkpoints['vit'], **options))
    for layer in quant_layers(unwrap(runner.model)).values():
        learned = layer.weight_quantizer.learned
        assert len(learned.ratio) == (
            1 if direct['granularity'] == 'tensor' else layer.weight_quantizer.shape[0]
        )
    assert 0 <= read_summary(tmp_path)['top1']['w4a4'] <= 100


def evaluate(tmp_path, cfg, checkpoint, *options) -> dict:
    cfg.experiment_name = tmp_path.name
    config, out = tmp_path / 'config.py', tmp_path / 'metrics.json'
    cfg.dump(config)
    arguments = [config, checkpoint, '--out', out, '--work-dir', tmp_path / 'log', *options]
    load_tool('test').main([str(argument) for argument in arguments])
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ('name', 'options', 'state'),
    [
        ('calibrated', (), 'ptq_w4a4'),
        ('w4a4', (), 'w4a4'),
        ('w4a4', ('--latent',), 'latent_fp32'),
        ('calibrated', ('--latent',), 'fp32'),
    ],
)
def test_tool_measures_what_the_run_measured(tmp_path, direct, name, options, state):
    cfg = direct_config(tmp_path, tmp_path / 'gone.pth')
    result = evaluate(tmp_path, cfg, direct['vit'] / f'{name}.pth', *options)
    assert result['top1'] == read_summary(direct['vit'])['top1'][state]
    assert result['state'] == ('latent_fp32' if options else 'w4a4')


def test_files_of_the_other_method_are_refused(float_checkpoints, direct, undisturbed):
    pretrained = float_checkpoints['vit']
    pairs = (
        (direct_config, undisturbed['vit'], r'policy \(it differs in weight\)'),
        (gplq_config, direct['vit'], r'policy \(it differs in weight\)'),
    )
    for config, work_dir, message in pairs:
        cfg = config(work_dir, pretrained)
        with pytest.raises(CheckpointError, match=message):
            run(cfg, resume=True)
    cfg = gplq_config(direct['vit'], pretrained)
    cfg.model.policy.weight = dict(layout='raw')
    with pytest.raises(CheckpointError, match=r"model\.direct={'granularity': 'row'.*has None"):
        run(cfg, resume=True)


def test_loop_and_model_must_agree(tmp_path, float_checkpoints):
    cfg = direct_config(tmp_path, float_checkpoints['vit'])
    cfg.model.direct = None
    with pytest.raises(ValueError, match=r'set model\.direct=dict'):
        run(cfg)
    cfg = gplq_config(tmp_path, float_checkpoints['vit'])
    cfg.model.update(direct={}, compensation=None)
    with pytest.raises(ValueError, match=r'gplq_mm\.DirectQATLoop'):
        run(cfg)


def test_folded_weights_can_be_deployed(tmp_path, float_checkpoints):
    cfg = direct_config(tmp_path, float_checkpoints['vit'], train_cfg__max_epochs=1)
    cfg.model.policy.weight = dict(layout='folded')
    cfg.experiment_name = 'direct_folded'
    run(cfg)
    config, out = tmp_path / 'config.py', tmp_path / 'packed.safetensors'
    cfg.dump(config)
    # It compares the packed model with the simulated one before it puts the file into place.
    load_tool('deploy').main([str(config), str(tmp_path / 'w4a4.pth'), '--out', str(out)])
    assert out.is_file()


@pytest.mark.slow
def test_two_ranks_start_and_end_alike(tmp_path, float_checkpoints, direct):
    cfg = direct_config(tmp_path / 'two', float_checkpoints['vit'], train_cfg__max_iters=3)
    for hook in cfg.custom_hooks[:2]:
        hook.batch_size //= 2
    cfg.train_dataloader.batch_size = 8
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    cfg.dump(tmp_path / 'two_ranks.py')
    arguments = (str(tmp_path / 'two_ranks.py'), '--launcher', 'pytorch')
    process = run_ranks(2, tmp_path, ROOT / 'tools' / 'train.py', *arguments)
    assert process.returncode == 0, process.stderr[-3000:]
    one, two = weights(direct['vit'], 'calibrated'), weights(tmp_path / 'two', 'calibrated')
    for key in one:
        if 'learned' in key:
            assert torch.equal(one[key], two[key]), key
    assert set(read_summary(tmp_path / 'two')['top1']) == STAGES
