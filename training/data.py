"""Tokens and batches: shards that prepare.py wrote, or text as bytes; by default Python's own standard library."""

import json
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.shards import Shards

CHECKED_FIRST = 2**28  # tokens, in about a second; those of longer corpora are checked as they are read
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Tokens:
    """A corpus: train and val are 1-D uint8 tensors or `Shards`, vocab counts the token ids, source says from where."""

    train: Tensor | Shards
    val: Tensor | Shards
    vocab: int
    source: str


def load_data(path: str | Path | None = None, vocab: int = 50304) -> Tokens:
    """Open a folder of token shards, or read text as `load_text` does.

    Args:
        path: a folder with ``*train*.bin`` and ``*val*.bin``, or text.
        vocab: of shards that no meta.json says it of.

    Raises:
        ValueError: neither shards nor text, shards without a part for training or validation, or a damaged one.
    """
    names = sorted(Path(path).glob("*.bin")) if path is not None and Path(path).is_dir() else []
    parts = [[name for name in names if kind in name.name] for kind in ("train", "val")]
    if not any(parts):
        return load_text(path)
    if not all(parts):
        raise ValueError(
            f"load_data: expected files *train*.bin and *val*.bin, got path={str(path)!r} with {len(parts[0])} and "
            f"{len(parts[1])}. Write both with `python -m training.prepare`."
        )
    meta = Path(path) / "meta.json"
    try:
        vocab = json.loads(meta.read_text(encoding="utf-8"))["vocab"] if meta.is_file() else vocab
        if type(vocab) is not int or not 0 < vocab <= 2**32:
            raise ValueError(f"vocab={str(vocab)[:80]}")
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(
            f"load_data: expected a vocab in {meta}, got {repr(error)[:200]}. Write the shards again with "
            "`python -m training.prepare`."
        ) from None
    tokens = Tokens(*(Shards(files, vocab) for files in parts), vocab, str(path))
    for part in (tokens.val, tokens.train):
        if len(part) <= CHECKED_FIRST:
            part.check()
    return tokens


def load_text(path: str | Path | None = None, val_fraction: float = 0.05) -> Tokens:
    """Read a corpus as bytes and split it into training and validation by file.

    A file is validation where the hash of its relative path falls in the lowest ``val_fraction``, so the split is the
    same on every machine and does not move when files are added; the lowest hash always is. A single file gives its
    last ``val_fraction`` of bytes instead. Files are read in the order of their paths, each followed by a zero byte.

    Args:
        path: a text file, or a folder whose text files are read recursively (hidden and binary ones are skipped; a
            file with a zero byte in its first 8 KiB is binary). None reads the ``*.py`` files of Python's standard
            library, without its tests.
        val_fraction: the part kept for validation.

    Raises:
        ValueError: the path does not exist or holds no text.
    """
    if path is not None and Path(path).is_file():
        text = Path(path).read_bytes()
        cut = len(text) - int(len(text) * val_fraction)
        return Tokens(_tensor(text[:cut]), _tensor(text[cut:]), 256, str(path))
    root = Path(sysconfig.get_paths()["stdlib"] if path is None else path)
    if not root.is_dir():
        raise ValueError(f"load_text: expected a text file or a folder, got path={str(path)!r}. Check that it exists.")
    train, val = bytearray(), bytearray()
    texts = dict(_texts(root, stdlib=path is None))
    in_val = validation_files(list(texts), val_fraction)
    for name, text in texts.items():
        part = val if name in in_val else train
        part += text + b"\0"
    if not train or not val:
        raise ValueError(
            f"load_text: expected a folder with at least two text files, got path={str(root)!r} with {len(texts)}. "
            "Give one text file by its own path, or another folder."
        )
    return Tokens(_tensor(train), _tensor(val), 256, str(root) if path else "the Python standard library")


