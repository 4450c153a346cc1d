"""The diagnostics of one checkpoint, one after the other, as plain data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..engine import CalibrationHook, CalibrationSet, unwrap
from ..errors import SettingError
from ..models import GPLQ, NetworkOutputs, Stage
from ..progress import show_steps
from ..ptq import RoundToNearest, round_weights
from .activations import activation_statistics, scale_histogram
from .sensitivity import network_sensitivity, number_of_steps
from .sites import quant_sites, weights_are_quantized
from .sizes import mean_bits, weight_counts
from .sqnr import layer_sqnr
from .suggestion import activation_budget, suggest_policy, weight_budget

# Other images than those that calibration (seed 0) has seen first.
SEED = 1
IMAGES = {'classifier': 64, 'detector': 8}


@dataclass(frozen=True)
class AnalysisSettings:
    """What to analyse.

    Attributes:
        num_images: Training images; None takes 64 for a classifier and 8 for a detector.
        sensitivity: Whether to quantize layer by layer, the long part.
        round_weights: Whether weights that the checkpoint has not quantized are rounded to
            nearest for the analysis. A budget for weights implies it.
        budget_mb: Budget of the packed file without header and compensation, 10^6 bytes.
        weight_bits: Instead, budget of the mean width of weights.
        activation_bits: Budget of the mean width of activations, by number of values.
        widths: Widths to choose from.
    """

    num_images: int | None = None
    sensitivity: bool = True
    round_weights: bool = False
    budget_mb: float | None = None
    weight_bits: float | None = None
    activation_bits: float | None = None
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)

    @property
    def has_weight_budget(self) -> bool:
        """Whether a budget for weights is given."""
        return self.budget_mb is not None or self.weight_bits is not None

    @property
    def has_budget(self) -> bool:
        """Whether any budget is given."""
        return self.has_weight_budget or self.activation_bits is not None

    @property
    def suggests_weights(self) -> bool:
        """Whether widths of weights are to be chosen: without any budget, both kinds are."""
        return self.sensitivity and (self.has_weight_budget or not self.has_budget)

    @property
    def suggests_activations(self) -> bool:
        """Whether widths of activations are to be chosen."""
        return self.sensitivity and (self.activation_bits is not None or not self.has_budget)


@torch.no_grad()
def analyze(runner, path: str, settings: AnalysisSettings) -> dict:
    """Analyses a checkpoint of any state.

    Args:
        runner: Runner of the config, with its training and validation data.
        path: The checkpoint: of a GPLQ run, or the FP32 one, which is then calibrated as the
            config says.
        settings: What to do.

    Returns:
        Plain data: ``state``, ``notes`` (sentences), ``images``, ``bits``, ``layers`` (widths,
        numbers of weights, errors), ``activations``, ``scale_histogram``; ``sensitivity`` and
        ``suggestion`` or None; ``record``, what the run has kept in the checkpoint.

    Raises:
        CheckpointError: If it cannot be read or is of another model.
        SettingError: If the config is not that of a GPLQ model.
        BudgetError: If a budget is out of reach.
    """
    model = unwrap(runner.model)
    if not isinstance(model, GPLQ):
        raise SettingError(
            'the analysis needs the config of a GPLQ run (model.type=gplq_mm.GPLQ), which says '
            'what is quantized; this one builds a float model.'
        )
    checkpoint = runner.load_checkpoint(path)
    model.eval()
    architecture, observe = model.architecture, NetworkOutputs(model)
    # The calibration of the config, or one with default settings.
    hook = next((h for h in runner.hooks if isinstance(h, CalibrationHook)), CalibrationHook())
    state, notes = _prepare(runner, model, hook, settings)
    kind = 'detector' if observe.is_detector else 'classifier'
    num_images = settings.num_images or IMAGES[kind]
    images = CalibrationSet.from_runner(runner, num_images, batch_size=hook.batch_size, seed=SEED)

    def batches(description: str = '') -> Iterator[dict]:
        for batch in images.batches(description=description):
            yield model.data_preprocessor(batch, False)

    # First of all, so that a budget out of reach is told before the parts that take time.
    weights = activations = sensitivity = suggestion = None
    if settings.suggests_weights and weights_are_quantized(architecture):
        size = (settings.budget_mb, settings.weight_bits)
        weights = weight_budget(architecture, settings.widths, *size)
    statistics = activation_statistics(architecture, batches('activation quantizers'), observe)
    if settings.suggests_activations:
        size = settings.activation_bits
        activations = activation_budget(architecture, statistics, settings.widths, size)
    errors = layer_sqnr(architecture, batches('errors of layers'), observe)
    if settings.sensitivity:
        steps = number_of_steps(architecture) * images.num_batches
        with show_steps(steps, 'sensitivity of layers') as step:
            sensitivity = network_sensitivity(architecture, batches(), observe, step)
        suggestion = suggest_policy(
            architecture,
            runner.cfg.model.to_dict().get('policy') or {},
            next(batches()),
            observe,
            sensitivity,
            weights,
            activations,
        )
    return {
        'state': state,
        'kind': kind,
        'notes': notes,
        'images': images.describe(),
        'bits': mean_bits(architecture, {n: v['values'] for n, v in statistics.items()}),
        'layers': _layers(architecture, errors),
        'activations': statistics,
        'scale_histogram': scale_histogram(architecture),
        'sensitivity': sensitivity,
        'suggestion': suggestion,
        'record': checkpoint.get('gplq', {}).get('record', {}),
    }


def _prepare(
    runner, model: GPLQ, hook: CalibrationHook, settings: AnalysisSettings
) -> tuple[str, list[str]]:
    """Gives the model what the checkpoint lacks; its state, and sentences on what was done."""
    state, notes = model.state_name, []
    if model.stage == Stage.FLOAT:
        hook.calibrate(model, hook.images(runner))
        notes.append(
            'The checkpoint is a float one. Its activation quantizers were calibrated for this '
            f'analysis on {hook.num_images} images, as the config says.'
        )
    elif model.stage == Stage.CALIBRATED:
        state = 'calibrated'
    if weights_are_quantized(model.architecture):
        return state, notes
    if settings.round_weights or settings.has_weight_budget:
        round_weights(model.architecture, RoundToNearest())
        notes.append(
            'The checkpoint has no quantized weights. They were rounded to nearest for this '
            'analysis; Stage 2 makes smaller errors.'
        )
    else:
        notes.append(
            'The checkpoint has no quantized weights, so this is about activations alone. '
            '--round-weights rounds them for the analysis.'
        )
    return state, notes


def _layers(architecture: nn.Module, errors: Mapping[str, Mapping]) -> dict[str, dict]:
    counts = weight_counts(architecture)
    return {
        name: {
            'kind': site.kind,
            'activation_bits': site.act_bits,
            'weight_bits': site.weight_bits,
            'num_weights': counts.get(name, 0),
            'errors': dict(errors.get(name, {})),
        }
        for name, site in quant_sites(architecture).items()
    }
