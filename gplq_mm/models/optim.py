"""Optimizer settings of training: rates of weights and quantizers, and bf16 on any device."""

from contextlib import contextmanager

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.runner import autocast
from torch import nn

from ..layers import act_quantizers, learned_parameters
from ..registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """Forward under bfloat16 autocast; parameters, gradients and updates stay FP32.

    bfloat16 has FP32's range, so there is no loss scaling. mmengine's AmpOptimWrapper refuses
    to run on a CPU; this one does not.
    """

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Enters the autocast region around the forward."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


def _merge_groups(optimizer: torch.optim.Optimizer) -> None:
    """Puts parameters with the same settings into one group, in the order of the first of each.

    mmengine makes a group of every parameter; an optimizer steps through groups one by one, and
    a quantized model has hundreds of small parameters.
    """
    merged: list[dict] = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != 'params'}
        for other in merged:
            if settings == {key: value for key, value in other.items() if key != 'params'}:
                other['params'].extend(group['params'])
                break
        else:
            merged.append({**settings, 'params': list(group['params'])})
    optimizer.param_groups[:] = merged


class _RelativeSteps:
    """Makes an optimizer's steps of quantizer parameters relative to their grids.

    Adam moves every number by about its learning rate, whatever its size. Scales differ by orders
    of magnitude, between sites and between channels, and so do their ranges. A step of a scale is
    multiplied by the scale, and a step of a zero-point by the range that the codes cover.

    Args:
        optimizer: Steps are changed from now on, and nothing that a checkpoint holds of it.
        model: Its quantizers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module):
        # A unit is the magnitude of a parameter, times a number.
        units = {id(parameter): (parameter, 1) for parameter in learned_parameters(model)}
        for quantizer in act_quantizers(model).values():
            if quantizer.offset is not None:
                span = quantizer.qmax - quantizer.qmin
                units[id(quantizer.offset)] = (quantizer.scale, span)
        self.parameters = [
            parameter
            for group in optimizer.param_groups
            if group.get('relative')
            for parameter in group['params']
        ]
        self.units = [units[id(parameter)] for parameter in self.parameters]
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, *_args) -> None:
        self.old = [parameter.clone() for parameter in self.parameters]
        magnitudes = torch._foreach_abs([parameter for parameter, _ in self.units])
        self.factors = torch._foreach_mul(magnitudes, [float(number) for _, number in self.units])

    @torch.no_grad()
    def _after(self, *_args) -> None:
        steps = torch._foreach_sub(self.parameters, self.old)
        torch._foreach_mul_(steps, self.factors)
        torch._foreach_add_(self.old, steps)
        torch._foreach_copy_(self.parameters, self.old)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GPLQOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Gives quantizer parameters their own settings; ``optimizer`` is that of the weights.

    ``optim_wrapper=dict(constructor='gplq_mm.GPLQOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=5e-6), quantizer=dict(lr=1e-3, weight_decay=0.))``

    Args:
        optim_wrapper_cfg: As in mmengine; the key ``quantizer`` holds overrides of optimizer
            settings (``lr``, ``weight_decay``) for scales and zero-points, in direct QAT those of
            weights too. With ``relative=True`` a step of a scale is in units of the scale, and one
            of a zero-point in units of the range that the codes cover.
        paramwise_cfg: As in mmengine, for the weights.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        optim_wrapper_cfg = dict(optim_wrapper_cfg)
        self.quantizer_cfg = dict(optim_wrapper_cfg.pop('quantizer', {}))
        super().__init__(optim_wrapper_cfg, paramwise_cfg or {})

    def __call__(self, model: nn.Module) -> OptimWrapper:
        self._quantizer_ids = {id(parameter) for parameter in learned_parameters(model)}
        if not self.paramwise_cfg:
            # mmengine asks the optimizer for one group only when nothing is set per parameter.
            self.paramwise_cfg = {'custom_keys': {}}
        wrapper = super().__call__(model)
        _merge_groups(wrapper.optimizer)
        if self.quantizer_cfg.get('relative'):
            _RelativeSteps(wrapper.optimizer, model)
        return wrapper

    def add_params(self, params: list[dict], module: nn.Module, *args, **kwargs) -> None:
        """Adds a module's parameters as mmengine does, then applies the quantizer settings."""
        first = len(params)
        super().add_params(params, module, *args, **kwargs)
        for group in params[first:]:
            if all(id(parameter) in self._quantizer_ids for parameter in group['params']):
                group.update(self.quantizer_cfg)
