# DeiT-T, W4A4, 8 GPUs x 16 images. The FP32 weights (mmpretrain's own, not distilled)
# are published with a top-1 accuracy of 74.50 %.
_base_ = ['./gplq_deit-small_w4a4_8xb16-1e_in1k.py']

model = dict(
    pretrained=_base_.gplq_zoo + 'deit/deit-tiny_pt-4xb256_in1k_20220218-13b382a0.pth',
    architecture=dict(backbone=dict(arch='deit-tiny'), head=dict(in_channels=192)),
)
