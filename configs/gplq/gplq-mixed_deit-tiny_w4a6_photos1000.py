# DeiT-Ti/16, weights of 4 bits and activations of 6.
_base_ = ['./gplq_deit-tiny_w4a4_photos1000.py']

model = dict(policy=dict(preset='gplq-mixed'))
