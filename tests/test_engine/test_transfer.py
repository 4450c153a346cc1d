"""Every stage of a run is probed on another data set, and recorded like the rest."""

import io
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_ranks import rank_config, torchrun
from tiny_runs import (
    KillAt,
    Killed,
    comparable,
    gplq_config,
    load,
    read_summary,
    run,
)

from gplq_mm.datasets.mnist5k import _digits
from gplq_mm.engine import RunRecord, print_summary, unwrap
from gplq_mm.engine.training_data import TrainingData
from gplq_mm.engine.transfer import TransferProbe
from gplq_mm.errors import DataError, SettingError

STAGES = {'fp32', 'ptq_w4a4', 'w32a4', 'latent_fp32', 'w4a4'}
KEYS = {'top1', 'relative_l2', 'cosine', 'agreement', 'num_train', 'num_val'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Digits 0, 1 and 6 as another task, in folders of images."""
    root = tmp_path_factory.mktemp('digits')
    images, labels = _digits()
    for label in (0, 1, 6):
        own = np.flatnonzero(labels == label)
        for split, chosen in (('train', own[:20]), ('val', own[-11:])):
            place = root / split / f'class_{label}'
            place.mkdir(parents=True)
            for index in chosen:
                cv2.imwrite(str(place / f'{index:04d}.png'), images[index])
    return root


def transfer(folder, **dataset) -> dict:
    pipeline = [dict(type='LoadImageFromFile', color_type='unchanged'), dict(type='PackInputs')]
    data = dict(type='CustomDataset', data_root=str(folder), with_label=True, pipeline=pipeline)
    return {
        f'{split}_dataloader': dict(batch_size=8, dataset={**data, 'data_prefix': split, **dataset})
        for split in ('train', 'val')
    }


def with_transfer(work_dir, pretrained, folder, **options):
    cfg = gplq_config(work_dir, pretrained, **options)
    cfg.train_cfg.transfer = transfer(folder)
    return cfg


@pytest.fixture(scope='module')
def whole(tmp_path_factory, float_checkpoints, folder):
    work_dir = tmp_path_factory.mktemp('transfer')
    run(with_transfer(work_dir, float_checkpoints['vit'], folder))
    return work_dir


def test_every_stage_has_its_row(whole):
    summary = read_summary(whole)
    assert set(summary['transfer']) == STAGES
    for row in summary['transfer'].values():
        assert set(row) == KEYS
        assert (row['num_train'], row['num_val']) == (60, 33)
        assert row['top1'] > 50, 'three digits should be told apart somehow'
    fp32 = summary['transfer']['fp32']
    assert fp32['relative_l2'] < 1e-5
    assert fp32['agreement'] == 100
    assert summary['transfer']['ptq_w4a4']['relative_l2'] > 0.01
    assert {f'transfer_{stage}' for stage in STAGES} <= set(summary['seconds'])


def test_the_run_itself_does_not_change(whole, undisturbed):
    ours, plain = comparable(read_summary(whole)), comparable(read_summary(undisturbed['vit']))
    assert ours.pop('transfer')
    assert plain.pop('transfer') == {}
    assert ours == plain


def test_a_row_is_what_the_probe_finds_in_the_checkpoint(whole, float_checkpoints, folder):
    """By a model of its own, from the file."""
    from tiny_runs import build_runner

    runner = build_runner(gplq_config(whole / 'other', float_checkpoints['vit']))
    model = unwrap(runner.model)
    model.init_weights()
    runner.load_checkpoint(str(whole / 'w4a4.pth'))
    row = TransferProbe(model, **transfer(folder)).measure()
    assert row == pytest.approx(read_summary(whole)['transfer']['w4a4'])


@pytest.mark.parametrize('count', [2, 5])
def test_resumed_run_has_the_same_rows(tmp_path, float_checkpoints, folder, whole, count):
    cfg = with_transfer(tmp_path, float_checkpoints['vit'], folder)
    with pytest.raises(Killed):
        run(cfg, KillAt('before_save_checkpoint', count))
    run(cfg, resume=True)
    assert comparable(read_summary(tmp_path)) == comparable(read_summary(whole))


def test_checkpoints_carry_the_rows(whole):
    rows = {
        name: set(load(whole / f'{name}.pth')['gplq']['record']['transfer'])
        for name in ('calibrated', 'w32a4', 'w4a4')
    }
    assert rows['calibrated'] == {'fp32', 'ptq_w4a4'}
    assert rows['w32a4'] == STAGES - {'w4a4'}
    assert rows['w4a4'] == STAGES


def printed(summary: dict) -> str:
    text = io.StringIO()
    print_summary(summary, Console(file=text, width=200))
    return text.getvalue()


def test_table_has_a_column(whole, undisturbed):
    summary = read_summary(whole)
    text = printed(summary)
    assert 'transfer top1' in text
    assert f'{summary["transfer"]["w32a4"]["top1"]:.2f}' in text
    assert 'transfer' not in printed(read_summary(undisturbed['vit']))


def test_images_of_every_step(whole):
    images = read_summary(whole)['images']
    assert images == dict(calibration=32, pca=64, training=192, weight_ptq=64, seen=352)


@pytest.mark.parametrize(
    ('iterations', 'expected'), [(0, 0), (1, 16), (6, 90), (7, 106), (12, 180), (13, 196)]
)
def test_images_of_training(iterations, expected):
    assert TrainingData(images=90, batch=16, iterations=6).images_in(iterations) == expected


def test_images_of_training_that_drops_the_last_batch():
    data = TrainingData(images=90, batch=16, iterations=5)
    assert [data.images_in(n) for n in (5, 6)] == [80, 96]


def test_images_without_steps():
    assert RunRecord().images(0) == dict.fromkeys(
        ('calibration', 'pca', 'training', 'weight_ptq', 'seen'), 0
    )


@pytest.mark.slow
def test_two_ranks(tmp_path, float_checkpoints, folder):
    rows = []
    for ranks in (1, 2):
        cfg = rank_config(tmp_path / str(ranks), float_checkpoints['vit'], ranks)
        cfg.train_cfg.update(max_epochs=0, transfer=transfer(folder))
        if ranks == 1:
            run(cfg)
        else:
            process = torchrun(cfg, tmp_path)
            assert process.returncode == 0, process.stderr[-3000:]
        rows.append(read_summary(tmp_path / str(ranks))['transfer'])
    assert rows[0].keys() == rows[1].keys()
    for stage in ('fp32', 'ptq_w4a4', 'w32a4', 'latent_fp32'):
        assert rows[1][stage] == pytest.approx(rows[0][stage], rel=1e-5, abs=1e-6), stage


class TestBadInput:
    """Said before anything is computed: no checkpoint and no summary is written."""

    def message(self, cfg, tmp_path) -> str:
        with pytest.raises((DataError, SettingError)) as caught:
            run(cfg)
        assert not list(tmp_path.glob('*.pth'))
        text = str(caught.value)
        assert len(text.splitlines()) == 1
        return text

    def cfg(self, tmp_path, float_checkpoints, folder):
        return with_transfer(tmp_path, float_checkpoints['vit'], folder)

    def test_missing_folder(self, tmp_path, float_checkpoints):
        cfg = self.cfg(tmp_path, float_checkpoints, tmp_path / 'nowhere')
        text = self.message(cfg, tmp_path)
        assert 'transfer.train_dataloader is missing or empty' in text
        assert 'correct its path' in text

    def test_empty_set(self, tmp_path, float_checkpoints, folder):
        shutil.copytree(folder, tmp_path / 'copy')
        for path in (tmp_path / 'copy' / 'val').rglob('*.png'):
            path.unlink()
        cfg = self.cfg(tmp_path, float_checkpoints, tmp_path / 'copy')
        assert 'transfer.val_dataloader is missing or empty' in self.message(cfg, tmp_path)

    def test_one_class(self, tmp_path, float_checkpoints, folder):
        shutil.copytree(folder, tmp_path / 'copy')
        for split in ('train', 'val'):
            for label in (0, 1):
                shutil.rmtree(tmp_path / 'copy' / split / f'class_{label}')
        cfg = self.cfg(tmp_path, float_checkpoints, tmp_path / 'copy')
        assert 'are of one class; give at least two' in self.message(cfg, tmp_path)

    def test_other_classes(self, tmp_path, float_checkpoints, folder):
        """Labels are numbered by folder, so a missing one would shift them."""
        shutil.copytree(folder, tmp_path / 'copy')
        shutil.rmtree(tmp_path / 'copy' / 'val' / 'class_0')
        cfg = self.cfg(tmp_path, float_checkpoints, tmp_path / 'copy')
        assert 'different classes' in self.message(cfg, tmp_path)

    def test_no_labels(self, tmp_path, float_checkpoints, folder):
        cfg = self.cfg(tmp_path, float_checkpoints, folder)
        cfg.train_cfg.transfer = transfer(folder, with_label=False)
        assert 'Set with_label=True' in self.message(cfg, tmp_path)

    def test_keys(self, tmp_path, float_checkpoints, folder):
        cfg = self.cfg(tmp_path, float_checkpoints, folder)
        cfg.train_cfg.transfer.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
        assert 'every image is read once, in order' in self.message(cfg, tmp_path)
        del cfg.train_cfg.transfer['train_dataloader']
        assert "must have ['train_dataloader', 'val_dataloader']" in self.message(cfg, tmp_path)

    def test_features_that_are_maps(self, folder):
        model = torch.nn.Module()
        model.mimicry = SimpleNamespace(tap=None, taps_maps=False)
        with pytest.raises(DataError, match=r'features of a classifier.*transfer=None'):
            TransferProbe(model, **transfer(folder))
