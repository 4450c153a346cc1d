# Folded weights without groups: no row of this model has more than 768 columns. Beside the base,
# which has groups of 32.
_base_ = ['../_base_/gplq_vit-tiny_imagenette_stage2.py']

model = dict(policy=dict(weight=dict(group_size=768)))
