# FP32 training of the detection quickstart's Mask R-CNN Swin, from nothing.
_base_ = [
    '../_base_/models/mask-rcnn_swin_mnist.py',
    '../_base_/datasets/mnist_scenes.py',
    'mmdet::_base_/default_runtime.py',
]

max_epochs = 7

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98)),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'relative_position_bias_table': dict(decay_mult=0.0)},
    ),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=100),
    dict(
        type='CosineAnnealingLR',
        begin=1,
        end=max_epochs,
        T_max=max_epochs - 1,
        eta_min=1e-5,
        convert_to_iter_based=True,
    ),
]

runner_type = 'gplq_mm.GPLQRunner'
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = {}
test_cfg = {}
default_hooks = dict(
    logger=dict(interval=50), checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2)
)
randomness = dict(seed=0)
