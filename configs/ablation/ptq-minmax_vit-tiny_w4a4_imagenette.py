# Plain PTQ, W4A4: the GPLQ run beside it without Stage 1, GPTQ and compensation. The grids are our
# policy's (activations asymmetric, a scale each channel; weights in groups of 32). Here they
# cover the extreme values: of a channel on the calibration images, and of a group of weights.
# The row 'plain PTQ' needs no images for the weights; the last row also corrects the biases by the
# mean inputs of 256 images.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(
    mimic=None,
    distill=None,
    compensation=None,
    policy=dict(activation=dict(observer='minmax'), weight=dict(observer='minmax')),
)
train_cfg = dict(max_epochs=0, weight_ptq=dict(type='RoundToNearest'))
