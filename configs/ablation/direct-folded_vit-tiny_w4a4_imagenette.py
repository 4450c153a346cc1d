# Direct QAT on the grid of GPLQ: folded weights in groups of 32, whose multipliers stay as they
# begin. Beside the base (activations first) and direct (raw weights).
_base_ = ['./direct_vit-tiny_w4a4_imagenette.py']

model = dict(policy=dict(weight=dict(layout='folded')))
