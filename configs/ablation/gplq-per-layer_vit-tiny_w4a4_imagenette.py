# One scale and zero-point for a layer's input. Beside the base, which has them for each channel;
# attention operands have them for each head in both.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(policy=dict(activation=dict(granularity='tensor')))
