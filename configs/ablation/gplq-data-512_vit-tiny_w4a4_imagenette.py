# One epoch over 512 images, drawn at random: 32 iterations. Calibration, PCA and Stage 2 see no
# others. Beside the base, whose 150 iterations see 2,400.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

train_dataloader = dict(dataset=dict(dataset=dict(max_images=512)))
train_cfg = dict(max_iters=32)
param_scheduler = dict(T_max=32)
