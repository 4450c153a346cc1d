"""Feature caches in whole runs."""

import pytest
import torch
from tiny_runs import (
    Killed,
    KillHook,
    assert_same_weights,
    build_runner,
    comparable,
    gplq_config,
    probe_config,
    read_summary,
    run,
    weights,
)

from gplq_mm.models import QuantBackbone


def cached_config(work_dir, pretrained, path):
    return gplq_config(work_dir, pretrained, model__teacher_cache=str(path))


def log_of(work_dir) -> str:
    return '\n'.join(path.read_text() for path in sorted(work_dir.glob('*/*.log')))


@pytest.fixture(scope='module')
def first(tmp_path_factory, float_checkpoints):
    """Work dir, cache file and model of a run that fills a cache."""
    folder = tmp_path_factory.mktemp('cache')
    runner = run(cached_config(folder / 'run', float_checkpoints['vit'], folder / 'f.sqlite'))
    return folder / 'run', folder / 'f.sqlite', runner.model


def test_a_run_with_a_cache_ends_like_one_without(first, undisturbed):
    assert_same_weights(weights(first[0]), weights(undisturbed['vit']))
    assert comparable(read_summary(first[0])) == comparable(read_summary(undisturbed['vit']))


def test_random_training_images_are_told_once(first):
    log = log_of(first[0])
    assert log.count('the pipeline of the training images is random') == 1
    cache = first[2].feature_cache
    assert f'{cache.hits} of {cache.lookups} outputs found' in log
    # Closed: one file.
    assert [path.name for path in first[1].parent.glob('f.sqlite*')] == ['f.sqlite']


def test_another_run_of_the_same_seed_finds_what_the_first_has_stored(
    first, tmp_path, float_checkpoints, undisturbed
):
    """Images of an epoch depend on the seed and its number."""
    runner = run(cached_config(tmp_path, float_checkpoints['vit'], first[1]))
    cache = runner.model.feature_cache
    # 96 of the first epoch, 64 of the basis, 50 of the feature distance; not those of the second.
    assert cache.hits == 96 + 64 + 50
    assert cache.lookups == cache.hits + 96
    assert_same_weights(weights(tmp_path), weights(undisturbed['vit']))


def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path, float_checkpoints, undisturbed):
    cfg = cached_config(tmp_path / 'run', float_checkpoints['vit'], tmp_path / 'f.sqlite')
    with pytest.raises(Killed):
        run(cfg, KillHook(5))
    run(cfg, resume=True)
    assert_same_weights(weights(tmp_path / 'run'), weights(undisturbed['vit']))


def test_a_probe_with_a_cache_ends_like_one_without(undisturbed, tmp_path):
    checkpoint = undisturbed['vit'] / 'w4a4.pth'
    heads = {}
    for name, options in (('plain', {}), ('cached', dict(cache=str(tmp_path / 'f.sqlite')))):
        torch.manual_seed(0)
        runner = build_runner(probe_config(tmp_path / name, checkpoint, **options))
        backbone = runner.model.backbone
        assert isinstance(backbone, QuantBackbone)
        runner.train()
        heads[name] = (
            runner.model.head.state_dict(),
            runner.message_hub.get_scalar('val/accuracy/top1').data[0].tolist(),
        )
    (plain, accuracy), (cached, cached_accuracy) = heads['plain'], heads['cached']
    assert accuracy[-1] > 20, 'the probe should have learned something'
    assert cached_accuracy == accuracy
    for key, value in plain.items():
        torch.testing.assert_close(cached[key], value, rtol=1e-4, atol=1e-5)
    # Of training and validation images everything but the first epoch.
    cache = backbone.feature_cache
    assert (cache.lookups, cache.hits) == (3 * (96 + 100), 2 * (96 + 100))
    assert 'is random' not in log_of(tmp_path / 'cached')
