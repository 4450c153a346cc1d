# Training and validation on a data set of our own in COCO's format. Left to a config are the
# folder, the images' places and the pipelines.
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        type='gplq_mm.SeededDataset',
        dataset=dict(
            type='CocoDataset',
            ann_file='annotations/instances_train.json',
            filter_cfg=dict(filter_empty_gt=True),
        ),
    ),
    sampler=dict(type='gplq_mm.ResumableSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=dict(type='CocoDataset', ann_file='annotations/instances_val.json', test_mode=True),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='CocoMetric')

test_dataloader = val_dataloader
test_evaluator = val_evaluator
