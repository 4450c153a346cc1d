# The losses of the paper: labels and mimicking, no distillation. Beside the base, and beside
# gplq-labels-mimic-off. Labels of ten classes speak against the other 990.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(task_weight=1.0, distill=None)
