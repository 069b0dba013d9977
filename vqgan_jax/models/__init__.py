"""Flax modules: arrays in, arrays out. They import nothing else of the package."""
