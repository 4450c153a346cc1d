# Direct QAT as LSQ has it, labels alone, at the length and the rate of direct-long.
# Beside that, and beside direct-labels.
_base_ = ['./direct-long_vit-tiny_w4a4_imagenette.py']

model = dict(mimic=None, distill=None, task_weight=1.0)
