# ptq-mse, with grids that cover the 1st to 99th percentile of a channel, and 99.9 % of a group of
# weights.
_base_ = ['./ptq-mse_vit-tiny_w4a4_imagenette.py']

model = dict(
    policy=dict(activation=dict(observer='percentile'), weight=dict(observer='percentile'))
)
