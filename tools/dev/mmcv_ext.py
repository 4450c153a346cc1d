"""The operators of mmcv that were compiled; the others say how to get them.

An installation copies this file to ``mmcv/_ext.py``. mmcv asks for every operator when it is
imported, and calls the few that a model needs.
"""

import contextlib

with contextlib.suppress(ModuleNotFoundError):  # of classifiers, which call none
    from mmcv._compiled_ops import *  # noqa: F403


def __getattr__(name):
    if name.startswith('__'):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f'The operator {name} of mmcv was not compiled: run `make install` for those that '
            'detectors usually call, or `GPLQ_MM_MMCV_OPS=all make install` for all.'
        )

    return missing
