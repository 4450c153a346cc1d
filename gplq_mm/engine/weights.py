"""Which weights a checkpoint brings, and whether they belong to the model at hand."""

from collections.abc import Mapping

from mmengine.model import is_model_wrapper
from torch import nn

from ..checkpoint import (
    CheckpointError,
    adopt_biases,
    load_float_weights,
    read_checkpoint,
    state_dict_of,
)
from ..models import GPLQ, Stage


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a distributed wrapper, or the model itself."""
    return model.module if is_model_wrapper(model) else model


def load_run_weights(
    model: nn.Module, checkpoint: Mapping, source: str, activations_only: bool = False
) -> None:
    """Loads the weights of a checkpoint of any state.

    A GPLQ model takes a GPLQ checkpoint (any stage, same policy) or the FP32 checkpoint of its
    architecture; another model takes its own.

    Args:
        model: Model, wrapped or not.
        checkpoint: Content of the file.
        source: Its name, for messages.
        activations_only: Whether the policy may differ in what it says of weights.

    Raises:
        CheckpointError: If it is of another architecture, policy or method (``direct``).
    """
    model = unwrap(model)
    if not isinstance(model, GPLQ) or 'gplq' not in checkpoint:
        load_float_weights(model.architecture if isinstance(model, GPLQ) else model, source)
        return
    different = model.policy.differences(checkpoint['gplq']['policy'], activations_only)
    if different:
        raise CheckpointError(
            f'checkpoint {source} was made under another policy (it differs in '
            f'{", ".join(different)}); use the config that made it, or start a new run.'
        )
    direct = checkpoint['gplq'].get('direct')
    if direct != model.direct:
        raise CheckpointError(
            f'checkpoint {source} was made with model.direct={direct}, this config has '
            f'{model.direct}; use the config that made it, or start a new run.'
        )
    state = state_dict_of(checkpoint)
    adopt_biases(model, state)
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f'checkpoint {source} is of another architecture: {str(error).splitlines()[1].strip()}'
        ) from error
    problems = [*result.missing_keys, *result.unexpected_keys]
    problems = [key for key in problems if not key.startswith('mimic_loss.')]
    if problems:
        raise CheckpointError(
            f'checkpoint {source} is of another architecture: {len(problems)} entries do not '
            f'match, for example {problems[0]}.'
        )


def load_act_qat(model: nn.Module, source: str) -> dict:
    """Loads the end of Stage 1 of another run, for another Stage 2.

    Nothing that a policy says of weights has acted by then, so it may differ.

    Args:
        model: GPLQ model, wrapped or not.
        source: Checkpoint that a GPLQ run has written after Stage 1.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If it is another file, or of another architecture, or the activations
            were quantized under another policy.
    """
    checkpoint = read_checkpoint(source)
    state = checkpoint.get('gplq')
    ends_stage_1 = (
        state is not None
        and state['stage'] != Stage.WEIGHT_PTQ.name
        and any(name.startswith('w32a') for name in state['record']['metrics'])
    )
    if not ends_stage_1:
        raise CheckpointError(
            f'checkpoint {source} is not one of the end of Stage 1; give the file that a GPLQ run '
            'writes then, such as w32a4.pth.'
        )
    load_run_weights(model, checkpoint, source, activations_only=True)
    return checkpoint
