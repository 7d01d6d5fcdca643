"""`prepare` with the real datasets, tiktoken and sentencepiece, on local files: nothing here touches a network."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import tiktoken

import sosd_fast
from training import prepare as script
from training import run
from training.data import load_data
from training.model import PRESETS, Config
from training.prepare import prepare

WORDS = "the cat sat on a mat and saw that the dog had eaten all of its food in 1997, wasn't it? Ünïcödé 猫".split()
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [f"document {i}: " + " ".join(rng.choice(WORDS, 100)) for i in range(count)]


def tokens_of(folder):
    data = load_data(folder)
    return data.val.read(0, len(data.val)).tolist() + data.train.read(0, len(data.train)).tolist()


def write(file, rows):
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(rows))), "text": rows}), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"text": row, "url": "x"}) + "\n" for row in rows))
    else:
        file.write_text("".join(row + "\n" for row in rows))


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "txt"])
def test_datasets_stream_rows_in_order_with_splits_and_configs(tmp_path, ending):
    folder = tmp_path / "data"
    (folder / "en").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n"
        f'  - {{split: train, path: "en/train-*.{ending}"}}\n  - {{split: validation, path: "en/val.{ending}"}}\n---\n'
    )
    rows, val = texts(40), texts(5, seed=1)
    for i in range(2):
        write(folder / "en" / f"train-{i}.{ending}", rows[20 * i : 20 * i + 20])
    write(folder / "en" / f"val.{ending}", val)
    meta = prepare(f"hf:{folder}:en", tmp_path / "out", "bytes", val_source=f"hf:{folder}:en:validation")
    parts = [part.read(0, len(part)) for part in (load_data(tmp_path / "out").train, load_data(tmp_path / "out").val)]
    assert [bytes(part.tolist()).decode().split("\0")[1:] for part in parts] == [rows, val]
    assert meta["train_tokens"] == sum(len(row.encode()) + 1 for row in rows)


def test_datasets_errors_are_one_line(tmp_path, capsys):
    write(tmp_path / "train.jsonl", texts(3))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "train.jsonl").write_text('{"content": "a"}\n')
    for source, message in [
        (f"hf:{tmp_path}::no-such-split", "no-such-split"),
        (f"hf:{tmp_path / 'odd'}", "documents: expected a column text of strings, got content in"),
        ("hf:no/such", "no/such"),
    ]:
        assert script.main([source, f"--out={tmp_path / 'out'}", "--tokenizer=bytes", "--val-tokens=10"]) == 2
        assert message in capsys.readouterr().err


def data_gym(text):
    """The bytes behind the printable characters that byte-level BPE writes them as."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
    return bytes(table[c] for c in text)


def test_tiktoken_writes_what_tokenizers_writes_of_the_same_merges(tmp_path, monkeypatch):
    source = tmp_path / "text.txt"
    source.write_text("\n\n  ".join(texts(30)) + "\ttail  ")
    prepare(str(source), tmp_path / "bpe", "bpe:400", val_tokens=50)
    vocab = json.loads((tmp_path / "bpe" / "tokenizer.json").read_text())["model"]["vocab"]
    ranks = {data_gym(token): i - 1 for token, i in vocab.items() if token != "<|endoftext|>"}
    end = len(ranks)
    local = tiktoken.Encoding(
        "gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": end}, explicit_n_vocab=end + 1
    )
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", local)  # where the downloaded one would be
    meta = prepare(str(source), tmp_path / "gpt2", "gpt2", val_tokens=50)
    assert meta["vocab"] == end + 1 > 300
    found = tokens_of(tmp_path / "gpt2")
    assert found == [end if token == 0 else token - 1 for token in tokens_of(tmp_path / "bpe")]
    assert found[0] == end and local.decode(found[1:]) == source.read_text()


def test_sentencepiece_then_training_from_the_shards(tmp_path, monkeypatch):
    folder = tmp_path / "text"
    folder.mkdir()
    for i, text in enumerate(texts(60)):
        (folder / f"{i}.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=",".join(map(str, folder.iterdir())), model_prefix=str(tmp_path / "sp"), vocab_size=300,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    meta = prepare(str(folder), tmp_path / "out", f"sentencepiece:{tmp_path / 'sp.model'}", val_tokens=500)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    assert meta["vocab"] == model.vocab_size()
    ids, documents = tokens_of(tmp_path / "out"), []
    for token in ids:
        if token == model.bos_id():
            documents.append([])
        else:
            documents[-1].append(token)
    assert sorted(map(model.decode, documents)) == sorted(texts(60))

    monkeypatch.setitem(PRESETS, "llama-nano", Config(1, 2, 32, 64, 32, 256, "swiglu", norm_gain=True, tied=False))
    flags = ["--model=llama-nano", "--steps=20", "--batch-size=4", "--tracker=full", "--quiet", "--device=cpu"]
    assert run.main([*flags, "--lr=0.01", f"--data={tmp_path / 'out'}", f"--run-dir={tmp_path / 'run'}"]) == 0
    log = sosd_fast.load(tmp_path / "run").log
    assert log[-1]["loss"] < log[0]["loss"] - 1
