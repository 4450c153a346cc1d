# Swin-B, W4A4, 8 GPUs x 16 images. The FP32 weights (pretrained on ImageNet-21k)
# are published with a top-1 accuracy of 85.16 %.
_base_ = ['mmpretrain::swin_transformer/swin-base_16xb64_in1k.py', '../_base_/gplq_in1k.py']

model = dict(
    _delete_=True,
    type='gplq_mm.GPLQ',
    architecture=_base_.model,
    pretrained=_base_.gplq_zoo
    + 'swin-transformer/convert/swin_base_patch4_window7_224_22kto1k-f967f799.pth',
    policy=_base_.gplq_policy,
    mimic=_base_.gplq_mimic,
    compensation=_base_.gplq_compensation,
)
train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        _delete_=True, type='gplq_mm.SeededDataset', dataset=_base_.train_dataloader.dataset
    ),
    sampler=dict(_delete_=True, **_base_.gplq_sampler),
)
train_cfg = dict(_delete_=True, **_base_.gplq_train_cfg)
optim_wrapper = dict(_delete_=True, **_base_.gplq_optim_wrapper)
param_scheduler = None
auto_scale_lr = _base_.gplq_auto_scale_lr
default_hooks = dict(checkpoint=dict(_delete_=True, **_base_.gplq_checkpoint))
custom_hooks = _base_.gplq_hooks
env_cfg = _base_.gplq_env_cfg
randomness = _base_.gplq_randomness
