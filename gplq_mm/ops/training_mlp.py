"""MLPs of training: quantized operands, and one tensor of the hidden layer kept for backward.

That is the input of the GELU, from which its slope and the codes of its output follow. Only a few
rows are worked on at a time, so that on a CPU all else stays in the cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ['mlp_fake_quant', 'mlp_fake_quant_backward']

# Hidden values that are worked on at a time, by kind of device.
CHUNK = {'cpu': 1 << 19, 'cuda': 1 << 28}


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``x @ weight.T + bias`` into ``out``, which may be rows of another tensor."""
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _chunks(x: Tensor, hidden: int) -> Iterator[slice]:
    count = max(CHUNK.get(x.device.type, CHUNK['cuda']) // max(hidden, 1), 1)
    return (slice(i, i + count) for i in range(0, len(x), count))


def mlp_fake_quant(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    scales: list[Tensor],
    offsets: list[Tensor | None],
    tables: list[Tensor],
    grids: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear2(gelu(linear1(x_hat))_hat)``.

    Args:
        x: ``(N, in)``; its dtype is that of the products.
        weights: ``(hidden, in)`` and ``(out, hidden)``, of any floating dtype.
        biases: ``(hidden,)`` and ``(out,)``, or None.
        scales, offsets: Of the inputs of both layers, one number or one a column; float32.
        tables: Of both, as in :mod:`.training_reference`.
        grids: code_min, code_max and level_bits of both, 6 integers.

    Returns:
        Output ``(N, out)``, the state of ``x``, and the input of the GELU ``(N, hidden)``. The
        first and the last have the dtype of ``x``.
    """
    ops = torch.ops.gplq_mm
    dtype = x.dtype
    first, second = (weight.to(dtype) for weight in weights)
    bias1, bias2 = (None if bias is None else bias.to(dtype) for bias in biases)
    out = x.new_empty(len(x), len(second))
    values, state = ops.fake_quant.default(x, scales[0], offsets[0], tables[0], grids[:3])
    values = values.to(dtype)
    hidden = x.new_empty(len(x), len(first))
    for rows in _chunks(x, len(first)):
        _product(values[rows], first, bias1, hidden[rows])
        activated = ops.gelu_fake_quant.default(
            hidden[rows], scales[1], offsets[1], tables[1], grids[3:]
        )
        _product(activated.to(dtype), second, bias2, out[rows])
    return out, state, hidden


def mlp_fake_quant_backward(
    grad: Tensor,
    state: Tensor,
    hidden: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    offsets: list[Tensor | None],
    tables: list[Tensor],
    grids: list[int],
) -> list[Tensor]:
    """Gradients of :func:`mlp_fake_quant`.

    Args:
        grad: ``(N, out)``; its dtype is that of the products.
        state: Of the input.
        hidden: Input of the GELU.
        weights, scales, offsets, tables, grids: As there.

    Returns:
        Gradients of the input, the two weights and the two biases (dtype of ``grad``), of the two
        scales and the two offsets (float32).
    """
    ops = torch.ops.gplq_mm
    dtype = grad.dtype
    first, second = (weight.to(dtype) for weight in weights)
    grad = grad.contiguous()
    grad_x = grad.new_empty(state.shape)
    grad_weights = [torch.zeros_like(first), torch.zeros_like(second)]
    grad_bias = grad.new_zeros(len(first))
    learned = [[torch.zeros_like(scale) for scale in scales] for _ in range(2)]
    for rows in _chunks(grad, len(first)):
        values = ops.fake_quant_values.default(
            state[rows], scales[0], offsets[0], tables[0], grids[:3]
        ).to(dtype)
        grad_hidden, activated, *of_hidden = ops.gelu_fake_quant_backward.default(
            grad[rows] @ second, hidden[rows], scales[1], offsets[1], tables[1], grids[3:]
        )
        grad_hidden = grad_hidden.to(dtype)
        grad_weights[1].addmm_(grad[rows].T, activated.to(dtype))
        grad_weights[0].addmm_(grad_hidden.T, values)
        grad_bias += grad_hidden.sum(0)
        grad_x[rows], *of_input = ops.fake_quant_backward.default(
            grad_hidden @ first, state[rows], scales[0], offsets[0], tables[0], grids[:3]
        )
        for kind in range(2):
            learned[kind][0] += of_input[kind]
            learned[kind][1] += of_hidden[kind]
    return [grad_x, *grad_weights, grad_bias, grad.sum(0), *learned[0], *learned[1]]
