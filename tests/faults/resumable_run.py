"""A training that meets every fault at once and writes a checkpoint per update; as a script, one that is killed.

`python -m faults.resumable_run FOLDER` (with PYTHONPATH=tests) trains twice: undisturbed, and killed 20 times on the
way. It prints as JSON where each kill struck. The children are forked from one process of a single thread that has
imported torch, which takes seconds; otherwise they are processes like any other.

A child halts at every note that it gives of its progress, until it may go on. So it is certain, on machines of any
speed, that kills strike at every kind of place, and that none comes too late. Others come some time after a note.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import json
import os
import random
import select
import signal
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradfold
import gradfold.batch.split

F = nn.functional

NUM_SAMPLES, BATCH_SIZE, NUM_BATCHES, CAPACITY, PATIENCE = 100, 40, 16, 12, 3
NUM_KILLS, NUM_BATCHES_OF_KILLED = 20, 50


def rows_from(start):
    """Rows of global batches without end, each epoch in an order of its own, from sample number `start` on."""
    while True:
        epoch, first = divmod(start, NUM_SAMPLES)
        order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(epoch))
        rows = order[first : first + BATCH_SIZE].tolist()
        yield rows
        start += len(rows)


class Run:
    """Dropout, BatchNorm by micro-batch, a loss scale that overflows again and again, and memory for 12 rows.

    Args:
        seed: of the weights at the start.
        num_batches: to train on, in all.
        note: called at every micro-batch.
    """

    def __init__(self, seed=0, num_batches=NUM_BATCHES, note=lambda: None):
        torch.manual_seed(seed)
        self.num_batches = num_batches
        self.model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        precision = gradfold.Precision(compute=torch.float16, grad_scaler=scaler)

        def loss_fn(model, batch):
            note()
            inputs, labels = batch
            if len(inputs) > CAPACITY:
                raise torch.OutOfMemoryError(f"{len(inputs)} rows")
            return F.cross_entropy(model(inputs), labels)

        accumulator = gradfold.Accumulator(self.model, loss_fn, precision=precision, batch_norm="per_micro_batch")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_batches)
        self.step = gradfold.TrainStep(accumulator, self.optimizer, scheduler, max_grad_norm=1.0)
        self.losses = []

    def state_dict(self):
        parts = {"model": self.model, "optimizer": self.optimizer, "step": self.step}
        states = {name: part.state_dict() for name, part in parts.items()}
        return {**states, "random": torch.get_rng_state(), "losses": list(self.losses)}

    def load_state_dict(self, state):
        for name in ("model", "optimizer", "step"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        self.losses = list(state["losses"])

    def __iter__(self):
        """Trains on a global batch at a time, from where it stands to the end."""
        generator = torch.Generator().manual_seed(7)
        inputs = torch.randn(NUM_SAMPLES, 6, generator=generator)
        labels = torch.randint(0, 4, (NUM_SAMPLES,), generator=generator)
        loader = DataLoader(
            TensorDataset(inputs, labels),
            batch_sampler=rows_from(self.step.samples),
            generator=torch.Generator(),  # else an iterator takes a number from torch's own
        )
        for batch in loader:
            if len(self.losses) == self.num_batches:
                return
            result = self.step(batch)
            self.losses.append(result.loss.item())
            yield result


def in_bytes(state, save=torch.save):  # the real one, also while torch.save is another
    file = io.BytesIO()
    save(state, file)
    return file.getvalue()


def from_bytes(content):
    return torch.load(io.BytesIO(content), weights_only=True)


def train(path, save, note):
    """Train from the checkpoint in `path`, if there is one, to the end; tells `note` what is being done."""
    note("start")
    run = Run(num_batches=NUM_BATCHES_OF_KILLED, note=lambda: note("micro-batch"))
    if path.exists():
        run.load_state_dict(torch.load(path, weights_only=True))
    note("built")
    fsync = os.fsync

    def halting_save(checkpoint, file):
        content = in_bytes(checkpoint)
        file.write(content[: len(content) // 2])
        file.flush()
        note("half written")
        file.write(content[len(content) // 2 :])

    def halting_fsync(number):
        fsync(number)
        note("not renamed")

    with mock.patch.object(os, "fsync", halting_fsync):
        for _ in run:
            states = run.state_dict()
            with mock.patch.object(torch, "save", halting_save):
                save(path, states)
            note("saved")


def example():
    """The one that shows how to write a checkpoint: its `save` is what is tested."""
    path = Path(__file__).parents[2] / "examples" / "resumable.py"
    spec = importlib.util.spec_from_file_location("example_resumable", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Child:
    """A training in a process of its own, which halts at every note until it may go on."""

    def __init__(self, path, save):
        notes, write_note = os.pipe()
        read_leave, leaves = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(notes), os.close(leaves)

                def note(text):
                    os.write(write_note, f"{text}\n".encode())
                    os.read(read_leave, 1)

                train(path, save, note)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write_note), os.close(read_leave)
        self._notes = os.fdopen(notes, "rb")
        self._leaves = leaves

    def note(self):
        """What it is about to do; empty when it has ended."""
        return self._notes.readline().decode().strip()

    def go_on(self):
        os.write(self._leaves, b".")

    def is_quiet_for(self, seconds):
        return not select.select([self._notes], [], [], seconds)[0]

    def end(self, kill=True):
        """Kill it, or wait until it has ended by itself; gives the exit status."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self._notes.close()
        os.close(self._leaves)
        return status

    def run_to(self, place, count):
        """Let it go on to note number `count` of this kind (of any kind: None), where it halts."""
        while count:
            note = self.note()
            if not note:
                raise AssertionError("it ended before it was killed")
            count -= place in (None, note)
            if count:
                self.go_on()


def num_batches_in(path):
    """How many batches the checkpoint has seen; the file is read in full."""
    return len(torch.load(path, weights_only=True)["losses"]) if path.exists() else 0


def main(folder):
    torch.set_num_threads(1)
    gradfold.batch.split._PATIENCE = PATIENCE
    save = example().save
    next(iter(Run()))  # what is imported on the way
    gc.freeze()  # what is there by now need not be looked through when memory runs out
    draw = random.Random(0)
    killed, unbroken = Path(folder, "killed.pt"), Path(folder, "unbroken.pt")
    places = ["start", "built", "half written", "not renamed", "saved", *["micro-batch"] * 5]
    kills = [(place, 1 if place in ("start", "built") else draw.randrange(1, 4)) for place in places]
    kills += [(None, draw.randrange(1, 15)) for _ in range(NUM_KILLS - len(kills))]
    draw.shuffle(kills)

    report, seen = [], 0
    for place, count in kills:
        child = Child(killed, save)
        child.run_to(place, count)
        halted = num_batches_in(killed)
        if place is None:  # on from there, by up to 3 ms (a micro-batch takes one) and to the next note at most
            child.go_on()
            place = "between" if child.is_quiet_for(draw.random() * 0.003) else "at the next"
        status = child.end()
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise AssertionError(f"it was not killed: {status}")
        before, seen = seen, num_batches_in(killed)
        if not before <= halted <= seen:
            raise AssertionError(f"a checkpoint was lost: {before}, {halted}, {seen}")
        report.append([place, seen])
    for path in (killed, unbroken):
        child = Child(path, save)
        while child.note():
            child.go_on()
        if child.end(kill=False) != 0:
            raise AssertionError("it failed")
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
