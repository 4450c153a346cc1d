# Swin-S, W3A3: 3 bits everywhere but in the patch embedding and the head, which keep 8.
_base_ = ['./gplq_swin-small_w4a4_8xb16-1e_in1k.py']

model = dict(policy=dict(activation=dict(bits=3), weight=dict(bits=3)))
