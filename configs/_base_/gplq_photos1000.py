# What the GPLQ runs on a thousand photos share; a config adds model and data, and takes
# gplq_model and gplq_architecture by name. Chosen on held-out training photos (docs/comparing.md).
_base_ = ['./default_runtime.py', './gplq.py', './datasets/transfer_folders.py']

# A thousand photos without labels stand for ImageNet: the outputs of the teacher's blocks are
# mimicked, its probabilities are distilled, and CutMix makes more images of them.
gplq_model = dict(
    type='gplq_mm.GPLQ',
    policy=dict(preset='gplq-levels'),
    mimic=None,
    block_mimic=dict(loss_weight=120.0),
    task_weight=0.0,
    distill=dict(loss_weight=20.0),
    compensation=_base_.gplq_compensation,
)
gplq_architecture = dict(train_cfg=dict(augments=dict(type='CutMix', alpha=1.0)))

train_cfg = dict(
    _base_.gplq_train_cfg,
    transfer=_base_.gplq_transfer,
    weight_ptq=dict(type='GPTQ', num_images=1024, batch_size=16),
    weight_tuning=dict(iters_per_block=24, lr=2e-5),
    num_diagnostic_images=128,
    max_epochs=4,
    max_iters=200,
)
val_cfg = {}
test_cfg = {}
# Levels are chosen where the values of a thousand photos lie. A step of Adam moves each of the
# thousands of scales and zero-points by as much as its rate, noise or not, and a rate at which they
# wander costs more than learning them brings.
optim_wrapper = dict(
    _base_.gplq_optim_wrapper,
    optimizer=dict(_base_.gplq_optim_wrapper.optimizer, lr=1e-5),
    quantizer=dict(_base_.gplq_optim_wrapper.quantizer, lr=2e-5, relative=True),
)
# Too few iterations for a constant rate to settle.
param_scheduler = dict(type='CosineAnnealingLR', T_max=200, eta_min_ratio=0.02, by_epoch=False)
default_hooks = dict(checkpoint=dict(_delete_=True, **dict(_base_.gplq_checkpoint, interval=50)))
custom_hooks = [
    # All of them: outliers are rare, and what calibration has not seen is clipped.
    dict(type='gplq_mm.CalibrationHook', num_images=1024, batch_size=32),
    dict(type='gplq_mm.PCABasisHook', num_images=512, batch_size=32),
    dict(type='gplq_mm.QuantStatsHook', interval=50),
    dict(type='gplq_mm.WeightDriftHook', interval=25),
]
