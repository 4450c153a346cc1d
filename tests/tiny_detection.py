"""Whole GPLQ runs on a tiny Mask R-CNN Swin and pictures of rectangles, in seconds."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from tiny_runs import ROOT

CONFIG = ROOT / 'configs/detection/gplq_mask-rcnn_swin-tiny-1x_w4a4_8xb1-1e_coco.py'
CLASSES = ('bright', 'dark')
SIZES = ((64, 64), (48, 80), (72, 56))


def write_coco(folder: Path, split: str, count: int, seed: int) -> None:
    """``count`` images of several sizes with one or two rectangles each, in COCO's format."""
    rng = np.random.default_rng(seed)
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        image = rng.integers(110, 140, (height, width, 3), dtype=np.uint8)
        for _ in range(1 + number % 2):
            w, h = rng.integers(16, 32, 2).tolist()
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            label = int(rng.integers(2))
            image[y : y + h, x : x + w] = (250, 20)[label]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=label + 1,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0,
                    segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                )
            )
        name = f'{split}_{number}.png'
        cv2.imwrite(str(folder / split / name), image)
        images.append(dict(id=number, file_name=name, height=height, width=width))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    text = json.dumps(dict(images=images, annotations=annotations, categories=categories))
    (folder / f'{split}.json').write_text(text)


def shrink_model(model: dict) -> None:
    """Makes mmdet's Mask R-CNN Swin-T tiny."""
    model.backbone.update(
        embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], drop_path_rate=0.1
    )
    model.backbone.init_cfg = None
    model.neck.update(in_channels=[16, 32, 64, 128], out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    model.rpn_head.anchor_generator.scales = [4]
    roi = model.roi_head
    roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = 16
    roi.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=2)
    roi.mask_head.update(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=2)
    model.train_cfg.rpn_proposal.update(nms_pre=64, max_per_img=32)
    model.test_cfg.rpn.update(nms_pre=64, max_per_img=32)


def detection_config(work_dir: Path, data: Path, pretrained: Path, **options) -> Config:
    """The COCO config of Mask R-CNN Swin-T with a tiny model and data; 8 iterations."""
    cfg = Config.fromfile(CONFIG)
    shrink_model(cfg.model.architecture)
    for name, loader, inner in (
        ('train', cfg.train_dataloader, cfg.train_dataloader.dataset.dataset),
        ('val', cfg.val_dataloader, cfg.val_dataloader.dataset),
    ):
        loader.update(num_workers=0, persistent_workers=False)
        inner.update(data_root=str(data), ann_file=f'{name}.json', data_prefix=dict(img=f'{name}/'))
        inner.metainfo = dict(classes=CLASSES)
        for step in inner.pipeline:
            if step['type'] == 'Resize':
                step['scale'] = (96, 64)
    cfg.train_dataloader.dataset.dataset.filter_cfg = dict(filter_empty_gt=False)
    cfg.val_evaluator.ann_file = str(data / 'val.json')
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    cfg.work_dir = str(work_dir)
    cfg.model.pretrained = str(pretrained)
    cfg.train_cfg.weight_ptq.update(num_images=4)
    cfg.train_cfg.max_iters = 8
    cfg.custom_hooks[0].num_images = 4
    cfg.default_hooks.checkpoint.interval = 4
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return cfg


def train_fp32(data: Path, path: Path, steps: int = 60) -> None:
    """Trains the float model a little and saves it."""
    from mmengine.runner import Runner

    import gplq_mm.datasets  # noqa: F401

    cfg = detection_config(path.parent, data, path)
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        model = MODELS.build(cfg.model.architecture)
        model.init_weights()
        loader = dict(cfg.train_dataloader, batch_size=4)
        loader['dataset'] = loader['dataset']['dataset']
        loader['sampler'] = dict(type='InfiniteSampler', seed=0)
        batches = iter(Runner.build_dataloader(loader, seed=0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        model.train()
        for _ in range(steps):
            batch = model.data_preprocessor(next(batches), True)
            loss, _log = model.parse_losses(model(**batch, mode='loss'))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, path)
