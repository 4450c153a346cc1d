# ViT-Ti/16, W3A3: 3 bits everywhere but in the patch embedding and the head, which keep 8.
_base_ = ['./gplq_vit-tiny_w4a4_photos1000.py']

model = dict(policy=dict(activation=dict(bits=3), weight=dict(bits=3)))
