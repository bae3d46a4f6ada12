"""The MNIST digits: read from a folder that the user names, or downloaded once into a cache.

Four files hold them, plain or gzip-compressed. Each is checked by the SHA-256 of its uncompressed
contents before it is used, so that a damaged or partial file never reaches an experiment.

Source: LeCun, Cortes and Burges, The MNIST database of handwritten digits (1998).
"""

import contextlib
import gzip
import hashlib
import http.client
import importlib.util
import io
import os
import tempfile
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pgdfast_experiments.errors import UsageError

VARIABLE = "PGDFAST_DATA"
"""Environment variable that names the folder where `--data` does not."""

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_TIMEOUT = 20.0   # seconds without an answer or without data


@dataclass(frozen=True)
class _File:
    """One of the four files: its name without .gz, and the size and SHA-256 of its contents."""

    name: str
    size: int
    sha256: str


_IMAGES, _LABELS = 0, 1
SPLITS = {
    "train": (
        _File("train-images-idx3-ubyte", 47040016,
              "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        _File("train-labels-idx1-ubyte", 60008,
              "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    ),
    "test": (
        _File("t10k-images-idx3-ubyte", 7840016,
              "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        _File("t10k-labels-idx1-ubyte", 10008,
              "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    ),
}


class MissingSplit(UsageError):
    """A split is neither in the folder nor to be downloaded."""


@dataclass(frozen=True)
class Data:
    """Digits to train and to test on.

    Attributes:
        train_images: pixels in [0, 1], shape (N, 784).
        train_labels: digits 0 to 9, shape (N,), int64.
        test_images: as train_images, shape (T, 784).
        test_labels: as train_labels, shape (T,).
        source: a sentence that says which split each came from; print and record it.

    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    source: str


def train_and_test(folder=None, train_size=1000, seed=0, dtype=torch.float32, progress=True):
    """Return `train_size` training images drawn at random, and the test images.

    Where the training split cannot be had but the test split is in the folder, the training images
    are drawn from the test split and the others are tested on; `source` then says so.

    Args:
        folder: as for `load`.
        train_size: N, at least 1.
        seed: of the draw; the same seed draws the same images on every machine.
        dtype: of the pixels.
        progress: show a bar on stderr while downloading.

    Raises:
        UsageError: as `load`; and for a `train_size` larger than the split has.

    """
    where = _Place.of(folder)
    try:
        images, labels = _tensors(where.contents("train", progress))
    except MissingSplit as missing:
        try:
            images, labels = _tensors(where.contents("test", progress, download=False))
        except MissingSplit:
            raise missing from None
        train, test = _draw(len(images), train_size, len(images) - 1, "test", seed)
        source = (
            f"The MNIST training split could not be had: {len(train):,} images of the test split (drawn with seed "
            f"{seed}) train, its other {len(test):,} test."
        )
        return Data(_pixels(images[train], dtype), labels[train],
                    _pixels(images[test], dtype), labels[test], source)
    train, _ = _draw(len(images), train_size, len(images), "training", seed)
    test_images, test_labels = _tensors(where.contents("test", progress))
    source = (
        f"{len(train):,} images of the MNIST training split (drawn with seed {seed}) train, "
        f"the {len(test_images):,} of its test split test."
    )
    return Data(_pixels(images[train], dtype), labels[train],
                _pixels(test_images, dtype), test_labels, source)


def load(folder=None, split="train", progress=True):
    """Return a split of MNIST in its original order.

    Args:
        folder: a folder with the original files, plain or .gz, which is only read. None: the one
            that the environment variable PGDFAST_DATA names; without that a cache folder
            ($XDG_CACHE_HOME or ~/.cache, pgdfast/mnist), which is filled by download.
        split: "train" (60,000 images) or "test" (10,000).
        progress: show a bar on stderr while downloading.

    Returns:
        (images, labels): uint8 of shape (n, 28, 28), 0 for paper and 255 for ink; int64 of (n,).

    Raises:
        UsageError: the folder is none, lacks a file, or has a damaged one (named; never used); or
            nothing is in the cache and no mirror answers.
        ValueError: another split.

    """
    if split not in SPLITS:
        raise ValueError(f"pgdfast_experiments.mnist_data.load: unknown split {split!r}; use 'train' or 'test'.")
    return _tensors(_Place.of(folder).contents(split, progress))


@dataclass(frozen=True)
class _Place:
    """A folder, and what named it: "--data", "PGDFAST_DATA" or None, which means the cache."""

    folder: Path
    named_by: str | None

    @classmethod
    def of(cls, folder):
        if folder is not None:
            place = cls(Path(os.path.expanduser(folder)), "--data")
        elif os.environ.get(VARIABLE):
            place = cls(Path(os.path.expanduser(os.environ[VARIABLE])), VARIABLE)
        else:
            base = os.environ.get("XDG_CACHE_HOME", "")
            base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
            return cls(Path(base, "pgdfast", "mnist"), None)
        if not os.path.isdir(place.folder):
            raise UsageError(
                f"{place.named_by}: got {str(place.folder)!r}, which is not a folder; needed: {_needed()}"
            )
        return place

    def contents(self, split, progress, download=True):
        """Return the uncompressed, checked bytes of the split's two files."""
        found, missing = [], []
        for file in SPLITS[split]:
            content, damage = _read(self.folder, file)
            if content is None and self.named_by is not None and damage:
                raise UsageError(f"{self.named_by}: {damage}; needed: an undamaged copy of this file")
            if content is None and self.named_by is None and download:
                content = _download(file, self.folder, damage, progress)
            found.append(content)
            missing += [file.name] if content is None else []
        if missing:
            raise MissingSplit(
                f"{self.named_by or 'cache'}: got {str(self.folder)!r}, which lacks {' and '.join(missing)}; "
                f"needed: {_needed()}"
            )
        return found


def _needed():
    names = [file.name for files in SPLITS.values() for file in files]
    return f"a folder with the four files {', '.join(names)}, plain or .gz"


def _read(folder, file):
    """Return (contents, None), (None, what is wrong with the copies there are) or (None, None)."""
    damage = None
    for path in (folder / file.name, folder / f"{file.name}.gz"):
        if not os.path.isfile(path):
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            damage = f"{str(path)!r} cannot be read ({error.strerror})"
            continue
        content, wrong = _checked(content, file)
        if wrong is None:
            return content, None
        damage = f"{str(path)!r} is not the original: {wrong}"
    return None, damage


def _checked(content, file):
    """Return (uncompressed contents, None), or (None, what is wrong with them)."""
    if content[:2] == b"\x1f\x8b":   # gzip, whatever the name says
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
                content = packed.read(file.size + 1)   # no more: a file may unpack to anything
        except (OSError, EOFError, zlib.error) as error:
            return None, f"cut short or damaged ({error})"
    if len(content) != file.size:
        size = f"{len(content):,}" if len(content) < file.size else f"more than {file.size:,}"
        return None, f"cut short or another file ({size} bytes, not {file.size:,})"
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        return None, f"damaged (its contents have SHA-256 {found[:12]}..., not {file.sha256[:12]}...)"
    return content, None


def _download(file, folder, damage, progress):
    """Return the file's contents from the first mirror that has them, and keep them in `folder`."""
    with _kept(folder, f"{file.name}.gz") as keep:
        tried = [damage] if damage else []
        for mirror in MIRRORS:
            url = f"{mirror}{file.name}.gz"
            try:
                packed = _fetch(url, file, progress)
            except urllib.error.HTTPError as error:
                error.close()
                tried.append(f"{url} gave no file ({error})")
                continue
            except (OSError, http.client.HTTPException) as error:
                tried.append(f"{url} gave no file ({getattr(error, 'reason', error)})")
                continue
            content, wrong = _checked(packed, file)
            if wrong is None:
                keep(packed)
                return content
            tried.append(f"{url} gave a file that was {wrong}")
    raise MissingSplit(
        f"MNIST: no usable {file.name} ({'; '.join(tried)}); "
        f"needed: --data DIR or {VARIABLE}=DIR, {_needed()}"
    )


def _fetch(url, file, progress):
    """Return what lies at `url`, up to a little more than the file's uncompressed size."""
    limit = file.size + file.size // 100 + 4096
    received = bytearray()
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
        length = answer.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        with _bar(file.name, total, progress) as advance:
            while len(received) <= limit and (part := answer.read(1 << 16)):
                received += part
                advance(len(part))
    if total is not None and len(received) < min(total, limit):
        raise ConnectionError(f"the connection ended after {len(received):,} of {total:,} bytes")
    return bytes(received)


@contextlib.contextmanager
def _kept(folder, name):
    """Yield `keep(content)`, which writes a file into `folder` under another name and renames it.

    That the folder can be written to is known before the block runs; nothing is left behind in it
    but a complete file.
    """
    scratch = None

    def keep(content):
        with _disk(folder):
            Path(scratch).write_bytes(content)
            os.replace(scratch, folder / name)

    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".partial-{name}-", dir=folder)
        os.close(handle)
    try:
        yield keep
    finally:
        with contextlib.suppress(FileNotFoundError):   # it was renamed
            os.unlink(scratch)


@contextlib.contextmanager
def _disk(folder):
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"MNIST: the cache folder {str(folder)!r} cannot be written to ({error.strerror or error}); needed: "
            f"another one, by XDG_CACHE_HOME, or --data DIR, {_needed()}"
        ) from error


@contextlib.contextmanager
def _bar(name, total, progress):
    """Show a bar on stderr while bytes arrive; yields `advance(count)`."""
    if not progress or importlib.util.find_spec("rich") is None:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"download {name}", total=total)
        yield lambda count: bar.advance(task, count)


def _tensors(contents):
    """(images, labels) of the checked files: the header has a magic number and the sizes, big-endian."""
    arrays = []
    for content in contents:
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", dimensions, 4)
        arrays.append(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape))
    images, labels = arrays[_IMAGES], arrays[_LABELS]
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def _draw(count, size, most, split, seed):
    """Return (indices of `size` random images out of `count`, those of the others)."""
    if not 1 <= size <= most:
        raise UsageError(f"number of training images: got {size}; needed: 1 to {most:,}, of the {count:,} in the {split} split")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:size], order[size:].sort().values


def _pixels(images, dtype):
    """uint8 (n, 28, 28) -> (n, 784) in [0, 1]."""
    return images.flatten(1).to(dtype) / 255
