# As linear-probe_swin-tiny_w4a4_pets.py, with model.backbone.checkpoint=FP32 weights.
_base_ = ['./linear-probe_swin-tiny_w4a4_pets.py']

model = dict(
    backbone=dict(policy=dict(_delete_=True, **_base_.probe_fp32.policy), compensation=None)
)
