"""Does a deployed model compute what its simulation computes?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import DeployError, Int4WeightLayer, find_blocks, quant_layers
from .convert import strip_wrappers


@dataclass(frozen=True)
class Agreement:
    """Result of :func:`compare`.

    Attributes:
        layers: Packed layers.
        compared: Those whose integer accumulators were compared: the ones that the run reached.
        unequal: Names of those where any accumulator differs.
        block_error: Largest relative error of a residual block that gets the simulation's input,
            0 without blocks.
        relative_error: L2 norm of an output's difference over that of the simulated output, the
            largest of all outputs.
        max_difference: Largest absolute difference of outputs.
        max_output: Largest absolute simulated output.
    """

    layers: int
    compared: int
    unequal: list[str]
    block_error: float
    relative_error: float
    max_difference: float
    max_output: float

    def require(self, block_tolerance: float = 0.02, tolerance: float = 0.5) -> None:
        """Raises DeployError unless all integers are equal and outputs as close as they can be.

        Args:
            block_tolerance: Largest relative error of a block. In a block a few activations may
                move to the next code.
            tolerance: Largest relative error of the outputs. Moved codes move others in later
                blocks, in an untrained model without end.
        """
        if (
            self.unequal
            or not self.block_error <= block_tolerance
            or not self.relative_error <= tolerance
        ):
            raise DeployError(
                f'the packed model does not compute what its simulation computes ({self}). '
                'Nothing was written; please report this.'
            )

    def __str__(self) -> str:
        return (
            f'{self.compared - len(self.unequal)} of {self.compared} layers have equal integers'
            + (
                f' ({self.layers - self.compared} not reached); '
                if self.compared < self.layers
                else '; '
            )
            + f'a block differs by {self.block_error:.3g} relative at most; '
            f'outputs differ by {self.max_difference:.3g} at most (largest output '
            f'{self.max_output:.3g}), {self.relative_error:.3g} relative'
        )


def tensors_in(outputs: Tensor | tuple | list) -> list[Tensor]:
    """The tensors in nested lists and tuples, in order."""
    if torch.is_tensor(outputs):
        return [outputs]
    return [tensor for output in outputs for tensor in tensors_in(output)]


def _flat(outputs: Tensor | tuple | list) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors_in(outputs)])


def _relative_error(expected: Tensor, found: Tensor) -> float:
    difference, norm = float((found - expected).norm()), float(expected.norm())
    return difference / norm if norm else difference


@torch.no_grad()
def compare(
    simulated: nn.Module,
    deployed: nn.Module,
    run: Callable[[nn.Module], Tensor | tuple | list],
) -> Agreement:
    """Runs both models and compares integers and outputs.

    Every packed layer gets the very input that its simulation got, so its accumulators must be
    the same integers, and so does every residual block. Outputs may differ where a rounding
    error moves an activation across the border of two codes.

    Args:
        simulated: Model after Stage 2. Stays as it is.
        deployed: The same model, deployed.
        run: Runs a model on some images and returns its outputs.
    """
    simulated = strip_wrappers(simulated)
    simulated.eval()
    unequal: set[str] = set()
    compared: set[str] = set()
    layers = quant_layers(simulated)
    for name, layer in layers.items():
        packed = deployed.get_submodule(name)

        def check(layer, args, name=name, packed: Int4WeightLayer = packed):
            compared.add(name)
            sums = layer.accumulate(args[0])
            if not torch.equal(sums.to(torch.int64), packed.accumulate(args[0]).to(torch.int64)):
                unequal.add(name)

        layer.register_forward_pre_hook(check)
    errors = [0.0]
    for name in find_blocks(simulated):

        def check_block(_, args, kwargs, output, name=name):
            twin = deployed.get_submodule(name)
            errors.append(_relative_error(_flat(output), _flat(twin(*args, **kwargs))))

        # Last of all hooks: behind the one that adds the compensation.
        simulated.get_submodule(name).register_forward_hook(check_block, with_kwargs=True)
    expected, found = tensors_in(run(simulated)), tensors_in(run(deployed))
    pairs = [(_flat(a), _flat(b)) for a, b in zip(expected, found, strict=True)]
    return Agreement(
        layers=len(layers),
        compared=len(compared),
        unequal=sorted(unequal),
        block_error=max(errors),
        relative_error=max(_relative_error(a, b) for a, b in pairs),
        max_difference=max(float((b - a).abs().max()) for a, b in pairs),
        max_output=max(float(a.abs().max()) for a, _ in pairs),
    )
