"""A list of images is read once a run; only the pipelines differ."""

from collections import Counter

import pytest
from tiny_runs import gplq_config, run

from gplq_mm.datasets import MNIST5k
from gplq_mm.engine.shared_datasets import SharedDatasets
from gplq_mm.errors import DataError

DATA = dict(type='gplq_mm.MNIST5k', split='train', pipeline=[], indices=[3, 5])


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """How often which images were read."""
    counted = Counter()
    load = MNIST5k.load_data_list

    def count(self):
        counted[self.split, tuple(self._indices or ())] += 1
        return load(self)

    monkeypatch.setattr(MNIST5k, 'load_data_list', count)
    return counted


def test_a_run_reads_its_training_images_once(reads, tmp_path, float_checkpoints):
    run(gplq_config(tmp_path / 'run', float_checkpoints['vit'], train_cfg__max_epochs=1))
    # Training and validation; for training, calibration, PCA, Stage 2 and its errors in one.
    assert len(reads) == 2
    assert set(reads.values()) == {1}


def test_only_the_pipeline_is_another(reads):
    datasets = SharedDatasets()
    first = datasets.build(dict(DATA, pipeline=[dict(type='mmpretrain.PackInputs')]))
    second = datasets.build(DATA)
    wrapped = datasets.build(dict(type='gplq_mm.SeededDataset', dataset=DATA, seed=0))
    assert reads.total() == 1
    assert len(first) == len(second) == len(wrapped) == 2
    assert 'data_samples' in first[0]
    assert second[0]['gt_label'] == wrapped[0]['gt_label'] == first.get_data_info(0)['gt_label']
    assert first.data_bytes is second.data_bytes
    datasets.build(dict(DATA, indices=[3]))
    SharedDatasets().build(DATA)
    assert reads.total() == 3


def test_wrappers_of_other_packages(reads):
    datasets = SharedDatasets()
    repeated = dict(type='RepeatDataset', dataset=DATA, times=3)
    assert len(datasets.build(repeated)) == 6
    assert len(datasets.build(dict(type='gplq_mm.SeededDataset', dataset=repeated))) == 6
    assert reads.total() == 1
    nested = dict(type='RepeatDataset', dataset=repeated, times=2)
    assert len(datasets.build(nested)) == 12


def test_a_function_may_make_the_data_set():
    made = SharedDatasets().build(DATA)
    assert SharedDatasets().build({'type': lambda: made}) is made


@pytest.mark.parametrize('serialize', [True, False])
def test_no_image(serialize, monkeypatch):
    monkeypatch.setattr(MNIST5k, 'filter_data', lambda self: [])
    with pytest.raises(DataError, match=r'no image is left in the data set of .*MNIST5k'):
        SharedDatasets().build(dict(DATA, indices=None, serialize_data=serialize))
