# mmdet's Mask R-CNN Swin-T at half its width: 7 M parameters, for objects of 5 to 60 pixels.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']

channels = 128
norm_cfg = dict(type='GN', num_groups=16)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SwinTransformer',
        arch=dict(embed_dims=48, depths=[2, 2, 4, 1], num_heads=[2, 4, 8, 16]),
        img_size=256,
        patch_size=4,
        # Overlapping patches learn faster from few images.
        patch_cfg=dict(kernel_size=8, padding=2),
        window_size=7,
        pad_small_map=True,
        drop_path_rate=0.0,
        out_indices=(0, 1, 2, 3),
        init_cfg=[
            dict(type='Xavier', layer='Linear', distribution='uniform'),
            dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
        ],
    ),
    # Trained from nothing: normalized feature maps learn several times faster.
    neck=dict(in_channels=[48, 96, 192, 384], out_channels=channels, num_outs=5, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, finest_scale=28),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=1),
        mask_roi_extractor=dict(out_channels=channels, finest_scale=28),
        mask_head=dict(
            num_convs=2,
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=1,
            norm_cfg=norm_cfg,
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=dict(sampler=dict(num=128)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)),
)
