"""Scripts that measure M3. Not installed: run them from the repository, as `python -m benchmarks.NAME`."""
