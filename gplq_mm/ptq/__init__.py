"""Post-training quantization of weights: functions of weight, statistics and spec."""

from .blockwise import quantize_weights, round_weights
from .build import build_weight_ptq
from .direct_qat import init_learned_weights
from .forecast import Progress
from .gptq import GPTQ, damped_hessian, gptq_round
from .norms import NormReport, calibrate_with_norms
from .refinement import coordinate_descent, refit_group_scale, refit_row_scale
from .reparam import reparametrize
from .rounding import RoundToNearest, expand_multiplier, to_stored_order
from .scales import search_group_scales, search_row_scale
from .statistics import SecondMoment
from .stream import find_units
from .unit import Unit

__all__ = [
    'GPTQ',
    'NormReport',
    'Progress',
    'RoundToNearest',
    'SecondMoment',
    'Unit',
    'build_weight_ptq',
    'calibrate_with_norms',
    'coordinate_descent',
    'damped_hessian',
    'expand_multiplier',
    'find_units',
    'gptq_round',
    'init_learned_weights',
    'quantize_weights',
    'refit_group_scale',
    'refit_row_scale',
    'reparametrize',
    'round_weights',
    'search_group_scales',
    'search_row_scale',
    'to_stored_order',
]
