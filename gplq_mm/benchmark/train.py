"""What a training step costs: bytes kept for backward, peak memory, time."""

import copy
from collections.abc import Callable, Iterable
from itertools import accumulate
from multiprocessing import get_context

import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..engine.stage_clock import StageClock
from ..layers import calibrate
from ..models import GPLQ, Stage
from ..ptq import init_learned_weights
from ..registry import MODELS
from .report import Bench, show

# Settings of the model by implementation. Training in FP32; ours, with two bytes an activation
# and with one, and with chosen levels; the same arithmetic as plain autograd keeps it; and direct
# QAT, which fake-quantizes weights too.
IMPLS = {
    'fp32': None,
    'gplq': {},
    'gplq_1byte': dict(saved_bytes=1),
    'levels': dict(policy=dict(preset='gplq-levels')),
    'plain': dict(saved_bytes=None),
    'direct': dict(direct={}, policy=dict(preset='gplq', weight=dict(layout='raw'))),
}
LEARNING_RATE = 1e-6
MEGABYTE = 2**20
COLUMNS = {
    'implementation': '{impl}',
    'kept for backward': '{saved_ratio:.2f}  ({saved_mb:.0f} MB)',
    'peak memory': '{peak_ratio:.2f}  ({peak_mb:.0f} MB)',
    'step': '{step_ratio:.2f}  ({step_ms:.0f} ms)',
}
# Steps before one is measured: optimizer states and buffers of libraries are made in the first.
WARM_UP = 2


def _quantized(architecture: dict, settings: dict, images: Tensor) -> GPLQ:
    """GPLQ model at the beginning of its training, calibrated on ``images``."""
    model = GPLQ(architecture, mimic={}, **settings)
    student = model.architecture
    with torch.no_grad():
        student.eval()
        calibrate(student, lambda _index, _passes: student(images, mode='tensor'))
        features, _ = model.teacher_outputs(images)
        centered = features - features.mean(0)
        model.mimic_loss.fit(features.mean(0), centered.T @ centered / len(features))
    model.advance(Stage.CALIBRATED)
    if model.direct is not None:
        init_learned_weights(student, model.direct['init'])
        model.advance(Stage.DIRECT_QAT)
    else:
        model.advance(Stage.ACT_QAT)
    return model


class TrainingStep:
    """One step of training of a model, again and again on the same random images.

    Args:
        model: Takes ``(inputs, data_samples, mode='loss')``.
        constructor: Of the optimizer wrapper, or None for mmengine's.
        images: ``(N, C, H, W)``.
        labels: ``(N,)``.
    """

    def __init__(self, model: nn.Module, constructor: str | None, images: Tensor, labels: Tensor):
        cfg = dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        )
        if constructor is not None:
            cfg.update(constructor=constructor, quantizer=dict(lr=LEARNING_RATE))
        self.model = model.train()
        self.optimizer = build_optim_wrapper(model, cfg)
        self.images = images
        self.samples = [BaseDataElement(gt_label=label[None]) for label in labels]

    def loss(self) -> Tensor:
        """Forward, the teacher's included."""
        losses = self.model(self.images, self.samples, mode='loss')
        return self.model.parse_losses(losses)[0]

    def __call__(self) -> None:
        self.optimizer.update_params(self.loss())


def build_step(impl: str, architecture: dict, image: tuple[int, ...], batch: int) -> TrainingStep:
    """Training step of one of :data:`IMPLS`, with random weights, images and labels.

    Args:
        impl: Which of them.
        architecture: Config of an ImageClassifier of mmpretrain.
        image: Shape of an image ``(C, H, W)``.
        batch: Images a step.
    """
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    images = torch.randn(batch, *image, device=device)
    labels = torch.randint(architecture['head']['num_classes'], (batch,), device=device)
    architecture = copy.deepcopy(architecture)
    if IMPLS[impl] is None:
        return TrainingStep(MODELS.build(architecture).to(device), None, images, labels)
    model = _quantized(architecture, IMPLS[impl], images.cpu()).to(device)
    return TrainingStep(model, 'gplq_mm.GPLQOptimWrapperConstructor', images, labels)


