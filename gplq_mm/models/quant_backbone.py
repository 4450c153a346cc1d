"""A quantized backbone as a part of any other model."""

from mmengine.model import BaseModule
from torch import nn

from ..checkpoint import (
    CheckpointError,
    adopt_biases,
    load_float_weights,
    read_checkpoint,
    state_dict_of,
)
from ..layers import is_calibrated, quant_layers, quantize_model, require_frozen
from ..quant import QuantPolicy
from ..registry import MODELS

PREFIX = 'architecture.backbone.'


@MODELS.register_module()
class QuantBackbone(BaseModule):
    """Backbone with a quantization policy, from an FP32 or a GPLQ checkpoint.

    Layers are named ``backbone.*``, as in a :class:`GPLQ` run, so one policy serves both.

    Args:
        backbone: Config of the float backbone.
        checkpoint: Checkpoint of a GPLQ run, or FP32 weights of the model or the backbone.
        policy: Arguments of :class:`gplq_mm.quant.QuantPolicy`.
        compensation: As in :class:`GPLQ`.
        frozen: Whether the backbone stays as it is: no gradients, always in eval mode.
        init_cfg: Not used; the weights come from ``checkpoint``.

    Raises:
        PolicyError: If the policy does not fit the backbone.
    """

    def __init__(
        self,
        backbone: dict,
        checkpoint: str | None = None,
        policy: dict | None = None,
        compensation: dict | None = None,
        frozen: bool = False,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        self.backbone = MODELS.build(backbone)
        self.checkpoint = checkpoint
        self.frozen = frozen
        self.policy = QuantPolicy.of(policy)
        self.quant_report = quantize_model(self, self.policy, compensation, may_stay_float=frozen)
        if frozen:
            self.requires_grad_(False)

    def init_weights(self) -> None:
        """Loads ``checkpoint``.

        Raises:
            CheckpointError: If it cannot be read, is of another architecture, or was made under
                another policy.
            NotCalibratedError: If ``frozen`` and the checkpoint has no frozen quantizers.
        """
        if self.checkpoint is None:
            self.backbone.init_weights()
            return
        content = read_checkpoint(self.checkpoint)
        state = state_dict_of(content)
        saved = content.get('gplq')
        if saved is None:
            self._load_float(state)
        else:
            self._load_quantized(state, saved)
        if self.frozen:
            require_frozen(self.backbone)
            self.requires_grad_(False)

    def _load_quantized(self, state: dict, saved: dict) -> None:
        if self.policy.differences(saved['policy']):
            raise CheckpointError(
                f'checkpoint {self.checkpoint} was made under another policy; give QuantBackbone '
                'the policy of that run.'
            )
        own = {
            key.removeprefix(PREFIX): value
            for key, value in state.items()
            if key.startswith(PREFIX)
        }
        adopt_biases(self.backbone, own)
        try:
            missing = self.backbone.load_state_dict(own, strict=False).missing_keys
        except RuntimeError as error:
            raise CheckpointError(
                f'checkpoint {self.checkpoint} is of another architecture: {error}'
            ) from error
        if missing:
            raise CheckpointError(
                f'checkpoint {self.checkpoint} lacks {len(missing)} entries of this backbone, for '
                f'example {missing[0]}; it is of another architecture.'
            )

    def _load_float(self, state: dict) -> None:
        prefixed = any(key.startswith('backbone.') for key in state)
        load_float_weights(self if prefixed else self.backbone, self.checkpoint)

    @property
    def is_calibrated(self) -> bool:
        """Whether every activation quantizer has a scale."""
        return is_calibrated(self)

    @property
    def weights_are_quantized(self) -> bool:
        """Whether every weight is in its integers."""
        return all(q.weight_quantizer.is_quantized for q in quant_layers(self).values())

    def train(self, mode: bool = True) -> nn.Module:
        """A frozen backbone stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(self, *args, **kwargs):
        """The backbone's own forward."""
        return self.backbone(*args, **kwargs)
