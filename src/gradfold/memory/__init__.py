"""Memory: what was used, what will fit, and which micro-batch is fastest."""
