"""The digits: found, checked, downloaded, split; and never used where damaged.

Small fake files stand in for MNIST, with their own sizes and hashes; a server on 127.0.0.1 stands in for the mirrors.
"""

import gzip
import hashlib
import http.server
import os
import re
import stat
import struct
import threading
from pathlib import Path

import pytest
import torch

from pgdfast_experiments import mnist_data
from pgdfast_experiments.errors import UsageError

DIGITS, REAL = os.environ.get("PGDFAST_DATA"), mnist_data.SPLITS
FOUR = [file.name for files in mnist_data.SPLITS.values() for file in files]
TRAIN, TEST = 12, 7   # images in the fake splits


def idx(values):
    """An IDX file of unsigned bytes, written by the format's own description."""
    header = bytes([0, 0, 8, values.dim()]) + b"".join(struct.pack(">I", n) for n in values.shape)
    return header + bytes(values.flatten().tolist())


def split(count, first):
    """Images whose corners name them: pixel (0, 0) is the image's number, pixel (0, 27) is 255."""
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    images[:, 0, 0] = torch.arange(first, first + count)
    images[:, 0, 27] = 255
    return images, torch.arange(count, dtype=torch.uint8) % 10


CONTENTS = dict(zip(FOUR, map(idx, (*split(TRAIN, 1), *split(TEST, 101))), strict=True))


