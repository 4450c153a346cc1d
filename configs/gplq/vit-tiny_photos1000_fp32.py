# The FP32 reference of the GPLQ runs on photos1000: convert the weights and score them.
#   export GPLQ_IMAGENET_VAL=FOLDER   (a folder of wnid folders)
#   python tools/convert_timm.py vit_tiny_patch16_224.safetensors vit-tiny.pth
#   python tools/test.py configs/gplq/vit-tiny_photos1000_fp32.py vit-tiny.pth
_base_ = [
    '../_base_/models/vit-tiny_p16_224.py',
    '../_base_/datasets/photos1000_resize-248.py',
    '../_base_/default_runtime.py',
]

# Scored only: mmengine wants a loop's parts all together or not at all.
train_dataloader = None
val_cfg = {}
test_cfg = {}
