# Plain W4A4 PTQ, for comparison: calibrated activations, weights rounded to the nearest, no
# training and no compensation.
_base_ = ['./gplq_mask-rcnn_swin-7m_w4a4_dsb2018.py']

model = dict(compensation=None)
train_cfg = dict(max_epochs=0, weight_ptq=dict(type='RoundToNearest'), baseline=None)
