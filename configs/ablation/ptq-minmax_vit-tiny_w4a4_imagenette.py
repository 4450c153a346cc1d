# ptq-mse, with grids that cover the extreme values: of a channel on the calibration images, and of
# a group of weights.
_base_ = ['./ptq-mse_vit-tiny_w4a4_imagenette.py']

model = dict(policy=dict(activation=dict(observer='minmax'), weight=dict(observer='minmax')))
