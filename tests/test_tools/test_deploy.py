"""tools/deploy.py: a checkpoint becomes a file that predicts the same."""

import pytest
import torch
from mmengine.dataset import default_collate
from mmengine.registry import DATASETS, DefaultScope
from packed_models import assert_close_but_for_flips, detector_config, quantized_detector
from tiny_runs import ARCHITECTURES, fp32_config, gplq_config, load_tool, read_summary

from gplq_mm.checkpoint import read_checkpoint
from gplq_mm.deploy import load


def deploy(tmp_path, cfg, checkpoint, *options):
    """Runs the tool; returns the path of the packed file."""
    config, out = tmp_path / 'config.py', tmp_path / 'sub' / 'model.safetensors'
    cfg.dump(config)
    arguments = [config, checkpoint, '--out', out, *options]
    load_tool('deploy').main([str(argument) for argument in arguments])
    return out


@torch.no_grad()
def predictions(model, cfg) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores ``(images, classes)`` on the validation set, and labels."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
        batch = default_collate([dataset[index] for index in range(len(dataset))])
        samples = model.eval().test_step(batch)
    scores = torch.stack([sample.pred_score for sample in samples])
    return scores, torch.cat([sample.gt_label for sample in samples])


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_packed_model_predicts_what_the_run_measured(tmp_path, undisturbed, capsys, arch):
    work_dir = undisturbed[arch]
    checkpoint = work_dir / 'w4a4.pth'
    # The checkpoint is enough: what trained it need not be here.
    cfg = gplq_config(tmp_path, tmp_path / 'gone.pth', arch)
    path = deploy(tmp_path, cfg, checkpoint)
    printed = capsys.readouterr().out
    assert 'have equal integers' in printed
    assert f'wrote {path}' in printed

    packed = load(path)
    scores, labels = predictions(packed, cfg)
    tool = load_tool('deploy')
    simulated = tool.build(cfg, read_checkpoint(checkpoint), str(checkpoint))
    expected, _ = predictions(simulated, cfg)
    assert_close_but_for_flips(scores, expected)
    # An image may change its class only where two scores are as close as the arithmetic.
    changed = scores.argmax(1) != expected.argmax(1)
    margin = expected.topk(2, 1).values.diff(dim=1).abs().flatten()
    assert bool((margin[changed] < 0.05).all())
    top1 = 100 * (expected.argmax(1) == labels).float().mean().item()
    summary = read_summary(work_dir)
    assert top1 == pytest.approx(summary['top1']['w4a4'])
    header = packed.deploy_header
    assert header['accuracy']['top1'] == summary['top1']
    assert header['policy']['preset'] == 'gplq'
    assert packed.dataset_meta['classes'] == tuple('0123456789')


@pytest.mark.parametrize('name', ['calibrated', 'w32a4'])
def test_before_stage_2(tmp_path, undisturbed, name):
    cfg = gplq_config(tmp_path, tmp_path / 'gone.pth')
    with pytest.raises(SystemExit, match=r'DeployError: .*Stage 2'):
        deploy(tmp_path, cfg, undisturbed['vit'] / f'{name}.pth')
    assert not (tmp_path / 'sub' / 'model.safetensors').exists()


@pytest.mark.parametrize('quantized', [False, True])
def test_float_checkpoint(tmp_path, float_checkpoints, quantized):
    path = float_checkpoints['vit']
    cfg = gplq_config(tmp_path, path) if quantized else fp32_config('vit')
    with pytest.raises(SystemExit, match=r'DeployError: .*(Stage 2|no quantized layers)'):
        deploy(tmp_path, cfg, path)


def test_missing_checkpoint(tmp_path):
    cfg = gplq_config(tmp_path, tmp_path / 'gone.pth')
    with pytest.raises(SystemExit, match=r'CheckpointError: .*gone\.pth does not exist'):
        deploy(tmp_path, cfg, tmp_path / 'gone.pth')


def test_name_of_the_file(capsys):
    with pytest.raises(SystemExit):
        load_tool('deploy').main(['config.py', 'w4a4.pth', '--out', 'model.pth'])
    assert 'model.pth must end in .safetensors' in capsys.readouterr().err


def test_a_model_that_disagrees_is_not_written(tmp_path, undisturbed, monkeypatch):
    """The file is compared before it takes its place; an older one stays."""
    cfg = gplq_config(tmp_path, tmp_path / 'gone.pth')
    path = deploy(tmp_path, cfg, undisturbed['vit'] / 'w4a4.pth')
    before = path.read_bytes()
    tool = load_tool('deploy')

    def damaged(source):
        model = load(source)
        model.backbone.layers[0].attn.qkv.weight ^= 1
        return model

    monkeypatch.setattr(tool.deploy, 'load', damaged)
    arguments = [tmp_path / 'config.py', undisturbed['vit'] / 'w4a4.pth', '--out', path]
    with pytest.raises(SystemExit, match='does not compute what its simulation computes'):
        tool.main([str(argument) for argument in arguments])
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_detector(tmp_path, capsys):
    """Mask R-CNN on a quantized backbone, its checkpoint as mmengine saves it."""
    cfg = detector_config()
    path = tmp_path / 'detector.pth'
    state = quantized_detector(cfg).state_dict()
    torch.save({'state_dict': state, 'meta': {'dataset_meta': {}}}, path)
    out = deploy(tmp_path, cfg, path, '--size', '48', '60')
    assert 'have equal integers' in capsys.readouterr().out
    assert type(load(out).backbone).__name__ == 'SwinTransformer'


def test_the_heads_of_a_detector_are_compared(tmp_path, monkeypatch):
    cfg = detector_config()
    path, out = tmp_path / 'detector.pth', tmp_path / 'model.safetensors'
    torch.save({'state_dict': quantized_detector(cfg).state_dict(), 'meta': {}}, path)
    cfg.dump(tmp_path / 'config.py')
    tool = load_tool('deploy')

    def damaged(source):
        model = load(source)
        model.roi_head.bbox_head.fc_cls.weight.data *= 3
        return model

    monkeypatch.setattr(tool.deploy, 'load', damaged)
    arguments = [tmp_path / 'config.py', path, '--out', out, '--size', '48', '60']
    with pytest.raises(SystemExit, match='does not compute what its simulation computes'):
        tool.main([str(argument) for argument in arguments])
    assert not out.exists()
