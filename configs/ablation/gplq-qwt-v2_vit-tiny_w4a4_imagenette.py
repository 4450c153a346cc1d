# GPTQ with QwT-v2, a factor and an offset for each channel. Beside the base, which has QwT.
_base_ = ['../_base_/gplq_vit-tiny_imagenette_stage2.py']

model = dict(compensation=dict(type='QwTv2'))
