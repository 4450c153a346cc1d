"""What holds for every family whose models are plain PyTorch modules."""

import copy

import torch
from builders import randomize
from packed_models import assert_close_but_for_flips, fill_compensations, finish
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gplq_mm import deploy
from gplq_mm.layers import find_blocks, quant_layers, quantizers_disabled

# Small configs of transformers.
VIT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=32,
    patch_size=8,
    num_labels=5,
)
SWIN = dict(
    embed_dim=16,
    depths=[2, 2],
    num_heads=[2, 2],
    window_size=4,
    image_size=32,
    patch_size=4,
    num_labels=5,
)
# What multiplies in float.
PRODUCTS = ('mm', 'bmm', 'baddbmm', 'convolution', 'scaled_dot_product')


class Products(TorchDispatchMode):
    """Names of the float products that ran."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'aten' and any(name in str(func) for name in PRODUCTS):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Random parameters such that every layer matters for the output, in eval mode."""
    randomize(model)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(module.weight, gain=2**0.5)
    return model.eval()


@torch.no_grad()
def quantized(model: nn.Module, *batches: torch.Tensor, **options) -> nn.Module:
    """A float model after both stages; quantizers off, it is what it was."""
    expected = first(model(batches[0]))
    model = finish(model, batches=batches, **options)
    with quantizers_disabled(model):
        torch.testing.assert_close(first(model(batches[0])), expected, rtol=1e-5, atol=1e-5)
    out = first(model(batches[0]))
    assert not torch.equal(out, expected)
    assert float(torch.cosine_similarity(out.flatten(), expected.flatten(), dim=0)) > 0.8
    return model


def first(output) -> torch.Tensor:
    """The tensor that a model gives, by itself, in a tuple or in a ModelOutput."""
    return output if torch.is_tensor(output) else output[0]


@torch.no_grad()
def check_packed(simulated: nn.Module, *batches: torch.Tensor, **options) -> nn.Module:
    """Every layer is quantized, nothing multiplies in float once packed, and the packed model
    gives what the simulated one does."""
    float_layers = [
        name
        for name, module in simulated.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in quant_layers(simulated)
    ]
    assert float_layers == []
    packed = deploy.convert(simulated)
    assert packed.deploy_report.simulated == {}
    for batch in batches:
        with Products() as products:
            out = first(packed(batch, **options))
        assert products.names == []
        assert_close_but_for_flips(out, first(simulated(batch, **options)))
    return packed


def check_compensation(model: nn.Module, *batches: torch.Tensor) -> None:
    """Every block takes a compensation, which stays when packed."""
    model = quantized(model, *batches, compensation=dict(type='QwTv2'))
    blocks = find_blocks(model)
    assert fill_compensations(model) == len(blocks) > 0
    check_packed(copy.deepcopy(model), batches[0])


def widths(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Bits of weights and inputs of the layers that differ from 4 and 4."""
    bits = {
        name: (layer.weight_quantizer.spec.bits, layer.act_quantizer.spec.bits)
        for name, layer in quant_layers(model).items()
    }
    return {name: pair for name, pair in bits.items() if pair != (4, 4)}
