# DeiT-Ti/16 as its authors and timm train it: 5.7 M parameters, ImageNet's mean and deviation.
_base_ = ['./vit-tiny_p16_224.py']

data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
