"""Benchmarks of serving: our engine and the peers a user would pick, on the same requests.

``mor bench serve`` is the command; docs/benchmarks.md says how to read its table.
"""
