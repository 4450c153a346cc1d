"""Linear probes on a frozen W4A4 backbone: whole runs, resuming, evaluation."""

import json

import pytest
import torch
from mmengine.hooks import Hook
from tiny_runs import Killed, load, load_tool, probe_config, run

from gplq_mm.layers import quant_layers

LAST = 'epoch_3.pth'


class KillAtEpoch(Hook):
    """Dies in the second epoch, after the checkpoint of the first."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.epoch == 1 and batch_idx == 2:
            raise Killed


@pytest.fixture(scope='module')
def whole(undisturbed, tmp_path_factory):
    """Work dir and model of an undisturbed probe."""
    work_dir = tmp_path_factory.mktemp('probe')
    runner = run(probe_config(work_dir, undisturbed['vit'] / 'w4a4.pth'))
    return work_dir, runner


def test_only_the_head_has_changed(whole, undisturbed):
    source = load(undisturbed['vit'] / 'w4a4.pth')['state_dict']
    state = load(whole[0] / LAST)['state_dict']
    quantized = [key for key in state if key.startswith('backbone.')]
    assert any(key.endswith('weight_quantizer.codes') for key in quantized)
    for key in quantized:
        assert torch.equal(state[key], source[f'architecture.{key.removeprefix("backbone.")}'])


def test_a_killed_probe_ends_like_an_undisturbed_one(whole, undisturbed, tmp_path):
    cfg = probe_config(tmp_path / 'run', undisturbed['vit'] / 'w4a4.pth')
    with pytest.raises(Killed):
        run(cfg, KillAtEpoch())
    assert not (tmp_path / 'run' / LAST).exists()
    run(cfg, resume=True)
    one, two = (load(path / LAST)['state_dict'] for path in (whole[0], tmp_path / 'run'))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)


def test_the_checkpoint_is_evaluated_as_in_the_run(whole, undisturbed, tmp_path):
    """Without the checkpoint of the backbone: all is in the probe's own."""
    cfg = probe_config(tmp_path, undisturbed['vit'] / 'w4a4.pth')
    cfg.model.backbone.checkpoint = None
    cfg.experiment_name = tmp_path.name
    cfg.dump(tmp_path / 'config.py')
    out = tmp_path / 'result.json'
    arguments = [tmp_path / 'config.py', whole[0] / LAST, '--out', out, '--work-dir', tmp_path]
    load_tool('test').main([str(argument) for argument in arguments])
    history = whole[1].message_hub.get_scalar('val/accuracy/top1').data[0]
    assert json.loads(out.read_text())['top1'] == pytest.approx(history[-1])
    assert quant_layers(whole[1].model)
