"""Write token shards: ``python -m training.prepare SOURCE --out=FOLDER --tokenizer=bpe:4096``."""

import argparse
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from training.data import _texts
from training.shards import write_shard

PIECE_BYTES = 2**20  # longer documents are tokenized in pieces, cut at line ends
TOKENIZERS = "bytes, gpt2, sentencepiece:FILE, bpe:VOCAB (trained on the source), or tokenizers:FILE"


def documents(source: str) -> Iterator[tuple[str, bytes]]:
    """Yields (name, text) of each document of a source.

    Args:
        source: a text file; a folder, whose text files come in the order of a hash of their names; or
            "hf:DATASET:CONFIG:SPLIT", streamed from the Hugging Face hub, or a local folder of its files, in its own
            order. Rows must have a column "text".

    Raises:
        ValueError: a source that does not exist, or rows without text.
        ImportError: `datasets` is missing.
    """
    if source.startswith("hf:") and source != "hf:":
        try:
            from datasets import load_dataset
        except ImportError:
            raise ImportError("documents: expected `datasets` for hf: sources. Run `pip install datasets`.") from None
        name, config, split = (source.split(":")[1:] + [""] * 2 + ["train"])[:3]
        stream = load_dataset(name, config or None, split=split or "train", streaming=True)
        for i, row in enumerate(stream):
            if not isinstance(row.get("text"), str):
                raise ValueError(
                    f"documents: expected a column text of strings, got {', '.join(row)} in row {i} of {source}. "
                    "Rename the column, or choose another data set."
                )
            yield f"{source}#{i}", row["text"].encode(errors="replace")
    elif Path(source).is_file():
        yield source, Path(source).read_bytes()
    elif Path(source).is_dir():
        texts = _texts(Path(source), stdlib=False)
        yield from sorted(texts, key=lambda text: (zlib.crc32(text[0].encode()), text[0]))
    else:
        raise ValueError(
            f"documents: expected a text file, a folder or hf:DATASET:CONFIG:SPLIT, got source={source!r}. "
            "Check that it exists."
        )


