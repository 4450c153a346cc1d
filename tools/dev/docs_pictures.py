"""Draws the pictures of the documentation: ``python tools/dev/docs_pictures.py``.

They have a background of their own, so that they can be read on light and on dark pages.
"""

import argparse
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parents[2] / 'docs' / 'pictures'
PAPER, CARD, INK, FAINT = '#f7f6f2', '#ffffff', '#1f2430', '#6b7280'
BLUE, ORANGE, GREEN, RED = '#2a6fb0', '#b8620e', '#2b8454', '#b23a48'
FONT = 'Helvetica, Arial, sans-serif'
LINE = 20


class Picture:
    """Elements of an SVG, in the order in which they are drawn.

    Args:
        width, height: Units of the drawing, about pixels.
        title: What the picture shows, for readers who do not see it.
    """

    def __init__(self, width: int, height: int, title: str):
        self.size, self.title = (width, height), title
        self.parts: list[str] = []

    def add(self, tag: str, content: str | None = None, **attributes) -> None:
        """An element; ``stroke_width=2`` is its attribute ``stroke-width``."""
        pairs = [f'{key.replace("_", "-")}="{value}"' for key, value in attributes.items()]
        end = '/>' if content is None else f'>{content}</{tag}>'
        self.parts.append(f'<{" ".join([tag, *pairs])}{end}')

    def text(self, x, y, lines: str, color=INK, size=16, anchor='middle', bold=False) -> None:
        """Lines of text, ``y`` the baseline of the first."""
        weight = {'font_weight': 'bold'} if bold else {}
        for index, line in enumerate(lines.split('\n')):
            self.add(
                'text', escape(line), x=x, y=y + index * LINE, fill=color, font_size=size,
                text_anchor=anchor, **weight,
            )  # fmt: skip

    def box(self, x, y, width, height, title: str, lines: str = '', color=INK) -> None:
        """A card with a title and lines below it."""
        self.add(
            'rect', x=x, y=y, width=width, height=height, rx=8, fill=CARD, stroke=color,
            stroke_width=1.6,
        )  # fmt: skip
        middle = x + width / 2
        if not lines:
            self.text(middle, y + height / 2 + 5, title, color, bold=True)
            return
        self.text(middle, y + 24, title, color, bold=True)
        self.text(middle, y + 47, lines, size=15)

    def path(self, data: str, color=INK, width=2.0, dashed=False, fill='none') -> None:
        """A line."""
        dash = {'stroke_dasharray': '6 5'} if dashed else {}
        self.add('path', d=data, stroke=color, stroke_width=width, fill=fill, **dash)

    def arrow(self, data: str, tip: tuple, way: str, color=INK, width=2.0, dashed=False) -> None:
        """A line with a head at ``tip`` that points ``way``: right, left, down or up."""
        self.path(data, color, width, dashed)
        x, y = tip
        ends = {
            'right': ((-9, -5), (-9, 5)),
            'left': ((9, -5), (9, 5)),
            'down': ((-5, -9), (5, -9)),
            'up': ((-5, 9), (5, 9)),
        }[way]
        corners = ' '.join(f'{x + dx},{y + dy}' for dx, dy in ((0, 0), *ends))
        self.add('polygon', points=corners, fill=color)

    def right(self, x, y, length, color=INK) -> None:
        """A level arrow."""
        self.arrow(f'M{x} {y} h{length - 7}', (x + length, y), 'right', color)

    def __str__(self) -> str:
        width, height = self.size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="{FONT}" role="img">'
        )
        paper = f'<rect width="{width}" height="{height}" rx="12" fill="{PAPER}"/>'
        title = f'<title>{escape(self.title)}</title>'
        return '\n'.join([head, title, paper, *self.parts, '</svg>']) + '\n'


