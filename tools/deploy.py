"""Pack a model after Stage 2 into one file that infers in integers."""

import argparse
import copy
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope
from mmpretrain.models import BaseClassifier
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gplq_mm import deploy
from gplq_mm.checkpoint import read_checkpoint
from gplq_mm.deploy.verify import compare, tensors_in
from gplq_mm.engine import headline_metrics, load_run_weights
from gplq_mm.errors import one_line_errors
from gplq_mm.layers.family import entry_of
from gplq_mm.registry import MODELS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of the run')
    parser.add_argument('checkpoint', help='its checkpoint after Stage 2, such as w4a4.pth')
    parser.add_argument('--out', required=True, help='the packed file, MODEL.safetensors')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'), help='image size of the final check'
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings')
    args = parser.parse_args(argv)
    if Path(args.out).suffix != '.safetensors':
        parser.error(f'--out {args.out} must end in .safetensors')
    return args


def build(cfg: Config, checkpoint: dict, source: str) -> nn.Module:
    """The simulated model with its weights; no data set is touched."""
    model = copy.deepcopy(cfg.model)
    if model.get('type') == 'gplq_mm.GPLQ':
        model.teacher = False
    elif isinstance(model.get('backbone'), dict) and 'checkpoint' in model.backbone:
        model.backbone.checkpoint = None
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'):
        model = MODELS.build(model)
    load_run_weights(model, checkpoint, source)
    return model.eval()


def image_size(cfg: Config) -> tuple[int, int]:
    """Height and width that the architecture is made for, else 224."""
    model = cfg.model.get('architecture', cfg.model)
    backbone = model.get('backbone') or {}
    size = backbone.get('backbone', backbone).get('img_size', 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def random_images(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """Two smooth random images as the preprocessor leaves them, about normal."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, channels, 16, 16, generator=generator)
    return F.interpolate(coarse, size=size, mode='bilinear')


def outputs(model: nn.Module, images: Tensor):
    """Logits of a classifier, maps and heads' outputs of a detector, features of other models."""
    if isinstance(model, BaseClassifier):
        return model(images, mode='tensor')
    if entry_of(model, 'outputs') is None:
        return model.extract_feat(images)
    # Installed where there are detectors only.
    from mmdet.structures import DetDataSample

    meta = dict(img_shape=tuple(images.shape[-2:]), scale_factor=(1.0, 1.0))
    samples = [DetDataSample(metainfo=meta) for _ in images]
    with DefaultScope.overwrite_default_scope('mmdet'):
        heads = model(images, samples, mode='tensor')
    # Proposals of nearly the same score may change places, so only the values are compared.
    return [*model.extract_feat(images), *(t.flatten().sort().values for t in tensors_in(heads))]


def print_sizes(report: deploy.SizeReport, console: Console) -> None:
    table = Table(title='size')
    for column in ('part', 'bytes', 'share of FP32'):
        table.add_column(column, justify='left' if column == 'part' else 'right')
    parts = {**report.parts, 'header': report.file - sum(report.parts.values())}
    for part, size in parts.items():
        table.add_row(part, f'{size:,}', f'{size / report.fp32:.4f}')
    table.add_section()
    if 'compensation' in report.parts:
        size = report.file - report.parts['compensation']
        share = report.ratio_without_compensation
        table.add_row('file without compensation', f'{size:,}', f'{share:.4f}')
    table.add_row('file', f'{report.file:,}', f'{report.ratio:.4f}')
    table.add_row('FP32', f'{report.fp32:,}', '1')
    console.print(table)


def write_checked(model: nn.Module, cfg: Config, args, meta: dict, accuracy: dict):
    """Writes the file beside its place, loads it, compares it, and moves it into place."""
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f'.{out.name}.', dir=out.parent)
    os.close(handle)
    try:
        sizes = deploy.save(model, cfg, temporary, meta, accuracy)
        deployed = deploy.load(temporary)
        images = random_images(model, tuple(args.size or image_size(cfg)))
        agreement = compare(model, deployed, lambda model: outputs(model, images))
        agreement.require()
        os.replace(temporary, out)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    return sizes, deployed.deploy_report, agreement


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    console = Console()
    with one_line_errors():
        cfg = Config.fromfile(args.config)
        if args.cfg_options is not None:
            cfg.merge_from_dict(args.cfg_options)
        checkpoint = read_checkpoint(args.checkpoint)
        model = build(cfg, checkpoint, args.checkpoint)
        record = checkpoint.get('gplq', {}).get('record', {})
        accuracy = headline_metrics(record.get('metrics', {}))
        meta = dict(checkpoint.get('meta', {}).get('dataset_meta') or {})
        sizes, report, agreement = write_checked(model, cfg, args, meta, accuracy)
    print_sizes(sizes, console)
    console.print(f'{report}.', soft_wrap=True)
    console.print(f'Deployed against simulated: {agreement}.', soft_wrap=True)
    for metric, stages in accuracy.items():
        values = ', '.join(f'{stage} {value:.2f}' for stage, value in stages.items())
        console.print(f'{metric} of the run: {values}', soft_wrap=True)
    console.print(f'wrote {args.out}', soft_wrap=True)


if __name__ == '__main__':
    main()
