"""The check of a device's kernels, here against those of the CPU; what a GPU run writes."""

import csv
import json

import torch

from gplq_mm.benchmark import gpu, kernels
from gplq_mm.ops import reference

SHAPES = [(5, 33, 65)]


def test_kernels_that_agree(capsys):
    torch.manual_seed(0)
    assert kernels.check(SHAPES, 'cpu') == []
    lines = capsys.readouterr().out.splitlines()
    # Two ops on four kinds of codes and two batches, two MLPs, a convolution, three attentions of
    # two kinds of codes; 14 results of training.
    assert len(lines) >= 16 + 2 + 1 + 6 + 14
    assert all(line.startswith('  ok') for line in lines)


def test_what_differs_is_named(monkeypatch, capsys):
    exact = reference.int4_accumulate
    monkeypatch.setattr(reference, 'int4_accumulate', lambda *args: exact(*args) + 1)
    problems = kernels.check(SHAPES, 'cpu')
    assert 'int4_accumulate (5, 33) x 65, W4A4' in problems
    assert all('int4_attention' not in name for name in problems)
    assert 'DIFFERS int4_accumulate (5, 33) x 65, W4A4' in capsys.readouterr().out


def test_rows_of_a_gpu_replace_those_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'environment', lambda: {'gpu': 'NVIDIA H200 (80 GB)'})
    first = [{'name': 'linear', 'shape': '1x2x3'}, {'name': 'model', 'model': 'a'}]
    gpu.save(tmp_path, first)
    path, table = gpu.save(tmp_path, [{'name': 'model', 'model': 'b'}])
    assert path.name == 'gpu_nvidia-h200-80-gb.json'
    rows = json.loads(path.read_text())['rows']
    assert rows == [first[0], {'name': 'model', 'model': 'b'}]
    with table.open() as file:
        assert [row['model'] for row in csv.DictReader(file)] == ['', 'b']
