"""The ops on random operands, and whether a device gives what the reference gives."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..ops import reference, training_reference
from ..quant.functional import POSITIONS
from ..quant.levels import table_of
from ..quant.packing import pack_multiplier_panels, pack_panels
from .timing import Call

# Code range of four bits and of the positions of levels, and bits of the rounding residual beside a
# code.
TRAINING_GRID, FINE_GRID = [0, 15, 12], [0, 63, 10]
# Of a layer or an operand whose codes are the integers themselves.
NO_TABLE = torch.empty(0, dtype=torch.uint8)


def random_layer(
    columns: int, rows: int, bits: int = 4, act_bits: int = 4, levels: int = 0
) -> tuple[list[Tensor], list[int]]:
    """Operands of a packed layer in groups of 32, on the CPU; with ``levels`` codes of 6 bits
    are positions of so many chosen ones."""
    limit = min(2 ** (bits - 1), 127)
    codes = torch.randint(-limit, 2 ** (bits - 1), (rows, columns), dtype=torch.int8)
    largest = max(1, min(15, 127 // limit))
    factors = torch.randint(1, largest + 1, (rows, -(-columns // 32)), dtype=torch.uint8)
    codes_of_input = 2**act_bits
    layer = [
        torch.full((columns,), codes_of_input / 5),
        torch.full((columns,), codes_of_input / 2) + torch.rand(columns),
        pack_panels(codes, bits),
        pack_multiplier_panels(factors),
        torch.randperm(columns).int(),
        torch.rand(rows) * 1e-3,
        torch.randn(rows),
        torch.randint(-1000, 1000, (rows,), dtype=torch.int32),
        random_tables(1, levels)[0] if levels else NO_TABLE,
    ]
    return layer, [0, codes_of_input - 1, 32]


def random_tables(rows: int, levels: int) -> Tensor:
    """Tables of ``levels`` random levels, uint8 ``(rows, 64)``."""
    chosen = torch.rand(rows, POSITIONS).argsort(1)[:, :levels].sort(1).values
    return table_of(chosen.to(torch.uint8))


def _moved(value, device: torch.device | str):
    """Tensors of nested lists and tuples on a device."""
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


@torch.inference_mode()
def check(shapes: Iterable[tuple[int, int, int]], device: torch.device | str) -> list[str]:
    """Compares every op on a device with the reference on the CPU, and prints a line of each.

    Args:
        shapes: Tokens an image, inputs, outputs of linear layers.
        device: Whose kernels are checked.

    Returns:
        What differs.
    """
    problems = []
    ops = torch.ops.gplq_mm

    def compare(name: str, actual: Tensor, expected: Tensor, flipped: float = 0.0) -> None:
        """Equal but for a fraction of values that rounding in front of a code moved."""
        actual, expected = actual.float().cpu(), expected.float()
        off = (actual - expected).abs() > 1e-3 * (1 + expected.abs()) * (flipped > 0)
        fraction = off.float().mean().item()
        worst = (actual - expected).abs().max().item()
        verdict = 'ok' if fraction <= flipped else 'DIFFERS'
        print(f'  {verdict:8}{name}: {fraction:.2%} differ, by {worst:.3g} at most', flush=True)
        if verdict != 'ok':
            problems.append(name)

    def run(op: str, label: str, *args, flipped: float = 0.0) -> None:
        actual = getattr(ops, op)(*_moved(args, device))
        compare(f'{op} {label}', actual, getattr(reference, op)(*args), flipped)

    for tokens, columns, rows in shapes:
        for bits, act_bits, levels in ((4, 4, 0), (8, 8, 0), (3, 6, 0), (4, 6, 16)):
            layer, grid = random_layer(columns, rows, bits, act_bits, levels)
            for images in (1, 4):
                x = torch.randn(tokens * images, columns, dtype=torch.bfloat16)
                # Every other value on a tie.
                ties = torch.randint(0, 16, x[:, ::2].shape) + 0.5 - layer[1][::2]
                x[:, ::2] = (ties / layer[0][::2]).bfloat16()
                label = f'{tuple(x.shape)} x {rows}, W{bits}A{act_bits}' + ', levels' * bool(levels)
                run('int4_accumulate', label, x, layer, grid)
                run('int4_linear', label, x, layer, grid)
    x = torch.randn(2 * 197, 384)
    (layer1, grid1), (layer2, grid2) = random_layer(384, 1536), random_layer(1536, 384)
    norm = torch.rand(384) + 0.5, torch.randn(384), 1e-6
    # The hidden values must meet the second grid.
    layer1[5] /= 30
    for given, name in ((x, 'float32'), (x.half(), 'float16')):
        mlp = (*norm, layer1, grid1, layer2, grid2, None)
        run('int4_mlp', name, given, *mlp, flipped=0.02)
    patches, geometry = random_layer(768, 768, 8, 8), [16, 16, 16, 16, 0, 0, 1, 1]
    run('int4_conv2d', 'of patches', torch.randn(2, 3, 224, 224), *patches, geometry)
    for tokens, heads, depth in ((197, 12, 64), (49, 6, 32), (144, 6, 32)):
        qkv, bias = torch.randn(4, tokens, 3 * heads * depth), torch.randn(heads, tokens, tokens)
        for last, table in ((15, NO_TABLE), (POSITIONS - 1, random_tables(heads, 16))):
            grids = torch.zeros(4, 2, heads)
            grids[:3, 0], grids[:3, 1], grids[3, 0] = 4.5 / last, -2.2, 1 / last
            rest = grids, [0, last] * 4, [table] * 4, True, bias, None, None, 0
            label = f'of {tokens} tokens' + ', levels' * (last != 15)
            run('int4_attention', label, qkv, heads, depth**-0.5, *rest, flipped=0.02)
    for name, call in training_calls(2).items():
        host = call(training_reference, 'cpu')()
        for i, actual in enumerate(call(ops, device)()):
            compare(f'{name}, result {i}', actual, host[i], 0.01)
    return problems


def training_calls(batch: int) -> dict[str, Callable[..., Call]]:
    """The ops of training at the shapes of DeiT-S, forward and backward.

    Returns:
        Name to a function of the ops and a device, which gives a call without arguments.
    """

    def quantizer(
        shape: tuple[int, ...], low: float, high: float, tables: int, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        grid = FINE_GRID if tables else TRAINING_GRID
        step = torch.linspace(0.9, 1.1, math.prod(shape)).view(shape) * (high - low) / grid[1]
        powers = torch.linspace(0.7, 1.3, tables)[:, None]
        levels = (torch.linspace(0, 1, 16) ** powers * grid[1]).round().to(torch.uint8)
        # None is empty, one is that of the tensor, more are those of the heads.
        table = table_of(levels) if tables > 1 else table_of(levels).flatten()
        return *(t.to(device) for t in (step, torch.full(shape, low), table)), grid

    def input_of(
        shape: tuple[int, ...], scale_shape: tuple[int, ...], tables: int = 0, gelu: bool = False
    ):
        def make(ops, device: torch.device | str) -> Call:
            torch.manual_seed(0)
            x, grad = (torch.randn(shape).to(device) for _ in range(2))
            given = quantizer(scale_shape, -0.2 if gelu else -2.0, 2.0, tables, device)

            def call():
                if gelu:
                    x_hat = ops.gelu_fake_quant(x, *given)
                    return x_hat, *ops.gelu_fake_quant_backward(grad, x, *given)
                x_hat, state = ops.fake_quant(x, *given)
                again = ops.fake_quant_values(state, *given)
                return x_hat, again, *ops.fake_quant_backward(grad, state, *given)

            return call

        return make

    def softmax_of(tables: int = 0):
        def make(ops, device: torch.device | str) -> Call:
            torch.manual_seed(0)
            scores, grad = (torch.randn(batch, 6, 197, 197) for _ in range(2))
            scores, grad = (4 * scores).to(device), grad.to(device)
            rest = (0.5, None, None, *quantizer((6, 1, 1), 0.0, 0.8, tables, device), True)

            def call():
                # In place: what is timed includes these copies.
                probs, again, above = scores.clone(), scores.clone(), grad.clone()
                total = ops.softmax_fake_quant_(probs, *rest)
                sums = ops.softmax_fake_quant_backward_(above, again, *rest)
                return probs, total, above, again, *sums

            return call

        return make

    tokens, hidden, heads = (batch, 197, 384), (batch, 197, 1536), (batch, 6, 197, 64)
    return {
        'input a channel': input_of(tokens, (384,)),
        'q, k or v a head': input_of(heads, (6, 1, 1)),
        'gelu a channel': input_of(hidden, (1536,), gelu=True),
        'softmax a head': softmax_of(),
        'levels, a channel': input_of(tokens, (384,), 1),
        'levels, a head': input_of(heads, (6, 1, 1), 6),
        'levels, gelu a channel': input_of(hidden, (1536,), 1, gelu=True),
        'levels, softmax a head': softmax_of(6),
    }
