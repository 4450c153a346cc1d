"""Fits the PCA basis of a config on however many ranks there are, and saves it."""

import os
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import is_distributed, is_main_process
from mmengine.registry import RUNNERS
from torch.distributed import destroy_process_group

from gplq_mm.distributed import end_program
from gplq_mm.engine import PCABasisHook


def main(path: str) -> None:
    cfg = Config.fromfile(path)
    cfg.launcher = 'pytorch' if 'RANK' in os.environ else 'none'
    runner = RUNNERS.build(cfg)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner._val_loop = runner.build_val_loop(runner._val_loop)
    runner._init_model_weights()
    runner.model.eval()
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, PCABasisHook))
    hook.before_train(runner)
    model = getattr(runner.model, 'module', runner.model)
    if is_main_process():
        torch.save(model.mimic_loss.state_dict(), Path(cfg.work_dir) / 'basis.pth')
    if is_distributed():
        destroy_process_group()


main(sys.argv[1])
end_program()
