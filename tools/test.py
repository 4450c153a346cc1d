"""Evaluate a checkpoint of any state: FP32, calibrated, W32A4 or W4A4."""

import argparse
import json
import os
from contextlib import nullcontext
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.dist import is_main_process
from mmengine.registry import RUNNERS

from gplq_mm.checkpoint import atomic_write_text
from gplq_mm.distributed import end_program, one_of_the_ranks
from gplq_mm.engine import DecisionHook, headline_metrics, unwrap
from gplq_mm.errors import one_line_errors
from gplq_mm.layers import quantizers_disabled
from gplq_mm.models import GPLQ, Stage


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='JSON file for the metrics')
    parser.add_argument(
        '--decisions', help='CSV file for the top-1 decision on every image, of a classifier'
    )
    parser.add_argument('--work-dir', help='folder of the log')
    parser.add_argument(
        '--latent', action='store_true', help='switch quantizers off: accuracy of the FP32 weights'
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def evaluate(args: argparse.Namespace) -> dict:
    """Runs the test set and returns what ``--out`` receives."""
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or os.path.join('work_dirs', Path(args.config).stem)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    cfg.load_from, cfg.resume = None, False
    cfg.runner_type = 'gplq_mm.GPLQRunner'
    if cfg.model.get('type') == 'gplq_mm.GPLQ':
        cfg.model.teacher = False
        # Whatever trains the model is not needed, and may ask for data that is not here.
        cfg.custom_hooks = []
    cfg.train_cfg = cfg.train_dataloader = cfg.optim_wrapper = cfg.param_scheduler = None
    runner = RUNNERS.build(cfg)
    runner.load_checkpoint(args.checkpoint)
    model = unwrap(runner.model)
    state, context = 'fp32', nullcontext()
    if isinstance(model, GPLQ):
        state = model.state_name
        if args.latent or model.stage == Stage.FLOAT:
            state = 'fp32' if model.stage == Stage.FLOAT else 'latent_fp32'
            context = quantizers_disabled(model)
    runner.logger.info(f'evaluating {args.checkpoint} as {state}')
    hook = DecisionHook(state, required=True)
    if args.decisions:
        runner.register_hook(hook)
    with context:
        metrics = dict(runner.test())
    if args.decisions and is_main_process():
        atomic_write_text(args.decisions, hook.decisions.to_csv())
    headlines = {key: value['x'] for key, value in headline_metrics({'x': metrics}).items()}
    return {'state': state, **headlines, 'metrics': metrics, 'checkpoint': str(args.checkpoint)}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(), one_of_the_ranks():
        result = evaluate(args)
        if is_main_process():
            text = json.dumps(result, indent=2)
            if args.out:
                atomic_write_text(args.out, text)
            print(text)


if __name__ == '__main__':
    main()
    end_program()
