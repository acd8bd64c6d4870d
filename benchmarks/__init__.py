"""Benchmarks of fastprompt against what people use today. ``python -m benchmarks`` runs them all."""