def saved_megabytes(forward: Callable[[], Tensor], model: nn.Module) -> float:
    """Megabytes (2**20 bytes) of the tensors that autograd keeps for backward, each storage once.

    Args:
        forward: Gives the loss.
        model: Its parameters and buffers do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            # A reference, so that no other storage can come to lie there.
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del loss
    return total / MEGABYTE


def _live_megabytes(step: TrainingStep) -> float:
    """What lives from one step to the next: images, weights, optimizer, teacher."""
    models = [step.model, *filter(None, [getattr(step.model, 'teacher', None)])]
    tensors = [step.images, *(t for m in models for t in (*m.parameters(), *m.buffers()))]
    for state in step.optimizer.optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values()) / MEGABYTE


def _peak_megabytes(step: TrainingStep) -> float:
    """Highest sum of allocations during a step, what lived before included."""
    if step.images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / MEGABYTE
    # torch counts allocations on a CPU for its profiler alone.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == '[memory]')
    highest = max(accumulate((size for _, size in changes), initial=0))
    return _live_megabytes(step) + highest / MEGABYTE


def _memory(threads: int, *args) -> dict[str, float]:
    torch.set_num_threads(threads)
    step, clock = build_step(*args), StageClock()
    for _ in range(WARM_UP):
        step()
    with clock.stage('step'):
        step()
    return {
        'saved_mb': saved_megabytes(step.loss, step.model),
        'peak_mb': _peak_megabytes(step),
        'resident_mb': clock.peak_memory_mb['step'],
    }


def training_memory(*args) -> dict[str, float]:
    """Memory of a training step, measured in a process of its own.

    Args:
        *args: Those of :func:`build_step`.

    Returns:
        ``saved_mb``, what is kept for backward; ``peak_mb``, the highest sum of the tensors that
        are alive during a step, with images, weights, gradients, optimizer and teacher;
        ``resident_mb``, the highest memory of the process on a CPU, with all packages and what
        the C library has not given back. Megabytes of 2**20 bytes.
    """
    with get_context('spawn').Pool(1) as pool:
        return pool.apply(_memory, (torch.get_num_threads(), *args))


def measure(
    bench: Bench,
    name: str,
    architecture: dict,
    image: tuple[int, ...],
    batch: int,
    impls: Iterable[str],
) -> None:
    """Measures the training steps of a model: memory, and time in turns.

    Args:
        bench: Takes the rows.
        name: Of the model, for the report.
        architecture, image, batch: As in :func:`build_step`.
        impls: Which of :data:`IMPLS`, FP32 among them.
    """
    memory, threads = {}, torch.get_num_threads()
    for impl in impls:
        with bench.console.status(f'{name}, batch {batch}: memory of {impl}'):
            memory[impl] = training_memory(impl, architecture, image, batch)
    steps = {impl: build_step(impl, architecture, image, batch) for impl in impls}
    title = f'{name}, batch {batch}, {threads} threads, in multiples of FP32'
    timings, rows = bench.time(steps, title), []
    for impl, (step, first, third, rounds) in timings.items():
        row = {'name': 'train', 'model': name, 'batch': batch, 'threads': threads, 'impl': impl}
        row |= {**memory[impl], 'step_ms': step}
        for key in ('saved', 'peak'):
            row[f'{key}_ratio'] = memory[impl][f'{key}_mb'] / memory['fp32'][f'{key}_mb']
        row['step_ratio'] = step / timings['fp32'].median_ms
        rows.append(row | {'quartile1_ms': first, 'quartile3_ms': third, 'rounds': rounds})
    bench.rows += rows
    show(rows, title, COLUMNS, bench.console)
