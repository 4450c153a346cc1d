"""Another forward in place of a module's own, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def patched_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Context in which ``module`` computes ``forward``, and its forward hooks do not run.

    Args:
        module: Any module.
        forward: Takes what the module's own forward takes. What hooks would add to its output,
            as a compensation does, it gives itself.
    """
    hooks, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
    # An instance attribute hides the class's forward.
    module.__dict__['forward'] = forward
    try:
        yield
    finally:
        del module.__dict__['forward']
        module._forward_hooks = hooks
