# Raw weights, one scale a row: the simulation of the paper, no integer product. Beside the base,
# whose weights are folded, in groups of 32.
_base_ = ['../_base_/gplq_vit-tiny_imagenette_stage2.py']

model = dict(policy=dict(weight=dict(layout='raw')))
