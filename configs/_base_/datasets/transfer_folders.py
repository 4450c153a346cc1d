# With another data set in folders, a linear probe of it follows every evaluation of a run:
#   export GPLQ_TRANSFER=DATA   (DATA/train/CLASS/* and DATA/val/CLASS/*, see configs/transfer)
# A config takes it by name: train_cfg = dict(transfer=_base_.gplq_transfer)
gplq_transfer_root = '{{$GPLQ_TRANSFER:none}}'
gplq_transfer_data = dict(
    type='CustomDataset',
    data_root=gplq_transfer_root,
    with_label=True,
    pipeline=[
        dict(type='gplq_mm.LoadImageOrFail'),
        dict(type='ResizeEdge', scale=248, edge='short', backend='pillow', interpolation='bicubic'),
        dict(type='CenterCrop', crop_size=224),
        dict(type='PackInputs'),
    ],
)
gplq_transfer = dict(
    train_dataloader=dict(
        batch_size=32, num_workers=2, dataset=dict(gplq_transfer_data, data_prefix='train')
    ),
    val_dataloader=dict(
        batch_size=32, num_workers=2, dataset=dict(gplq_transfer_data, data_prefix='val')
    ),
)
if gplq_transfer_root == 'none':
    gplq_transfer = None