def why_activations_first() -> Picture:
    """The order of the two stages, and the basin."""
    p = Picture(
        960, 690,
        'Above: weights that are rounded first cannot take in activation scales that are learned '
        'later; activations first, and the scales are folded into the weights before these are '
        'rounded. Below: a loss landscape in which direct QAT leaves the basin of the FP32 model '
        'and GPLQ stays.',
    )  # fmt: skip
    p.text(30, 38, 'The order', size=18, anchor='start', bold=True)
    for y, color, name in ((58, RED, 'weights\nfirst'), (178, GREEN, 'activations\nfirst')):
        p.text(76, y + 42, name, color, bold=True)
    p.box(140, 58, 180, 92, 'round W', 'integers, for good', ORANGE)
    p.right(320, 104, 36)
    p.box(356, 58, 200, 92, 'learn scales s', 'of the inputs,\none a channel', BLUE)
    p.right(556, 104, 36)
    p.box(592, 58, 338, 92, 'no integer product', 'the sum over k of s · q · W has another\n'
          'scale in every term', RED)  # fmt: skip
    p.box(140, 178, 180, 92, 'learn scales s', 'while W is FP32,\nthen freeze them', BLUE)
    p.right(320, 224, 36)
    p.box(356, 178, 200, 92, 'fold, then round', 'V = s · W,\nV to integers', ORANGE)
    p.right(556, 224, 36)
    p.box(592, 178, 338, 92, 'an integer product', 'the sum over k of q · V runs over integers;\n'
          'one float scale a row follows', GREEN)  # fmt: skip

    p.text(30, 322, 'The basin', size=18, anchor='start', bold=True)
    p.text(124, 322, '(schematic)', FAINT, anchor='start')
    p.arrow('M60 640 V352', (60, 345), 'up', FAINT, 1.4)
    p.arrow('M60 640 H923', (930, 640), 'right', FAINT, 1.4)
    p.text(72, 362, 'loss', FAINT, anchor='start')
    p.text(930, 664, 'weights', FAINT, anchor='end')
    # A wide basin, a ridge, a narrow one that is less deep.
    curve = (
        'M80 385 C150 400 165 598 300 600 C430 602 440 440 520 440 '
        'C600 440 600 560 680 562 C770 564 790 430 915 395'
    )
    p.path(curve, FAINT, 3)
    p.arrow('M311 592 C390 585 420 398 520 398 C610 398 616 492 652 532', (657, 541), 'down',
            RED, 2.6)  # fmt: skip
    p.text(540, 384, 'direct QAT: all rounded at once, long training', RED, anchor='start')
    p.add('circle', cx=660, cy=556, r=7, fill=RED)
    p.text(684, 596, 'other features,\nother mistakes', RED)
    p.arrow('M307 584 C320 560 336 560 346 572', (350, 581), 'down', GREEN, 2.6)
    p.add('circle', cx=352, cy=588, r=7, fill=GREEN)
    p.add('circle', cx=300, cy=596, r=8, fill=INK)
    p.text(290, 624, 'FP32 model', bold=True)
    p.text(
        284,
        446,
        'GPLQ: one epoch of\ntiny steps, held by\nthe teacher; then\n'
        'weights are rounded\nwithout training',
        GREEN,
    )
    return p


def pipeline() -> Picture:
    """The two stages, what they need and what they write."""
    p = Picture(
        960, 600,
        'Stage 1: FP32 checkpoint, calibration, Act-QAT with a frozen teacher and the PCA mimic '
        'loss, freeze. Stage 2: block by block fold, round, QwT. Then deploy.',
    )  # fmt: skip
    p.text(30, 38, 'Stage 1: activations', BLUE, 18, 'start', bold=True)
    p.box(30, 190, 140, 92, 'FP32', 'your trained\ncheckpoint')
    p.right(170, 236, 36)
    p.box(206, 178, 190, 116, 'calibration', '128 training images;\nscales and zero-points\n'
          'of least squared error', BLUE)  # fmt: skip
    p.right(396, 236, 36)
    p.box(432, 178, 270, 116, 'Act-QAT, one epoch', 'inputs 4 bits, weights FP32;\n'
          'weights, scales, zero-points\nlearn by tiny steps', BLUE)  # fmt: skip
    p.right(702, 236, 36)
    p.box(738, 190, 192, 92, 'freeze', 'activations never\nchange again', BLUE)
    # The teacher.
    p.box(206, 58, 190, 74, 'teacher', 'FP32, frozen', FAINT)
    p.path('M100 190 V95 H199', FAINT, 2, dashed=True)
    p.arrow('M190 95 h9', (206, 95), 'right', FAINT)
    p.right(396, 95, 36, FAINT)
    p.box(432, 58, 270, 74, 'PCA mimic loss', 'features stay where they were', GREEN)
    p.arrow('M567 132 V171', (567, 178), 'down', GREEN)
    p.text(579, 160, '+ loss of your task', GREEN, 15, 'start')
    for x, name in ((301, 'calibrated.pth'), (567, 'iter_N.pth'), (834, 'w32a4.pth')):
        p.text(x, 318, name, FAINT, 15)

    p.path('M834 282 V298 M834 326 V352 H100', INK)
    p.arrow('M100 352 V410', (100, 417), 'down')
    p.text(118, 388, 'Stage 2: weights', ORANGE, 18, 'start', bold=True)
    p.add('rect', x=20, y=402, width=600, height=146, rx=10, fill='none', stroke=ORANGE,
          stroke_width=1.4, stroke_dasharray='6 5')  # fmt: skip
    p.text(320, 572, 'block by block, in the order of the forward, on 512 training images',
           ORANGE, 15)  # fmt: skip
    p.box(30, 417, 150, 116, 'observe', 'inputs of the block,\nas the blocks\nbefore give them',
          ORANGE)  # fmt: skip
    p.right(180, 475, 30)
    p.box(210, 417, 180, 116, 'fold and round', 'GPTQ: 4 bits, groups\nof 32, one float\n'
          'scale a row', ORANGE)  # fmt: skip
    p.right(390, 475, 30)
    p.box(420, 417, 190, 116, 'QwT', 'a linear map beside\nthe block takes back\npart of the error',
          ORANGE)  # fmt: skip
    p.right(620, 475, 120)
    p.text(676, 465, 'w4a4.pth', FAINT, 15)
    p.box(740, 417, 190, 116, 'deploy', 'packed integers:\nint4 on CPU and CUDA,\nONNX', GREEN)
    p.text(835, 557, 'my_model.safetensors', FAINT, 15)
    return p


PICTURES = {'why-activations-first.svg': why_activations_first, 'pipeline.svg': pipeline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(str(draw()), encoding='utf-8')


if __name__ == '__main__':
    main()
