"""Token shards and the command that writes them."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sosd_fast
from training import prepare as script
from training import run
from training.data import fixed_batches, load_data, passes
from training.model import PRESETS, Config
from training.prepare import Tokenizer, prepare
from training.shards import Shards, read_shard, write_shard

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the cat sat on a mat and saw that the dog had eaten all of its food".split()


def folder(root, count=40, words=200):
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        (root / f"{i}.txt").write_text(f"document {i}\n" + " ".join(rng.choice(WORDS, words)) + "\n")
    return root


def independent(path, tokens, magic=20240520, version=1, kind="H"):
    """The public format by another hand: struct, and nothing of ours."""
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}{kind}", *tokens))
    return path


@pytest.mark.parametrize(("magic", "version", "kind"), [(20240520, 1, "H"), (20240801, 7, "I"), (20240801, 1, "I")])
def test_a_shard_of_another_writer_loads(tmp_path, magic, version, kind):
    tokens = [1, 0, 65535, 50256, 7]
    path = independent(tmp_path / "x.bin", tokens, magic, version, kind)
    assert read_shard(path).tolist() == tokens
    assert Shards([path]).read(1, 3).tolist() == tokens[1:4]


@pytest.mark.parametrize(("top", "kind", "magic"), [(65535, "H", 20240520), (65536, "I", 20240801)])
def test_another_reader_reads_our_shard(tmp_path, top, kind, magic):
    tokens = np.array([3, top, 5])
    write_shard(tmp_path / "x.bin", tokens)
    raw = (tmp_path / "x.bin").read_bytes()
    assert struct.unpack("<3i", raw[:12])[0] == magic and struct.unpack("<3i", raw[:12])[2] == 3
    assert list(struct.unpack(f"<3{kind}", raw[1024:])) == tokens.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_damaged_shards_are_named(tmp_path):
    good = independent(tmp_path / "good_train.bin", list(range(100))).read_bytes()
    for name, content, message in [
        ("short", good[:1000], r"expected a header of 1024 bytes, got .*short\.bin with 1000"),
        ("empty", b"", r"got .*empty\.bin with 0"),
        ("truncated", good[:-2], r"expected 1224 bytes for 100 tokens, got 1222 bytes in .*truncated\.bin"),
        ("longer", good + b"x", r"got 1225 bytes in .*longer\.bin"),
        ("text", b"a text, no shard" * 100, r"read_shard: expected magic 20240520, version 1 or magic 20240801"),
        ("version", struct.pack("<i", 20240520) + struct.pack("<i", 9) + good[8:], r"version 9 in .*version\.bin"),
        ("negative", good[:8] + struct.pack("<i", -1) + good[12:], r"negative\.bin"),
    ]:
        path = tmp_path / f"{name}.bin"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_shard(path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "train_0.bin").write_bytes(good)
    with pytest.raises(ValueError, match=r"load_data: expected files \*train\*\.bin and \*val\*\.bin, got .*1 and 0"):
        load_data(tmp_path / "x")
    (tmp_path / "x" / "val_0.bin").write_bytes(good)
    with pytest.raises(ValueError, match=r"expected token ids below vocab=64, got 99 in .*val_0\.bin"):
        load_data(tmp_path / "x", vocab=64)
    for meta in ("{", "{}", "[]", '{"vocab": null}', '{"vocab": "many"}'):
        (tmp_path / "x" / "meta.json").write_text(meta)
        with pytest.raises(ValueError, match=r"load_data: expected a vocab in .*meta\.json, got"):
            load_data(tmp_path / "x")


def test_shards_are_one_sequence(tmp_path):
    sizes, start = [7, 1, 0, 12, 5], 0
    for i, size in enumerate(sizes):
        write_shard(tmp_path / f"{i}.bin", np.arange(start, start + size))
        start += size
    shards = Shards(sorted(tmp_path.iterdir()))
    assert len(shards) == 25
    for first in range(25):
        for count in range(25 - first + 1):
            assert shards.read(first, count).tolist() == list(range(first, first + count))
    assert len(Shards([])) == 0


def draw(count, tokens, **kwargs):
    stream = passes(tokens, kwargs.pop("batch_size", 6), 4, kwargs.pop("seed", 0), **kwargs)
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("kind", ["tensor", "shards"])
def test_passes_take_every_window_once_a_pass(tmp_path, kind):
    tokens = torch.arange(100, dtype=torch.uint8)
    if kind == "shards":
        write_shard(tmp_path / "a.bin", np.arange(33))
        write_shard(tmp_path / "b.bin", np.arange(33, 100))
        tokens = Shards([tmp_path / "a.bin", tmp_path / "b.bin"])
    batches = draw(8, tokens)  # 48 windows: two passes of 24
    for x, y in batches:
        assert x.shape == y.shape == (6, 4) and x.dtype is torch.int64
        assert torch.equal(y, x + 1)
    starts = torch.cat([x[:, 0] for x, _ in batches]).tolist()
    assert sorted(starts[:24]) == sorted(starts[24:]) == list(range(0, 96, 4))
    assert starts[:24] != starts[24:]


def test_passes_are_a_function_of_seed_and_number():
    tokens = torch.arange(100, dtype=torch.uint8)
    whole = draw(9, tokens)
    for done in (1, 4, 7):  # within and beyond the first pass
        for (x, _), (x2, _) in zip(whole[done:], draw(9 - done, tokens, done=done), strict=True):
            assert torch.equal(x, x2)
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(whole, draw(9, tokens, seed=1), strict=True))
    parts = [draw(9, tokens, rank=rank, ranks=3) for rank in range(3)]
    for i, (x, y) in enumerate(whole):
        assert torch.equal(x, torch.cat([part[i][0] for part in parts]))
        assert torch.equal(y, torch.cat([part[i][1] for part in parts]))
    with pytest.raises(ValueError, match=r"passes: expected a batch that 4 ranks can share equally, got batch_size=6"):
        draw(1, tokens, ranks=4)
    with pytest.raises(ValueError, match=r"passes: expected at least context \+ 1 = 5 tokens"):
        draw(1, tokens[:4])


# prepare


def test_bytes_are_the_text_each_document_behind_a_zero(tmp_path):
    source = folder(tmp_path / "text", 5)
    meta = prepare(str(source), tmp_path / "out", "bytes", val_tokens=100, shard_tokens=1000)
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == meta
    tokens = load_data(tmp_path / "out")
    everything = bytes(tokens.val.read(0, 100).tolist() + tokens.train.read(0, len(tokens.train)).tolist())
    assert meta["val_tokens"] == len(tokens.val) == 100 and meta["train_tokens"] == len(tokens.train)
    expected = {(source / f"{i}.txt").read_bytes() for i in range(5)}
    assert set(everything.split(b"\0")[1:]) == expected and everything[0] == 0
    sizes = [len(read_shard(path)) for path in sorted((tmp_path / "out").glob("train_*.bin"))]
    assert set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000


def test_bpe_is_trained_deterministic_and_decodes(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    source = folder(tmp_path / "text")
    for name in ("a", "b"):
        prepare(str(source), tmp_path / name, "bpe:320", val_tokens=500)
    for file in ("train_000000.bin", "val_000000.bin", "tokenizer.json", "meta.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    tokens = load_data(tmp_path / "a")
    assert tokens.vocab == 320
    bpe = tokenizers.Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    ids = tokens.val.read(0, 500).tolist() + tokens.train.read(0, len(tokens.train)).tolist()
    assert len(ids) < sum(path.stat().st_size for path in source.iterdir()) / 2
    end = bpe.token_to_id("<|endoftext|>")
    assert ids[0] == end and ids.count(end) == 40
    text = bpe.decode(ids, skip_special_tokens=True)
    assert all((source / f"{i}.txt").read_text() in text for i in range(40))
    again = prepare(str(source), tmp_path / "c", f"tokenizers:{tmp_path / 'a' / 'tokenizer.json'}", val_tokens=500)
    assert again["train_tokens"] == len(tokens.train)
    assert (tmp_path / "c" / "train_000000.bin").read_bytes() == (tmp_path / "a" / "train_000000.bin").read_bytes()


def test_long_documents_are_cut_at_lines_and_characters(monkeypatch):
    monkeypatch.setattr(script, "PIECE_BYTES", 10)
    text = "ab\ncdefgh\n" + "ä" * 20 + "\nend"
    pieces = [piece.decode() for piece in script._pieces(text.encode())]
    assert "".join(pieces) == text and pieces[0] == "ab\ncdefgh\n" and max(map(len, pieces)) <= 10


def test_max_tokens_and_a_validation_source(tmp_path):
    source, other = folder(tmp_path / "text"), tmp_path / "val.txt"
    other.write_text("only for validation " * 100)
    meta = prepare(str(source), tmp_path / "out", "bytes", 300, val_source=str(other), max_tokens=5000)
    assert (meta["train_tokens"], meta["val_tokens"]) == (5000, 300)
    tokens = load_data(tmp_path / "out")
    assert bytes(tokens.val.read(1, 20).tolist()) == b"only for validation "
    assert b"validation" not in bytes(tokens.train.read(0, 5000).tolist())


def test_hugging_face_streams(tmp_path, monkeypatch):
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(name, config, split, streaming):
            asked.append((name, config, split, streaming))
            return iter([{"text": f"{split} row {i}"} for i in range(50)])

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    prepare("hf:allenai/c4:en", tmp_path / "out", "bytes", 100, val_source="hf:allenai/c4:en:validation")
    assert set(asked) == {("allenai/c4", "en", split, True) for split in ("train", "validation")}
    tokens = load_data(tmp_path / "out")
    assert bytes(tokens.train.read(0, 24).tolist()) == b"\0train row 0\0train row 1"
    assert bytes(tokens.val.read(0, 17).tolist()) == b"\0validation row 0"


def test_gpt2_bpe_is_that_of_tiktoken(tmp_path, monkeypatch):
    """With a stand-in for the package, which fetches its merges from the network."""

    class Gpt2:
        n_vocab, eot_token = 50257, 50256

        @staticmethod
        def encode_ordinary_batch(texts):
            return [[len(word) for word in text.split()] for text in texts]

    monkeypatch.setitem(sys.modules, "tiktoken", type("tiktoken", (), {"get_encoding": {"gpt2": Gpt2}.get}))
    source = tmp_path / "text.txt"
    source.write_text("some words of a text " * 10)
    meta = prepare(str(source), tmp_path / "out", val_tokens=4)
    assert meta["vocab"] == 50257
    assert load_data(tmp_path / "out").val.read(0, 4).tolist() == [50256, 4, 5, 2]


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    source = folder(tmp_path / "text")
    sentencepiece.SentencePieceTrainer.train(
        input=str(source / "0.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=28, minloglevel=2
    )
    coder = Tokenizer(f"sentencepiece:{tmp_path / 'sp.model'}")
    assert coder.vocab == 28 and coder.separator == 1 and coder.encode(["the cat"])[0]


def test_errors(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"documents: expected a text file, a folder or hf:.*got source='/no/such'"):
        prepare("/no/such", tmp_path / "out", "bytes")
    with pytest.raises(ValueError, match=r"Tokenizer: expected bytes, gpt2, .*got name='wordpiece'"):
        prepare("/no/such", tmp_path / "out", "wordpiece")
    source = folder(tmp_path / "text", 2)
    with pytest.raises(ValueError, match=r"prepare: expected a new or empty folder, got out="):
        prepare(str(source), source, "bytes")
    with pytest.raises(ValueError, match=r"prepare: expected more than val_tokens=10000000 tokens, got \d+ in"):
        prepare(str(source), tmp_path / "small", "bytes")
    assert not any((tmp_path / "small").iterdir()), "the next try may use it"
    for number in ("val_tokens", "max_tokens", "shard_tokens", "train_bytes"):
        with pytest.raises(ValueError, match=rf"prepare: expected a positive number, got {number}=0"):
            prepare(str(source), tmp_path / "zero", "bytes", **{number: 0})
    for name in ("bpe:abc", "bpe:256", "bpe:", "bpe:-4"):
        with pytest.raises(ValueError, match=rf"Tokenizer: expected a vocabulary of at least 257 .*got name='{name}'"):
            Tokenizer(name)
    for name in ("sentencepiece:/no/such", "tokenizers:"):
        with pytest.raises(ValueError, match=rf"Tokenizer: expected a file, got name='{name}'"):
            Tokenizer(name)
    with pytest.raises(ValueError, match=r"documents: expected .* got source='hf:'"):
        prepare("hf:", tmp_path / "hf", "bytes")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match=r"documents: expected `datasets` for hf: sources\. Run `pip install data"):
        prepare("hf:x", tmp_path / "hf", "bytes")
    assert script.main([str(source), f"--out={tmp_path / 'gpt2'}"]) == 2
    assert "Tokenizer: expected `tiktoken` for 'gpt2'. Run `pip install tiktoken`." in capsys.readouterr().err


def test_prepare_then_train_from_the_shards(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    source, out = folder(tmp_path / "text", 60, 400), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "training.prepare",
        source,
        f"--out={out}",
        "--tokenizer=bpe:320",
        "--val-tokens=2000",
    ]
    done = subprocess.run([*command, "--shard-tokens=5000"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout)["vocab"] == 320 and len(list(out.glob("train_*.bin"))) > 1
    monkeypatch.setitem(PRESETS, "gpt2-nano", Config(2, 2, 32, 64, 32, 256))
    flags = ["--steps=30", "--batch-size=4", "--tracker=full", "--quiet", "--device=cpu", "--lr=0.01"]
    assert run.main([*flags, f"--data={out}", f"--run-dir={tmp_path / 'run'}"]) == 0
    result = sosd_fast.load(tmp_path / "run")
    assert result.log[-1]["loss"] < result.log[0]["loss"] - 1  # 5.8 nats at the start, for 320 tokens
    shape = next(r.shape for r in result.records if r.name == "wte.weight")
    assert shape == (320, 32)  # the model's vocabulary has grown to the data's
    assert len(fixed_batches(load_data(out).val, 4, 32, 1000)) > 1


@pytest.mark.parametrize("text", [b"a" + b"\x80" * 3_000_000, b"\x80" * 2_500_000, ("ab\u20ac" * 600_000).encode()])
def test_bytes_that_are_no_text_are_cut_all_the_same(text):
    pieces = list(script._pieces(text))
    assert b"".join(pieces) == text and all(0 < len(piece) <= script.PIECE_BYTES for piece in pieces)
    if text[:2] == b"ab":
        assert all(piece.decode() for piece in pieces), "no character is cut"


@pytest.mark.parametrize(
    "name", ["bpe:1e999", "bpe:-3", "bpe:\u00b2", "bpe:" + "9" * 5000, "bpe:99999999999", "bpe:256"]
)
def test_a_vocabulary_that_is_none(tmp_path, capsys, name):
    (tmp_path / "a.txt").write_text("text")
    assert script.main([str(tmp_path / "a.txt"), f"--out={tmp_path / 'out'}", f"--tokenizer={name}"]) == 2
    assert "Tokenizer: expected a vocabulary of at least 257" in capsys.readouterr().err


def test_a_damaged_tokenizer_is_one_line(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "t.json").write_text("{]")
    argv = [str(tmp_path / "a.txt"), f"--out={tmp_path / 'out'}", f"--tokenizer=tokenizers:{tmp_path / 't.json'}"]
    assert script.main(argv) == 2
    assert "Tokenizer: expected the file of a tokenizer" in capsys.readouterr().err


def test_a_disk_that_is_full_leaves_the_folder_as_it_was(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("text " * 1000)
    real, calls = script.write_shard, 0

    def full(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(script, "write_shard", full)
    argv = [str(tmp_path / "a.txt"), f"--out={tmp_path / 'out'}", "--tokenizer=bytes", "--val-tokens=100"]
    argv += ["--shard-tokens=500"]
    assert script.main(argv) == 2
    assert "No space left" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())
    assert script.main(argv) == 0


def shards(folder, vocab=256, count=4000):
    folder.mkdir()
    for kind in ("train", "val"):
        write_shard(folder / f"{kind}_0.bin", np.arange(count) % vocab)
    (folder / "meta.json").write_text(json.dumps({"vocab": vocab}))
    return folder


@pytest.mark.parametrize("vocab", ["1e999", "-1", "0", "true", '"300"', "[1]", "9" * 5000, "1e3"])
def test_a_vocabulary_in_meta_that_is_none(tmp_path, vocab):
    shards(tmp_path / "x")
    (tmp_path / "x" / "meta.json").write_text('{"vocab": ' + vocab + "}")
    with pytest.raises(ValueError, match="load_data: expected a vocab in"):
        load_data(tmp_path / "x")


def test_ids_beyond_the_vocabulary_are_seen_before_training(tmp_path, capsys):
    shards(tmp_path / "x")
    tokens = np.arange(4000) % 256
    tokens[3999] = 256
    write_shard(tmp_path / "x" / "train_0.bin", tokens)
    assert run.main([f"--data={tmp_path / 'x'}", f"--run-dir={tmp_path / 'run'}", "--device=cpu"]) == 2
    assert "expected token ids below vocab=256, got 256 in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_shard_that_is_cut_off_during_training(tmp_path, capsys, monkeypatch):
    """Mapped into memory, it would end the process by SIGBUS; a checkpoint is written first."""
    tiny = Config(n_layer=1, n_head=2, width=32, ff_width=64, context=32, vocab=256)
    monkeypatch.setitem(PRESETS, "gpt2-nano", tiny)
    shards(tmp_path / "x")
    whole, path = (tmp_path / "x" / "train_0.bin").read_bytes(), tmp_path / "x" / "train_0.bin"
    forward, calls = run.Transformer.forward, 0

    def struck(self, x, y):
        nonlocal calls
        calls += 1
        if calls == 5:
            path.write_bytes(whole[:1100])
        return forward(self, x, y)

    monkeypatch.setattr(run.Transformer, "forward", struck)
    argv = ["--batch-size=2", "--steps=40", "--eval-every=100", "--quiet", "--device=cpu", "--tracker=off"]
    assert run.main([*argv, f"--data={tmp_path / 'x'}", f"--run-dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "run: no data at step" in said and "cut off meanwhile" in said and "train_0.bin" in said
    path.write_bytes(whole)
    assert run.main([f"--resume={tmp_path / 'run'}"]) == 0
    assert [line["step"] for line in sosd_fast.load(tmp_path / "run").log] == list(range(1, 41))


def test_a_pipe_is_no_shard(tmp_path):
    import os

    os.mkfifo(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="read_shard: expected a file"):
        read_shard(tmp_path / "train.bin")
