"""multitask_prompt in Triton. A factor ``rows[t] @ cols[t]`` is made where it is used, and only in registers.

Products are plain fp32 ones for every rank. MPT's ranks are small (PEFT's default is 1): the work is bound by memory,
and the tensor cores could not be used without rounding ``grad * shared`` to their narrower inputs.
"""
