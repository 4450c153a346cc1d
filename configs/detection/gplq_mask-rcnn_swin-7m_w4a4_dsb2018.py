# GPLQ on the small Mask R-CNN Swin of dsb2018, everything quantized, without mimicking.
#   python tools/train.py configs/detection/gplq_mask-rcnn_swin-7m_w4a4_dsb2018.py \
#       --cfg-options model.pretrained=work_dirs/mask-rcnn_swin-7m_dsb2018_fp32/epoch_18.pth
_base_ = [
    '../_base_/models/mask-rcnn_swin-7m.py',
    '../_base_/datasets/dsb2018_instance.py',
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
train_dataloader = dict(batch_size=1)
train_cfg = dict(**_base_.gplq_train_cfg)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
# An epoch has 240 steps only, so the weights move faster than in the paper's schedule.
optim_wrapper = dict(
    **{
        **_base_.gplq_optim_wrapper,
        'optimizer': dict(type='AdamW', lr=2e-5, weight_decay=0.0, fused=True),
    }
)
param_scheduler = None
default_hooks = dict(checkpoint=dict(_delete_=True, **_base_.gplq_checkpoint))
custom_hooks = _base_.gplq_hooks
env_cfg = _base_.gplq_env_cfg
randomness = _base_.gplq_randomness
