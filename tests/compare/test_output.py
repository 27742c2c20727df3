"""Files that are whole or not there, and standard streams that never raise; the disks that are full are real ones."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from full_disk import largest_file, text_file
from torch import nn

from gradfold.compare.output import lasting_streams, write_whole
from gradfold.compare.results import Tensors, load, save_parameters


@pytest.mark.parametrize("before", [None, b"an older report"])
@pytest.mark.parametrize("size", [65, 100_000])
def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path: Path, before: bytes | None, size: int) -> None:
    path = tmp_path / "report.html"
    if before is not None:
        path.write_bytes(before)
    with largest_file(64), pytest.raises(OSError, match=r"report\.html") as caught:
        write_whole(path, b"x" * size)
    assert caught.value.errno == errno.EFBIG
    assert [one.read_bytes() for one in tmp_path.iterdir()] == ([] if before is None else [before])
    write_whole(path, b"x" * size)
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"x" * size]


def test_an_interrupt_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "report.html", b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", b"\\u2022 \\u017c \\udcff"), ("utf-8", "\u2022 \u017c \\udcff".encode())]
)
def test_what_a_locale_lacks_is_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, printed: bytes
) -> None:
    with text_file(tmp_path / "printed", encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        stream.write("before, ")
        with lasting_streams() as failure:
            print("\u2022 \u017c \udcff")
            assert failure() is None
        assert sys.stdout is stream
    assert (tmp_path / "printed").read_bytes() == b"before, " + printed + b"\n"


def test_a_full_disk_raises_nothing_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with text_file(Path("/dev/full")) as stdout, text_file(Path("/dev/full")) as stderr:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        with lasting_streams() as failure:
            for _ in range(100):
                print("x" * 1000, flush=True)
                print("y" * 1000, file=sys.stderr, flush=True)
            found = failure()
    assert found is not None and found.errno == errno.ENOSPC


def test_a_reader_that_has_gone_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with text_file(writer) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_streams() as failure:
            print("x" * 100_000)
            found = failure()
    assert found is not None and found.errno == errno.EPIPE


def test_streams_that_are_closed_or_no_files_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with lasting_streams() as failure:
        assert sys.stdout is None
        print("said", file=sys.stderr)
        assert failure() is None
    assert sys.stderr.getvalue() == "said\n"  # type: ignore[attr-defined]


def test_tensors_that_cannot_be_saved_leave_no_part(tmp_path: Path) -> None:
    model = nn.Linear(100, 100)
    with largest_file(1000), pytest.raises(OSError, match=r"cannot save final\.pt for the comparison, .* free in"):
        save_parameters(model, tmp_path, Tensors.FINAL)
    assert load(tmp_path, Tensors.FINAL) is None and list(tmp_path.iterdir()) == []


def test_torch_says_nothing_of_full_disks_itself(tmp_path: Path) -> None:
    """Else `save_parameters` would not need to."""
    with largest_file(1000), pytest.raises(RuntimeError):
        torch.save(torch.zeros(10_000), tmp_path / "tensor.pt")
