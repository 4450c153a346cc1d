# The paper's linear probe: a linear head on a frozen backbone, 100 epochs, rate 1e-3, batch 64.
# Frozen includes drop path, so the paper's 0.1 is not in effect.
_base_ = ['./default_runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='gplq_mm.QuantBackbone',
        checkpoint=None,
        policy=dict(preset='gplq'),
        compensation=dict(type='QwT'),
        frozen=True,
    ),
    head=dict(type='LinearClsHead', loss=dict(type='CrossEntropyLoss', loss_weight=1.0)),
)
# For comparison: the same frozen backbone with nothing quantized.
probe_fp32 = dict(policy=dict(preset='gplq', rules=[dict(pattern='', exclude=True)]))

train_pipeline = [
    dict(type='gplq_mm.LoadImageOrFail'),
    dict(
        type='RandomResizedCrop',
        scale=224,
        crop_ratio_range=(0.3, 1.0),
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='gplq_mm.LoadImageOrFail'),
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=1)
test_evaluator = val_evaluator

runner_type = 'gplq_mm.GPLQRunner'
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.0))
param_scheduler = dict(type='CosineAnnealingLR', T_max=100, by_epoch=True)
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=10)
val_cfg = {}
test_cfg = {}
