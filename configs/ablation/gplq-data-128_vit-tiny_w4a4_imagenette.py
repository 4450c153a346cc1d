# One epoch over 128 images, drawn at random: 8 iterations. Calibration, PCA and Stage 2 see no
# others. Beside the base, whose 150 iterations see 2,400.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

train_dataloader = dict(dataset=dict(dataset=dict(max_images=128)))
train_cfg = dict(max_iters=8)
param_scheduler = dict(T_max=8)
