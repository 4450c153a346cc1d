"""Tells feature caches which look-ups are those of training."""

from collections.abc import Iterator

from mmengine.hooks import Hook
from torch import nn

from ...models import FeatureCache
from ...registry import HOOKS
from ..weights import unwrap

__all__ = ['FeatureCacheHook']


def feature_caches(model: nn.Module) -> Iterator[FeatureCache]:
    """The caches of a model and its parts."""
    for module in unwrap(model).modules():
        cache = getattr(module, 'feature_cache', None)
        if isinstance(cache, FeatureCache):
            yield cache


@HOOKS.register_module()
class FeatureCacheHook(Hook):
    """Epochs for the feature caches of a model, and their use in the log; belongs to the runner."""

    priority = 'NORMAL'

    def before_train_epoch(self, runner) -> None:
        """From here on images are those of training."""
        for cache in feature_caches(runner.model):
            cache.begin_epoch()

    def after_train_epoch(self, runner) -> None:
        """Validation follows. A cache in which nothing is found is said to be useless."""
        for cache in feature_caches(runner.model):
            cache.end_epoch()

    def after_run(self, runner) -> None:
        """Says how many look-ups were answered, and closes the files."""
        for cache in feature_caches(runner.model):
            runner.logger.info(
                f'feature cache {cache.store.path}: {cache.hits} of {cache.lookups} outputs found'
            )
            cache.close()
