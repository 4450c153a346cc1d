# FP32 training of the quickstart's ViT.
_base_ = [
    '../_base_/models/vit_mnist.py',
    '../_base_/datasets/mnist5k.py',
    '../_base_/default_runtime.py',
]

max_epochs = 8

train_dataloader = dict(batch_size=32)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98)),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        # Positions start near zero and have to become as large as the patches' features.
        custom_keys={
            '.cls_token': dict(decay_mult=0.0),
            '.pos_embed': dict(decay_mult=0.0, lr_mult=10.0),
        },
    ),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        begin=1,
        end=max_epochs,
        T_max=max_epochs - 1,
        eta_min=1e-5,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=4)
val_cfg = {}
test_cfg = {}
default_hooks = dict(logger=dict(interval=125))
