# What the detection configs share; model, data and evaluator come from mmdet's config.
_base_ = ['./gplq.py']

import torch  # noqa: E402  (mmengine decides by the first statement that this is a text config)

# Layers whose outputs are classes, boxes and masks.
gplq_predictors = (
    r'\w*_head\.(\w+\.)*(fc_cls|fc_reg|conv_logits|rpn_cls|rpn_reg|retina_cls|retina_reg)$'
)
gplq_outside = dict(pattern='', exclude=True)
gplq_inside = dict(pattern=r'^backbone\.', exclude=False)
gplq_neck = dict(pattern=r'^neck\.', exclude=False)

# Ready policies. All: the predictors have 8 bits, as the first layer has.
gplq_policy = dict(
    preset='gplq',
    rules=[dict(pattern=gplq_predictors, activation=dict(bits=8), weight=dict(bits=8))],
)
gplq_policy_backbone = dict(preset='gplq', rules=[gplq_outside, gplq_inside])
gplq_policy_backbone_neck = dict(preset='gplq', rules=[gplq_outside, gplq_inside, gplq_neck])
# As RepQ-ViT: all weights and inputs at 4 bits but the image itself, which keeps 8.
gplq_policy_strict = dict(
    preset='gplq',
    rules=[
        dict(
            pattern=r'^backbone\.(patch_embed\.|conv1$|stem\.)', weight=dict(bits=4), optional=True
        )
    ],
)

# Beyond the paper, off by default: mimicking of the pyramid's levels. Switched on by
#   feature_layer='neck', mimic=_base_.gplq_mimic_maps
gplq_mimic_maps = dict(loss_weight=0.1, explained=0.9, multiple=32)

# One image a GPU: they differ in size.
gplq_train_cfg = dict(weight_ptq=dict(num_images=32, batch_size=1))
gplq_hooks = [
    dict(type='gplq_mm.CalibrationHook', num_images=32, batch_size=1),
    dict(type='gplq_mm.QuantStatsHook', interval=100),
    dict(type='gplq_mm.WeightDriftHook', interval=200),
    # Does nothing without model.mimic.
    dict(type='gplq_mm.PCABasisHook', num_images=64, batch_size=1),
]
gplq_zoo = 'https://download.openmmlab.com/mmdetection/v2.0/'
gplq_sampler = dict(type='gplq_mm.ResumableSampler', shuffle=True)
gplq_randomness = dict(seed=0, deterministic=False)
gplq_env_cfg = dict(dist_cfg=dict(backend='nccl' if torch.cuda.is_available() else 'gloo'))
# 5e-6 belongs to 8 GPUs with one image each.
gplq_auto_scale_lr = dict(base_batch_size=8)
