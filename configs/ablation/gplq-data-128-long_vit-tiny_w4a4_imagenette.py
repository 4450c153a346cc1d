# 150 iterations over 128 images, drawn at random, which all steps share. Beside gplq-data-128 (as
# many images, 8 iterations) and the base (as many iterations, 2,400 images).
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

train_dataloader = dict(dataset=dict(dataset=dict(max_images=128)))
train_cfg = dict(max_epochs=19)
