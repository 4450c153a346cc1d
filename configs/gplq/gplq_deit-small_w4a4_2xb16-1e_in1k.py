# DeiT-S, W4A4, 2 GPUs x 16 images at the rate that the paper's appendix gives for it.
_base_ = ['./gplq_deit-small_w4a4_8xb16-1e_in1k.py']

optim_wrapper = dict(optimizer=dict(lr=1e-6))
auto_scale_lr = dict(base_batch_size=32)
