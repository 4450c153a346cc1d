# Direct QAT as it is usually done: ten times the iterations, at a rate at which LSQ also moves
# weights from one code to another.
_base_ = ['./direct_vit-tiny_w4a4_imagenette.py']

train_cfg = dict(max_epochs=10, max_iters=1500)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = dict(T_max=1500)
