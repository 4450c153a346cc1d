# Mask R-CNN on ViT-Ti/16 (192 wide, timm's weights: pixels scaled to -1..1) with a simple feature
# pyramid; for small data sets, so pyramid and heads are slim. A config sets num_classes, and for
# boxes without masks roi_head.mask_head=None, roi_head.mask_roi_extractor=None.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']

custom_imports = dict(imports=['mmpretrain.models'], allow_failed_imports=False)
norm_cfg = dict(type='mmpretrain.LN2d', eps=1e-6)
channels = 128

model = dict(
    data_preprocessor=dict(
        mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], pad_size_divisor=16
    ),
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch='deit-tiny',
        img_size=224,
        patch_size=16,
        out_type='featmap',
    ),
    neck=dict(
        _delete_=True,
        type='gplq_mm.SimpleFeaturePyramid',
        in_channels=192,
        out_channels=channels,
        num_outs=5,
        norm_cfg=norm_cfg,
    ),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(
            num_convs=2, in_channels=channels, conv_out_channels=channels, norm_cfg=norm_cfg
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300), rcnn=dict(sampler=dict(num=128))
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)),
)
