# Mask R-CNN on a plain ViT-B/16 with a simple feature pyramid, after ViTDet (Li et al., 2022):
# global attention in every block, and the pyramid from the last map alone.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']

custom_imports = dict(imports=['mmpretrain.models'], allow_failed_imports=False)
norm_cfg = dict(type='mmpretrain.LN2d', eps=1e-6)

model = dict(
    # Whole patches; mean and standard deviation are ImageNet's, as in mmdet's base.
    data_preprocessor=dict(pad_size_divisor=16),
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch='base',
        # Size of the position embedding of the pre-training; it is resized to each image.
        img_size=224,
        patch_size=16,
        out_type='featmap',
        drop_path_rate=0.1,
    ),
    neck=dict(
        _delete_=True,
        type='gplq_mm.SimpleFeaturePyramid',
        in_channels=768,
        out_channels=256,
        num_outs=5,
        norm_cfg=norm_cfg,
    ),
    # Two convolutions in the RPN head, four and a linear layer in the box head (appendix A.2).
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(
            _delete_=True,
            type='Shared4Conv1FCBBoxHead',
            conv_out_channels=256,
            norm_cfg=norm_cfg,
            in_channels=256,
            fc_out_channels=1024,
            roi_feat_size=7,
            num_classes=80,
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder',
                target_means=[0.0, 0.0, 0.0, 0.0],
                target_stds=[0.1, 0.1, 0.2, 0.2],
            ),
            reg_class_agnostic=False,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        ),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
