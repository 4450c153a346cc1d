"""The main job on the embedded digits: train in FP32, quantize with GPLQ, show the table.

``--model`` is a ViT or a Swin that classifies digits, or a Mask R-CNN with a
Swin that finds them in scenes.

Every step is an ordinary call of tools/train.py; the commands are printed.
"""

import argparse
import json
import time
from pathlib import Path

from mmengine.config import Config
from rich.console import Console

from gplq_mm.engine import print_summary
from gplq_mm.engine.launch import follow, shown, telling, train_command
from gplq_mm.errors import one_line_errors

ROOT = Path(__file__).resolve().parent.parent
# Model -> folder of its configs, name of its FP32 config, folder of its results.
MODELS = {
    'vit': ('quickstart', 'vit_mnist', 'quickstart'),
    'swin': ('quickstart', 'swin_mnist', 'quickstart-swin'),
    'mask-rcnn': ('quickstart-det', 'mask-rcnn_mnist', 'quickstart-det'),
}


def run(config: Path, work_dir: Path, options: list[str], resume: bool, console: Console) -> None:
    """Runs tools/train.py, shows the telling lines and keeps all of them in a file."""
    command = train_command(ROOT, config, work_dir, options, resume)
    console.print('$', shown(command, ROOT), style='bold', soft_wrap=True, highlight=False)
    log = work_dir / 'console.log'
    log.unlink(missing_ok=True)
    start = time.monotonic()

    def show(line: str) -> None:
        if (message := telling(line)) is not None:
            elapsed = f'{time.monotonic() - start:4.0f} s'
            console.print(f'  {elapsed}  {message}', highlight=False, markup=False)

    follow(command, log, show, cwd=ROOT)


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', choices=list(MODELS), default='vit')
    parser.add_argument(
        '--work-dir', help='defaults to work_dirs/quickstart, -swin or -det behind it'
    )
    parser.add_argument('--resume', action='store_true', help='continue a run that was interrupted')
    args = parser.parse_args()
    folder, name, default = MODELS[args.model]
    work_dir = Path(args.work_dir or ROOT / 'work_dirs' / default).resolve()
    configs = ROOT / 'configs' / folder
    console = Console()

    fp32_config = configs / f'{name}_fp32.py'
    fp32_dir = work_dir / 'fp32'
    checkpoint = fp32_dir / f'epoch_{Config.fromfile(fp32_config).train_cfg.max_epochs}.pth'
    start = time.monotonic()
    if not (args.resume and checkpoint.is_file()):
        run(fp32_config, fp32_dir, [], args.resume, console)
    run(
        configs / f'gplq_{name}.py',
        work_dir,
        [f'model.pretrained={checkpoint}'],
        args.resume,
        console,
    )
    summary_file = work_dir / 'summary.json'
    summary = json.loads(summary_file.read_text())
    print_summary(summary, console)
    console.print(f'{time.monotonic() - start:.0f} s in all. Written:')
    for path in (checkpoint, *sorted(work_dir.glob('*.pth')), summary_file):
        console.print(f'  {path}', soft_wrap=True, highlight=False)


if __name__ == '__main__':
    main()