def validation_files(names: list[str], fraction: float) -> set[str]:
    """The names whose hash lies in the lowest ``fraction`` of its range, and the one with the lowest hash."""
    place = {name: zlib.crc32(name.encode()) / 2**32 for name in names}
    return {name for name in names if place[name] < fraction or place[name] == min(place.values())}


def _texts(root: Path, stdlib: bool) -> Iterator[tuple[str, bytes]]:
    for file in sorted(root.rglob("*.py" if stdlib else "*"), key=lambda file: file.relative_to(root).as_posix()):
        parts = file.relative_to(root).parts
        if not file.is_file() or any(part.startswith(".") or (stdlib and part in SKIPPED) for part in parts):
            continue
        text = file.read_bytes()
        if text and b"\0" not in text[:8192]:
            yield "/".join(parts), text


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _windows(tokens: Tensor | Shards, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    if isinstance(tokens, Shards):
        windows = torch.stack([tokens.read(start, context + 1) for start in starts.tolist()])
    else:
        windows = tokens[starts[:, None] + torch.arange(context + 1)].long()  # (B, context + 1)
    return windows[:, :-1], windows[:, 1:]


def _check_length(who: str, tokens: Tensor | Shards, context: int) -> None:
    if len(tokens) < context + 1:
        raise ValueError(
            f"{who}: expected at least context + 1 = {context + 1} tokens, got len(tokens)={len(tokens)}. "
            "Give more text or a shorter context."
        )


def batches(
    tokens: Tensor, batch_size: int, context: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows of the text without end: inputs and next tokens, each (batch_size, context), int64.

    Each batch takes one draw from ``generator`` and nothing from the global one, so a run continues exactly where it
    stopped after ``generator.set_state`` with the state saved by ``generator.get_state`` between two batches.
    """
    _check_length("batches", tokens, context)

    def draw():
        while True:
            starts = torch.randint(len(tokens) - context, (batch_size,), generator=generator)
            yield _windows(tokens, starts, context)

    return draw()  # a generator of its own, so that the check above runs at the call and not at the first batch


def passes(
    tokens: Tensor | Shards, batch_size: int, context: int, seed: int, done: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows end to end, each once a pass, in an order shuffled anew for each pass; without end.

    What batch number i holds depends on (seed, i) alone, so a run continues exactly by its number of steps.

    Args:
        tokens: the corpus.
        batch_size: sequences of the global batch.
        context: tokens of a sequence.
        seed: of the orders.
        done: batches to leave out.
        rank: which of ``ranks`` equal parts of each batch to read.
        ranks: must divide batch_size.

    Returns:
        An iterator of inputs and next tokens, each (batch_size / ranks, context), int64.
    """
    _check_length("passes", tokens, context)
    if batch_size % ranks:
        raise ValueError(
            f"passes: expected a batch that {ranks} ranks can share equally, got batch_size={batch_size}. "
            "Take a multiple."
        )
    count = (len(tokens) - 1) // context

    def draw():
        orders: dict[int, np.ndarray] = {}
        position = done * batch_size + rank * (batch_size // ranks)
        while True:
            windows = []
            for place in range(position, position + batch_size // ranks):
                number = place // count
                if number not in orders:
                    orders.pop(number - 1, None)
                    order = np.arange(count, dtype=np.uint32 if count < 2**32 else np.uint64)
                    orders[number] = np.random.Generator(np.random.PCG64([seed, number])).permutation(order)
                windows.append(int(orders[number][place % count]))
            yield _windows(tokens, torch.tensor(windows) * context, context)
            position += batch_size

    return draw()


def fixed_batches(
    tokens: Tensor | Shards, batch_size: int, context: int, sequences: int
) -> list[tuple[Tensor, Tensor]]:
    """The same evenly spaced windows every time, at most ``sequences`` in all, for validation."""
    _check_length("fixed_batches", tokens, context)
    count = min(sequences, (len(tokens) - 1) // context)
    starts = torch.arange(count) * ((len(tokens) - context) // count)
    return [_windows(tokens, part, context) for part in starts.split(batch_size)]
