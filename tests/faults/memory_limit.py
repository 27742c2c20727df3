"""A training under a limit of the address space, as `ulimit -v` sets it, where torch's CPU allocator really fails.

`python memory_limit.py` trains the same model without a limit and under several, each in a child forked from one
process that is warm, and prints as JSON what happened. Limits are relative to what the process has before the first
large batch and to what the full batch adds to that.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import traceback
from pathlib import Path

import torch
from torch import nn

import gradfold
import gradfold.engine.recovery

F = nn.functional

NUM_ROWS, LENGTH, WIDTH, NUM_LAYERS, NUM_UPDATES = 32, 3072, 16, 12, 2
SHARES = (0.6, 0.35, 0.2)  # of the memory that the full batch takes
MIB = 2**20


def make():
    torch.manual_seed(0)
    layers = [layer for _ in range(NUM_LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(nn.Linear(2, WIDTH), *layers, nn.Linear(WIDTH, 1)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def batch(number, num_rows=NUM_ROWS, length=LENGTH):
    generator = torch.Generator().manual_seed(number)
    inputs = torch.rand(num_rows, length, 2, generator=generator, dtype=torch.float64)
    return inputs, inputs.sum(2, keepdim=True).sin()


def loss_fn(model, batch):
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets)


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def status(name):
    """A size of this process in bytes, such as VmSize, the address space."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def limit_to(more):
    """From here on this process gets so many bytes of address space on top of what it has."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + int(more), hard))


def unlimited():
    """The gradients of the training in plain torch, and what one step of it adds to the address space."""
    model, optimizer = make()
    before, gradients = status("VmSize"), []
    for number in range(NUM_UPDATES):
        optimizer.zero_grad()
        loss_fn(model, batch(number)).backward()
        gradients.append(gradient(model))
        optimizer.step()
    return {"bytes": status("VmPeak") - before, "gradients": [gradient.tolist() for gradient in gradients]}


def plain(more):
    """One step in plain torch under a limit: the text of its error."""
    model, _ = make()
    data = batch(0)
    limit_to(more)
    try:
        loss_fn(model, data).backward()
    except RuntimeError as error:
        return str(error)
    return None


class Trained:
    """A gradfold training that notes which errors it recovers from."""

    def __init__(self):
        self.messages = []
        self.model, optimizer = make()
        self.step = gradfold.TrainStep(gradfold.Accumulator(self.model, loss_fn), optimizer)

        def noting(error, original=gradfold.engine.recovery.is_out_of_memory):
            if original(error):
                self.messages.append(str(error))
            return original(error)

        gradfold.engine.recovery.is_out_of_memory = noting


def limited(more, expected):
    """The training with gradfold under a limit, with the number of rows left to it."""
    run, updates = Trained(), []
    batches = [batch(number) for number in range(NUM_UPDATES)]
    limit_to(more)
    for data, reference in zip(batches, expected, strict=True):
        result = run.step(data)
        found, reference = gradient(run.model), torch.tensor(reference, dtype=torch.float64)
        updates.append(
            {
                "error": ((found - reference).norm() / reference.norm()).item(),
                "num_micro_batches": result.num_micro_batches,
                "sizes": [recovery.micro_batch_size for recovery in result.recoveries],
                "causes": [recovery.cause for recovery in result.recoveries],
            }
        )
    return {"updates": updates, "messages": run.messages}


def too_little(more):
    """Rows that do not fit even one by one, and then a smaller batch."""
    run = Trained()
    long, short = batch(0, num_rows=4, length=24 * LENGTH), batch(1, num_rows=4, length=16)
    run.step(short)
    before = gradient(run.model)
    limit_to(more)
    try:
        run.step.accumulator.backward(long)
        return None
    except gradfold.DoesNotFitError as error:
        sizes, message = error.sizes, str(error)
    is_untouched = torch.equal(gradient(run.model), before)
    result = run.step(short)
    return {
        "sizes": sizes,
        "message": message,
        "is_untouched": is_untouched,
        "updates": run.step.updates,
        "recoveries": len(result.recoveries),
        "messages": run.messages,
    }


def in_a_child(function, *args):
    """What the function returns in a forked process, which has a heap and a limit of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            content = json.dumps(function(*args))
            resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
            with os.fdopen(write, "w") as file:
                file.write(content)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as file:
        content = file.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise AssertionError(f"{function.__name__}{args[:1]} failed, see above")
    return json.loads(content)


def main():
    torch.set_num_threads(1)
    model, _ = make()
    gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(batch(0, num_rows=4, length=2))  # what it imports
    gc.freeze()
    reference = in_a_child(unlimited)
    report = {"mib": reference["bytes"] / MIB, "limits": []}
    for share in SHARES:
        more = share * reference["bytes"]
        found = in_a_child(limited, more, reference["gradients"])
        report["limits"].append({"share": share, "plain": in_a_child(plain, more), **found})
    row = 24 * LENGTH * WIDTH * 8  # one activation of one long row
    report["too_little"] = in_a_child(too_little, 2 * row)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
