# A real ImageNet ViT-Ti/16 on ten of its classes, scored 1000-way, in ten minutes on two cores.
#   export GPLQ_IMAGENETTE=/path/to/imagenette   (folders train and val of wnid folders)
#   python tools/convert_timm.py vit_tiny_patch16_224.safetensors vit-tiny.pth
#   python tools/train.py configs/gplq/gplq_vit-tiny_w4a4_imagenette.py \
#       --cfg-options model.pretrained=vit-tiny.pth
# With another data set in folders, a linear probe of it follows every evaluation:
#   export GPLQ_TRANSFER=DATA   (DATA/train/CLASS/* and DATA/val/CLASS/*, see configs/transfer)
_base_ = [
    '../_base_/models/vit-tiny_p16_224.py',
    '../_base_/datasets/imagenette.py',
    '../_base_/datasets/transfer_folders.py',
    '../_base_/default_runtime.py',
    '../_base_/gplq.py',
]

# Ten classes stand for a thousand. So the labels are not used: with them the model learns that the
# other 990 do not occur. The teacher's whole feature is mimicked, not only what varies between the
# ten, its 1000 probabilities are distilled, and CutMix makes images that belong to none of them.
model = dict(
    _delete_=True,
    type='gplq_mm.GPLQ',
    architecture=dict(_base_.model, train_cfg=dict(augments=dict(type='CutMix', alpha=1.0))),
    pretrained='{{$GPLQ_VIT_TINY:checkpoints/vit-tiny.pth}}',
    policy=_base_.gplq_policy,
    mimic=dict(_base_.gplq_mimic, explained=1.0),
    task_weight=0.0,
    distill=dict(loss_weight=20.0),
    compensation=_base_.gplq_compensation,
)
train_cfg = dict(
    _base_.gplq_train_cfg,
    transfer=_base_.gplq_transfer,
    weight_ptq=dict(type='GPTQ', num_images=256, batch_size=16),
    num_diagnostic_images=128,
    max_iters=150,
)
val_cfg = {}
test_cfg = {}
optim_wrapper = dict(
    _base_.gplq_optim_wrapper,
    optimizer=dict(type='AdamW', lr=5e-6, weight_decay=0.0, fused=True),
    quantizer=dict(lr=1e-3, weight_decay=0.0),
)
# Too few iterations for a constant rate to settle.
param_scheduler = dict(type='CosineAnnealingLR', T_max=150, eta_min_ratio=0.02, by_epoch=False)
default_hooks = dict(checkpoint=dict(_delete_=True, **dict(_base_.gplq_checkpoint, interval=50)))
custom_hooks = [
    dict(type='gplq_mm.CalibrationHook', num_images=64, batch_size=32),
    dict(type='gplq_mm.PCABasisHook', num_images=512, batch_size=32),
    dict(type='gplq_mm.QuantStatsHook', interval=50),
    dict(type='gplq_mm.WeightDriftHook', interval=25),
]
