"""Tiny runs on one rank and on several, and the comparison of their weights."""

import subprocess

from tiny_runs import ROOT, gplq_config, run_ranks


def rank_config(work_dir, pretrained, ranks: int, arch: str = 'vit', **options):
    """The same run on any number of ranks: only the batch of a rank depends on it."""
    options.setdefault('train_cfg__max_epochs', 1)
    cfg = gplq_config(work_dir, pretrained, arch, **options)
    cfg.train_dataloader.batch_size = 16 // ranks
    cfg.train_cfg.weight_ptq.update(num_images=33, batch_size=8)
    cfg.custom_hooks[0].update(num_images=33, batch_size=16)
    # AdamW divides by the size of a gradient, and so makes a step of the rounding error of one
    # that is zero (a key's bias); a code that flips then ends the comparison.
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=1e-3)
    cfg.optim_wrapper.quantizer.lr = 1e-2
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    return cfg


def torchrun(cfg, folder, *options) -> subprocess.CompletedProcess:
    path = folder / 'two_ranks.py'
    cfg.dump(path)
    arguments = (str(path), '--launcher', 'pytorch', *options)
    return run_ranks(2, folder, ROOT / 'tools' / 'train.py', *arguments)


def assert_same_training(first, second, start) -> None:
    """Weights, scales and zero-points after Stage 1, relative to how far it has moved them."""
    moved = 0
    for key, value in first.items():
        if not value.is_floating_point() or value.shape != start[key].shape:
            continue
        distance = float((value - start[key]).norm())
        moved += distance > 0
        # Six digits of what float32 can hold of the value itself.
        allowed = 1e-3 * distance + 1e-6 * float(value.norm())
        assert float((second[key] - value).norm()) <= allowed, key
    assert moved > 30
