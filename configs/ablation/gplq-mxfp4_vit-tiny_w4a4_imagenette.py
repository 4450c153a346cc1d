# MXFP4 for weights and inputs of layers, a simulation: blocks along K, those of inputs scaled by
# what they hold. Attention products, first layer and head are those of the base, beside which it
# is read.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(policy=dict(activation=dict(format='mxfp4'), weight=dict(format='mxfp4')))
