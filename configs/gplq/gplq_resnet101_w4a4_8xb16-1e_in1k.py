# ResNet-101, W4A4, 8 GPUs x 16 images. The FP32 weights (mmpretrain's own)
# are published with a top-1 accuracy of 77.97 %.
_base_ = ['./gplq_resnet50_w4a4_8xb16-1e_in1k.py']

model = dict(
    pretrained=_base_.gplq_zoo + 'resnet/resnet101_8xb32_in1k_20210831-539c63f8.pth',
    architecture=dict(backbone=dict(depth=101)),
)
