"""Compiling Triton launches for a device that is not there."""

from types import SimpleNamespace

import torch

# Compute capability -> shared memory that a block can have, in bytes (CUDA C++ Programming
# Guide, technical specifications per compute capability).
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


class FakeDriver:
    """Enough of a driver to bind arguments and compile, on a machine without a device."""

    def __init__(self, target):
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_benchmarker(self):
        def time_once(call, quantiles=None):
            call()
            return [1.0] * len(quantiles)

        return time_once


class CompileOnly:
    """While entered, launches bind, tune and compile for a device, but run nothing.

    Args:
        monkeypatch: pytest's.
        capability: Of the device, a key of :data:`SHARED`.
        cache: Folder for what is compiled.

    Attributes:
        capability: As given.
        launched: Name of each kernel and what was compiled of it, in order.
    """

    def __init__(self, monkeypatch, capability: int, cache) -> None:
        self._patch, self._cache = monkeypatch, cache
        self.capability = capability
        self._kernels = []
        self.launched = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.launched]

    def __enter__(self) -> 'CompileOnly':
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        run = triton.runtime.JITFunction.run

        def compile_only(kernel, *args, grid, warmup, **kwargs):
            compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
            self.launched.append((kernel.fn.__name__, compiled))
            self._kernels.append(kernel)
            return compiled

        limits = SimpleNamespace(shared_memory_per_block_optin=SHARED[self.capability])
        self._patch.setattr(triton.runtime.JITFunction, 'run', compile_only)
        self._patch.setattr(torch.cuda, 'current_device', lambda: 0)
        self._patch.setattr(torch.cuda, 'get_device_properties', lambda _device: limits)
        self._patch.setenv('TRITON_CACHE_DIR', str(self._cache))
        target = GPUTarget('cuda', self.capability, 32)
        self._patch.setattr(driver, '_active', FakeDriver(target))
        return self

    def __exit__(self, *_error) -> None:
        # Nothing that was compiled without a device must be launched on one.
        for kernel in self._kernels:
            kernel.device_caches.clear()
