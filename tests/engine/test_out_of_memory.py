"""The out-of-memory error: what counts as one, what only looks like it, and what is given back."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch

from gradfold.engine.recovery import release_memory
from gradfold.errors import is_out_of_memory

CPU = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        MemoryError("Unable to allocate 7.28 TiB for an array"),
        RuntimeError(f"{CPU}8000000000000 bytes. Error code 12 (Cannot allocate memory)"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8000000000000 bytes."),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_ran_out_is_recognized(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Storage size calculation overflowed with sizes=[9223372036854775807]"),
        RuntimeError("out of memory"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError(f"{CPU}8 bytes"),
        OSError(12, "Cannot allocate memory"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:30],
)
def test_what_only_looks_like_it_is_not(error):
    assert not is_out_of_memory(error)


def test_a_size_that_overflows_is_no_lack_of_memory():
    """Fewer rows would overflow, too: it is a wrong shape."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, 2**62)
    assert not is_out_of_memory(caught.value)


ALLOCATE = """
import resource, torch
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
from gradfold.errors import is_out_of_memory
for allocate in (lambda: torch.empty(2**34), lambda: bytearray(2**35)):
    try:
        allocate()
    except Exception as error:
        print(type(error).__name__, is_out_of_memory(error))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="address space limits")
def test_the_real_allocators_under_a_limit_of_the_address_space():
    result = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["RuntimeError", "True", "MemoryError", "True"], result.stderr


class Knot:
    """An object that refers to itself, as the tensors of a failed frame may."""

    def __init__(self):
        self.itself = self


def test_giving_back_frees_what_only_refers_to_itself():
    gc.disable()
    try:
        knot = weakref.ref(Knot())
        assert knot() is not None
        release_memory(torch.device("cpu"))
        assert knot() is None
    finally:
        gc.enable()


def test_a_device_without_memory_has_nothing_to_give_back():
    release_memory(torch.device("meta"))
