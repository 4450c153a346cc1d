"""tools/test.py measures, for every state, what the run itself measured."""

import json

import pytest
from tiny_runs import ARCHITECTURES, fp32_config, gplq_config, load_tool, read_summary

from gplq_mm.evaluation import Decisions


def evaluate(tmp_path, cfg, checkpoint, *options) -> dict:
    cfg.experiment_name = tmp_path.name
    config, out = tmp_path / 'config.py', tmp_path / 'sub' / 'metrics.json'
    cfg.dump(config)
    arguments = [config, checkpoint, '--out', out, '--work-dir', tmp_path / 'log', *options]
    load_tool('test').main([str(argument) for argument in arguments])
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ('name', 'options', 'state'),
    [
        ('w32a4', (), 'w32a4'),
        ('w4a4', (), 'w4a4'),
        ('w4a4', ('--latent',), 'latent_fp32'),
        ('w32a4', ('--latent',), 'latent_fp32'),
    ],
)
@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_states_of_a_run(tmp_path, undisturbed, float_checkpoints, arch, name, options, state):
    work_dir = undisturbed[arch]
    # The checkpoint is enough: what trained it need not be here.
    cfg = gplq_config(work_dir, tmp_path / 'gone.pth', arch)
    result = evaluate(tmp_path, cfg, work_dir / f'{name}.pth', *options)
    summary = read_summary(work_dir)
    assert result['state'] == state
    assert result['top1'] == summary['top1'][state]
    assert result['metrics']['accuracy/top1'] == result['top1']
    assert result['checkpoint'] == str(work_dir / f'{name}.pth')


def test_calibrated(tmp_path, undisturbed, float_checkpoints):
    work_dir = undisturbed['vit']
    cfg = gplq_config(work_dir, float_checkpoints['vit'])
    result = evaluate(tmp_path, cfg, work_dir / 'calibrated.pth')
    assert result['state'] == 'w32a4'
    assert 0 <= result['top1'] <= 100


@pytest.mark.parametrize(('options', 'state'), [((), 'w4a4'), (('--latent',), 'latent_fp32')])
def test_decisions_are_those_of_the_run(tmp_path, undisturbed, options, state):
    work_dir, file = undisturbed['vit'], tmp_path / 'sub' / 'decisions.csv'
    cfg = gplq_config(work_dir, tmp_path / 'gone.pth')
    result = evaluate(tmp_path, cfg, work_dir / 'w4a4.pth', '--decisions', file, *options)
    own = Decisions.from_csv(file.read_text())
    of_run = Decisions.from_csv((work_dir / 'decisions.csv').read_text())
    assert own.predictions == {state: of_run.predictions[state]}
    assert (own.images, own.labels) == (of_run.images, of_run.labels)
    assert 100 * own.correct(state).mean() == pytest.approx(result['top1'])


@pytest.mark.parametrize('quantized', [False, True])
def test_float_checkpoint(tmp_path, undisturbed, float_checkpoints, quantized):
    """With the float model's config, and with that of the run that quantizes it."""
    path = float_checkpoints['vit']
    cfg = gplq_config(tmp_path, path) if quantized else fp32_config('vit')
    result = evaluate(tmp_path, cfg, path)
    assert result['state'] == 'fp32'
    assert result['top1'] == read_summary(undisturbed['vit'])['top1']['fp32']


def test_calibrated_latent_weights_are_the_float_ones(tmp_path, undisturbed):
    work_dir = undisturbed['vit']
    cfg = gplq_config(work_dir, tmp_path / 'gone.pth')
    result = evaluate(tmp_path, cfg, work_dir / 'calibrated.pth', '--latent')
    assert result['state'] == 'latent_fp32'
    assert result['top1'] == read_summary(work_dir)['top1']['fp32']
