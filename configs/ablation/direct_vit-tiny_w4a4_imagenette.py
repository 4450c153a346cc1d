# Direct QAT of the ViT-Ti/16 of gplq_vit-tiny_w4a4_imagenette.py: LSQ on weights and activations
# together, for the same iterations, data and losses.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

model = dict(direct={}, compensation=None, policy=dict(weight=dict(layout='raw')))
train_cfg = dict(
    _delete_=True,
    type='gplq_mm.DirectQATLoop',
    max_epochs=_base_.train_cfg.max_epochs,
    max_iters=_base_.train_cfg.max_iters,
    baseline=_base_.train_cfg.baseline,
    num_diagnostic_images=_base_.train_cfg.num_diagnostic_images,
    transfer=_base_.train_cfg.transfer,
)
