# A float scale for each group of 128, a simulation. Beside gplq-group-128.
_base_ = ['./gplq-float-scales_vit-tiny_w4a4_imagenette.py']

model = dict(policy=dict(weight=dict(group_size=128)))
