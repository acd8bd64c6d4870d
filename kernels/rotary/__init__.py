"""rotary in Triton: each number is read once and written once; forward and backward are one kernel."""