class Tokenizer:
    """A named tokenizer.

    Args:
        name: "bytes", "gpt2", "sentencepiece:FILE", "bpe:VOCAB" or "tokenizers:FILE".
        texts: what "bpe" is trained on.

    Attributes:
        vocab: token ids are below it.
        separator: the token before each document.

    Raises:
        ValueError: an unknown name, a missing file, or a vocabulary too small.
        ImportError: the package behind it is missing.
    """

    def __init__(self, name: str, texts: Iterable[str] = ()):
        kind, _, argument = name.partition(":")
        if kind == "bpe" and not (re.fullmatch("[0-9]{1,7}", argument) and int(argument) > 256):
            raise ValueError(
                "Tokenizer: expected a vocabulary of at least 257 (all bytes, <|endoftext|>) and below 10 million, got "
                f"name={name[:80]!r}. Use bpe:4096."
            )
        if kind in ("sentencepiece", "tokenizers") and not Path(argument).is_file():
            raise ValueError(f"Tokenizer: expected a file, got name={name!r}. Check that it exists.")
        try:
            if kind == "bytes":
                self.vocab, self.separator = 256, 0
                self._encode = lambda texts: [list(text.encode()) for text in texts]
            elif kind == "gpt2":
                import tiktoken

                gpt2 = tiktoken.get_encoding("gpt2")
                self.vocab, self.separator, self._encode = gpt2.n_vocab, gpt2.eot_token, gpt2.encode_ordinary_batch
            elif kind == "sentencepiece":
                import sentencepiece

                model = sentencepiece.SentencePieceProcessor(model_file=argument)
                self.vocab, self.separator, self._encode = model.vocab_size(), model.bos_id(), model.encode
            elif kind in ("bpe", "tokenizers"):
                import tokenizers

                bpe = tokenizers.Tokenizer.from_file(argument) if kind == "tokenizers" else _train(int(argument), texts)
                self._bpe = bpe
                self.vocab, self.separator = bpe.get_vocab_size(), bpe.token_to_id("<|endoftext|>")
                self._encode = lambda texts: [e.ids for e in bpe.encode_batch(texts, add_special_tokens=False)]
            else:
                raise ValueError(f"Tokenizer: expected {TOKENIZERS}, got name={name!r}. Choose one.")
        except ImportError as error:
            raise ImportError(
                f"Tokenizer: expected `{error.name}` for {name!r}. Run `pip install {error.name}`."
            ) from None
        except ValueError:
            raise
        except Exception as error:  # what tokenizers and sentencepiece raise
            raise ValueError(
                f"Tokenizer: expected the file of a tokenizer, got name={name!r} ({str(error)[:200]}). Fetch it again."
            ) from None
        if self.separator is None or self.separator < 0:
            raise ValueError(
                f"Tokenizer: expected a token that begins a document (<|endoftext|>, or bos), got name={name!r} "
                "without one. Train it with such a token."
            )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of each text."""
        return self._encode(texts)

    def save(self, folder: Path):
        """Keeps what was trained, to decode by."""
        if hasattr(self, "_bpe"):
            self._bpe.save(str(folder / "tokenizer.json"))


def _train(vocab: int, texts: Iterable[str]):
    """Byte-level BPE, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _pieces(text: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(text):
        end = start + PIECE_BYTES
        if end < len(text):
            end = text.rfind(b"\n", start, end) + 1 or end
            for back in range(4):  # a UTF-8 character has four bytes at most; what is none is cut anywhere
                if text[end - back] & 0xC0 != 0x80:
                    end -= back
                    break
        yield text[start:end]
        start = end


def token_blocks(source: str, tokenizer: Tokenizer, batch: int = 64) -> Iterator[np.ndarray]:
    """Yields the tokens of a source, the separator before each document, in blocks of ``batch`` pieces."""
    pieces = (
        (first, piece.decode(errors="replace"))
        for _, text in documents(source)
        for first, piece in zip(itertools.chain([True], itertools.repeat(False)), _pieces(text), strict=False)
    )
    while block := list(itertools.islice(pieces, batch)):
        encoded = tokenizer.encode([piece for _, piece in block])
        rows = [[tokenizer.separator, *ids] if first else ids for (first, _), ids in zip(block, encoded, strict=True)]
        yield np.fromiter(itertools.chain.from_iterable(rows), dtype=np.uint32, count=sum(map(len, rows)))


class _Stream:
    """Blocks of tokens, taken a number of tokens at a time."""

    def __init__(self, blocks: Iterable[np.ndarray]):
        self._blocks = iter(blocks)
        self._left = np.empty(0, np.uint32)

    def take(self, count: int | None) -> Iterator[np.ndarray]:
        """Yields the next ``count`` tokens, None: all."""
        for block in itertools.chain([self._left], self._blocks):
            if count is not None and len(block) >= count:
                self._left = block[count:]
                yield block[:count]
                return
            count = None if count is None else count - len(block)
            yield block
        self._left = self._left[:0]


def write_shards(folder: Path, kind: str, blocks: Iterable[np.ndarray], size: int) -> int:
    """Writes kind_000000.bin, ... of ``size`` tokens each, the last one shorter; returns the number of tokens."""
    pending, held, number, total = [], 0, 0, 0
    for block in itertools.chain(blocks, [None]):
        if block is not None:
            pending.append(block)
            held += len(block)
        while held >= size or (block is None and held):
            tokens = np.concatenate(pending)
            write_shard(folder / f"{kind}_{number:06d}.bin", tokens[:size])
            total += min(size, held)
            pending, held, number = [tokens[size:]], max(0, held - size), number + 1
    return total


def prepare(
    source: str, out: str | Path, tokenizer: str = "gpt2", val_tokens: int = 10_000_000, val_source: str | None = None,
    max_tokens: int | None = None, shard_tokens: int = 100_000_000, train_bytes: int = 50_000_000,
) -> dict:  # fmt: skip
    """Writes training and validation shards and meta.json; the same for the same source, wherever it runs.

    Args:
        source: see `documents`.
        out: a new or empty folder.
        tokenizer: see `Tokenizer`.
        val_tokens: the first so many tokens are for validation.
        val_source: take them from here instead.
        max_tokens: of training; None takes all there are.
        shard_tokens: in a file.
        train_bytes: of the source that "bpe" is trained on.

    Returns:
        What meta.json holds: tokenizer, vocab, train_tokens, val_tokens, source.

    Raises:
        ValueError: a folder that is not empty, a source too small, or a number that is not positive.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"prepare: expected a new or empty folder, got out={str(out)!r}. Choose another.")

    numbers = {"val_tokens": val_tokens, "max_tokens": max_tokens, "shard_tokens": shard_tokens}
    for name, value in (numbers | {"train_bytes": train_bytes}).items():
        if value is not None and value < 1:
            raise ValueError(f"prepare: expected a positive number, got {name}={value}. Leave it out for the default.")

    if shard_tokens >= 2**31:
        raise ValueError(f"prepare: expected a count that a header holds, got shard_tokens={shard_tokens}. Take fewer.")

    def sample():
        left = train_bytes
        for _, text in documents(source):
            for piece in _pieces(text):
                if left <= 0:
                    return
                left -= len(piece)
                yield piece.decode(errors="replace")

    coder = Tokenizer(tokenizer, sample())
    train = _Stream(token_blocks(source, coder))
    val = _Stream(token_blocks(val_source, coder)) if val_source else train
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    try:
        for kind, stream, count in (("val", val, val_tokens), ("train", train, max_tokens)):
            counts[f"{kind}_tokens"] = write_shards(out, kind, stream.take(count), shard_tokens)
        if not all(counts.values()):
            raise ValueError(
                f"prepare: expected more than val_tokens={val_tokens} tokens, got {counts['val_tokens']} in "
                f"source={source!r}, which leaves none to train on. Lower --val-tokens."
            )
    except BaseException:
        for path in out.glob("*.bin*"):  # or the same folder would be refused the next time
            path.unlink()
        raise
    meta = {"tokenizer": tokenizer, "vocab": coder.vocab, **counts, "source": source, "val_source": val_source}
    coder.save(out)
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta


def main(argv=None) -> int:
    """Prepare as the flags say; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("source", help="Reads a text file, a folder of text, or hf:DATASET:CONFIG:SPLIT.")
    add("--out", required=True, help="The new folder for the shards, which must be given.")
    add("--tokenizer", default="gpt2", help=f"The tokenizer: {TOKENIZERS}; %(default)s by default.")
    add("--val-tokens", type=int, default=10_000_000,
        help="The number of tokens for validation, the first ones of the source, %(default)s by default.")
    add("--val-source",
        help="Another source for the tokens of validation, such as the data set's own split; by default the same.")
    add("--max-tokens", type=int, help="The number of tokens for training; by default all there are.")
    add("--shard-tokens", type=int, default=100_000_000,
        help="The number of tokens in a file, %(default)s by default.")
    add("--train-bytes", type=int, default=50_000_000,
        help="The bytes of the source that bpe:VOCAB is trained on, %(default)s by default.")
    # fmt: on
    try:
        meta = prepare(**vars(parser.parse_args(argv)))
    except (ValueError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(meta))
    return 0


if __name__ == "__main__":
    sys.exit(main())
