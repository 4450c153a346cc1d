# Mask R-CNN Swin-T of the 3x schedule, W4A4.
# The paper's schedule: one epoch, one image a GPU, no PCA loss.
# The FP32 weights are mmdet's: 46.0 box AP, 41.6 mask AP.
_base_ = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py',
    '../_base_/gplq_detection.py',
]

model = dict(
    _delete_=True,
    type='gplq_mm.GPLQ',
    architecture=_base_.model,
    pretrained=_base_.gplq_zoo
    + 'swin/mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco/'
    + 'mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco_20210906_131725-bacf6f7b.pth',
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
