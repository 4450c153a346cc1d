"""Rounding noise of activations where a rank does not reach a layer, in an importable module."""

import torch
from torch import nn

from gplq_mm.analysis.widths import activation_noise
from gplq_mm.layers import quantize_model
from gplq_mm.quant import QuantPolicy

WIDTHS = (3, 4)


class Net(nn.Module):
    """A second layer that only sees images whose first value is positive."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(x[x[:, 0] > 0])


def model() -> nn.Module:
    """The model, quantized and calibrated."""
    from builders import calibrated

    torch.manual_seed(0)
    net = Net()
    quantize_model(net, QuantPolicy())
    return calibrated(net, torch.randn(64, 6, generator=torch.Generator().manual_seed(1)))


def rows() -> torch.Tensor:
    """What both ranks see together; the second half does not reach the second layer."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    net = model()
    reach = net.first(x)[:, 0] > 0
    return torch.cat((x[reach][:12], x[~reach][:12]))


@torch.no_grad()
def noise_on_rank(rank: int, folder: str) -> None:
    """Process ``rank`` of two; writes what it found to ``<folder>/<rank>.pth``."""
    torch.set_num_threads(1)
    net, mine = model(), rows()[12 * rank : 12 * rank + 12]
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    torch.save(activation_noise(net, mine, net, WIDTHS), f'{folder}/{rank}.pth')
    torch.distributed.destroy_process_group()
