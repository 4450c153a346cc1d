"""One training step on two ranks, in a module that a spawned process can import."""

import torch
import torch.distributed as dist
from mmcv.cnn.bricks.drop import Dropout, DropPath
from torch import nn

from gplq_mm.distributed import make_rank_invariant
from gplq_mm.layers import calibrate
from gplq_mm.quant import ActQuantizer, ActSpec

IMAGES = 6


def build() -> nn.Module:
    """Layers that see more than an image, and a quantizer; in training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        DropPath(0.3),
        ActQuantizer(ActSpec(observer='minmax', zero_point='float'), (4, 1, 1)),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, momentum=None, affine=False),
        Dropout(0.2),
        nn.Flatten(1),
        nn.Linear(64, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.5),
    )
    model.eval()
    calibrate(model, lambda _index, _count: model(images()))
    make_rank_invariant(model)
    return model.train()


def images() -> torch.Tensor:
    """The batch of all ranks."""
    return torch.randn(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(3)) + 1


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output of two forwards, gradients of their mean square, and buffers."""
    torch.manual_seed(7)
    x.requires_grad_()
    output = torch.stack((model(x), model(x)), 1)
    # The mean over a rank's images, as every loss is.
    output.square().mean().backward()
    result = {'output': output.detach(), 'input': x.grad}
    result |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return result | dict(model.named_buffers())


def step_on_rank(rank: int, folder: str) -> None:
    """Process ``rank`` of two; writes what it found to ``<folder>/<rank>.pth``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    model = build()
    found = step(model, images()[rank::2].contiguous())
    for name, _ in model.named_parameters():
        dist.all_reduce(found[name])
        found[name] /= 2
    torch.save(found, f'{folder}/{rank}.pth')
    dist.destroy_process_group()
