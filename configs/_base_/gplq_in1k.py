# What the ImageNet configs share. Model, pipelines and evaluator come from mmpretrain's config,
# which is the other base; names here begin with gplq_, since two bases may not define the same.
_base_ = ['./gplq.py']

import torch  # noqa: E402  (mmengine decides by the first statement that this is a text config)

# mmpretrain's model zoo; its metafile.yml files list what follows.
gplq_zoo = 'https://download.openmmlab.com/mmclassification/v0/'
gplq_sampler = dict(type='gplq_mm.ResumableSampler', shuffle=True)
# A fixed seed, since a resumed run has to continue the same order of samples.
gplq_randomness = dict(seed=0, deterministic=False)
gplq_env_cfg = dict(dist_cfg=dict(backend='nccl' if torch.cuda.is_available() else 'gloo'))
# 5e-6 belongs to 8 x 16 images; mmpretrain's number belongs to its own learning rate.
gplq_auto_scale_lr = dict(base_batch_size=128)
