"""Memory: what a window takes, before and after it is run, and the micro-batch size that follows from it.

- measure: `measure_peak` counts tensors (`MemoryTracker`) into an `AllocationTrace`, whose peak is a `MemoryBreakdown`.
- predict: `DryRun` traces a window and an update on fake tensors; `PeakEstimate` fits lines through two of them, which
  give the peak of every size.
- plan: `plan` holds estimates against a `Budget` with its `Margin`, and tries what would save memory.
- tune: `AutoTuner` times the sizes that fit another `Budget` (`Search`), and keeps its `MicroBatchChoice` on disk.

Start reading at `tracker.py`, then `estimate.py`.
"""
