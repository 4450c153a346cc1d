# Weights and activations of 3 bits, ends of 8. Beside the base, and beside direct_vit-tiny_w3a3.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(policy=dict(weight=dict(bits=3), activation=dict(bits=3)))
