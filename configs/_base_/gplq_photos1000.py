# What the GPLQ runs on a thousand photos share; a config adds model and data, and takes
# gplq_model and gplq_architecture by name. Chosen on held-out training photos (docs/comparing.md).
_base_ = ['./default_runtime.py', './gplq.py', './datasets/transfer_folders.py']

# A thousand photos without labels stand for ImageNet: the teacher's whole feature is mimicked, its
# probabilities are distilled, and CutMix makes more images of them.
gplq_model = dict(
    type='gplq_mm.GPLQ',
    policy=dict(preset='gplq-levels'),
    mimic=dict(_base_.gplq_mimic, explained=1.0),
    task_weight=0.0,
    distill=dict(loss_weight=20.0),
    compensation=_base_.gplq_compensation,
)
gplq_architecture = dict(train_cfg=dict(augments=dict(type='CutMix', alpha=1.0)))

train_cfg = dict(
    _base_.gplq_train_cfg,
    transfer=_base_.gplq_transfer,
    weight_ptq=dict(type='GPTQ', num_images=256, batch_size=16),
    num_diagnostic_images=128,
    max_epochs=3,
    max_iters=150,
)
val_cfg = {}
test_cfg = {}
optim_wrapper = _base_.gplq_optim_wrapper
# Too few iterations for a constant rate to settle.
param_scheduler = dict(type='CosineAnnealingLR', T_max=150, eta_min_ratio=0.02, by_epoch=False)
default_hooks = dict(checkpoint=dict(_delete_=True, **dict(_base_.gplq_checkpoint, interval=50)))
custom_hooks = [
    dict(type='gplq_mm.CalibrationHook', num_images=64, batch_size=32),
    dict(type='gplq_mm.PCABasisHook', num_images=512, batch_size=32),
    dict(type='gplq_mm.QuantStatsHook', interval=50),
    dict(type='gplq_mm.WeightDriftHook', interval=25),
]