@pytest.fixture(autouse=True)
def fakes(monkeypatch, tmp_path):
    """Fake files for MNIST's, a cache of the test's own, and mirrors where nobody listens."""
    fake = {
        name: mnist_data._File(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in CONTENTS.items()
    }
    monkeypatch.setattr(mnist_data, "SPLITS", {"train": tuple(fake[n] for n in FOUR[:2]),
                                               "test": tuple(fake[n] for n in FOUR[2:])})
    monkeypatch.setattr(mnist_data, "MIRRORS", ("http://127.0.0.1:9/",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("PGDFAST_DATA", raising=False)


def folder_with(path, names=FOUR, packed=True):
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        if packed:
            (path / f"{name}.gz").write_bytes(gzip.compress(CONTENTS[name], 1))
        else:
            (path / name).write_bytes(CONTENTS[name])
    return path


def cache(tmp_path):
    return tmp_path / "xdg" / "pgdfast" / "mnist"


class Mirror:
    """A server on 127.0.0.1: `files` maps a name to (status, body, promised length or None)."""

    def __init__(self):
        self.files, self.asked = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                status, body, length = outer.files.get(self.path.rsplit("/", 1)[-1], (404, b"none", None))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def url(self, path=""):
        return f"http://127.0.0.1:{self.server.server_address[1]}/{path}"

    def holds(self, names=FOUR):
        for name in names:
            self.files[f"{name}.gz"] = (200, gzip.compress(CONTENTS[name]), None)
        return self

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def mirror():
    mirror = Mirror()
    yield mirror
    mirror.close()


# --- a folder of the user's -----------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
def test_a_folder_is_read_in_order(tmp_path, packed):
    folder = folder_with(tmp_path / "digits", packed=packed)
    for name, count, first in (("train", TRAIN, 1), ("test", TEST, 101)):
        images, labels = mnist_data.load(folder, name)
        expected, digits = split(count, first)
        assert images.dtype == torch.uint8 and torch.equal(images, expected)
        assert labels.dtype == torch.int64 and torch.equal(labels, digits.long())


def test_the_argument_comes_before_the_environment_and_that_before_the_cache(tmp_path, monkeypatch):
    folder = folder_with(tmp_path / "argument")
    monkeypatch.setenv("PGDFAST_DATA", str(tmp_path / "nowhere"))
    assert len(mnist_data.load(folder)[0]) == TRAIN
    with pytest.raises(UsageError, match=r"PGDFAST_DATA: got '.*nowhere', which is not a folder; needed: a folder with"):
        mnist_data.load()
    monkeypatch.setenv("PGDFAST_DATA", str(folder))
    folder_with(cache(tmp_path), FOUR[2:])
    assert len(mnist_data.load()[0]) == TRAIN
    monkeypatch.setenv("PGDFAST_DATA", "")
    assert len(mnist_data.load(split="test")[0]) == TEST   # the cache, without a mirror


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    folder_with(tmp_path / "digits")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(mnist_data.load("~/digits")[0]) == TRAIN


def test_what_a_folder_lacks_is_named(tmp_path):
    folder = folder_with(tmp_path / "digits", [FOUR[0]])
    with pytest.raises(UsageError, match=rf"--data: got '.*digits', which lacks {FOUR[1]}; needed: .*{', '.join(FOUR)}, plain"):
        mnist_data.load(folder)


DAMAGE = {
    "cut gzip": (".gz", lambda c: gzip.compress(c)[:-20], "cut short or damaged"),
    "flipped bit in gzip": (".gz", lambda c: _flipped(gzip.compress(c)), "(damaged|another file)"),
    "other contents": (".gz", lambda c: gzip.compress(_flipped(c)), "damaged .its contents have SHA-256"),
    "cut": ("", lambda c: c[:-1], "cut short or another file"),
    "longer": ("", lambda c: c + b"0", "bytes, not"),
    "a bomb": (".gz", lambda c: gzip.compress(bytes(10**7)), "more than"),
    "empty": ("", lambda c: b"", "0 bytes, not"),
    "a page": (".gz", lambda c: b"<html>not found</html>", "cut short or another file"),
}


def _flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", [FOUR[0], FOUR[3]])
def test_a_damaged_file_is_named_never_used_and_left_alone(tmp_path, kind, name):
    suffix, change, message = DAMAGE[kind]
    folder = folder_with(tmp_path / "digits", [n for n in FOUR if n != name])
    damaged = folder / f"{name}{suffix}"
    damaged.write_bytes(change(CONTENTS[name]))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=rf"--data: '.*{name}{suffix}' is not the original: .*{message}.*needed: an undamaged"):
        mnist_data.train_and_test(folder, 2, 0)   # nor does the test split stand in for it
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_good_copy_beside_a_damaged_one_serves(tmp_path):
    folder = folder_with(tmp_path / "digits")
    (folder / FOUR[0]).write_bytes(b"half")
    assert len(mnist_data.load(folder)[0]) == TRAIN


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = folder_with(tmp_path / "digits")
    (folder / f"{FOUR[0]}.gz").chmod(0)
    with pytest.raises(UsageError, match=f"{FOUR[0]}.gz' cannot be read"):
        mnist_data.load(folder)


def test_a_folder_is_never_written_to(tmp_path):
    folder = folder_with(tmp_path / "digits")
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    before = folder.stat().st_mtime_ns
    mnist_data.train_and_test(folder, 2, 0)
    assert folder.stat().st_mtime_ns == before and len(list(folder.iterdir())) == 4
    assert not cache(tmp_path).exists()
    folder.chmod(stat.S_IRWXU)


def test_another_split():
    with pytest.raises(ValueError, match="unknown split 'validation'; use 'train' or 'test'"):
        mnist_data.load(split="validation")


# --- training and test images ---------------------------------------------------------------------


def numbers(pixels):
    """The numbers that `split` wrote into the images' corners."""
    return (255 * pixels[:, 0]).round().long()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_labels_and_the_draw(tmp_path, dtype):
    folder = folder_with(tmp_path / "digits")
    data = mnist_data.train_and_test(folder, 5, 3, dtype=dtype)
    assert data.train_images.shape == (5, 784) and data.test_images.shape == (TEST, 784)
    assert data.train_images.dtype == data.test_images.dtype == dtype
    assert float(data.train_images.min()) == 0 and bool((data.train_images[:, 27] == 1).all())
    drawn = numbers(data.train_images)
    assert len(set(drawn.tolist())) == 5 and set(drawn.tolist()) <= set(range(1, TRAIN + 1))
    assert torch.equal(data.train_labels, (drawn - 1) % 10) and data.train_labels.dtype == torch.int64
    assert torch.equal(numbers(data.test_images), torch.arange(101, 101 + TEST))
    assert torch.equal(data.test_labels, torch.arange(TEST) % 10)
    assert data.source == ("5 images of the MNIST training split (drawn with seed 3) train, "
                           f"the {TEST} of its test split test.")
    again, other = mnist_data.train_and_test(folder, 5, 3), mnist_data.train_and_test(folder, 5, 4)
    assert torch.equal(numbers(again.train_images), drawn)
    assert not torch.equal(numbers(other.train_images), drawn)


def test_the_whole_training_split(tmp_path):
    data = mnist_data.train_and_test(folder_with(tmp_path / "digits"), TRAIN, 0)
    assert sorted(numbers(data.train_images).tolist()) == list(range(1, TRAIN + 1))


@pytest.mark.parametrize("names", [FOUR[2:], FOUR[1:]], ids=["no training files", "training labels alone"])
def test_the_test_split_stands_in_for_training_and_the_source_says_so(tmp_path, names):
    data = mnist_data.train_and_test(folder_with(tmp_path / "digits", names), 3, 0)
    train, test = numbers(data.train_images).tolist(), numbers(data.test_images).tolist()
    assert len(train) == 3 and test == sorted(test)
    assert sorted(train + test) == list(range(101, 101 + TEST))   # no image in both
    assert data.train_labels.tolist() == [(n - 101) % 10 for n in train]
    assert data.test_labels.tolist() == [(n - 101) % 10 for n in test]
    assert "training split could not be had: 3 images of the test split" in data.source
    assert f"its other {TEST - 3} test" in data.source


def test_a_stand_in_needs_the_test_split(tmp_path):
    with pytest.raises(UsageError, match="lacks train-labels-idx1-ubyte; needed"):
        mnist_data.train_and_test(folder_with(tmp_path / "digits", FOUR[:1]), 3, 0)


@pytest.mark.parametrize(
    ("names", "size", "most"), [(FOUR, 0, TRAIN), (FOUR, TRAIN + 1, TRAIN), (FOUR[2:], TEST, TEST - 1)]
)
def test_more_images_than_there_are(tmp_path, names, size, most):
    with pytest.raises(UsageError, match=f"training images: got {size}; needed: 1 to {most}, of"):
        mnist_data.train_and_test(folder_with(tmp_path / "digits", names), size, 0)


# --- the download ---------------------------------------------------------------------------------


def test_a_download_fills_the_cache_once(tmp_path, monkeypatch, mirror, capsys):
    monkeypatch.setattr(mnist_data, "MIRRORS", (mirror.holds().url("mnist/"),))
    data = mnist_data.train_and_test(None, 5, 0)
    assert "training split (drawn" in data.source
    assert mirror.asked == [f"/mnist/{name}.gz" for name in FOUR]
    assert sorted(path.name for path in cache(tmp_path).iterdir()) == sorted(f"{name}.gz" for name in FOUR)
    assert len(mnist_data.load(split="train")[0]) == TRAIN and len(mirror.asked) == 4
    shown = capsys.readouterr()
    assert shown.out == ""


def test_the_bar_is_on_stderr_and_can_be_left_out(monkeypatch, mirror, capsys):
    monkeypatch.setattr(mnist_data, "MIRRORS", (mirror.holds().url(),))
    monkeypatch.setenv("FORCE_COLOR", "1")   # rich then takes the captured stream for a terminal
    mnist_data.load(split="train", progress=False)
    assert capsys.readouterr() == ("", "")
    mnist_data.load(split="test")
    out, err = capsys.readouterr()
    assert out == "" and "download t10k-images" in err


BAD_ANSWERS = {
    "404": ((404, b"none", None), "HTTP Error 404"),
    "truncated": ((200, gzip.compress(CONTENTS[FOUR[2]])[:-30], len(gzip.compress(CONTENTS[FOUR[2]]))), "the connection ended"),
    "wrong contents": ((200, gzip.compress(_flipped(CONTENTS[FOUR[2]])), None), "damaged .its contents"),
    "a web page": ((200, b"<html>sign in</html>", None), "cut short or another file"),
    "endless": ((200, bytes(10**6), None), "more than"),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_a_bad_answer_is_refused_and_the_next_mirror_asked(tmp_path, monkeypatch, mirror, kind):
    answer, message = BAD_ANSWERS[kind]
    mirror.files[f"{FOUR[2]}.gz"] = answer
    monkeypatch.setattr(mnist_data, "MIRRORS", (mirror.url(),))
    with pytest.raises(UsageError, match=rf"no usable {FOUR[2]} .*{message}.*needed: --data DIR or PGDFAST_DATA=DIR, "):
        mnist_data.load(split="test")
    assert list(cache(tmp_path).iterdir()) == []   # not even half a file

    good = Mirror().holds()
    try:
        monkeypatch.setattr(mnist_data, "MIRRORS", (mirror.url(), good.url()))
        assert len(mnist_data.load(split="test")[0]) == TEST
        assert len(good.asked) == 2
    finally:
        good.close()


def test_a_damaged_file_in_the_cache_is_replaced(tmp_path, monkeypatch, mirror):
    folder_with(cache(tmp_path))
    (cache(tmp_path) / f"{FOUR[2]}.gz").write_bytes(b"half")
    with pytest.raises(UsageError, match=f"{FOUR[2]}.gz' is not the original.*gave no file"):
        mnist_data.load(split="test")   # nobody listens
    monkeypatch.setattr(mnist_data, "MIRRORS", (mirror.holds().url(),))
    assert len(mnist_data.load(split="test")[0]) == TEST and mirror.asked == [f"/{FOUR[2]}.gz"]
    assert len(mnist_data.load(split="test")[0]) == TEST and len(mirror.asked) == 1


def test_a_silent_mirror_times_out(monkeypatch, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:   # accepts, never answers
        monkeypatch.setattr(mnist_data, "MIRRORS", (f"http://127.0.0.1:{listener.getsockname()[1]}/",))
        monkeypatch.setattr(mnist_data, "_TIMEOUT", 0.2)
        with pytest.raises(UsageError, match="gave no file .*timed out"):
            mnist_data.load(split="test")
    assert list(cache(tmp_path).iterdir()) == []


def test_no_network_and_no_folder_is_one_sentence(tmp_path):
    with pytest.raises(UsageError) as caught:
        mnist_data.train_and_test(None, 3, 0)
    message = str(caught.value)
    assert "http://127.0.0.1:9/train-images-idx3-ubyte.gz gave no file" in message
    assert "--data DIR or PGDFAST_DATA=DIR" in message and all(name in message for name in FOUR)
    assert "\n" not in message and not re.search(r"\. [A-Z]", message)


def test_without_a_network_a_cached_test_split_stands_in(tmp_path):
    folder_with(cache(tmp_path), FOUR[2:])
    data = mnist_data.train_and_test(None, 3, 0)
    assert len(data.test_images) == TEST - 3 and "could not be had" in data.source


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(mnist_data, "_fetch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mnist_data.load()
    assert list(cache(tmp_path).iterdir()) == []


def test_a_full_disk_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch, mirror):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mnist_data, "MIRRORS", (mirror.holds().url(),))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match="cannot be written to .No space left.*XDG_CACHE_HOME, or --data DIR"):
        mnist_data.load()
    assert list(cache(tmp_path).iterdir()) == [] and len(mirror.asked) == 1


def test_a_cache_that_cannot_be_made_is_said_before_anything_is_downloaded(tmp_path, monkeypatch, mirror):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(mnist_data, "MIRRORS", (mirror.holds().url(),))
    with pytest.raises(UsageError, match="cannot be written to"):
        mnist_data.load()
    assert mirror.asked == []


def test_the_cache_follows_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_with(tmp_path / ".cache" / "pgdfast" / "mnist")
    for value in ("", "relative/is/ignored"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert len(mnist_data.load()[0]) == TRAIN


# --- the digits themselves ------------------------------------------------------------------------


@pytest.fixture
def real(fakes, monkeypatch):
    """The folder that PGDFAST_DATA named when the tests began, and MNIST's own hashes."""
    if not DIGITS:
        pytest.skip("PGDFAST_DATA names no folder with the MNIST files")
    monkeypatch.setattr(mnist_data, "SPLITS", REAL)
    return DIGITS


def test_the_real_test_split(real):
    images, labels = mnist_data.load(real, "test")
    assert images.shape == (10000, 28, 28) and images.dtype == torch.uint8
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert float(images.double().mean() / 255) == pytest.approx(0.1325, abs=1e-4)


def test_real_digits_to_train_and_test_on(real):
    data = mnist_data.train_and_test(real, 1000, 0)
    assert data.train_images.shape == (1000, 784) and len(data.test_images) == len(data.test_labels)
    assert len(data.test_images) == (9000 if "could not be had" in data.source else 10000)
    assert float(data.train_images.min()) == 0 and float(data.train_images.max()) == 1
    assert data.train_labels.bincount(minlength=10).min() > 50
