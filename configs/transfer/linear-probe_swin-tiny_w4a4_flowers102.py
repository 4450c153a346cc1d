# Linear probe on Flowers102: python tools/train.py THIS_FILE --cfg-options \
#     model.backbone.checkpoint=work_dirs/gplq_swin-tiny_w4a4_8xb16-1e_in1k/w4a4.pth
_base_ = ['../_base_/linear_probe_swin-tiny.py']

data = dict(type='Flowers102', data_root='data/flowers102')
model = dict(head=dict(num_classes=102), data_preprocessor=dict(num_classes=102))
train_dataloader = dict(dataset=dict(**data, split='trainval', pipeline=_base_.train_pipeline))
val_dataloader = dict(
    dataset=dict(**data, split='test', pipeline=_base_.test_pipeline, test_mode=True)
)
test_dataloader = val_dataloader
