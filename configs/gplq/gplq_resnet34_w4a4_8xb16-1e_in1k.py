# ResNet-34, W4A4, 8 GPUs x 16 images. The FP32 weights (mmpretrain's own)
# are published with a top-1 accuracy of 73.62 %.
_base_ = ['./gplq_resnet50_w4a4_8xb16-1e_in1k.py']

model = dict(
    pretrained=_base_.gplq_zoo + 'resnet/resnet34_8xb32_in1k_20210831-f257d4e6.pth',
    architecture=dict(backbone=dict(depth=34), head=dict(in_channels=512)),
)
