# The quantizers of the paper: symmetric, min-max, raw weights. Losses, rates and Stage 2 are
# those of the base, beside which it is read.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(policy=dict(preset='paper'))
