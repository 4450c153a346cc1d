# DeiT-Ti/16, W4A4 but for 8 bits in hidden values of MLPs and operands of attentions.
_base_ = ['./gplq_deit-tiny_w4a4_photos1000.py']

model = dict(policy=dict(preset='gplq-mixed'))
