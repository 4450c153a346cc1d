# Stage 1 trains scales and zero-points alone. Beside the base, which trains weights too.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(train_weights=False)
