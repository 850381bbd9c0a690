"""Readers of published data: trajectories to train on, benchmarks to evaluate with (README.md)."""
