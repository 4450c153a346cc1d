# Blood cells (BCCD): 205 + 87 photos of 640 x 480 pixels, read at half that size, with boxes of
# three classes in COCO's format. Folder layout: $GPLQ_BCCD/images/*.jpg and
# $GPLQ_BCCD/annotations/instances_{train,val}.json
_base_ = ['./coco_format.py']

data_root = '{{$GPLQ_BCCD:data/bccd}}/'
metainfo = dict(
    classes=('RBC', 'WBC', 'Platelets'), palette=[(220, 20, 60), (0, 0, 142), (119, 200, 32)]
)
scale = (320, 240)

train_pipeline = [
    dict(type='gplq_mm.LoadImageOrFail'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    # The cells have no upright side.
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='gplq_mm.LoadImageOrFail'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]

data = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    dataset=dict(dataset=dict(**data, data_prefix=dict(img='images/'), pipeline=train_pipeline))
)
val_dataloader = dict(dataset=dict(**data, data_prefix=dict(img='images/'), pipeline=test_pipeline))
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json', metric='bbox')

test_dataloader = val_dataloader
test_evaluator = val_evaluator
