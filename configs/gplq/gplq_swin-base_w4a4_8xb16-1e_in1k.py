# Swin-B, W4A4, 8 GPUs x 16 images. The FP32 weights (pretrained on ImageNet-21k)
# are published with a top-1 accuracy of 85.16 %.
_base_ = ['./gplq_swin-tiny_w4a4_8xb16-1e_in1k.py']

model = dict(
    pretrained=_base_.gplq_zoo
    + 'swin-transformer/convert/swin_base_patch4_window7_224_22kto1k-f967f799.pth',
    architecture=dict(backbone=dict(arch='base', drop_path_rate=0.5), head=dict(in_channels=1024)),
)
