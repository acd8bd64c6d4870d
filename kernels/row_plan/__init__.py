"""The cells of a row plan in Triton: what ``fastprompt/layout/cells.py`` does in PyTorch, a program a sequence."""
