# Mask R-CNN with a Swin of 2.2 M parameters, for scenes of 96 pixels with digits of 16 to 36.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']

channels = 64
num_classes = 10
norm_cfg = dict(type='GN', num_groups=16)

model = dict(
    data_preprocessor=dict(mean=[20.0], std=[60.0], bgr_to_rgb=False, pad_size_divisor=16),
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SwinTransformer',
        arch=dict(embed_dims=48, depths=[2, 2, 2], num_heads=[2, 4, 8]),
        img_size=96,
        in_channels=1,
        patch_size=4,
        # Overlapping patches learn faster from few images.
        patch_cfg=dict(kernel_size=8, padding=2),
        window_size=6,
        pad_small_map=True,
        drop_path_rate=0.0,
        out_indices=(0, 1, 2),
        init_cfg=[
            dict(type='Xavier', layer='Linear', distribution='uniform'),
            dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
        ],
    ),
    # Trained from nothing: normalized feature maps learn several times faster.
    neck=dict(in_channels=[48, 96, 192], out_channels=channels, num_outs=3, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[5], strides=[4, 8, 16]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(output_size=7, sampling_ratio=2),
            out_channels=channels,
            featmap_strides=[4, 8],
            finest_scale=28,
        ),
        bbox_head=dict(in_channels=channels, fc_out_channels=192, num_classes=num_classes),
        mask_roi_extractor=dict(
            roi_layer=dict(output_size=14, sampling_ratio=2),
            out_channels=channels,
            featmap_strides=[4, 8],
            finest_scale=28,
        ),
        mask_head=dict(
            num_convs=2,
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=num_classes,
            norm_cfg=norm_cfg,
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=20)),
)
