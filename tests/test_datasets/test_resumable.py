import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.dataset import BaseDataset, DefaultSampler
from mmengine.runner import Runner

from gplq_mm.datasets import ResumableSampler, SeededDataset
from gplq_mm.datasets.resumable import seeded_rng
from gplq_mm.errors import SettingError


def draw_all():
    """One number of every random generator that transforms use."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class NoisyDataset(BaseDataset):
    """Sample i is (i, what the three random generators say); number ``reject`` is refused."""

    METAINFO = dict(classes=('a', 'b'))

    def __init__(self, length=10, reject=None, **kwargs):
        self.length = length
        self.reject = reject
        super().__init__(pipeline=[self.add_noise], **kwargs)

    def load_data_list(self):
        return [dict(number=i) for i in range(self.length)]

    def add_noise(self, info):
        noise = draw_all()
        return None if info['number'] == self.reject else (info['number'], *noise)


def make_sampler(length, rank=0, world_size=1, **kwargs):
    # The sampler needs no more than a length; a real data set would cost a garbage collection.
    sampler = ResumableSampler(SeededDataset(range(length), lazy_init=True), **kwargs)
    sampler.rank, sampler.world_size = rank, world_size
    return sampler


def all_ranks(length, world_size, epoch=0, start_sample=0, **kwargs):
    """What the ranks consume in turn: the global order of the samples."""
    per_rank = []
    for rank in range(world_size):
        sampler = make_sampler(length, rank, world_size, seed=0, **kwargs)
        sampler.set_position(epoch, start_sample)
        per_rank.append(list(sampler))
    return [row[i] for i in range(len(per_rank[0])) for row in per_rank if i < len(row)]


lengths = st.integers(1, 60)
worlds = st.integers(1, 7)
epochs = st.integers(0, 1000)


class TestSampler:
    @given(length=lengths, world_size=worlds, epoch=epochs, round_up=..., shuffle=...)
    def test_whole_epoch_is_that_of_the_default_sampler(
        self, length, world_size, epoch, round_up: bool, shuffle: bool
    ):
        for rank in range(world_size):
            ours = make_sampler(
                length, rank, world_size, seed=5, shuffle=shuffle, round_up=round_up
            )
            theirs = DefaultSampler(range(length), shuffle, 5, round_up)
            theirs.rank, theirs.world_size = rank, world_size
            theirs.total_size = -(-length // world_size) * world_size if round_up else length
            ours.set_epoch(epoch)
            theirs.set_epoch(epoch)
            numbers = list(ours)
            assert [n % length for n in numbers] == list(theirs)
            assert {n // length for n in numbers} <= {epoch}
            assert len(numbers) == len(ours)

    @given(length=lengths, before=worlds, after=worlds, epoch=epochs, data=st.data())
    def test_no_sample_is_lost_or_doubled_on_another_world_size(
        self, length, before, after, epoch, data
    ):
        start = data.draw(st.integers(0, length // before)) * before
        first = all_ranks(length, before, epoch)[:start]
        rest = all_ranks(length, after, epoch, start, round_up=False)
        assert first + rest == all_ranks(length, 1, epoch)

    @given(length=lengths, world_size=worlds, data=st.data())
    def test_round_up_gives_ranks_equally_many(self, length, world_size, data):
        start = data.draw(st.integers(0, length))
        order = all_ranks(length, world_size, 0, start)
        assert len(order) == -(-(length - start) // world_size) * world_size
        assert order[: length - start] == all_ranks(length, 1, 0, start)

    def test_epochs_and_seeds_differ(self):
        indices = [[n % 50 for n in all_ranks(50, 1, epoch)] for epoch in (0, 1)]
        assert indices[0] != indices[1]
        assert list(make_sampler(50, seed=0)) != list(make_sampler(50, seed=1))

    def test_position_holds_for_its_epoch_only(self):
        sampler = make_sampler(10, seed=0, shuffle=False)
        sampler.set_position(2, 7)
        sampler.set_epoch(2)  # the hook, at the start of the resumed epoch
        assert list(sampler) == [27, 28, 29]
        sampler.set_epoch(3)
        assert list(sampler) == list(range(30, 40))

    def test_length_is_of_whole_epochs(self):
        sampler = make_sampler(10, seed=0)
        sampler.set_position(0, 7)
        assert len(sampler) == 10

    def test_finished_epoch_is_empty(self):
        sampler = make_sampler(10, seed=0, world_size=4)
        sampler.set_position(0, 10)
        assert list(sampler) == []

    @pytest.mark.parametrize('position', [(-1, 0), (0, -1), (0, 11)])
    def test_bad_position(self, position):
        with pytest.raises(ValueError, match=r'No position .* in a data set of 10 samples'):
            make_sampler(10, seed=0).set_position(*position)

    def test_plain_dataset_is_refused(self):
        with pytest.raises(SettingError, match=r'list does not.*gplq_mm\.SeededDataset'):
            ResumableSampler([1, 2, 3])


class TestSeededDataset:
    def test_sample_depends_on_seed_epoch_and_index_only(self):
        dataset = SeededDataset(NoisyDataset(), seed=1)
        reference = dataset[3]
        draw_all()
        assert dataset[3] == reference
        others = [dataset[4], dataset[dataset.sample_number(1, 3)]]
        others.append(SeededDataset(NoisyDataset(), seed=2)[3])
        for other in others:
            assert all(a != b for a, b in zip(other[1:], reference[1:], strict=True))

    def test_streams_are_stable(self):
        """Written down, since a resumed run may continue on another machine or release."""
        with seeded_rng(0, 1, 2):
            drawn = draw_all()
        assert drawn == pytest.approx((0.2634123, 0.1700986, 0.2428198), abs=1e-6)

    def test_training_random_state_is_left_alone(self):
        dataset = SeededDataset(NoisyDataset(), seed=1)
        results = []
        for fetch in (False, True):
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            if fetch:
                dataset[3]
            results.append(draw_all())
        assert results[0] == results[1]

    def test_random_state_is_restored_after_an_error(self):
        random.seed(0)
        expected = random.random()
        random.seed(0)
        with pytest.raises(ZeroDivisionError), seeded_rng(1):
            random.random() / 0
        assert random.random() == expected

    def test_rejected_sample_is_replaced_reproducibly(self):
        dataset = SeededDataset(NoisyDataset(reject=3), seed=1)
        sample = dataset[3]
        assert sample[0] != 3
        np.random.seed(99)
        assert dataset[3] == sample

    def test_passes_on_the_wrapped_dataset(self):
        dataset = SeededDataset(NoisyDataset(lazy_init=True), seed=1, lazy_init=True)
        assert dataset.metainfo == dict(classes=('a', 'b'))
        dataset.full_init()
        assert len(dataset) == 10
        assert dataset.get_data_info(24)['number'] == 4
        assert [sample[0] for sample in dataset] == list(range(10))

    def test_takes_over_the_samplers_seed(self):
        own, none = SeededDataset(NoisyDataset(), seed=1), SeededDataset(NoisyDataset())
        with pytest.raises(RuntimeError, match='has no seed'):
            none[0]
        for dataset in (own, none):
            ResumableSampler(dataset, seed=8)
        assert (own.seed, none.seed) == (1, 8)

    def test_negative_number(self):
        with pytest.raises(IndexError, match='not negative, got -1'):
            SeededDataset(NoisyDataset(), seed=1)[-1]


def build_loader(num_workers=0, seed=0, **kwargs):
    # mmpretrain's own transforms use NumPy's generator, torchvision's use torch's.
    pipeline = [
        dict(type='RandomCrop', crop_size=28, padding=4),
        dict(
            type='RandAugment',
            policies=[dict(type='Rotate', magnitude_range=(0, 30)), dict(type='Invert')],
            num_policies=1,
            magnitude_level=5,
        ),
        dict(type='NumpyToPIL'),
        dict(type='torchvision/RandomAffine', degrees=10),
        dict(type='PILToNumpy'),
        dict(type='PackInputs'),
    ]
    dataset = dict(type='gplq_mm.MNIST5k', split='train', indices=40, pipeline=pipeline)
    return Runner.build_dataloader(
        dict(
            dataset=dict(type='gplq_mm.SeededDataset', dataset=dataset),
            sampler=dict(type='gplq_mm.ResumableSampler', shuffle=True),
            batch_size=8,
            num_workers=num_workers,
            **kwargs,
        ),
        seed=seed,
    )


def read(loader, epoch, start_sample=0):
    loader.sampler.set_position(epoch, start_sample)
    return [
        (sample.img_path, image)
        for batch in loader
        for sample, image in zip(batch['data_samples'], batch['inputs'], strict=True)
    ]


def same(first, second):
    return len(first) == len(second) and all(
        a == b and torch.equal(x, y) for (a, x), (b, y) in zip(first, second, strict=True)
    )


class TestWithRunner:
    def test_workers_do_not_matter(self):
        reference = read(build_loader(0), epoch=1)
        assert same(read(build_loader(2), epoch=1), reference)
        assert not same(read(build_loader(0), epoch=2), reference)
        assert not same(read(build_loader(0, seed=1), epoch=1), reference)

    def test_persistent_workers_follow_the_epoch(self):
        loader = build_loader(2, persistent_workers=True)
        epochs = [read(loader, epoch) for epoch in (0, 1)]
        for epoch in (0, 1):
            assert same(epochs[epoch], read(build_loader(0), epoch))

    def test_resume_in_the_middle_of_an_epoch(self):
        reference = read(build_loader(0), epoch=3)
        assert same(read(build_loader(2), epoch=3, start_sample=16), reference[16:])

    def test_resume_with_another_world_size(self):
        reference = read(build_loader(0), epoch=3)
        loaders = [build_loader(0) for _ in range(2)]
        for rank, loader in enumerate(loaders):
            loader.sampler.rank, loader.sampler.world_size = rank, 2
        by_rank = [read(loader, epoch=3, start_sample=16) for loader in loaders]
        merged = [sample for pair in zip(*by_rank, strict=True) for sample in pair]
        assert same(merged, reference[16:])

    def test_num_batch_per_epoch(self):
        loader = build_loader(0, num_batch_per_epoch=2)
        first, second = (read(loader, epoch) for epoch in (0, 1))
        assert len(first) == 16
        assert {path for path, _ in first} == {path for path, _ in second}
        assert not same(sorted(first), sorted(second))
