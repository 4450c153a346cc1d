import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from mmpretrain.registry import MODELS
from safetensors.torch import load_file, save_file

from gplq_mm.models.timm_conversion import convert_timm_vit_state_dict

TOOL = Path(__file__).parents[2] / 'tools' / 'convert_timm.py'
SIZES = dict(img_size=32, patch_size=16, num_classes=7)


def timm_model(distilled=False):
    torch.manual_seed(0)
    name = 'deit_tiny_distilled_patch16_224' if distilled else 'vit_tiny_patch16_224'
    model = timm.create_model(name, embed_dim=24, depth=2, num_heads=3, **SIZES).eval()
    for parameter in model.parameters():  # biases and tokens start at zero and would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def mm_model(distilled=False):
    arch = dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=96)
    backbone = 'DistilledVisionTransformer' if distilled else 'VisionTransformer'
    return MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type=backbone, arch=arch, img_size=32, patch_size=16),
            head=dict(
                type='DeiTClsHead' if distilled else 'VisionTransformerClsHead',
                num_classes=7,
                in_channels=24,
            ),
        )
    ).eval()


@pytest.mark.parametrize('distilled', [False, True])
def test_same_logits(distilled):
    source, target = timm_model(distilled), mm_model(distilled)
    target.load_state_dict(convert_timm_vit_state_dict(source.state_dict()))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(target(images), source(images), rtol=1e-4, atol=1e-4)


def test_missing_and_unknown_keys_are_named():
    state_dict = timm_model().state_dict()
    del state_dict['blocks.1.mlp.fc2.bias']
    state_dict['blocks.0.ls1.gamma'] = torch.zeros(24)
    with pytest.raises(
        ValueError, match=r'missing keys: blocks\.1\.mlp\.fc2\.bias; unknown keys: blocks\.0\.ls1'
    ):
        convert_timm_vit_state_dict(state_dict)


def test_missing_block_is_named():
    state_dict = {k: v for k, v in timm_model().state_dict().items() if 'blocks.0.' not in k}
    with pytest.raises(ValueError, match=r'missing keys: blocks\.0\.attn.* and 7 more'):
        convert_timm_vit_state_dict(state_dict)


@pytest.mark.parametrize('foreign', [{}, {'conv1.weight': torch.zeros(1)}])
def test_foreign_weights(foreign):
    with pytest.raises(ValueError, match='not the weights of a plain timm ViT'):
        convert_timm_vit_state_dict(foreign)


def load_tool():
    spec = importlib.util.spec_from_file_location('convert_timm', TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def save(state_dict, path):
    if path.suffix == '.safetensors':
        save_file(state_dict, path)
    else:
        torch.save(state_dict, path)


class TestTool:
    @pytest.mark.parametrize(
        ('source', 'nested'), [('.safetensors', False), ('.pth', False), ('.pth', True)]
    )
    @pytest.mark.parametrize('target', ['.safetensors', '.pth'])
    def test_formats(self, tmp_path, monkeypatch, capsys, source, target, nested):
        src, dst = tmp_path / f'src{source}', tmp_path / f'dst{target}'
        state_dict = timm_model().state_dict()
        save({'model': state_dict} if nested else state_dict, src)
        monkeypatch.setattr(sys, 'argv', ['convert_timm.py', str(src), str(dst)])
        load_tool().main()
        assert 'Wrote 32 tensors' in capsys.readouterr().out
        if target == '.pth':
            written = torch.load(dst, weights_only=True)['state_dict']
        else:
            written = load_file(dst)
        mm_model().load_state_dict(written)
        assert {p.name for p in tmp_path.iterdir()} == {src.name, dst.name}

    @pytest.mark.parametrize(
        ('suffix', 'fault', 'message'),
        [
            ('.safetensors', 'missing', 'does not exist'),
            ('.safetensors', 'truncated', 'cannot be read as weights'),
            ('.safetensors', 'foreign', 'not the weights of a plain timm ViT'),
            ('.pth', 'missing', 'does not exist'),
            ('.pth', 'truncated', 'cannot be read as weights'),
            ('.pth', 'foreign', 'not the weights of a plain timm ViT'),
            ('.pth', 'no state dict', 'holds no state dict'),
        ],
    )
    def test_bad_source_gives_one_sentence_and_no_file(
        self, tmp_path, monkeypatch, suffix, fault, message
    ):
        src, dst = tmp_path / f'src{suffix}', tmp_path / 'dst.pth'
        if fault == 'truncated':
            save(timm_model().state_dict(), src)
            src.write_bytes(src.read_bytes()[:1000])
        elif fault == 'foreign':
            save({'conv1.weight': torch.zeros(1)}, src)
        elif fault == 'no state dict':
            save({'epoch': 3}, src)
        monkeypatch.setattr(sys, 'argv', ['convert_timm.py', str(src), str(dst)])
        with pytest.raises(SystemExit) as stop:
            load_tool().main()
        assert stop.value.code.startswith(f'DataError: {src}')
        assert message in stop.value.code
        assert '\n' not in stop.value.code
        assert not dst.exists()

    def test_script(self, tmp_path):
        """As a user runs it: the exit status is 1 and there is no traceback."""
        command = [sys.executable, str(TOOL), 'weights.bin', str(tmp_path / 'dst.pth')]
        result = subprocess.run(command, capture_output=True, text=True, cwd=TOOL.parents[1])
        assert result.returncode == 1
        assert 'weights.bin ends in neither .safetensors nor .pth' in result.stderr
        assert 'Traceback' not in result.stderr

    def test_failed_write_keeps_the_old_file(self, tmp_path, monkeypatch):
        dst = tmp_path / 'dst.pth'
        dst.write_bytes(b'old')

        def fail(*args, **kwargs):
            raise OSError('No space left on device')

        tool = load_tool()
        monkeypatch.setattr(tool.torch, 'save', fail)
        with pytest.raises(OSError, match='No space'):
            tool.write_state_dict({}, dst)
        assert [p.name for p in tmp_path.iterdir()] == ['dst.pth']
        assert dst.read_bytes() == b'old'


def test_real_vit_tiny(shared_data):
    weights = load_file(shared_data / 'weights' / 'vit_tiny_patch16_224_in1k.safetensors')
    converted = convert_timm_vit_state_dict(weights)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='VisionTransformer', arch='deit-tiny', img_size=224, patch_size=16),
            head=dict(type='VisionTransformerClsHead', num_classes=1000, in_channels=192),
        )
    )
    model.load_state_dict(converted)
    assert sum(p.numel() for p in model.parameters()) == 5_717_416
