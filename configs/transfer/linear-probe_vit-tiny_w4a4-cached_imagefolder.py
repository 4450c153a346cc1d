# As linear-probe_vit-tiny_w4a4_imagefolder.py, without augmentation: every epoch has the same
# images, so the frozen backbone computes each of them once and a file answers from then on. Made
# for CPUs; not the paper's protocol.
#   export GPLQ_PROBE_DATA=DATA
#   python tools/train.py configs/transfer/linear-probe_vit-tiny_w4a4-cached_imagefolder.py \
#       --cfg-options model.backbone.checkpoint=.../w4a4.pth \
#       model.head.num_classes=10 model.data_preprocessor.num_classes=10
_base_ = ['./linear-probe_vit-tiny_w4a4_imagefolder.py']

# May be shared by any number of runs, networks and data sets.
model = dict(backbone=dict(cache='{{$GPLQ_FEATURE_CACHE:work_dirs/features.sqlite}}'))
train_dataloader = dict(num_workers=2, dataset=dict(pipeline=_base_.test_pipeline))
val_dataloader = dict(num_workers=2)
test_dataloader = val_dataloader
default_hooks = dict(checkpoint=dict(interval=10))
