"""A config and a call give the same integers: one implementation, two doors."""

import torch
from tiny_runs import gplq_config, run, weights

import gplq_mm
from gplq_mm.checkpoint import load_float_weights
from gplq_mm.engine import CalibrationSet, unwrap
from gplq_mm.layers import quant_layers
from gplq_mm.registry import MODELS


def test_without_training(tmp_path, float_checkpoints):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'], train_cfg__max_epochs=0)
    cfg.custom_hooks[0].update(num_images=64, batch_size=32)
    runner = run(cfg)
    found = unwrap(runner.model)
    model = MODELS.build({**cfg.model.architecture, 'data_preprocessor': cfg.data_preprocessor})
    load_float_weights(model, float_checkpoints['vit'])
    loader = CalibrationSet.from_runner(runner, 64, batch_size=32).batches()
    gplq_mm.quantize_(
        model,
        dict(loader=loader, num_images=64),
        policy=cfg.model.policy,
        compensation=cfg.model.compensation,
        weight_ptq=dict(type='GPTQ', num_images=64),
    )
    state = model.state_dict()
    wanted = {k: v for k, v in found.architecture.state_dict().items() if k in state}
    assert wanted.keys() == state.keys()
    assert [key for key in state if not torch.equal(state[key], wanted[key])] == []
    saved = weights(tmp_path)
    for name, layer in quant_layers(model).items():
        key = f'architecture.{name}.weight_quantizer.codes'
        assert torch.equal(layer.weight_quantizer.codes, saved[key])
