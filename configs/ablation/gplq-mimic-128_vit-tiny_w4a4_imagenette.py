# Mimics the 128 leading components of the feature. Beside the base, which mimics all 192.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(mimic=dict(num_components=128))
