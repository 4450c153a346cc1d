"""The GPLQ model: a quantized student and, while it trains, its frozen FP32 teacher."""

import copy
from functools import partial

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from ..checkpoint import CheckpointError, adopt_biases, load_float_weights, read_checkpoint
from ..errors import SettingError, StateError
from ..layers import (
    freeze_activations,
    freeze_learned_weights,
    is_calibrated,
    learn_weights,
    quant_layers,
    quantize_model,
    require_frozen,
    weights_are_learned,
)
from ..quant import QuantPolicy
from ..registry import MODELS
from .mimicry import Mimicry, prepare_training
from .run_stage import Stage, check_order
from .training_losses import check_images, completed_settings, require_finite


@MODELS.register_module()
class GPLQ(BaseModel):
    """Two-stage quantization of a model of mmpretrain (or any that takes the same three modes).

    Args:
        architecture: Config of the float model.
        pretrained: Checkpoint of the float model, a file or URL. Needed for training.
        backbone_from: Instead of ``pretrained``, for another task than that of the weights: a
            checkpoint with FP32 weights or of a GPLQ run before Stage 2 (``w32a4.pth``). The
            backbone begins with its weights, all else as the architecture initializes it, and
            the quantizers are calibrated on the new data.
        policy: Arguments of :class:`gplq_mm.quant.QuantPolicy`.
        mimic: Arguments of :class:`PCAMimicLoss`, or None to train without it.
        distill: ``dict(loss_weight=..., temperature=...)`` adds the Kullback-Leibler distance
            from the teacher's class probabilities, or None.
        block_mimic: ``dict(loss_weight=...)`` adds the relative error of the outputs of all
            residual blocks (:class:`.BlockMimicry`), or None.
        task_weight: Factor on the losses of the architecture. 0 trains without labels.
        compensation: ``dict(type='QwT')``, ``dict(type='QwTv2')`` or None.
        train_weights: Whether Stage 1 trains the FP32 weights too (the paper's text) or only
            the quantizers.
        direct: ``dict(granularity='row', init='observer')`` for direct QAT, the usual baseline:
            weights and activations are quantized and learned together, for
            :class:`gplq_mm.engine.DirectQATLoop`. A weight scale belongs to a ``'row'`` or a
            ``'tensor'`` and starts where the policy's ``weight.observer`` puts it, or by LSQ's
            rule (``'lsq'``). None for GPLQ.
        saved_bytes: Bytes that quantized layers keep of an activation for backward: 2, or 1, which
            leaves 4 bits for the rounding residual, so that gradients of scales are a few percent
            off. None keeps floats, as plain autograd does.
        gradient_checkpointing: Whether residual blocks keep their input alone, and are computed
            again in backward: less memory still, for a third more time.
        teacher: Whether to keep a teacher. Training needs one for ``mimic`` and ``distill``,
            evaluation does not.
        teacher_dtype: Precision in which the teacher computes the targets of the losses:
            ``'float32'``, ``'bfloat16'`` (autocast), or ``'auto'`` (default): bfloat16 on devices
            that multiply it natively (CUDA from sm_80 on; CPUs with AMX or AVX512_BF16), else
            float32. The PCA basis and the feature distance are computed in float32 always.
        feature_layer: Name of the layer with the features to mimic. Of a Linear it is the input,
            the penultimate feature of a classifier; of any other layer the output, one map or
            several ``(N, D, H, W)``, as ``'neck'`` gives the levels of a detector's pyramid.
            Defaults to the last Linear of the head.
        data_preprocessor: As in every OpenMMLab model; handed on to the architecture.
        init_cfg: Not used; the weights come from ``pretrained``.

    Raises:
        PolicyError: If the policy does not fit the architecture.
        SettingError: For settings that contradict each other.
    """

    def __init__(
        self,
        architecture: dict,
        pretrained: str | None = None,
        policy: dict | None = None,
        mimic: dict | None = None,
        distill: dict | None = None,
        block_mimic: dict | None = None,
        task_weight: float = 1.0,
        compensation: dict | None = None,
        train_weights: bool = True,
        direct: dict | None = None,
        saved_bytes: int | None = 2,
        gradient_checkpointing: bool = False,
        teacher: bool = True,
        feature_layer: str | None = None,
        backbone_from: str | None = None,
        teacher_dtype: str = 'auto',
        data_preprocessor: dict | nn.Module | None = None,
        init_cfg: dict | None = None,
    ):
        student = MODELS.build(self._with_preprocessor(architecture, data_preprocessor))
        super().__init__(data_preprocessor=student.data_preprocessor, init_cfg=init_cfg)
        self.pretrained, self.backbone_from = pretrained, backbone_from
        self._check_start(mimic, distill, block_mimic)
        self.direct = self._check_direct(direct, compensation)
        float_model = copy.deepcopy(student) if teacher else None
        self.policy = QuantPolicy.of(policy)
        self.quant_report = quantize_model(student, self.policy, compensation)
        if self.direct is not None:
            learn_weights(student, self.direct['granularity'])
        prepare_training(student, saved_bytes, gradient_checkpointing, train_weights)
        self.architecture = student
        self.mimicry = Mimicry(
            student,
            float_model,
            mimic,
            distill,
            block_mimic,
            task_weight,
            feature_layer,
            teacher_dtype,
        )
        # A child under this name, since files hold its basis.
        self.mimic_loss = self.mimicry.loss
        self.register_buffer('stage_code', torch.zeros((), dtype=torch.uint8))

    @staticmethod
    def _with_preprocessor(architecture: dict, data_preprocessor) -> dict:
        architecture = dict(architecture)
        if data_preprocessor is not None:
            architecture['data_preprocessor'] = data_preprocessor
        return architecture

    def _check_start(self, *losses: dict | None) -> None:
        if self.backbone_from is None:
            return
        if self.pretrained is not None:
            raise SettingError('set pretrained or backbone_from, not both.')
        if any(loss is not None for loss in losses):
            raise SettingError(
                'backbone_from starts a new task, for which there is no teacher; set mimic=None, '
                'distill=None and block_mimic=None.'
            )

    @staticmethod
    def _check_direct(direct: dict | None, compensation: dict | None) -> dict | None:
        direct = completed_settings('direct', direct, granularity='row', init='observer')
        if direct is not None and compensation is not None:
            raise SettingError(
                'direct QAT ends with the weights it has learned, and fits no compensation to '
                'them; set compensation=None.'
            )
        return direct

    # -- the teacher lives outside the module tree: it is neither saved nor trained -----------

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen FP32 model, in eval mode, or None."""
        teacher = self.mimicry.teacher
        return None if teacher is None else teacher.network

    @property
    def has_teacher_features(self) -> bool:
        """Whether :meth:`teacher_outputs` can be asked for."""
        teacher = self.mimicry.teacher
        return teacher is not None and teacher.tap is not None

    def _apply(self, fn, *args, **kwargs):
        if self.teacher is not None:
            self.teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    # -- stages ---------------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        """How far the model has come."""
        return Stage(int(self.stage_code))

    @property
    def stage_names(self) -> dict[str, str]:
        """Rows of a result table -> name of the stage, for example ``act`` -> ``'w32a4'``."""
        label = self.policy.label
        names = {
            'fp32': 'fp32',
            'ptq': f'ptq_{label}',
            'act': f'w32{label[label.index("a") :]}',
            'latent_fp32': 'latent_fp32',
            'final': label,
        }
        if self.direct is not None:
            # There is no moment at which activations alone are quantized.
            del names['act']
        return names

    @property
    def state_name(self) -> str:
        """What the model computes as it is: ``'fp32'``, ``'w32a4'`` or ``'w4a4'``."""
        if self.stage == Stage.FLOAT:
            return 'fp32'
        names = self.stage_names
        return (
            names['final'] if self.stage == Stage.WEIGHT_PTQ else names.get('act', names['final'])
        )

    def advance(self, stage: Stage) -> None:
        """Enters ``stage``.

        Raises:
            StateError: If that would go back, skip the calibration, or belongs to the other
                method.
        """
        stage = Stage(stage)
        check_order(self.stage, stage, self.direct is not None)
        if stage != Stage.FLOAT and not is_calibrated(self.architecture):
            raise StateError(f'{stage.name} needs calibrated activation quantizers first.')
        if stage == Stage.DIRECT_QAT and not weights_are_learned(self.architecture):
            raise StateError(f'{stage.name} needs initialized weight quantizers first.')
        if stage == Stage.WEIGHT_PTQ:
            require_frozen(self.architecture)
            pending = [
                name
                for name, layer in quant_layers(self.architecture).items()
                if not layer.weight_quantizer.is_quantized
            ]
            if pending:
                raise StateError(f'{len(pending)} weights are not quantized yet: {pending[0]}.')
        self.stage_code.fill_(int(stage))

    def freeze_activations(self) -> None:
        """Ends Stage 1: scales and zero-points never change again."""
        freeze_activations(self.architecture)

    def freeze_learned_weights(self) -> None:
        """Ends direct QAT: weights become the integers that training has simulated."""
        freeze_learned_weights(self.architecture)

    # -- weights --------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Loads ``pretrained`` or ``backbone_from`` into student and teacher.

        Raises:
            SettingError: If there is neither.
            CheckpointError: If it cannot be read, is of another architecture, or ``pretrained`` is
                a checkpoint of a GPLQ run.
        """
        if self.backbone_from is not None:
            self.architecture.init_weights()
            # Under the name that the weights have in the file.
            part = nn.ModuleDict({'backbone': self.architecture.backbone})
            load_float_weights(part, self.backbone_from, quantizers=False)
            if self.teacher is not None:
                own = self.architecture.state_dict()
                adopt_biases(self.teacher, own)
                self.teacher.load_state_dict({key: own[key] for key in self.teacher.state_dict()})
            self._is_init = True
            return
        if self.pretrained is None:
            raise SettingError(
                'GPLQ quantizes a trained model: set model.pretrained to its checkpoint, for '
                'example --cfg-options model.pretrained=PATH.'
            )
        if 'gplq' in read_checkpoint(self.pretrained):
            raise CheckpointError(
                f'model.pretrained={self.pretrained} was written by a GPLQ run, whose weights are '
                'no longer those of the float model: name the float checkpoint there. To go on '
                'with Stage 2 of that run set train_cfg.act_qat_from, for a new task '
                'model.backbone_from, and to evaluate give it to tools/test.py.'
            )
        for network in (self.architecture, self.teacher):
            if network is not None:
                load_float_weights(network, self.pretrained)
        self._is_init = True

    # -- forward --------------------------------------------------------------------------

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        """The three modes of OpenMMLab; ``loss`` adds mimicking and distillation.

        Args:
            inputs: Preprocessed images ``(N, C, H, W)``.
            data_samples: Annotations.
            mode: ``'tensor'``, ``'predict'`` or ``'loss'``.

        Raises:
            DataError: For a NaN or an infinity in an image.
            StateError: When asked to train after Stage 2.
        """
        check_images(inputs, data_samples)
        if mode != 'loss':
            return self.architecture(inputs, data_samples, mode=mode)
        if self.stage == Stage.WEIGHT_PTQ:
            raise StateError('the weights are quantized and frozen; this model cannot be trained.')
        run_student = partial(self.architecture, inputs, data_samples, mode='loss')
        return self.mimicry.losses(run_student, inputs)

    def teacher_outputs(self, inputs: Tensor) -> tuple:
        """Features ``(N, D)`` of the teacher and its logits ``(N, classes)``; or its maps, twice.

        In float32 on every device, so that what is measured with them can be compared.

        Raises:
            StateError: If the model was built without a teacher.
        """
        return self.mimicry.need_teacher().outputs(inputs)

    @torch.no_grad()
    def student_outputs(self, inputs: Tensor) -> tuple:
        """As :meth:`teacher_outputs`, of the student as it is now."""
        return self.mimicry.outputs(inputs)

    def parse_losses(self, losses: dict) -> tuple[Tensor, dict]:
        """Sums the losses, and stops before a NaN or an infinity reaches the weights.

        Raises:
            NonFiniteLossError: On all ranks, if any rank's loss is not finite.
        """
        loss, log = super().parse_losses(losses)
        require_finite(loss, log)
        return loss, log
