"""The speed of the families on this machine: python -m zoo.bench. Every number is a ratio, see zoo.bench.timing."""
