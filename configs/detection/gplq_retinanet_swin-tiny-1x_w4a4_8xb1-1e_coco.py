# RetinaNet Swin-T, W4A4: one epoch, one image a GPU.
# mmdet publishes no weights for this config: train it first and set model.pretrained.
_base_ = ['mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py', '../_base_/gplq_detection.py']

model = dict(
    _delete_=True,
    type='gplq_mm.GPLQ',
    architecture=_base_.model,
    pretrained=None,
    policy=_base_.gplq_policy,
    compensation=_base_.gplq_compensation,
)
train_dataloader = dict(
    batch_size=1,
    dataset=dict(
        _delete_=True, type='gplq_mm.SeededDataset', dataset=_base_.train_dataloader.dataset
    ),
    sampler=dict(_delete_=True, **_base_.gplq_sampler),
    batch_sampler=None,
)
train_cfg = dict(_delete_=True, **_base_.gplq_train_cfg)
optim_wrapper = dict(_delete_=True, **_base_.gplq_optim_wrapper)
param_scheduler = None
auto_scale_lr = _base_.gplq_auto_scale_lr
default_hooks = dict(checkpoint=dict(_delete_=True, **_base_.gplq_checkpoint))
custom_hooks = _base_.gplq_hooks
env_cfg = _base_.gplq_env_cfg
randomness = _base_.gplq_randomness
