# Direct QAT as LSQ has it: labels alone, without a teacher. Beside direct.
_base_ = ['./direct_vit-tiny_w4a4_imagenette.py']

model = dict(mimic=None, distill=None, task_weight=1.0)
