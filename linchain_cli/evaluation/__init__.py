"""Evaluation: tasks, the two protocols, statistics and result files."""
