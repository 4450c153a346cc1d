# GPTQ without compensation. Beside the base, which has QwT.
_base_ = ['../_base_/gplq_vit-tiny_imagenette_stage2.py']

model = dict(compensation=None)
