# Linear probe on StanfordCars: python tools/train.py THIS_FILE --cfg-options \
#     model.backbone.checkpoint=work_dirs/gplq_swin-tiny_w4a4_8xb16-1e_in1k/w4a4.pth
_base_ = ['../_base_/linear_probe_swin-tiny.py']

data = dict(type='StanfordCars', data_root='data/stanford-cars')
model = dict(head=dict(num_classes=196), data_preprocessor=dict(num_classes=196))
train_dataloader = dict(dataset=dict(**data, split='train', pipeline=_base_.train_pipeline))
val_dataloader = dict(
    dataset=dict(**data, split='test', pipeline=_base_.test_pipeline, test_mode=True)
)
test_dataloader = val_dataloader
