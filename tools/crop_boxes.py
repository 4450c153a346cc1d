"""Cut the boxes of a data set in COCO's format into folders of images, one a class.

Usage: python tools/crop_boxes.py OUT --train IMAGES TRAIN.json --val IMAGES VAL.json

OUT/train/CLASS/*.png and OUT/val/CLASS/*.png are what the linear probes with `imagefolder` in
their name read. A crop is the square around a box, moved into the image where it leaves it.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

from PIL import Image

from gplq_mm.errors import DataError, SettingError, one_line_errors

Crops = dict[str, list[tuple[int, str, tuple[int, int, int, int]]]]


def square(box: list[float], width: int, height: int) -> tuple[int, int, int, int]:
    """The square around a box, inside an image.

    Args:
        box (list[float]): x, y, width and height in pixels.
        width (int): Of the image.
        height (int): Of the image.

    Returns:
        tuple[int, int, int, int]: left, top, right, bottom in pixels. No square where the box is
            longer than the image is high or wide.
    """
    x, y, w, h = box
    side = round(max(w, h))
    side_x, side_y = min(side, width), min(side, height)
    left = min(max(round(x + w / 2 - side / 2), 0), width - side_x)
    top = min(max(round(y + h / 2 - side / 2), 0), height - side_y)
    return left, top, left + side_x, top + side_y


def read_crops(annotations: Path, min_size: int) -> Crops:
    """Crops by class: number of the annotation, file of the image, and the square.

    Raises:
        DataError: If the file is missing or not in COCO's format.
    """
    try:
        content = json.loads(annotations.read_text(encoding='utf-8'))
        names = {c['id']: c['name'].replace('/', '-') for c in content['categories']}
        images = {image['id']: image for image in content['images']}
        crops = defaultdict(list)
        for item in sorted(content['annotations'], key=lambda item: item['id']):
            if item.get('iscrowd') or min(item['bbox'][2:]) < min_size:
                continue
            image = images[item['image_id']]
            place = square(item['bbox'], image['width'], image['height'])
            crops[names[item['category_id']]].append((item['id'], image['file_name'], place))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{annotations} cannot be read as annotations in COCO's format "
            f'({type(error).__name__}: {error}): correct the path or the file.'
        ) from error
    return crops


def write_crops(crops: Crops, images: Path, out: Path) -> int:
    """Cuts them out, and returns how many.

    Raises:
        DataError: If an image is missing or damaged.
    """
    count = 0
    for name, items in crops.items():
        (out / name).mkdir(parents=True)
        for number, file, place in items:
            try:
                with Image.open(images / file) as image:
                    image.convert('RGB').crop(place).save(out / name / f'{number}.png')
            except OSError as error:
                raise DataError(f'{images / file} cannot be cut ({error}): repair it.') from error
            count += 1
    return count


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('out', type=Path, help='folder to write; must not exist yet')
    for split in ('train', 'val'):
        parser.add_argument(
            f'--{split}', nargs=2, type=Path, required=True, metavar=('IMAGES', 'JSON')
        )
    parser.add_argument('--min-size', type=int, default=32, help='shorter side of a box, pixels')
    parser.add_argument(
        '--min-images', type=int, default=1, help='of a class, in both sets; others are left out'
    )
    parser.add_argument('--max-images', type=int, help='of a class; drawn at random, seed 0')
    args = parser.parse_args(argv)
    with one_line_errors():
        if args.out.exists():
            raise SettingError(f'{args.out} exists already: give a new folder.')
        splits = {s: read_crops(vars(args)[s][1], args.min_size) for s in ('train', 'val')}
        # Labels are numbered by folder, so that both sets must have the same folders.
        names = sorted(
            name
            for name in splits['train']
            if all(len(crops.get(name, ())) >= args.min_images for crops in splits.values())
        )
        if not names:
            raise SettingError(
                f'no class has {args.min_images} box(es) of {args.min_size} pixels in both sets: '
                'lower --min-images or --min-size.'
            )
        for split, crops in splits.items():
            rng = random.Random(0)
            kept = {
                name: rng.sample(crops[name], min(len(crops[name]), args.max_images or 10**9))
                for name in names
            }
            count = write_crops(kept, vars(args)[split][0], args.out / split)
            print(f'{args.out / split}: {count} images of {len(names)} classes')


if __name__ == '__main__':
    main()
