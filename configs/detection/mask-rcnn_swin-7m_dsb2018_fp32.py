# FP32 training of a small Mask R-CNN Swin from nothing on 240 microscopy images.
#   export GPLQ_DSB2018=/path/to/dsb2018
#   python tools/train.py configs/detection/mask-rcnn_swin-7m_dsb2018_fp32.py
_base_ = [
    '../_base_/models/mask-rcnn_swin-7m.py',
    '../_base_/datasets/dsb2018_instance.py',
    'mmdet::_base_/default_runtime.py',
]

max_epochs = 18

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05, betas=(0.9, 0.98)),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'relative_position_bias_table': dict(decay_mult=0.0)},
    ),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=60),
    dict(
        type='CosineAnnealingLR',
        begin=1,
        end=max_epochs,
        T_max=max_epochs - 1,
        eta_min=5e-6,
        convert_to_iter_based=True,
    ),
]

runner_type = 'gplq_mm.GPLQRunner'
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=6)
val_cfg = {}
test_cfg = {}
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3)
)
randomness = dict(seed=0)
