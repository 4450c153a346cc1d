"""The quickstart: what it runs fits together, and the detector keeps its AP."""

import json
import subprocess
import sys

import pytest
from mmengine.config import Config
from tiny_runs import ROOT, load_tool

quickstart = load_tool('quickstart')


@pytest.mark.parametrize('model', quickstart.MODELS)
def test_the_quantized_run_starts_from_what_the_first_run_writes(model):
    folder, name, results = quickstart.MODELS[model]
    fp32 = Config.fromfile(ROOT / 'configs' / folder / f'{name}_fp32.py')
    gplq = Config.fromfile(ROOT / 'configs' / folder / f'gplq_{name}.py')
    last = fp32.train_cfg.max_epochs
    assert gplq.model.pretrained == f'work_dirs/{results}/fp32/epoch_{last}.pth'
    assert gplq.model.architecture.backbone == fp32.model.backbone
    assert gplq.val_dataloader == fp32.val_dataloader


@pytest.mark.slow
def test_the_detector_keeps_its_ap(tmp_path):
    command = [sys.executable, 'tools/quickstart.py', '--model', 'mask-rcnn']
    subprocess.run([*command, '--work-dir', str(tmp_path)], check=True, cwd=ROOT, timeout=3600)
    summary = json.loads((tmp_path / 'summary.json').read_text())
    for metric in ('bbox_mAP', 'segm_mAP'):
        assert summary[metric]['fp32'] > 50
        assert summary[metric]['w4a4'] > summary[metric]['fp32'] - 2
