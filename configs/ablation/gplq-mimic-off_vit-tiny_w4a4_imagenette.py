# No mimicking of features: Stage 1 learns from the distilled probabilities alone. Beside the
# base, which mimics all 192 dimensions.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(mimic=None)
