"""Every call that the doctor looks at, right and wrong, with what torch raises where it is wrong.

Its arguments are the sections to run. Each prints losses, errors, and at its end the weights and random states to
the last bit.
"""

import hashlib
import random
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def attempt(action):
    """What goes wrong, with the lines of this file that it came through."""
    try:
        action()
    except Exception as error:
        trace, lines = error.__traceback__, []
        while trace is not None:
            lines += [trace.tb_lineno] if trace.tb_frame.f_code.co_filename == __file__ else []
            trace = trace.tb_next
        print(type(error).__name__, str(error).splitlines()[0], lines, error.__cause__, error.__context__)


class Rows(torch.utils.data.Dataset):
    def __init__(self, num_rows, broken=None):
        self.rows = torch.randn(num_rows, 6)
        self.broken = broken

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index == self.broken:
            raise LookupError(f"row {index} is damaged")
        return {"x": self.rows[index], "y": index % 4}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 6, sparse=True)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1))
        self.heads = nn.Linear(8, 4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.heads(self.body(x + self.embed(x.argmax(1) % 4)))


class CountingSGD(torch.optim.SGD):
    """Makes every second step."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure) if self.calls % 2 == 0 else None


def finish(name, *models):
    digest = hashlib.sha256()
    for model in models:
        for value in model.state_dict().values():
            digest.update(value.detach().float().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    print(name, digest.hexdigest()[:16], random.random())


def classify():
    model = Net()
    dense = [p for n, p in model.named_parameters() if not n.startswith("embed")]
    optimizer = torch.optim.SGD(dense, lr=0.1)
    sparse = torch.optim.SparseAdam(list(model.embed.parameters()), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    loader = torch.utils.data.DataLoader(Rows(26), batch_size=4, shuffle=True)
    for epoch in range(2):
        running = 0.0
        for i, batch in enumerate(loader):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(batch["x"]), batch["y"], label_smoothing=0.1 * (i % 2))
            scaler.scale(loss / 2).backward()
            running += loss.item()
            if not torch.isfinite(loss):
                break
            if i % 2:
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_((p for p in dense), 1.0)
                nn.utils.clip_grad_value_(parameters=dense, clip_value=0.5)
                scaler.step(optimizer)
                sparse.step()
                scaler.update()
                scheduler.step()
                optimizer.zero_grad()
                model.embed.weight.grad = None
        print("epoch", epoch, running, float(norm), scheduler.get_last_lr(), int(loss.detach() > 0))
    attempt(lambda: scaler.unscale_(optimizer))
    attempt(lambda: scaler.update())
    attempt(lambda: loss.backward())
    attempt(lambda: torch.autograd.backward([loss], "seed"))
    attempt(lambda: model(batch["x"]).item())
    finish("classify", model)


def compare_samples():
    tower, queue = nn.Linear(6, 3, bias=False), nn.Linear(6, 3)
    optimizer = CountingSGD([*tower.parameters()], lr=0.1)
    late = None
    for i in range(6):
        x = torch.randn(5, 6)
        a, b = F.normalize(tower(x)), F.normalize(queue(x.flip(0)))
        loss = F.cross_entropy(a @ b.T * 2 + torch.cdist(a, b), torch.arange(5)) - (a.T @ b).square().sum() * 0.1
        (loss * (1 / 2)).backward()
        if i == 5:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                extra = tower(x).square().mean()
            torch.autograd.backward([extra, tower(x).sum()], [torch.tensor(0.5), None])
        for p in tower.parameters():
            p.grad.mul_(0.5)
        optimizer.step()
        if i == 3:
            late = torch.optim.Adam(queue.parameters(), lr=0.01)
        if late is not None:
            late.step()
        if optimizer.calls % 2 == 0:
            torch._foreach_zero_([p.grad for p in tower.parameters()])
            with torch.no_grad():
                tower.weight.mul_(0.999)
    del late
    tower(x).sum().backward()
    finish("compare", tower, queue)


def low_precision():
    model = nn.Linear(6, 2).bfloat16()
    hook = model.weight.register_hook(lambda grad: grad * 1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for i in range(6):
        soft = torch.softmax(torch.randn(3, 2), 1).bfloat16()
        (F.cross_entropy(model(torch.randn(3, 6).bfloat16()), soft) / 3).backward()
        model.weight.grad.data[0] += 1
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            plateau.step(0.5)
    hook.remove()
    attempt(lambda: torch.optim.Adam(model.parameters(), lr=-1.0))
    attempt(lambda: torch.optim.lr_scheduler.StepLR(optimizer, 1, last_epoch=3))
    attempt(lambda: nn.utils.clip_grad_norm_(model.parameters(), float("nan"), error_if_nonfinite="x" > ""))
    print(torch.ones(2).tolist(), bool(model.weight.grad.any()), model.weight.grad.float().numpy().sum())
    finish("low", model)


def closures():
    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.InstanceNorm1d(2, affine=True), nn.Flatten(), nn.Linear(8, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    x = torch.randn(1, 2, 6)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
        return loss

    def broken():
        raise ArithmeticError("no loss today")

    stray = nn.Linear(8, 1)
    for _ in range(2):
        weight = torch.ones(1)
        F.cross_entropy(stray(torch.ones(3, 8)).expand(3, 2), torch.tensor([0, 1, 1]), weight.expand(2)).backward()
    (model(x) * stray(torch.ones(8))).sum().backward()
    for p in model.parameters():
        p.grad = None
    attempt(lambda: optimizer.step(broken))
    for _ in range(3):
        print("lbfgs", float(optimizer.step(closure).detach()))
    again = torch.optim.SGD(model.parameters(), lr=0.01)
    again.step()
    again.step()
    finish("closures", model)


def ranks():
    if not dist.is_initialized():  # and left to the end of the process: gloo's threads may hold up an earlier one
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.parallel.DistributedDataParallel(nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with model.no_sync():
            model(torch.randn(4, 6)).mean().backward()
        (-model(torch.randn(4, 6)).mean() * 0.5).backward()
        optimizer.step()
        model.zero_grad()
    finish("ranks", model.module)


def broken_loader():
    def read():
        for batch in torch.utils.data.DataLoader(Rows(8, broken=5), batch_size=2):
            print("rows", batch["x"].sum().item())

    attempt(read)
    iterable = torch.utils.data.DataLoader((lambda: [torch.ones(2)] * 3)(), batch_size=None)
    print(sum(float(one.sum()) for one in iterable))


SECTIONS = (classify, compare_samples, low_precision, closures, ranks, broken_loader)

if __name__ == "__main__":
    for section in SECTIONS:
        if section.__name__ in sys.argv[1:]:
            torch.manual_seed(0)
            random.seed(0)
            section()
