"""Batches: nestings of tensors, their rows, and how they are split into micro-batches."""
