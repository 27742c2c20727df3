"""The numbers in findings, held against the naive computation of what they say."""

from __future__ import annotations

import re

import torch
from doctor.forked import diagnose
from torch import nn


def finding(path, body, code):
    path.write_text(body)
    report, printed = diagnose(path)
    (found,) = [one for one in report.findings if one.code == code] or [printed]
    return found.message


def test_the_error_of_weights_over_unequal_counts(tmp_path):
    """3, 9, 6 and 6 valid targets of 24: a quarter each, where an eighth, three eighths and a quarter are right."""
    body = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for update in range(3):
    for num_valid in (3, 9, 6, 6):
        labels = torch.randint(0, 5, (10,))
        labels[num_valid:] = -100
        (torch.nn.functional.cross_entropy(model(torch.randn(10, 4)), labels) / 4).backward()
    optimizer.step()
    optimizer.zero_grad()
"""
    message = finding(tmp_path / "train.py", body, "GF007")
    counts = torch.tensor([3.0, 9.0, 6.0, 6.0])
    worst = (0.25 / (counts / counts.sum()) - 1).abs().max()
    assert "3, 9, 6, 6" in message and f"up to {worst:.0%} off" in message and worst == 1.0


def test_the_rounding_of_sums_in_bfloat16(tmp_path):
    body = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(32, 16).bfloat16()
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
batches = torch.randn(32, 8, 32).bfloat16()
for x in batches:
    (model(x).square().mean() / 32).backward()
optimizer.step()
optimizer.zero_grad()
"""
    message = finding(tmp_path / "train.py", body, "GF014")
    torch.manual_seed(0)
    model = nn.Linear(32, 16).bfloat16()
    batches = torch.randn(32, 8, 32).bfloat16()
    rounded, exact = None, None
    for x in batches:
        grads = torch.autograd.grad(model(x).square().mean() / 32, list(model.parameters()))
        flat = torch.cat([grad.flatten() for grad in grads])
        rounded = flat if rounded is None else rounded + flat
        exact = flat.double() if exact is None else exact + flat.double()
    ratio = rounded.double().dot(exact) / exact.dot(exact)
    error = float((rounded.double() - ratio * exact).norm() / (ratio * exact.norm()))
    said = float(re.search(r"off by ([\d.e-]+) of", message)[1])
    assert abs(said / error - 1) < 0.05 and error > 1e-3


def test_clipping_of_a_gradient_that_is_too_large(tmp_path):
    """Gradients between 0.9 and 1.1: the sum of 4 has a norm around 4 and is cut at 2, their mean would not be."""
    path = tmp_path / "train.py"
    path.write_text("""
import torch
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([weight], lr=0.1)
for i in range(12):
    (weight * (0.9 + 0.2 * torch.rand(3))).mean().backward()
    if (i + 1) % 4 == 0:
        torch.nn.utils.clip_grad_norm_([weight], 2.0)
        optimizer.step()
        optimizer.zero_grad()
""")
    report, _ = diagnose(path)
    (found,) = report.findings
    assert found.code == "GF002" and "clipped 3 of 3 gradients; divided by 4, it would clip 0" in found.message
