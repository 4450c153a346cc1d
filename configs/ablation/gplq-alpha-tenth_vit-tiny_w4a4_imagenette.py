# A tenth of the weight of mimicking, the paper's alpha of 0.1. Beside the base, where it is 1;
# the weight of distillation stays.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(mimic=dict(loss_weight=0.1))
