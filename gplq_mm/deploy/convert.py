"""From a simulated model after Stage 2 to one that computes with packed integers."""

import copy
from dataclasses import dataclass, field

from torch import nn

from ..layers import Int4Attention, QuantAttention, quant_layers
from ..layers.compiled import PACKED
from ..layers.family import entry_of
from ..layers.fused import fuse_blocks
from ..layers.int4_weight import DeployError, Int4WeightLayer
from ..layers.replace import set_module
from ..models import GPLQ, QuantBackbone, Stage
from .packed_tensors import attention_record, layer_origin, remember

NOTHING = (
    'the model has no quantized layers to pack; quantize it first, by a GPLQ run or '
    'gplq_mm.quantize_.'
)


@dataclass
class DeployReport:
    """What became of the layers: full names.

    Attributes:
        layers: Packed Linear and convolution layers.
        attention: Attention layers whose products run in one op on codes.
        simulated: Attention layers that stay in float arithmetic on rounded values, and why.
        fused: Blocks with a fused forward.
    """

    layers: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    simulated: dict[str, str] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = (
            f'{len(self.layers)} layers packed, {len(self.attention)} attentions in integers, '
            f'{len(self.fused)} blocks fused'
        )
        if self.simulated:
            name, reason = next(iter(self.simulated.items()))
            text += f'; {len(self.simulated)} attentions simulated ({name}: {reason})'
        return text


def strip_wrappers(model: nn.Module) -> nn.Module:
    """The architecture without what only training needs.

    Args:
        model: A :class:`GPLQ`, or any model, with a :class:`QuantBackbone` somewhere or not.

    Returns:
        A copy: the architecture of a GPLQ, with every QuantBackbone replaced by its backbone.

    Raises:
        DeployError: If a GPLQ has not finished Stage 2, or nothing is quantized.
    """
    if isinstance(model, GPLQ):
        if model.stage != Stage.WEIGHT_PTQ:
            raise DeployError(
                f'the model is at stage {model.stage.name}: its weights are not quantized. Only a '
                'model after Stage 2 can be deployed: finish the run with tools/train.py, or take '
                'its w4a4 checkpoint.'
            )
        model = model.architecture
    model = copy.deepcopy(model)
    if isinstance(model, QuantBackbone):
        model = model.backbone
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantBackbone):
            set_module(model, name, module.backbone)
    if not quant_layers(model):
        if any(isinstance(module, Int4WeightLayer) for module in model.modules()):
            raise DeployError('the model is deployed already.')
        raise DeployError(NOTHING)
    return model


def convert_in_place(model: nn.Module) -> DeployReport:
    """Replaces the simulated layers of ``model`` and leaves it in eval mode without gradients.

    Raises:
        DeployError: If a layer cannot be packed.
    """
    report = DeployReport()
    for name, layer in quant_layers(model).items():
        packed = PACKED.get(type(layer))
        if packed is None:
            raise DeployError(f'{name}: {type(layer).__name__} has no packed form.')
        twin = packed.from_quantized(layer)
        # For a file that is written of the packed model.
        remember(twin, *layer_origin(layer))
        set_module(model, name, twin)
        report.layers.append(name)
    for name, module in list(model.named_modules()):
        simulated = [child for child in module.children() if isinstance(child, QuantAttention)]
        if simulated:
            origin = attention_record(simulated[0])
            kind = entry_of(module, 'attentions')
            if kind is None or kind.pack is None:
                reason = f'{type(module).__name__} has no packed form'
            else:
                reason = kind.pack(module)
            if reason is None:
                report.attention.append(name)
                for child in module.children():
                    if isinstance(child, Int4Attention):
                        remember(child, *origin)
            else:
                report.simulated[name] = reason
    report.fused = fuse_blocks(model)
    # Backbones of mmpretrain return nothing here.
    model.eval()
    model.requires_grad_(False)
    return report


def convert(model: nn.Module) -> nn.Module:
    """Deployed model in memory: packed layers, integer attention, fused blocks.

    Args:
        model: A :class:`GPLQ` after Stage 2, a model with a :class:`QuantBackbone`, or any model
            whose layers were swapped by :func:`gplq_mm.layers.quantize_model`. Stays as it is.

    Returns:
        The architecture (without the GPLQ wrapper) in eval mode, on the same device. Its
        ``deploy_report`` says what became of the layers.

    Raises:
        DeployError: Before Stage 2, for layout ``raw``, or a layer that cannot be packed.
    """
    deployed = strip_wrappers(model)
    deployed.deploy_report = convert_in_place(deployed)
    return deployed
