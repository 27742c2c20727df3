"""The doctor: runs an existing training script for some updates, records it, and says what is wrong with it.

Start with `process.diagnose`, which runs a script in a child process; `run` hooks torch's functions there:

1. `backward_hooks`, `optimizer_hooks` and `data_hooks` are what `instrumentation` calls around torch's functions. A
   failure of the doctor ends the recording, never the script.
2. They write `events`, each with a line of the script (`source`, `syntax`), into the log of the `recorder`, which keeps
   the provenance of all gradients (`gradient_state`). `loss_graph` and `graph_stats` read the autograd graph.
3. `stop` ends the script when enough was seen. `diagnose` turns the log into a `history` of windows, which the `rules`
   check, one hazard per file; each `finding` is shown by `report`, as text or SARIF.

Nothing here knows the rest of gradfold, but `errors` and `memory.system`.
"""
