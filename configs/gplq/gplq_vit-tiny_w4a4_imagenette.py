# A real ImageNet ViT-Ti/16 on ten of its classes, scored 1000-way, in ten minutes on two cores.
#   export GPLQ_IMAGENETTE=/path/to/imagenette   (folders train and val of wnid folders)
#   python tools/convert_timm.py vit_tiny_patch16_224.safetensors vit-tiny.pth
#   python tools/train.py configs/gplq/gplq_vit-tiny_w4a4_imagenette.py \
#       --cfg-options model.pretrained=vit-tiny.pth
_base_ = [
    '../_base_/models/vit-tiny_p16_224.py',
    '../_base_/datasets/imagenette.py',
    '../_base_/default_runtime.py',
    '../_base_/gplq.py',
]

model = dict(
    _delete_=True,
    type='gplq_mm.GPLQ',
    architecture=_base_.model,
    pretrained='{{$GPLQ_VIT_TINY:checkpoints/vit-tiny.pth}}',
    policy=_base_.gplq_policy,
    mimic=_base_.gplq_mimic,
    compensation=_base_.gplq_compensation,
)
train_cfg = _base_.gplq_train_cfg
val_cfg = {}
test_cfg = {}
optim_wrapper = _base_.gplq_optim_wrapper
default_hooks = dict(checkpoint=dict(_delete_=True, **_base_.gplq_checkpoint))
custom_hooks = _base_.gplq_hooks
