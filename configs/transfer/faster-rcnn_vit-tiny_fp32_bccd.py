# A detector of blood cells on an FP32 ViT-Ti, all of it trained: what the quantized backbones are
# compared with.
#   export GPLQ_BCCD=/path/to/bccd GPLQ_VIT_TINY=vit-tiny.pth
#   python tools/train.py configs/transfer/faster-rcnn_vit-tiny_fp32_bccd.py
_base_ = [
    '../_base_/models/mask-rcnn_vit-tiny-p16_sfp.py',
    '../_base_/datasets/bccd_detection.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/gplq_detection.py',
]

max_epochs = 12
iterations = max_epochs * 52

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='{{$GPLQ_VIT_TINY:checkpoints/vit-tiny.pth}}',
            prefix='backbone.',
        )
    ),
    # Boxes only.
    roi_head=dict(bbox_head=dict(num_classes=3), mask_head=None, mask_roi_extractor=None),
)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-4, weight_decay=0.05),
    # The backbone is trained already.
    paramwise_cfg=dict(
        norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys=dict(backbone=dict(lr_mult=0.25))
    ),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(
        type='CosineAnnealingLR',
        by_epoch=False,
        begin=50,
        end=iterations,
        T_max=iterations - 50,
        eta_min_ratio=0.02,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=6)
val_cfg = {}
test_cfg = {}
default_hooks = dict(
    logger=dict(interval=13), checkpoint=dict(type='CheckpointHook', interval=2, max_keep_ckpts=2)
)
randomness = dict(seed=0)
