"""Measurements that anyone can repeat: each a command, `python -m benchmarks.NAME`."""
