# DeiT-Ti/16 on a thousand photos without labels, scored on others, 1000-way.
#   export GPLQ_PHOTOS1000=FOLDER GPLQ_IMAGENET_VAL=FOLDER   (folders of wnid folders)
#   python tools/convert_timm.py deit_tiny_patch16_224.safetensors deit-tiny.pth
#   python tools/train.py configs/gplq/gplq_deit-tiny_w4a4_photos1000.py \
#       --cfg-options model.pretrained=deit-tiny.pth
_base_ = [
    '../_base_/models/deit-tiny_p16_224.py',
    '../_base_/datasets/photos1000.py',
    '../_base_/gplq_photos1000.py',
]

model = dict(
    _base_.gplq_model,
    _delete_=True,
    architecture=dict(_base_.model, **_base_.gplq_architecture),
    pretrained='{{$GPLQ_DEIT_TINY:checkpoints/deit-tiny.pth}}',
)
