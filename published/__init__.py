"""Readers of published data: trajectories for training, benchmarks for evaluation (README.md)."""
