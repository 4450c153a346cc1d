# No distillation of probabilities: Stage 1 learns from mimicking alone. Beside the base.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(distill=None)
