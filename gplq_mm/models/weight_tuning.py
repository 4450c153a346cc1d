"""Training between the blocks of Stage 2: what is still float makes up for what is rounded."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from ..distributed import average_, is_distributed
from ..errors import SettingError
from ..layers import QuantWeightLayer, compiled_products, quant_layers, quant_units
from .iteration_seed import seed_iteration
from .training_losses import check_count, completed_settings


def tuning_settings(settings: Mapping | None) -> dict | None:
    """``weight_tuning`` with what it leaves out, or None.

    Raises:
        SettingError: For an unknown key, or a value that cannot be used.
    """
    settings = completed_settings('weight_tuning', settings, iters_per_block=16, lr=1e-5)
    if settings is None:
        return None
    advice = '; weight_tuning=None rounds without training'
    check_count(settings['iters_per_block'], 'weight_tuning.iters_per_block', advice)
    rate = settings['lr']
    if not isinstance(rate, (int, float)) or not rate > 0:
        raise SettingError(f'weight_tuning.lr={rate!r} must be a positive number.')
    return settings


def _trained(layer: QuantWeightLayer) -> list[nn.Parameter]:
    """What trains of a layer.

    A raw one reads the parameter of its bias behind Stage 2, too, so that it has to stay; a folded
    one keeps a bias beside its integers.
    """
    parameters = (layer.weight, layer.bias if layer.is_folded else None)
    return [parameter for parameter in parameters if parameter is not None]


class WeightTuning:
    """Trains, after each block of Stage 2, the weights that are not rounded yet.

    A block that is rounded gives the blocks behind it other inputs than they had. A few iterations
    on the losses of Stage 1 let their weights, which are still float, answer to that, before they
    are rounded themselves: what GPTQ does from column to column of a layer, from block to block.
    Source: incremental quantization (INQ, Zhou et al., ICLR 2017); within a block QuIP# (Tseng et
    al., ICML 2024, fine-tuning during quantization) does the same.

    It is entered for the time of Stage 2 as a context. Behind it the float weights are those of
    Stage 1 again: what was trained went into the integers alone. Modules are in eval mode, so that
    running statistics stay what they are.

    Every weight trains that is not rounded, also one that Stage 1 has not trained.

    Args:
        model: Quantized model whose activation quantizers are frozen, or what holds it and has been
            trained in Stage 1: names of parameters in ``optim_wrapper`` are its.
        settings: Of :func:`tuning_settings`.
        optim_wrapper: Config; its optimizer gets the rate of the settings.
        loss: ``loss(batch)`` runs the model and gives what to minimise, a finite scalar.
        batches: Training batches of this rank, without an end.
        seed: Of the random numbers.
        iteration: Number of the first iteration, which with the seed decides them.

    Attributes:
        losses: Block -> mean loss of the iterations behind it, of this rank.
        iterations: How many there were.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Mapping,
        optim_wrapper: Mapping,
        loss: Callable[[Any], Tensor],
        batches: Iterator[Any],
        seed: int = 0,
        iteration: int = 0,
    ):
        self.model, self.loss, self.batches = model, loss, batches
        self.iters_per_block = settings['iters_per_block']
        optimizer = {**optim_wrapper['optimizer'], 'lr': settings['lr']}
        self.optim_wrapper = {**optim_wrapper, 'optimizer': optimizer}
        self.seed, self.first = seed, iteration
        self.losses: dict[str, float] = {}
        self.iterations = 0

    def __enter__(self) -> 'WeightTuning':
        self._layers = list(quant_layers(self.model).values())
        self._flags = {p: p.requires_grad for p in self.model.parameters()}
        weights = [weight for layer in self._layers for weight in _trained(layer)]
        self._stage1 = {weight: weight.detach().clone() for weight in weights}
        try:
            # A constructor warns of every parameter without a gradient, and leaves it out; with all
            # of them in, those that stay as they are get none, and are passed over.
            self._wrapper = build_optim_wrapper(self.model.requires_grad_(True), self.optim_wrapper)
        except BaseException:
            self.__exit__()
            raise
        self._wrapper.zero_grad()
        self.model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        return self

    @torch.no_grad()
    def __exit__(self, *_error) -> None:
        for weight, value in self._stage1.items():
            weight.copy_(value)
            weight.grad = None
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._wrapper, self._stage1, self._flags = None, {}, {}

    def run(self, block: str) -> Iterator[None]:
        """The iterations behind a block; yields after each.

        Args:
            block: Its name.

        Raises:
            NonFiniteLossError: Of the loss.
        """
        for layer in self._layers:
            if layer.weight_quantizer.is_quantized:
                # Nothing reads them any more, up to the end of Stage 2.
                for weight in _trained(layer):
                    weight.requires_grad_(False)
                    weight.grad = None
        total = 0.0
        with self._rounded_units_compiled():
            for number in range(1, self.iters_per_block + 1):
                total += self._step()
                self.losses[block] = total / number
                yield

    @contextmanager
    def _rounded_units_compiled(self) -> Iterator[None]:
        """Context in which units without a float weight run in the kernels: no gradient passes
        them, since nothing before them trains either."""
        with ExitStack() as stack:
            for name in quant_units(self.model):
                unit = self.model.get_submodule(name)
                layers = quant_layers(unit).values()
                if all(layer.weight_quantizer.is_quantized for layer in layers):
                    stack.enter_context(compiled_products(unit))
            yield

    @torch.enable_grad()
    def _step(self) -> float:
        wrapper = self._wrapper
        seed_iteration(self.seed, self.first + self.iterations)
        with wrapper.optim_context(self.model):
            loss = self.loss(next(self.batches))
        wrapper.backward(wrapper.scale_loss(loss))
        self._average_gradients()
        if wrapper.should_update():
            wrapper.step()
            wrapper.zero_grad()
        self.iterations += 1
        return float(loss.detach())

    def _average_gradients(self) -> None:
        if not is_distributed():
            return
        weights = [weight for weight in self._stage1 if weight.requires_grad]
        for weight in weights:
            if weight.grad is None:
                # The images of this rank do not reach it, those of another may.
                weight.grad = torch.zeros_like(weight)
        average_([weight.grad for weight in weights])
