# Four times the iterations of Stage 1. Beside the base, which makes 150.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

train_cfg = dict(max_epochs=4, max_iters=600)
param_scheduler = dict(T_max=600)
