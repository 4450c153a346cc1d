# Weights rounded to nearest, with QwT-v2. Beside gplq-rtn, which has QwT.
_base_ = ['./gplq-rtn_vit-tiny_w4a4_imagenette.py']

model = dict(compensation=dict(type='QwTv2'))
