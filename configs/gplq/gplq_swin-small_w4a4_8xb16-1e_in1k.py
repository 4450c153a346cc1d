# Swin-S, W4A4, 8 GPUs x 16 images. The FP32 weights (the original authors' weights)
# are published with a top-1 accuracy of 83.21 %.
_base_ = ['./gplq_swin-tiny_w4a4_8xb16-1e_in1k.py']

model = dict(
    pretrained=_base_.gplq_zoo
    + 'swin-transformer/convert/swin_small_patch4_window7_224-cc7a01c9.pth',
    architecture=dict(backbone=dict(arch='small', drop_path_rate=0.3)),
)
