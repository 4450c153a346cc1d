# Linear probe on Flowers102: python tools/train.py THIS_FILE --cfg-options \
#     model.backbone.checkpoint=work_dirs/gplq_swin-tiny_w4a4_8xb16-1e_in1k/w4a4.pth
_base_ = ['../_base_/linear_probe.py']

data = dict(type='Flowers102', data_root='data/flowers102')
model = dict(
    **{
        **_base_.probe_model,
        'backbone': dict(
            **_base_.probe_model.backbone,
            backbone=dict(type='SwinTransformer', arch='tiny', img_size=224),
        ),
        'neck': dict(type='GlobalAveragePooling'),
        'head': dict(**_base_.probe_model.head, in_channels=768, num_classes=102),
        'data_preprocessor': dict(
            num_classes=102,
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            to_rgb=True,
        ),
    }
)
train_dataloader = dict(dataset=dict(**data, split='trainval', pipeline=_base_.train_pipeline))
val_dataloader = dict(
    dataset=dict(**data, split='test', pipeline=_base_.test_pipeline, test_mode=True)
)
test_dataloader = val_dataloader
