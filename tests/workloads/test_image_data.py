"""The readers of data files, on small files made here; the download, from a server on this machine."""

import gzip
import hashlib
import io
import os
import shutil
import struct
import tarfile
import threading
import tracemalloc
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from gradfold.errors import DataError
from gradfold.workloads.data_files import Mirror, read_file, unpack
from gradfold.workloads.image_data import CIFAR10, MNIST, load_cifar10, load_digits, load_mnist, read_idx
from gradfold.workloads.text_data import read_paragraphs

REAL_DATA = Path(os.environ.get("GRADFOLD_TEST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


def idx_bytes(array):
    return struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape) + bytes(array.flatten().tolist())


def mnist_parts(num_train=12, num_test=5):
    """The content of the four files, and the arrays in it."""
    generator = torch.Generator().manual_seed(0)
    arrays = {}
    for part, rows in (("train", num_train), ("t10k", num_test)):
        arrays[f"{part}-images-idx3-ubyte"] = torch.randint(0, 256, (rows, 28, 28), generator=generator)
        arrays[f"{part}-labels-idx1-ubyte"] = torch.randint(0, 10, (rows,), generator=generator)
    return arrays


@pytest.fixture
def mnist_folder(tmp_path):
    folder = tmp_path / "mnist-files"
    folder.mkdir()
    for name, array in mnist_parts().items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    return folder


def cifar_records(labels, first_pixel=0):
    """Records whose red, green and blue planes count up from 0, 1 and 2, but for the first pixel of the red one."""
    planes = bytearray(bytes((channel + i) % 256 for channel in range(3) for i in range(1024)))
    planes[0] = first_pixel
    return b"".join(bytes([label]) + bytes(planes) for label in labels)


@pytest.fixture
def cifar_folder(tmp_path):
    folder = tmp_path / "cifar-files" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    (folder / "data_batch_10.bin").write_bytes(cifar_records([3, 4]))
    (folder / "data_batch_2.bin").write_bytes(cifar_records([2]))
    (folder / "data_batch_1.bin").write_bytes(cifar_records([0, 9], first_pixel=255))
    (folder / "test_batch.bin").write_bytes(cifar_records([7, 8, 1]))
    (folder / "batches.meta.txt").write_text("airplane\n")
    return folder


@pytest.mark.parametrize("shape", [(7,), (2, 3), (4, 2, 5)])
@pytest.mark.parametrize("compress", [gzip.compress, bytes], ids=["gzipped", "plain"])
def test_idx_gives_the_array_back(tmp_path, shape, compress):
    array = torch.arange(torch.Size(shape).numel()).mul(7).remainder(256).view(shape)
    path = tmp_path / "any-name"
    path.write_bytes(compress(idx_bytes(array)))
    read = read_idx(path)
    assert read.dtype == torch.uint8
    assert torch.equal(read, array.to(torch.uint8))


GOOD_IDX = idx_bytes(torch.arange(200).view(10, 20))
WRONG_CHECKSUM = bytearray(gzip.compress(GOOD_IDX))
WRONG_CHECKSUM[-8] ^= 0xFF


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(gzip.compress(GOOD_IDX)[:-20], "truncated: expected a whole gzip file", id="truncated gzip"),
        pytest.param(bytes(WRONG_CHECKSUM), "corrupt: expected a gzip file", id="wrong checksum"),
        pytest.param(gzip.compress(GOOD_IDX)[:10] + b"\xff" * 99, "does not decompress: Error", id="corrupt stream"),
        pytest.param(b"\x1f\x8bnothing like gzip", "corrupt: expected a gzip file", id="only the magic of gzip"),
        pytest.param(GOOD_IDX[:-3], "expected 200 bytes after the header, which says 10 x 20, found 197", id="short"),
        pytest.param(GOOD_IDX + b"\0", "expected 200 bytes .* found 201", id="long"),
        pytest.param(GOOD_IDX[:9], "expected a header of 12 bytes, found 9", id="truncated header"),
        pytest.param(b"<html>moved</html>", "begins with the bytes 00 00 08, found 3c 68 74 6d", id="a web page"),
        pytest.param(b"\0\0\x0d\x01" + bytes(8), "found 00 00 0d 01", id="floats"),
        pytest.param(b"", "found an empty file", id="empty"),
        pytest.param(b"\0\0\x08\0x", "expected 1 to 8 dimensions, its header says 0", id="no dimension"),
        pytest.param(b"\0\0\x08\x09" + bytes(36), "1 to 8 dimensions, its header says 9", id="nine dimensions"),
        pytest.param(b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"x", "its header says 255", id="255 dimensions"),
        pytest.param(b"\0\0\x08\2" + b"\xff" * 8 + b"x", "says 4294967295 x 4294967295, found 1", id="absurd sizes"),
        pytest.param(
            gzip.compress(b"\0\0\x08\1" + b"\xff" * 4 + b"x"),
            "expected 4,294,967,295 bytes .* found 1",
            id="absurd gzip",
        ),
        pytest.param(
            idx_bytes(torch.zeros(0, 28, 28)), "at least one element, found the sizes 0 x 28 x 28", id="0 rows"
        ),
    ],
)
def test_idx_refuses_damaged_and_foreign_files(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


ZEROS = gzip.compress(bytes(2**20))  # a kilobyte that holds a megabyte


def peak_bytes(function):
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            function()
        return tracemalloc.get_traced_memory()[1], str(caught.value)
    finally:
        tracemalloc.stop()


def test_idx_reads_no_more_than_its_header_says(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\1\0\0\0\5") + ZEROS * 512)
    peak, message = peak_bytes(lambda: read_idx(path))
    assert "expected 5 bytes after the header, which says 5, found 6 or more" in message and str(path) in message
    assert peak < 2**20


@pytest.mark.parametrize("name", ["wiki.train.tokens.gz", "data_batch_1.bin"])
def test_what_has_no_header_unpacks_to_a_bounded_size(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(ZEROS * 512)
    read = {
        "wiki.train.tokens.gz": lambda: read_paragraphs(tmp_path, [name]),
        "data_batch_1.bin": lambda: load_cifar10(tmp_path),
    }[name]
    peak, message = peak_bytes(read)
    assert f"{path} unpacks to more than 67,108,864 bytes" in message
    assert peak < 2**28  # not the 512 MiB that it holds


def test_gzip_of_several_members_and_of_much_repetition_is_read(tmp_path):
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(b"the same words\n" * 10) + gzip.compress(b"the same words\n" * 999_990))
    assert path.stat().st_size * 300 < 15_000_000
    assert read_paragraphs(tmp_path, ["text.gz"]) == [["the", "same", "words"]] * 1_000_000


@pytest.mark.parametrize("content", [b"a line\nanother\n" * 9, os.urandom(99)], ids=["text", "noise"])
def test_a_flipped_bit_is_a_data_error_or_changes_nothing(tmp_path, content):
    path = tmp_path / "text.gz"
    whole = gzip.compress(content)
    refused = 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert read_file(path, "text", must_be_gzipped=True) == content
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 4 * len(whole)


@pytest.mark.parametrize("read", [read_idx, lambda path: read_file(path, "a text"), unpack])
@pytest.mark.parametrize("name", ["with a \0", "half a character \ud800"])
def test_a_name_that_no_file_can_have_is_a_data_error(tmp_path, read, name):
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert name[:6] in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_named(mnist_folder, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    for load in (load_cifar10, lambda folder: load_mnist(folder.parent)):
        with pytest.raises(DataError, match="it cannot be read: Permission denied"):
            load(mnist_folder)


def test_idx_says_what_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"absent\.gz: expected an IDX file, found none that can be read: No such file"):
        read_idx(tmp_path / "absent.gz")
    with pytest.raises(DataError, match="expected an IDX file, found none that can be read"):
        read_idx(tmp_path)


def assert_is_small_mnist(images):
    arrays = mnist_parts()
    for part, (given, labels) in (("train", images.train), ("t10k", images.test)):
        expected = (arrays[f"{part}-images-idx3-ubyte"][:, None].double() / 255 - 0.1307) / 0.3081
        torch.testing.assert_close(given, expected.float())
        assert torch.equal(labels, arrays[f"{part}-labels-idx1-ubyte"])


def test_mnist_is_read_and_normalized(mnist_folder):
    images = load_mnist(mnist_folder)
    assert_is_small_mnist(images)
    assert images.facts["training samples"] == "12"
    assert images.facts["held-out samples"] == "5"


def test_mnist_may_be_unpacked(mnist_folder):
    for path in list(mnist_folder.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert_is_small_mnist(load_mnist(mnist_folder))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-labels-idx1-ubyte", torch.zeros(11), "expected 12 labels, one for each image .*, found 11"),
        ("t10k-labels-idx1-ubyte", torch.tensor([1, 2, 3, 4, 26]), "expected labels from 0 to 9, found 26"),
        ("t10k-labels-idx1-ubyte", torch.zeros(5, 2), "expected one size N, found 5 x 2"),
        ("train-images-idx3-ubyte", torch.zeros(12, 8, 8), "expected the sizes N x 28 x 28, found 12 x 8 x 8"),
    ],
)
def test_mnist_refuses_files_that_do_not_fit_together(mnist_folder, name, array, message):
    (mnist_folder / f"{name}.gz").write_bytes(idx_bytes(array.int()))
    with pytest.raises(DataError, match=message) as caught:
        load_mnist(mnist_folder)
    assert f"{name}.gz" in str(caught.value)


def test_mnist_names_the_missing_file_and_what_is_there(mnist_folder, tmp_path):
    (mnist_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz or t10k-labels-idx1-ubyte, found t10k-images"):
        load_mnist(mnist_folder)
    with pytest.raises(DataError, match="expected a folder with data files, found nothing"):
        load_mnist(tmp_path / "absent")
    with pytest.raises(DataError, match="expected a folder with data files, found a file"):
        load_mnist(mnist_folder / "t10k-images-idx3-ubyte.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found an empty folder"):
        load_mnist(tmp_path / "empty")


def test_cifar_takes_the_batches_in_the_order_of_their_numbers(cifar_folder):
    images = load_cifar10(cifar_folder)
    assert images.train[1].tolist() == [0, 9, 2, 3, 4]
    assert images.test[1].tolist() == [7, 8, 1]
    assert images.train[0].shape == (5, 3, 32, 32)
    from_above = load_cifar10(cifar_folder.parent)
    assert torch.equal(from_above.train[0], images.train[0])


def test_cifar_planes_are_red_green_blue_row_by_row(cifar_folder):
    images = load_cifar10(cifar_folder)
    mean, std = torch.tensor((0.4914, 0.4822, 0.4465)), torch.tensor((0.2470, 0.2435, 0.2616))
    pixels = (images.train[0] * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255
    assert pixels[:, 0, 0, 0].round().tolist() == [255, 255, 0, 0, 0]
    assert pixels[0, :, 2, 5].round().tolist() == [69, 70, 71]  # row 2, column 5: the plane's element 69


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2.bin", cifar_records([1, 2])[:-1], "6,145 bytes, which is 1 records and 3,072 bytes"),
        ("test_batch.bin", b"", "found 0 bytes"),
        ("test_batch.bin", cifar_records([1, 77]), "expected labels from 0 to 9, found 77"),
        ("test_batch.bin", None, "expected a CIFAR-10 file, found none that can be read: No such file"),
    ],
)
def test_cifar_refuses_damaged_and_foreign_files(cifar_folder, name, content, message):
    if content is None:
        (cifar_folder / name).unlink()
    else:
        (cifar_folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_cifar10(cifar_folder)
    assert str(cifar_folder / name) in str(caught.value)


def test_cifar_without_training_batches_says_what_is_there(cifar_folder):
    for path in cifar_folder.glob("data_batch_*"):
        path.unlink()
    with pytest.raises(DataError, match=r"data_batch_1.bin, .*, found batches.meta.txt, test_batch.bin"):
        load_cifar10(cifar_folder)


def test_digits_are_split_by_class_and_normalized():
    images = load_digits()
    num_train, num_test = len(images.train[1]), len(images.test[1])
    assert (num_train, num_test) == (1433, 364)
    assert images.train[0].shape == (num_train, 1, 8, 8)
    train, test = images.train[1].bincount(), images.test[1].bincount()
    assert torch.equal(test, (train + test + 4) // 5)
    every = torch.cat([images.train[0], images.test[0]])
    assert every.mean().item() == pytest.approx(0, abs=1e-3)
    assert every.std().item() == pytest.approx(1, abs=1e-3)
    assert torch.equal(load_digits().test[0], images.test[0])


class Published:
    """A folder that a server publishes on this machine, with the paths that were asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.requests = requests = []

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *arguments):
                requests.append(self.path)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"

    def mirror(self, name):
        sha256 = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.folder.iterdir()}
        return Mirror(name=name, url=self.url, sha256=sha256)


@pytest.fixture
def publish(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(folder):
        published = Published(folder)
        thread = threading.Thread(target=published.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((published.server, thread))
        return published

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def test_mnist_is_downloaded_once(mnist_folder, publish, tmp_path):
    published = publish(mnist_folder)
    mirror = published.mirror("mnist")
    assert_is_small_mnist(load_mnist(None, mirror, cache=tmp_path / "cache"))
    assert len(published.requests) == 4
    assert_is_small_mnist(load_mnist(None, mirror, cache=tmp_path / "cache"))
    assert len(published.requests) == 4


def test_a_damaged_file_in_the_cache_is_downloaded_again(mnist_folder, publish, tmp_path):
    published = publish(mnist_folder)
    mirror = published.mirror("mnist")
    folder = mirror.fetch(tmp_path / "cache")
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    assert_is_small_mnist(load_mnist(None, mirror, cache=tmp_path / "cache"))
    assert published.requests[4:] == ["/train-images-idx3-ubyte.gz"]


def test_a_download_with_another_hash_is_refused_and_not_kept(mnist_folder, publish, tmp_path):
    published = publish(mnist_folder)
    mirror = published.mirror("mnist")
    (mnist_folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(torch.zeros(12, 28, 28).int())))
    with pytest.raises(DataError, match=r"hash of downloaded file(.|\n)*--data DIR") as caught:
        load_mnist(None, mirror, cache=tmp_path / "cache")
    assert f"{published.url}train-images-idx3-ubyte.gz" in str(caught.value)
    assert not (tmp_path / "cache" / "mnist" / "train-images-idx3-ubyte.gz").exists()


def test_a_file_that_the_server_does_not_have_says_what_to_do(mnist_folder, publish, tmp_path):
    published = publish(mnist_folder)
    mirror = published.mirror("mnist")
    (mnist_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz: 404(.|\n)*--data DIR"):
        load_mnist(None, mirror, cache=tmp_path / "cache")


def test_without_a_connection_the_error_says_what_to_do(mnist_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    published = Published(mnist_folder)
    mirror = published.mirror("mnist")
    published.server.server_close()
    with pytest.raises(DataError, match=r"cannot download http://127.0.0.1:(.|\n)*train-labels(.|\n)*--data DIR"):
        load_mnist(None, mirror, cache=tmp_path / "cache")


@pytest.fixture
def cifar_archive_folder(cifar_folder, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.add(cifar_folder, arcname=cifar_folder.name)
    (folder / "cifar-10-binary.tar.gz").write_bytes(content.getvalue())
    return folder


def test_cifar_is_downloaded_and_unpacked_once(cifar_archive_folder, publish, tmp_path):
    published = publish(cifar_archive_folder)
    mirror = published.mirror("cifar10")
    for _ in range(2):
        images = load_cifar10(None, mirror, cache=tmp_path / "cache")
        assert images.train[1].tolist() == [0, 9, 2, 3, 4]
    assert published.requests == ["/cifar-10-binary.tar.gz"]
    assert sorted(path.name for path in (tmp_path / "cache" / "cifar10").iterdir()) == [
        "cifar-10-binary.tar.gz",
        "cifar-10-binary.tar.gz.untar",
    ]


def test_an_interrupted_unpacking_leaves_nothing_behind(cifar_archive_folder, monkeypatch):
    archive = cifar_archive_folder / "cifar-10-binary.tar.gz"

    def interrupted(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unpack(archive)
    assert [path.name for path in cifar_archive_folder.iterdir()] == [archive.name]
    assert load_cifar10(unpack(archive)).test[1].tolist() == [7, 8, 1]


def test_a_folder_that_another_process_unpacked_meanwhile_is_taken(cifar_archive_folder, cifar_folder, monkeypatch):
    archive = cifar_archive_folder / "cifar-10-binary.tar.gz"

    def too_late(self, target):
        shutil.copytree(cifar_folder, target / cifar_folder.name)
        raise OSError("Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", too_late)
        folder = unpack(archive)
    archive.unlink()
    assert load_cifar10(unpack(archive)).test[1].tolist() == [7, 8, 1]
    assert list(cifar_archive_folder.iterdir()) == [folder]


def archived(path, *members):
    """A tar.gz archive of members (name, content, fields of TarInfo)."""
    with tarfile.open(path, mode="w:gz") as archive:
        for name, content, fields in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "members",
    [
        [("{outside}/escaped", b"abc", {})],
        [("link", b"", {"type": tarfile.SYMTYPE, "linkname": "{outside}"}), ("link/escaped", b"abc", {})],
        [("link", b"", {"type": tarfile.SYMTYPE, "linkname": "../.."}), ("link/escaped", b"abc", {})],
        [("link", b"", {"type": tarfile.LNKTYPE, "linkname": "{outside}/secret"})],
        [("a", b"abc", {}), ("link", b"", {"type": tarfile.LNKTYPE, "linkname": "a"})],
        [("../../escaped", b"abc", {})],
        [("a/../../../escaped", b"abc", {})],
        [("device", b"", {"type": tarfile.CHRTYPE})],
        [("pipe", b"", {"type": tarfile.FIFOTYPE})],
        [("twice", b"abc", {}), ("twice/below", b"abc", {})],
    ],
)
def test_an_archive_writes_files_into_its_own_folder_or_nothing(tmp_path, members):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret").write_text("secret")
    shown = [
        (
            name.format(outside=outside),
            content,
            {k: v.format(outside=outside) if k == "linkname" else v for k, v in f.items()},
        )
        for name, content, f in members
    ]
    archive = archived(inside / "a.tar.gz", *shown)
    with pytest.raises(DataError) as caught:
        unpack(archive)
    assert str(archive) in str(caught.value)
    assert list(inside.iterdir()) == [archive] and [path.name for path in outside.iterdir()] == ["secret"]
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "inside"}


def test_an_archive_unpacks_to_a_bounded_size(tmp_path):
    archive = archived(tmp_path / "a.tar.gz", ("zeros", bytes(2**27), {}))
    assert archive.stat().st_size < 2**18
    with pytest.raises(DataError, match="unpacks to more than 67,108,864 bytes"):
        unpack(archive)
    assert list(tmp_path.iterdir()) == [archive]


def test_a_damaged_archive_is_a_data_error_and_leaves_nothing(tmp_path):
    texts = b"content " * 40, bytes(range(40))
    whole = archived(tmp_path / "a.tar.gz", ("folder/a", texts[0], {}), ("b", texts[1], {})).read_bytes()
    damaged = [b"", b"<html>moved</html>", whole[:9], whole[: len(whole) // 2], whole[:-4], whole[10:]]
    name_ends = whole.index(b"\0", 10) + 1  # a name that gzip ignores
    for bit in range(8 * name_ends, 8 * len(whole), 7):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    archive, expected, num_kept = tmp_path / "a.tar.gz", b"".join(texts), 0
    for content in damaged:
        archive.write_bytes(content)
        try:
            folder = unpack(archive)
        except DataError as error:
            assert str(archive) in str(error)
        else:  # a bit that gzip does not use
            assert (folder / "folder" / "a").read_bytes() + (folder / "b").read_bytes() == expected
            shutil.rmtree(folder)
            num_kept += 1
        assert list(tmp_path.iterdir()) == [archive]
    assert num_kept <= 1


def test_the_published_data_sets_are_named_by_https_and_whole_hashes():
    for mirror in (MNIST, CIFAR10):
        assert mirror.url.startswith("https://") and mirror.url.endswith("/")
        assert all(len(bytes.fromhex(sha256)) == 32 for sha256 in mirror.sha256.values())
    assert len(MNIST.sha256) == 4


@pytest.mark.skipif(
    not (REAL_DATA / "mnist").is_dir(), reason="no folder mnist/ in GRADFOLD_TEST_DATA or ../shared/data"
)
def test_the_real_mnist():
    images = load_mnist(REAL_DATA / "mnist")
    assert images.train[0].shape == (60_000, 1, 28, 28)
    assert images.test[0].shape == (10_000, 1, 28, 28)
    pixels = images.train[0] * 0.3081 + 0.1307
    assert pixels.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std().item() == pytest.approx(0.3081, abs=1e-4)
    assert images.train[1][:5].tolist() == [5, 0, 4, 1, 9]


@pytest.mark.skipif(
    not (REAL_DATA / "cifar10").is_dir(), reason="no folder cifar10/ in GRADFOLD_TEST_DATA or ../shared/data"
)
def test_the_real_cifar10():
    images = load_cifar10(REAL_DATA / "cifar10")
    assert len(images.train[0]) % 1000 == 0 and len(images.test[0]) % 1000 == 0
    assert images.train[0].mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (images.train[0].std(dim=(0, 2, 3)) - 1).abs().max() < 0.05
    assert set(images.train[1].tolist()) == set(range(10))
