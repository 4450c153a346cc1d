# A float scale for each group of 32, a simulation. Beside the base, whose groups have integer
# multiples of one scale of the row.
_base_ = ['../_base_/gplq_vit-tiny_imagenette_stage2.py']

model = dict(policy=dict(weight=dict(group_scale='float')))
