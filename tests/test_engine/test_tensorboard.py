"""Scalars of a GPLQ run in TensorBoard, by mmengine's own backend."""

import pytest
from mmengine.config import DictAction
from tiny_runs import gplq_config, run

OPTION = 'visualizer.vis_backends.0.type=TensorboardVisBackend'


@pytest.fixture(scope='module')
def scalars(tmp_path_factory, float_checkpoints):
    """Tag -> list of (step, value)."""
    pytest.importorskip('tensorboard', reason='pip install .[tensorboard]')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    work_dir = tmp_path_factory.mktemp('tensorboard')
    cfg = gplq_config(work_dir, float_checkpoints['vit'], train_cfg__max_epochs=1)
    # As the command line changes it.
    key, _, value = OPTION.partition('=')
    cfg.merge_from_dict({key: DictAction._parse_iterable(value)})
    run(cfg)
    (events,) = work_dir.glob('*/vis_data/events.out.tfevents.*')
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()['scalars']
    }


def test_losses(scalars):
    assert [step for step, _ in scalars['loss']] == [1, 2, 3, 4, 5, 6]
    assert all(value > 0 for _, value in scalars['loss_pca_mimic'])


def test_quantizers(scalars):
    name = 'quant/backbone.layers.0.attn.qkv.act_quantizer'
    assert [step for step, _ in scalars[f'{name}/sqnr_db']] == [1, 6]
    assert all(0 <= value < 0.5 for _, value in scalars[f'{name}/clip_rate'])
    assert scalars['quant_sqnr_db']


def test_weight_drift(scalars):
    steps = [step for step, _ in scalars['weight_drift/mae']]
    assert steps == [1, 6]
    assert 'weight_drift/backbone.layers.1.ffn.layers.1/mse' in scalars


def test_accuracy(scalars):
    assert len(scalars['accuracy/top1']) >= 4
