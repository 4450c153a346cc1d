# As gplq_mask-rcnn_swin-7m_w4a4_dsb2018.py, with mimicking of the pyramid's levels.
_base_ = ['./gplq_mask-rcnn_swin-7m_w4a4_dsb2018.py']

model = dict(feature_layer='neck', mimic=_base_.gplq_mimic_maps)
