# Weights rounded to nearest, without compensation. Beside gplq-rtn, which has QwT.
_base_ = ['./gplq-rtn_vit-tiny_w4a4_imagenette.py']

model = dict(compensation=None)
