"""Several processes that train one model.

`ddp` and `fsdp` find out from the modules which; a `ProcessGroup` runs their collectives; `coordinators` implement the
engine's `Coordinator`, `turns` for shards and `overlap` for sums in the last backward pass. `launch` starts processes
for the commands. Start reading at `ddp.find_process_group`, then `coordinators.py`.
"""
