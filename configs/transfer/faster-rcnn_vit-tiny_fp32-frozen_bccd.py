# As faster-rcnn_vit-tiny_w4a4-frozen_bccd.py with the FP32 backbone: what freezing costs by itself.
_base_ = ['./faster-rcnn_vit-tiny_fp32_bccd.py']

model = dict(backbone=dict(frozen_stages=12))
