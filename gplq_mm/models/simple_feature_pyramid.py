"""A feature pyramid for plain vision transformers."""

from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..errors import SettingError
from ..registry import MODELS


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Levels of stride 4, 8, 16 and 32 from the last map of a plain ViT with patches of 16.

    ViTDet (Li et al., 2022, "Exploring Plain Vision Transformer Backbones for Object Detection",
    section 3 and appendix A.2). Use it with ``out_type='featmap'`` and ``with_cls_token`` as in
    the pre-training; mmpretrain's VisionTransformer pads the image to whole patches and resizes
    its position embedding by itself, so images may have any size. Convolutions and transposed
    convolutions are named as in an FPN, and quantized like it.

    Args:
        in_channels: Width of the transformer; a multiple of 4.
        out_channels: Channels of every level. Defaults to 256.
        num_outs: Number of levels; those beyond the fourth halve the last one by pooling.
            Defaults to 5.
        norm_cfg: Normalization after each convolution. Defaults to LayerNorm over the channels.
        init_cfg: Defaults to Xavier, as mmdet's FPN.

    Raises:
        SettingError: For ``in_channels`` or ``num_outs`` that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 5,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ):
        if init_cfg is None:
            init_cfg = dict(type='Xavier', layer='Conv2d', distribution='uniform')
        super().__init__(init_cfg)
        if in_channels < 4 or in_channels % 4:
            raise SettingError(f'in_channels={in_channels} must be a multiple of 4.')
        if num_outs < 4:
            raise SettingError(f'num_outs={num_outs} must be at least 4.')
        norm_cfg = norm_cfg or dict(type='mmpretrain.LN2d', eps=1e-6)
        self.out_channels = out_channels
        self.num_outs = num_outs
        half, quarter = in_channels // 2, in_channels // 4
        self.scales = nn.ModuleList(
            (
                nn.Sequential(
                    nn.ConvTranspose2d(in_channels, half, 2, 2),
                    build_norm_layer(norm_cfg, half)[1],
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                ),
                nn.ConvTranspose2d(in_channels, half, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            )
        )
        self.lateral_convs = nn.ModuleList(
            ConvModule(channels, out_channels, 1, norm_cfg=norm_cfg, act_cfg=None)
            for channels in (quarter, half, in_channels, in_channels)
        )
        self.fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=norm_cfg, act_cfg=None)
            for _ in range(4)
        )
        self.pool = nn.MaxPool2d(1, stride=2)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Levels from fine to coarse.

        Args:
            inputs: The backbone's outputs; the last one is read, ``(N, in_channels, H, W)``.

        Returns:
            ``num_outs`` maps ``(N, out_channels, 4H, 4W)``, ``(.., 2H, 2W)``, ``(.., H, W)``,
            ``(.., H/2, W/2)``, ... rounded up.

        Raises:
            SettingError: If the input is no feature map of the right width.
        """
        x = inputs[-1]
        wanted = self.lateral_convs[-1].in_channels
        if x.dim() != 4 or x.shape[1] != wanted:
            raise SettingError(
                f'SimpleFeaturePyramid needs maps (N, {wanted}, H, W) and got {tuple(x.shape)}; '
                "set backbone.out_type='featmap' and neck.in_channels to the transformer's width."
            )
        levels = [
            fpn(lateral(scale(x)))
            for scale, lateral, fpn in zip(
                self.scales, self.lateral_convs, self.fpn_convs, strict=True
            )
        ]
        while len(levels) < self.num_outs:
            levels.append(self.pool(levels[-1]))
        return tuple(levels)
