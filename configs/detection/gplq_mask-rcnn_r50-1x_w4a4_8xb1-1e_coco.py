# Mask R-CNN ResNet-50, W4A4: one epoch, one image a GPU.
# The FP32 weights are mmdet's: 38.2 box AP, 34.7 mask AP.
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/gplq_detection.py']

model = dict(
    _delete_=True,
    type='gplq_mm.GPLQ',
    architecture=_base_.model,
    pretrained=_base_.gplq_zoo
    + 'mask_rcnn/mask_rcnn_r50_fpn_1x_coco/mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth',
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
