# GPLQ on the ViT that vit_mnist_fp32.py trains.
_base_ = [
    '../_base_/models/vit_mnist.py',
    '../_base_/datasets/mnist5k.py',
    '../_base_/default_runtime.py',
    '../_base_/gplq.py',
]

model = dict(
    _delete_=True,
    type='gplq_mm.GPLQ',
    architecture=_base_.model,
    pretrained='work_dirs/quickstart/fp32/epoch_8.pth',
    policy=_base_.gplq_policy,
    mimic=_base_.gplq_mimic,
    compensation=_base_.gplq_compensation,
)
train_cfg = dict(_base_.gplq_train_cfg, max_epochs=4)
val_cfg = {}
test_cfg = {}
optim_wrapper = dict(_base_.gplq_optim_wrapper)
default_hooks = dict(
    logger=dict(interval=60), checkpoint=dict(_delete_=True, **_base_.gplq_checkpoint)
)
custom_hooks = _base_.gplq_hooks
