"""Data sets by name: where their files lie, their arrays and constants. How batches are made: data.dali."""
