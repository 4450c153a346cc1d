# RepQ-ViT (Li et al., ICCV 2023), W4A4, with the images and the evaluation of the GPLQ run beside
# it: one scale a tensor, LayerNorms reparametrized, zero and powers of sqrt(2) for attention
# probabilities, and weights rounded with a scale each row. As in our other policies the patch
# embedding and the head have 8 bits.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(
    mimic=None,
    distill=None,
    compensation=None,
    policy=dict(preset='repq'),
)
train_cfg = dict(
    max_epochs=0,
    # The result is plain rounding already.
    baseline=None,
    # Rounding looks at no image; one batch shows the order of the layers.
    weight_ptq=dict(type='RoundToNearest', num_images=16),
    error_images=dict(num_images=64, batch_size=16),
)
