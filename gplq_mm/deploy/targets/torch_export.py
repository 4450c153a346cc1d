"""``torch.export`` of a deployed model: one graph of aten ops and ``gplq_mm`` ops."""

import os

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ...checkpoint import atomic_write
from ...layers import DeployError
from ...layers.int4_weight import Int4WeightLayer

# An exported dimension is a range.
MAX_BATCH = 2**16


def export_program(
    model: nn.Module,
    image_shape: tuple[int, int, int] = (3, 224, 224),
    batch: int | None = None,
) -> ExportedProgram:
    """Captures the forward of a deployed model.

    The program holds the ops ``gplq_mm::*`` as they are: run it where ``gplq_mm.ops`` has been
    imported. The image size is fixed, as the window maps of a Swin depend on it.

    Args:
        model: Deployed model on the device it will run on; ``model(images)`` is captured
            (mmpretrain and mmdet: ``mode='tensor'``, no preprocessing).
        image_shape: Channels, height and width of the normalised float32 images.
        batch: Fixed number of images. Defaults to any number from 1.

    Returns:
        The program; ``program.module()`` is callable.

    Raises:
        DeployError: If the model is not deployed, or its forward cannot be captured.
    """
    if not any(isinstance(module, Int4WeightLayer) for module in model.modules()):
        raise DeployError(
            'the model has no packed layers; export what gplq_mm.deploy.load or '
            'gplq_mm.deploy.convert returns.'
        )
    model.eval()
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    # An example of one image would fix the batch.
    example = torch.zeros(batch or 2, *image_shape, device=device)
    axes = {} if batch else {0: Dim('batch', min=1, max=MAX_BATCH)}
    try:
        with torch.no_grad():
            return torch.export.export(model, (example,), dynamic_shapes=(axes,), strict=False)
    except Exception as error:
        reason = str(error).strip().partition('\n')[0]
        hint = '' if batch else ' A fixed batch size may work: give batch=N.'
        raise DeployError(
            f'{type(model).__name__} cannot be captured for images of {tuple(image_shape)} '
            f'({type(error).__name__}: {reason}).{hint}'
        ) from error


def save_program(program: ExportedProgram, path: str | os.PathLike) -> None:
    """Writes an exported program as a ``.pt2`` archive; an existing file is replaced at once.

    There is no loader here on purpose: ``torch.export.load`` reads the archive, and unpickles
    parts of it, so that a foreign archive can run code. Load only your own. For files that
    travel use :func:`gplq_mm.deploy.save`.

    Args:
        program: Result of :func:`export_program`.
        path: The file to write.

    Raises:
        OSError: If the file cannot be written.
    """
    atomic_write(path, lambda file: torch.export.save(program, file))
