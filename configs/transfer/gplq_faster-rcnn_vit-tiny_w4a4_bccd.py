# The same detector with a backbone of 4-bit activations whose weights are trained with the heads;
# Stage 2 rounds them at the end. The first row of its table is the untrained detector.
#   python tools/train.py configs/transfer/gplq_faster-rcnn_vit-tiny_w4a4_bccd.py --cfg-options \
#       model.backbone_from=work_dirs/gplq_vit-tiny_w4a4_imagenette/w32a4.pth
_base_ = ['./faster-rcnn_vit-tiny_fp32_bccd.py']

model = dict(
    _delete_=True,
    type='gplq_mm.GPLQ',
    architecture={
        **_base_.model,
        'backbone': dict(
            type='mmpretrain.VisionTransformer',
            arch='deit-tiny',
            img_size=224,
            patch_size=16,
            out_type='featmap',
        ),
    },
    backbone_from='{{$GPLQ_VIT_TINY_W32A4:work_dirs/gplq_vit-tiny_w4a4_imagenette/w32a4.pth}}',
    policy=_base_.gplq_policy_backbone,
    compensation=_base_.gplq_compensation,
)
train_cfg = dict(
    _delete_=True, **{**_base_.gplq_train_cfg, 'max_epochs': _base_.max_epochs, 'baseline': None}
)
# The rates of the FP32 training: the heads are new.
optim_wrapper = dict(
    constructor='gplq_mm.GPLQOptimWrapperConstructor', quantizer=dict(lr=1e-3, weight_decay=0.0)
)
default_hooks = dict(checkpoint=dict(_delete_=True, **{**_base_.gplq_checkpoint, 'interval': 104}))
custom_hooks = _base_.gplq_hooks
env_cfg = _base_.gplq_env_cfg
