# Linear probe of ViT-Ti on any folder of images: DATA/train/CLASS/* and DATA/val/CLASS/*.
#   export GPLQ_PROBE_DATA=DATA
#   python tools/train.py configs/transfer/linear-probe_vit-tiny_w4a4_imagefolder.py --cfg-options \
#       model.backbone.checkpoint=work_dirs/gplq_vit-tiny_w4a4_imagenette/w4a4.pth \
#       model.head.num_classes=10 model.data_preprocessor.num_classes=10
_base_ = ['../_base_/linear_probe.py']

data = dict(type='CustomDataset', data_root='{{$GPLQ_PROBE_DATA:data/folder}}', with_label=True)
model = dict(
    backbone=dict(
        backbone=dict(type='VisionTransformer', arch='deit-tiny', img_size=224, patch_size=16)
    ),
    head=dict(in_channels=192, num_classes=10),
    # timm's weights: pixels scaled to -1..1.
    data_preprocessor=dict(
        num_classes=10, mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True
    ),
)
train_dataloader = dict(dataset=dict(**data, data_prefix='train', pipeline=_base_.train_pipeline))
val_dataloader = dict(
    dataset=dict(**data, data_prefix='val', pipeline=_base_.test_pipeline, test_mode=True)
)
test_dataloader = val_dataloader
