# Activations without zero-points. Beside the base, whose zero-points are learned.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(policy=dict(activation=dict(zero_point='none')))
