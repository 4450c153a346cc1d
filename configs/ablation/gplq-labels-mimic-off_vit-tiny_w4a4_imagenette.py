# Labels alone: the paper's ablation of its mimic loss. Beside gplq-labels.
_base_ = ['./gplq-labels_vit-tiny_w4a4_imagenette.py']

model = dict(mimic=None)
