"""prefix_attention in Triton.

A batch is laid out in *virtual* order: sequences sorted by the prefix they read, one after the other. A query sees one
interval of virtual own keys and one interval of its prefix's keys, so packed, padded, windowed, causal and decoding
batches differ in the numbers of a table (``schedule.py``), not in code. A tile of queries spans as many sequences as
fit, with all query heads of a group folded into its rows: tile row m is query ``m // FOLD``, head ``m % FOLD`` of the
group.
"""
