"""Triton kernels, installed as ``fastprompt.kernels``.

Launched by ``fastprompt/ops/<op>/triton.py`` and ``fastprompt/layout/triton.py``.
"""
