"""The engine: a window of micro-batches, run in some order, recovered from faults, made into one gradient."""
