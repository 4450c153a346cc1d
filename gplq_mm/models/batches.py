"""What a data loader may yield, and how a model that knows no batches of ours is run on it."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import DataError, SettingError
from .training_losses import check_images

LABELS = ('labels', 'label')


def is_of_openmmlab(model: nn.Module, batch: Any) -> bool:
    """Whether a batch is what OpenMMLab's data loaders or preprocessors give, for such a model."""
    return isinstance(batch, Mapping) and 'inputs' in batch and hasattr(model, 'data_preprocessor')


def prepare(model: nn.Module, batch: Any, name: str = 'the batch', training: bool = False) -> Any:
    """A batch on the model's device, checked; one of OpenMMLab behind its preprocessor.

    ``name`` says in errors which one it is.

    Raises:
        DataError: For images that are not finite, or a batch without a tensor.
    """
    if is_of_openmmlab(model, batch):
        batch = model.data_preprocessor(dict(batch), training)
        check_images(batch['inputs'], batch.get('data_samples'), name)
        return batch
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        batch = dict(batch)
    batch = tree_map(lambda leaf: leaf.to(device) if torch.is_tensor(leaf) else leaf, batch)
    tensors = [leaf for leaf in tree_leaves(batch) if torch.is_tensor(leaf)]
    if not tensors:
        raise DataError(
            f'the loader yields a {type(batch).__name__} without a tensor; it must yield images, '
            '(images, labels), a dict, or the arguments of the forward.'
        )
    for tensor in tensors:
        if tensor.is_floating_point():
            check_images(tensor, batch=name)
    return batch


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    # Of the class: on an instance a wrapper may hide it.
    found = dict(inspect.signature(type(model).forward).parameters)
    found.pop('self', None)
    return found


def arguments_and_label(model: nn.Module, batch: Any) -> tuple[tuple, dict, Any]:
    """Positional and named arguments of the forward in a batch, and the label or None.

    A pair is an image and its label, unless the forward needs two arguments. Of a dict the keys
    count that the forward names.
    """
    if isinstance(batch, Mapping):
        label = next((batch[key] for key in LABELS if key in batch), None)
        known = _parameters(model)
        return (), {k: v for k, v in batch.items() if k in known and k not in LABELS}, label
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}, None
    needed = sum(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in _parameters(model).values()
    )
    if len(batch) == 2 and needed < 2:
        return (batch[0],), {}, batch[1]
    return tuple(batch), {}, None


def run_on(model: nn.Module, batch: Any) -> Any:
    """Forward of a model on a prepared batch, without its labels."""
    if is_of_openmmlab(model, batch):
        return model(**batch, mode='tensor')
    args, kwargs, _ = arguments_and_label(model, batch)
    return model(*args, **kwargs)


def logits_of(output: Any) -> Tensor:
    """Class scores ``(N, classes)`` in what a classifier gives.

    Raises:
        SettingError: If there are none.
    """
    found = getattr(output, 'logits', output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not torch.is_tensor(found) or found.dim() != 2:
        raise SettingError(
            'the loader yields labels, and the model gives no class scores (N, classes) to '
            'compare them with; give loss=callable(output, batch), or a loader without labels.'
        )
    return found


def task_losses(
    model: nn.Module,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any],
    loss: Callable[[Any, Any], Tensor] | None,
) -> dict:
    """What a forward in training is to minimise beside mimicking, by name; empty without labels.

    Args:
        model: The student.
        batch: Prepared.
        forward: ``forward(model, batch)``.
        loss: ``loss(output, batch)`` in place of what the labels say, or None.
    """
    if loss is None and forward is run_on:
        if is_of_openmmlab(model, batch):
            if batch.get('data_samples'):
                return dict(model(**batch, mode='loss'))
        elif isinstance(batch, Mapping) and 'labels' in batch and 'labels' in _parameters(model):
            known = _parameters(model)
            output = model(**{key: value for key, value in batch.items() if key in known})
            return {'loss': output['loss']}
    output = forward(model, batch)
    if loss is not None:
        return {'loss': loss(output, batch)}
    label = None if is_of_openmmlab(model, batch) else arguments_and_label(model, batch)[2]
    return {} if label is None else {'loss': F.cross_entropy(logits_of(output), label)}


def count_images(batch: Any) -> int:
    """Images of a batch: the length of its first tensor, or of a list of images."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    if isinstance(batch, dict) and isinstance(batch.get('inputs'), (list, tuple)):
        return len(batch['inputs'])
    return next((len(leaf) for leaf in tree_leaves(batch) if torch.is_tensor(leaf)), 1)


def first_batches(batches: Iterable[Any], num_images: int) -> Iterator[Any]:
    """The batches of the first images; the last one is whole."""
    for batch in batches:
        if num_images <= 0:
            return
        num_images -= count_images(batch)
        yield batch
