# Mask R-CNN ViT-B with a simple feature pyramid (ViTDet style), W4A4: one epoch, one image a GPU.
# No weights are published for this architecture: train it first and set model.pretrained.
_base_ = [
    '../_base_/models/mask-rcnn_vit-base-p16_sfp.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/gplq_detection.py',
]

model = dict(
    _delete_=True,
    type='gplq_mm.GPLQ',
    architecture=_base_.model,
    pretrained=None,
    policy=_base_.gplq_policy,
    compensation=_base_.gplq_compensation,
)
# Attention is global: its memory grows with the square of the image's area.
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(1024, 1024), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=(1024, 1024), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataset = {**_base_.train_dataloader.dataset, 'pipeline': train_pipeline}
train_dataloader = dict(
    batch_size=1,
    dataset=dict(_delete_=True, type='gplq_mm.SeededDataset', dataset=train_dataset),
    sampler=dict(_delete_=True, **_base_.gplq_sampler),
    batch_sampler=None,
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
train_cfg = dict(**_base_.gplq_train_cfg)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(**_base_.gplq_optim_wrapper)
param_scheduler = None
auto_scale_lr = _base_.gplq_auto_scale_lr
default_hooks = dict(checkpoint=dict(_delete_=True, **_base_.gplq_checkpoint))
custom_hooks = _base_.gplq_hooks
env_cfg = _base_.gplq_env_cfg
randomness = _base_.gplq_randomness
