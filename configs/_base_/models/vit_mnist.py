# A plain ViT for digits: 6 layers of width 96 over 6 x 6 overlapping patches of 8 x 8 grey pixels.
# Overlap is what makes it learn in minutes: with 7 x 7 patches of 4 x 4 pixels side by side it
# needs about twice the epochs. No padding is needed, a digit's rim is empty.
data_preprocessor = dict(num_classes=10, mean=[33.3], std=[78.6], to_rgb=False)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=96, num_layers=6, num_heads=3, feedforward_channels=192),
        img_size=28,
        patch_size=4,
        patch_cfg=dict(kernel_size=8, padding=0),
        in_channels=1,
    ),
    neck=None,
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=10,
        in_channels=96,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    # The usual normal initialization of std 0.02 is meant for widths near 768.
    init_cfg=[
        dict(type='Xavier', layer='Linear', distribution='uniform'),
        dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
    ],
)
