"""Which layers read the output of a LayerNorm: found by what changes when it changes.

Between a LayerNorm and its readers a model may reshape, pad, shift and cut into windows, pick a
token or average over all of them. So nothing is read from names or from the code: every LayerNorm
gives a row of random numbers instead, its mark, and the layers that are given nothing but this
row are its readers. Whether it has others is seen with the readers' own outputs held fixed: if
anything that the model gives still changes, the LayerNorm is left alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import gather_objects
from ..errors import DataError
from ..layers.reproducible import ReproducibleLayerNorm
from .stream import same_values

# Relative to the mark's largest value: an average over tokens is not equal to the last bit.
TOLERANCE = 1e-4


@dataclass
class FoundNorms:
    """LayerNorms in front of given layers, in the order of their definition.

    Attributes:
        readers: LayerNorm -> the layers that read its output, where nothing else does.
        padded: Those among them whose readers are given rows of zeros, too, as Swin pads windows.
        left: LayerNorms whose output reaches one of the layers and something else as well.
    """

    readers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    padded: set[str] = field(default_factory=set)
    left: list[str] = field(default_factory=list)

    def agree(self, other: 'FoundNorms') -> 'FoundNorms':
        """What holds here and for the ``other`` images."""
        same = {norm: own for norm, own in self.readers.items() if other.readers.get(norm) == own}
        known = dict.fromkeys((*self.readers, *self.left, *other.readers, *other.left))
        left = [norm for norm in known if norm not in same]
        return FoundNorms(same, (self.padded | other.padded) & same.keys(), left)


@torch.no_grad()
def find_norm_readers(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
) -> FoundNorms:
    """Finds LayerNorms that only given layers read. Collective: all ranks find the same.

    LayerNorms over the last axis with an affine weight count. Costs three forwards a batch, and
    one more for each LayerNorm where one is left alone.

    Args:
        model: Model in eval mode that computes in float (quantizers switched off).
        layers: Names of the Linear layers that may be readers.
        batches: Images. Others than these should reach the layers in the same way: where images
            differ in size, give one of each size.
        forward: ``forward(batch)`` runs the model and returns everything of it that must not
            change.

    Raises:
        DataError: If there is no batch.
    """
    found = None
    for batch in batches:
        one = _Search(model, layers, partial(forward, batch)).run()
        found = one if found is None else found.agree(one)
    for other in gather_objects(found):
        if found is None or other is None:
            raise DataError('the readers of LayerNorms are looked for without an image; give one.')
        found = found.agree(other)
    return found


class _Search:
    """The steps of :func:`find_norm_readers` for one batch."""

    def __init__(self, model: nn.Module, layers: Sequence[str], run: Callable[[], Any]):
        self.model, self.layers, self.run_model = model, list(layers), run
        self.marks: dict[str, Tensor] = {}
        for number, (name, module) in enumerate(model.named_modules()):
            # A subclass may normalize over another axis.
            plain = type(module) in (nn.LayerNorm, ReproducibleLayerNorm)
            if plain and module.weight is not None and module.weight.dim() == 1:
                generator = torch.Generator().manual_seed(number)
                mark = torch.randn(len(module.weight), generator=generator)
                self.marks[name] = mark.to(module.weight)
        self.outputs: dict[str, list[Tensor]] = {}
        # Layer -> for each of its calls the LayerNorm it reads (None: something else), and whether
        # there were rows of zeros.
        self.seen: dict[str, list[tuple[str | None, bool]]] = {}

    def run(self) -> FoundNorms:
        with self._after(self.layers, self._record):
            reference = self.run_model()
        with self._marked(self.marks), self._after(self.layers, self._look):
            self.run_model()
        readers: dict[str, list[str]] = {}
        padded = set()
        for name in self.layers:
            norms = {norm for norm, _ in self.seen.get(name, [])}
            if len(norms) == 1 and None not in norms:
                (norm,) = norms
                readers.setdefault(norm, []).append(name)
                if any(zeros for _, zeros in self.seen[name]):
                    padded.add(norm)
        calls = [call for calls in self.seen.values() for call in calls]
        touched = {norm for norm, _ in calls if norm is not None}
        alone = touched & readers.keys()
        if alone and not self._unchanged(readers, alone, reference):
            alone = {norm for norm in alone if self._unchanged(readers, {norm}, reference)}
        return FoundNorms(
            {norm: tuple(readers[norm]) for norm in self.marks if norm in alone},
            padded & alone,
            [norm for norm in self.marks if norm in touched and norm not in alone],
        )

    def _unchanged(self, readers: dict, norms: set[str], reference: Any) -> bool:
        """Whether marks of ``norms`` change nothing while their readers give what they gave."""
        fixed = [name for norm in norms for name in readers[norm]]
        calls = {name: iter(self.outputs[name]) for name in fixed}

        def replay(_module, _args, output: Tensor, name: str) -> Tensor:
            # One call more than before: it is not held fixed, so that it counts as a change.
            known = next(calls[name], None)
            return output if known is None else known.clone()

        with self._marked(norms), self._after(fixed, replay):
            return same_values(self.run_model(), reference)

    def _record(self, _module, _args, output: Tensor, name: str) -> None:
        self.outputs.setdefault(name, []).append(output.clone())

    def _look(self, _module, args: tuple, _output, name: str) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        zeros = (rows == 0).all(1)
        found = None
        if not bool(zeros.all()):
            rest = rows[~zeros]
            for norm, mark in self.marks.items():
                near = TOLERANCE * mark.abs().max()
                if len(mark) == rest.shape[1] and bool(((rest - mark).abs() <= near).all()):
                    found = norm
                    break
        self.seen.setdefault(name, []).append((found, bool(zeros.any())))

    def _marked(self, norms: Iterable[str]):
        def mark(_module, _args, output: Tensor, name: str) -> Tensor:
            return self.marks[name].expand_as(output).clone()

        return self._after(norms, mark)

    @contextmanager
    def _after(self, names: Iterable[str], function: Callable) -> Iterator[None]:
        """``function`` after each forward, before other hooks, which see what it returns."""
        with ExitStack() as stack:
            for name in names:
                hook, module = partial(function, name=name), self.model.get_submodule(name)
                stack.callback(module.register_forward_hook(hook, prepend=True).remove)
            yield
