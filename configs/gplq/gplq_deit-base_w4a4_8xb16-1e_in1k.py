# DeiT-B, W4A4, 8 GPUs x 16 images. The FP32 weights (mmpretrain's own, not distilled)
# are published with a top-1 accuracy of 81.76 %.
_base_ = ['./gplq_deit-small_w4a4_8xb16-1e_in1k.py']

model = dict(
    pretrained=_base_.gplq_zoo + 'deit/deit-base_pt-16xb64_in1k_20220216-db63c16c.pth',
    architecture=dict(
        backbone=dict(arch='deit-base', drop_path_rate=0.1), head=dict(in_channels=768)
    ),
)
