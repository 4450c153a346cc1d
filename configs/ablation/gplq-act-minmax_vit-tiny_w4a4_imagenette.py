# Activations, attention operands too, start from their extreme values. Beside the base, which
# starts where the squared error is least.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(policy=dict(activation=dict(observer='minmax')))
