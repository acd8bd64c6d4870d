"""Triton kernels, installed as ``fastprompt.kernels``; launched by ``fastprompt/ops/<op>/triton.py`` and ``fastprompt/layout/triton.py``."""
