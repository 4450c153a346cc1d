# GPLQ on the Mask R-CNN that mask-rcnn_mnist_fp32.py trains: everything is quantized.
_base_ = [
    '../_base_/models/mask-rcnn_swin_mnist.py',
    '../_base_/datasets/mnist_scenes.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/gplq_detection.py',
]

model = dict(
    _delete_=True,
    type='gplq_mm.GPLQ',
    architecture=_base_.model,
    pretrained='work_dirs/quickstart-det/fp32/epoch_7.pth',
    policy=_base_.gplq_policy,
    compensation=_base_.gplq_compensation,
)
train_cfg = dict(_base_.gplq_train_cfg)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
# An epoch has 100 steps only, so the weights move faster than in the paper's schedule.
optim_wrapper = dict(
    **{
        **_base_.gplq_optim_wrapper,
        'optimizer': dict(type='AdamW', lr=2e-5, weight_decay=0.0, fused=True),
    }
)
param_scheduler = None
default_hooks = dict(
    logger=dict(interval=25), checkpoint=dict(_delete_=True, **_base_.gplq_checkpoint)
)
custom_hooks = _base_.gplq_hooks
env_cfg = _base_.gplq_env_cfg
randomness = _base_.gplq_randomness
