"""What tools/benchmark.py and benchmarks/gpu.py measure; one file for each thing.

``linear``, ``model``, ``train``, ``ptq``, ``kernels`` and ``gpu``. ``timing`` is their clock,
``report`` their tables, files and pictures; ``peers`` and ``synthetic`` make what is measured.
"""
