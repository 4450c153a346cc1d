# Ten ImageNet classes, scored 1000-way: the ten-way score of a trained model is saturated.
# Folder layout: $GPLQ_IMAGENETTE/{train,val}/<wnid>/*.JPEG
data_root = '{{$GPLQ_IMAGENETTE:data/imagenette}}'

train_pipeline = [
    dict(type='gplq_mm.LoadImageOrFail'),
    dict(
        type='RandomResizedCrop',
        scale=224,
        crop_ratio_range=(0.3, 1.0),
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='gplq_mm.LoadImageOrFail'),
    dict(type='ResizeEdge', scale=248, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=16,
    num_workers=2,
    persistent_workers=True,
    dataset=dict(
        type='gplq_mm.SeededDataset',
        dataset=dict(
            type='gplq_mm.ImageNetFolder',
            data_root=data_root,
            data_prefix='train',
            pipeline=train_pipeline,
        ),
    ),
    sampler=dict(type='gplq_mm.ResumableSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=2,
    persistent_workers=True,
    dataset=dict(
        type='gplq_mm.ImageNetFolder',
        data_root=data_root,
        data_prefix='val',
        pipeline=test_pipeline,
        test_mode=True,
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1, 5))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
