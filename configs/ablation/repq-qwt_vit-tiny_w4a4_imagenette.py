# RepQ-ViT and then QwT: a linear compensation beside every block, fitted on 256 images.
_base_ = ['./repq_vit-tiny_w4a4_imagenette.py']

model = dict(compensation=dict(_delete_=True, type='QwT'))
train_cfg = dict(weight_ptq=dict(num_images=256))
