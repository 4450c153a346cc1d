"""Export a packed model as ONNX (opset 21, int4) or as a torch.export program."""

import argparse

from gplq_mm import deploy
from gplq_mm.deploy.architecture import decode
from gplq_mm.deploy.targets.onnx import export_onnx
from gplq_mm.deploy.targets.torch_export import export_program, save_program
from gplq_mm.errors import one_line_errors


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('model', help='packed file of tools/deploy.py, MODEL.safetensors')
    parser.add_argument('--onnx', metavar='FILE', help='the ONNX file to write')
    parser.add_argument('--program', metavar='FILE', help='the torch.export archive to write, .pt2')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=3,
        metavar=('C', 'H', 'W'),
        help='channels, height and width of an image; defaults to what the architecture says',
    )
    parser.add_argument('--batch', type=int, help='fixed number of images; defaults to any')
    args = parser.parse_args(argv)
    if not (args.onnx or args.program):
        parser.error('nothing to write: give --onnx FILE, --program FILE or both')
    if args.batch is not None and args.batch < 1:
        parser.error(f'--batch {args.batch} must be at least 1')
    return args


def image_shape(header: dict) -> tuple[int, int, int]:
    """Channels, height and width that the backbone is made for; 3 x 224 x 224 if it is silent."""
    backbone = header['architecture'].get('backbone') or {}
    size = decode(backbone.get('img_size', 224))
    height, width = (size, size) if isinstance(size, int) else size
    return backbone.get('in_channels', 3), height, width


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        model = deploy.load(args.model)
        shape = tuple(args.shape or image_shape(model.deploy_header))
        images = '{}x{}x{}'.format(*shape)
        count = args.batch or 'any number of'
        if args.program:
            save_program(export_program(model, shape, args.batch), args.program)
            print(f'{args.program}: torch.export program for {count} images of {images}')
        if args.onnx:
            export_onnx(model, args.onnx, shape, args.batch)
            print(f'{args.onnx}: ONNX opset 21 for {count} images of {images}')


if __name__ == '__main__':
    main()
