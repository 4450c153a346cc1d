# What every GPLQ run shares. A config takes these by name, since its other base brings its own
# train_cfg, optim_wrapper, ...:  train_cfg = dict(_delete_=True, **_base_.gplq_train_cfg)
runner_type = 'gplq_mm.GPLQRunner'

# Ours: asymmetric activations, MSE calibration, integer-true folded weights.
gplq_policy = dict(preset='gplq')
gplq_mimic = dict(loss_weight=1.0, explained=0.6, multiple=32)
gplq_compensation = dict(type='QwT')
# A config may add to model:
#   teacher_dtype='auto'    precision of the teacher's targets: bfloat16 where the device multiplies
#                           it natively (sm_80 on; AMX or AVX512_BF16), else float32; or one by name

gplq_train_cfg = dict(
    type='gplq_mm.GPLQTrainLoop',
    max_epochs=1,
    weight_ptq=dict(type='GPTQ', num_images=512, batch_size=16),
    baseline=dict(type='RoundToNearest'),
)

# The paper's rate for the weights (8 GPUs x 16 images), constant, no decay; the quantizers learn
# at their own rate.
gplq_optim_wrapper = dict(
    type='OptimWrapper',
    constructor='gplq_mm.GPLQOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=5e-6, weight_decay=0.0, fused=True),
    quantizer=dict(lr=1e-3, weight_decay=0.0),
)

gplq_checkpoint = dict(type='gplq_mm.GPLQCheckpointHook', interval=500)
gplq_hooks = [
    dict(type='gplq_mm.CalibrationHook', num_images=128, batch_size=32),
    dict(type='gplq_mm.PCABasisHook', num_images=1024, batch_size=32),
    dict(type='gplq_mm.QuantStatsHook', interval=100),
    dict(type='gplq_mm.WeightDriftHook', interval=200),
]
