# As linear-probe_vit-tiny_w4a4-cached_imagefolder.py, with model.backbone.checkpoint=FP32 weights.
_base_ = ['./linear-probe_vit-tiny_w4a4-cached_imagefolder.py']

model = dict(
    backbone=dict(policy=dict(_delete_=True, **_base_.probe_fp32.policy), compensation=None)
)
