# Labels, and mimicking of the 64 components that the paper takes for this width. Beside
# gplq-labels, which mimics all 192.
_base_ = ['./gplq-labels_vit-tiny_w4a4_imagenette.py']

model = dict(mimic=dict(num_components=64))
