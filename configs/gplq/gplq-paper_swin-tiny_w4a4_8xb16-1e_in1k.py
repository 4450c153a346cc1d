# Swin-T, W4A4 as the paper describes it: symmetric activations calibrated with min-max, weights
# in rows of their own with percentile scales rounded to nearest, one learning rate for everything.
_base_ = ['./gplq_swin-tiny_w4a4_8xb16-1e_in1k.py']

model = dict(policy=dict(preset='paper'))
train_cfg = dict(weight_ptq=dict(type='RoundToNearest'))
optim_wrapper = dict(quantizer=dict(lr=5e-6))
