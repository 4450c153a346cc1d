# The same detector on the backbone of a finished GPLQ run: W4A4 and frozen, only pyramid and heads
# are trained.
#   python tools/train.py configs/transfer/faster-rcnn_vit-tiny_w4a4-frozen_bccd.py --cfg-options \
#       model.backbone.checkpoint=work_dirs/gplq_vit-tiny_w4a4_imagenette/w4a4.pth
_base_ = ['./faster-rcnn_vit-tiny_fp32_bccd.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='gplq_mm.QuantBackbone',
        backbone=dict(
            type='mmpretrain.VisionTransformer',
            arch='deit-tiny',
            img_size=224,
            patch_size=16,
            out_type='featmap',
        ),
        checkpoint='{{$GPLQ_VIT_TINY_W4A4:work_dirs/gplq_vit-tiny_w4a4_imagenette/w4a4.pth}}',
        # Those of the GPLQ run.
        policy=dict(preset='gplq'),
        compensation=dict(type='QwT'),
        frozen=True,
    )
)
