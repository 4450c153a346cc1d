# The same for models that timm evaluates at 0.9 of the shorter edge.
_base_ = ['./photos1000.py']

test_pipeline = [
    dict(type='gplq_mm.LoadImageOrFail'),
    dict(type='ResizeEdge', scale=248, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
