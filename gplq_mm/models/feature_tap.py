"""Where features are taken from a model, and how."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import SettingError
from ..layers.family import entry_of


class FeatureTap:
    """Keeps feature and output of one layer's last forward, as long as it is open.

    Args:
        layer: The layer. The feature is the first input of a Linear, and the output of any other
            layer (a tensor or a tuple of them).
    """

    def __init__(self, layer: nn.Module):
        self.is_open = False
        self.of_output = not isinstance(layer, nn.Linear)
        self.feature: Tensor | tuple[Tensor, ...] | None = None
        self.output: Tensor | tuple[Tensor, ...] | None = None
        self._handle = layer.register_forward_hook(self._keep)

    def _keep(self, _layer: nn.Module, args: tuple, output: Tensor) -> None:
        if self.is_open:
            self.feature, self.output = output if self.of_output else args[0], output

    def remove(self) -> None:
        """Takes the tap off its layer."""
        self._handle.remove()

    def __enter__(self) -> 'FeatureTap':
        self.is_open = True
        return self

    def __exit__(self, *_exception) -> None:
        # Holding on would keep the graph of the last iteration alive.
        self.is_open, self.feature, self.output = False, None, None


def tapped_outputs(tap: FeatureTap, run: Callable[[], Any]) -> tuple:
    """Feature and output of the tapped layer in a forward of its model, which is ``run()``."""
    with tap:
        run()
        return tap.feature, tap.output


def feature_layer_of(model: nn.Module, name: str | None) -> nn.Module:
    """The named layer, or what the model's family mimics (:attr:`.Family.features`), or the last
    Linear of the head, whose input is the penultimate feature."""
    if name is not None:
        try:
            return model.get_submodule(name)
        except AttributeError as error:
            raise SettingError(
                f'feature_layer={name!r} is no layer of the architecture.'
            ) from error
    of_family, head = entry_of(model, 'features'), getattr(model, 'head', None)
    if of_family is not None:
        layers = [of_family(model)]
    else:
        layers = [] if head is None else [m for m in head.modules() if isinstance(m, nn.Linear)]
    if not layers or layers[-1] is None:
        raise SettingError(
            'the architecture has neither a head with a Linear layer nor a neck of a detector, '
            'so there are no features to mimic; set feature_layer, or mimic=None and distill=None.'
        )
    return layers[-1]


def feature_width(layer: nn.Module, name: str | None, mimic: dict) -> int:
    """Width of the features of :func:`feature_layer_of`: ``mimic.dim``, or what the layer says."""
    key = 'in_features' if isinstance(layer, nn.Linear) else 'out_channels'
    known = layer.normalized_shape[-1] if isinstance(layer, nn.LayerNorm) else None
    width = mimic.get('dim', getattr(layer, key, known))
    if not isinstance(width, int):
        raise SettingError(
            f'feature_layer={name!r} does not tell the width of its features; set mimic.dim.'
        )
    return width
