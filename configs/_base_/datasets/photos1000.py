# Photos of many ImageNet classes to quantize with, and photos of ImageNet's validation set to score
# on, 1000-way. Both are folders of wnid folders: $GPLQ_PHOTOS1000/<wnid>/*.jpg and
# $GPLQ_IMAGENET_VAL/<wnid>/*.JPEG; the two have no photo in common.
#
# Settings are not chosen by the score. GPLQ_HOLD_OUT=0/5 holds one fifth of the training photos
# out, and the run trains on the rest and scores on that fifth (docs/comparing.md).
train_root = '{{$GPLQ_PHOTOS1000:data/photos1000}}'
scored_root = '{{$GPLQ_IMAGENET_VAL:data/imagenet_val}}'
hold_out = '{{$GPLQ_HOLD_OUT:none}}'
if hold_out == 'none':
    hold_out = None

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
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
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
            data_root=train_root,
            without_fold=hold_out,
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
        data_root=train_root if hold_out else scored_root,
        fold=hold_out,
        pipeline=test_pipeline,
        test_mode=True,
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1, 5))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
