# Begins where gplq_vit-tiny_w4a4_imagenette.py has ended Stage 1: for configs that differ from
# it in Stage 2 alone. Run that one first.
_base_ = ['../gplq/gplq_vit-tiny_w4a4_imagenette.py']

train_cfg = dict(
    act_qat_from='{{$GPLQ_VIT_TINY_W32A4:work_dirs/gplq_vit-tiny_w4a4_imagenette/w32a4.pth}}'
)
