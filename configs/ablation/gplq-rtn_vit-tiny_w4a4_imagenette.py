# Weights rounded to nearest, with QwT: Stage 2 of the paper on our grid. Beside the base, which
# has GPTQ.
_base_ = ['../_base_/gplq_vit-tiny_imagenette_stage2.py']

train_cfg = dict(weight_ptq=dict(type='RoundToNearest'))
