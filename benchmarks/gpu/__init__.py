"""What can be shown of the GPU kernels without a GPU, and the script that shows the rest on a machine that has one.

compile_matrix: every variant compiled for every target, and what the binaries contain. model: bytes, FLOPs, launches
and a predicted time beside those of other implementations. launch_cost: microseconds of Python in a launch. check: runs
on a GPU; correctness, then benchmarks. The first three need no GPU and are ``make gpu-evidence``, the last ``make
gpu-check``.
"""
