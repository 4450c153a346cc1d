# 800 + 150 scenes of 1 to 6 MNIST digits, with boxes and masks, composed on the fly: no download.
train_pipeline = [
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    # The scenes are arrays already, as the pictures given to an inferencer may be.
    dict(type='mmdet.LoadImageFromNDArray'),
    # Changes nothing here: it records the scale_factor that predictions are mapped back with.
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances'),
    ),
]

train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    dataset=dict(
        type='gplq_mm.SeededDataset',
        dataset=dict(
            type='gplq_mm.MNISTScenes', split='train', num_scenes=800, pipeline=train_pipeline
        ),
    ),
    sampler=dict(type='gplq_mm.ResumableSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=dict(type='gplq_mm.MNISTScenes', split='val', num_scenes=150, pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='CocoMetric', metric=['bbox', 'segm'])

test_dataloader = val_dataloader
test_evaluator = val_evaluator
