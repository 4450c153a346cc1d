# The linear probe on Swin-T. What is left to a config is the data set and its number of classes.
_base_ = ['./linear_probe.py']

model = dict(
    backbone=dict(backbone=dict(type='SwinTransformer', arch='tiny', img_size=224)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(in_channels=768),
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True
    ),
)
