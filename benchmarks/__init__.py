"""Benchmarks, a module each, that print a table and write a record. What they measure is elsewhere."""
