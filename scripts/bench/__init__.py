"""Benchmarks, run from the repository's root as `python -m scripts.bench NAME ...`: one module each.

Every figure is a ratio of things that took turns. A table comes first, the last line is JSON.
"""
