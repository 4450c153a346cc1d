# A small Swin for digits. Stage 1 has 8 x 8 tokens, from overlapping patches of 7 x 7 pixels
# without padding, in 2 x 2 windows that every second block shifts; stage 2 has 4 x 4 tokens, one
# window.
data_preprocessor = dict(num_classes=10, mean=[33.3], std=[78.6], to_rgb=False)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=48, depths=[2, 4], num_heads=[2, 4]),
        img_size=28,
        patch_size=3,
        patch_cfg=dict(kernel_size=7, padding=0),
        in_channels=1,
        window_size=4,
        out_indices=(1,),
        drop_path_rate=0.0,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=96,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    init_cfg=[
        dict(type='Xavier', layer='Linear', distribution='uniform'),
        dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
    ],
)
