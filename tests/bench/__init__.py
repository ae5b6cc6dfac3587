"""Benchmarks: `python -m tests.bench [NAME ...] [--json FILE]`. Ratios side by side in one run, never pass or fail.

Results, with date and command, are kept in RESULTS.md beside this file.
"""
