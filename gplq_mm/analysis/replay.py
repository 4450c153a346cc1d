"""Running a model from one of its blocks on: what lies before is not computed again."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..layers import patched_forward, quant_units


class Replay:
    """Outputs of the units of a model for one batch, given again instead of computed.

    A unit is a residual block, or a quantized layer outside of any block.

    Args:
        model: Quantized model; it must compute the same whenever it is given the same.
    """

    def __init__(self, model: nn.Module):
        self.units = {name: model.get_submodule(name) for name in quant_units(model)}
        # In the order of their first run.
        self._outputs: dict[str, list] = {}

    def unit_of(self, path: str) -> str | None:
        """The unit that a module is part of, or None if there is none."""
        return next((u for u in self.units if path == u or path.startswith(f'{u}.')), None)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Context in which a forward is remembered, in place of an earlier one."""
        self._outputs = {}
        with ExitStack() as stack:
            for name, unit in self.units.items():

                def keep(_module, _args, output, name: str = name) -> None:
                    # The model may go on with it in place.
                    copied = output.clone() if torch.is_tensor(output) else None
                    self._outputs.setdefault(name, []).append(copied)

                stack.callback(unit.register_forward_hook(keep).remove)
            yield

    @contextmanager
    def before(self, unit: str | None) -> Iterator[None]:
        """Context in which units that ran before ``unit`` give what they gave.

        That is what they would compute as long as nothing before ``unit`` has changed. Units that
        ran several times may depend on it, and are computed.
        """
        with ExitStack() as stack:
            for name in self._outputs if unit in self._outputs else ():
                if name == unit:
                    break
                outputs = self._outputs[name]
                if len(outputs) == 1 and outputs[0] is not None:
                    stack.enter_context(patched_forward(self.units[name], _giving(outputs[0])))
            yield


def _giving(output: Tensor) -> Callable:
    return lambda *_args, **_kwargs: output.clone()
