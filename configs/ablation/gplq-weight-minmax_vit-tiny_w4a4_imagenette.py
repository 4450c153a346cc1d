# Scales of weights that clip nothing. Beside the base, whose scales have the least squared error.
_base_ = ['../_base_/gplq_vit-tiny_imagenette_stage2.py']

model = dict(policy=dict(weight=dict(observer='minmax')))
