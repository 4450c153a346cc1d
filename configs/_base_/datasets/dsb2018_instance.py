# Nuclei of the 2018 Data Science Bowl: 240 + 80 microscopy images of 256 x 256 pixels with 9,165
# masks, in COCO's format. Folder layout: $GPLQ_DSB2018/{train,val}/*.jpg and
# $GPLQ_DSB2018/annotations/instances_{train,val}.json
_base_ = ['./coco_format.py']

data_root = '{{$GPLQ_DSB2018:data/dsb2018}}/'
metainfo = dict(classes=('nucleus',), palette=[(220, 20, 60)])

train_pipeline = [
    dict(type='gplq_mm.LoadImageOrFail'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    # The objects have no upright side.
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='gplq_mm.LoadImageOrFail'),
    # Changes nothing here: it records the scale_factor that predictions are mapped back with.
    dict(type='Resize', scale=(256, 256), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]

data = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    dataset=dict(dataset=dict(**data, data_prefix=dict(img='train/'), pipeline=train_pipeline))
)
val_dataloader = dict(dataset=dict(**data, data_prefix=dict(img='val/'), pipeline=test_pipeline))
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json', metric=['bbox', 'segm'])

test_dataloader = val_dataloader
test_evaluator = val_evaluator
