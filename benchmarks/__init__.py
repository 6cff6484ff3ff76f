"""What identity costs: Face Fusion beside plain Stable Diffusion and its alternatives: `python -m benchmarks`."""
