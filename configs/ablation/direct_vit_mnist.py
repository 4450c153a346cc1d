# Direct QAT of the quickstart's ViT: what gplq_vit_mnist.py does in two stages, at once. LSQ on
# weights and activations together, for the same iterations, losses and learning rates.
_base_ = ['../quickstart/gplq_vit_mnist.py']

model = dict(direct={}, compensation=None, policy=dict(weight=dict(layout='raw')))
train_cfg = dict(
    _delete_=True,
    type='gplq_mm.DirectQATLoop',
    max_epochs=_base_.train_cfg.max_epochs,
    baseline=_base_.train_cfg.baseline,
)
