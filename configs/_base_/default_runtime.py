_base_ = ['mmpretrain::_base_/default_runtime.py']

import torch  # noqa: E402  (mmengine decides by the first statement that this is a text config)

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20),
    # Checkpoints hold the optimizer and, in a GPLQ run, the teacher's name: keep few.
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
)

env_cfg = dict(
    cudnn_benchmark=False,
    # Zero OpenCV threads: every loader worker would otherwise start its own pool.
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl' if torch.cuda.is_available() else 'gloo'),
)

# A fixed seed, since a resumed run has to continue the same order of samples.
randomness = dict(seed=0, deterministic=False)
