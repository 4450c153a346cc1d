# Mask R-CNN Swin-S of the 3x schedule, W4A4.
# The paper's schedule: one epoch, one image a GPU, no PCA loss.
# The FP32 weights are mmdet's: 48.2 box AP, 43.2 mask AP.
_base_ = ['./gplq_mask-rcnn_swin-tiny-3x_w4a4_8xb1-1e_coco.py']

# mmdet's config keeps the address of the backbone's weights at both places.
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth'
model = dict(
    pretrained=_base_.gplq_zoo
    + 'swin/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco/'
    + 'mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco_20210903_104808-b92c91f1.pth',
    architecture=dict(backbone=dict(depths=[2, 2, 18, 2], init_cfg=dict(checkpoint=pretrained))),
)
