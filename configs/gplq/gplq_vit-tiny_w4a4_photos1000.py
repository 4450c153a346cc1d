# ViT-Ti/16 on a thousand photos without labels, scored on others, 1000-way.
#   export GPLQ_PHOTOS1000=FOLDER GPLQ_IMAGENET_VAL=FOLDER   (folders of wnid folders)
#   python tools/convert_timm.py vit_tiny_patch16_224.safetensors vit-tiny.pth
#   python tools/train.py configs/gplq/gplq_vit-tiny_w4a4_photos1000.py \
#       --cfg-options model.pretrained=vit-tiny.pth
_base_ = [
    '../_base_/models/vit-tiny_p16_224.py',
    '../_base_/datasets/photos1000_resize-248.py',
    '../_base_/gplq_photos1000.py',
]

model = dict(
    _base_.gplq_model,
    _delete_=True,
    architecture=dict(_base_.model, **_base_.gplq_architecture),
    pretrained='{{$GPLQ_VIT_TINY:checkpoints/vit-tiny.pth}}',
)
