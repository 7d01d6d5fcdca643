"""The sizes of the reproduction: the flags of its runs, and the text of a scale that trains on subwords."""

import json
from dataclasses import dataclass
from pathlib import Path

from training.data import load_text
from training.optimizers import DEFAULT_LR
from training.prepare import prepare


@dataclass(frozen=True)
class Scale:
    """Sizes: of the runs, and of the simplified model."""

    gpt2: tuple[str, ...]  # flags of run.py
    llama: tuple[str, ...]
    steps: int
    warmup: int
    eval_every: int
    flags: tuple[str, ...] = ()
    eval_sequences: int = 16
    lr: float | None = None  # AdamW's peak; None leaves run.py's
    memory: float = 0.25  # 1 / (lr decay) of the run with weight decay, over the length of the run
    vocab: int | None = None  # of subwords that are trained on the text; None takes bytes
    theory_steps: int = 12_000
    theory_levels: int = 12
    theory_seeds: int = 0  # at least so many


SCALES = {
    # 15 runs. A step takes a core 0.64 s (GPT-2), 0.79 s (LLaMA), 1.31 s (Muon): 42 min of 2 cores, and validation.
    "nano": Scale(
        ("--model=gpt2-nano", "--batch-size=8"),
        ("--model=llama-nano", "--batch-size=8"),
        400,
        20,
        20,
        ("--device=cpu",),
    ),
    # Chosen by search (README.md, "How the scale laptop was chosen"). 8 million subwords in each of 15 runs; a step
    # takes a core 0.82 s (GPT-2), 0.95 s (LLaMA), 0.88 s (Muon) beside the probe: by that
    # 2 hours of 2 cores.
    "laptop": Scale(
        ("--model=gpt2-nano", "--width=128", "--context=128", "--batch-size=64"),
        ("--model=llama-nano", "--width=128", "--context=128", "--batch-size=64"),
        1_000,
        75,
        50,
        ("--device=cpu",),
        eval_sequences=64,
        lr=2e-3,
        memory=2.0,
        vocab=512,
        theory_steps=48_000,
        theory_levels=48,
        theory_seeds=16,
    ),
    # 5e16 and 1.5e17 FLOP a run, for 10 minutes of one data-centre GPU; --data should name token shards.
    "small": Scale(
        ("--model=gpt2-small", "--batch-size=32"),
        ("--model=llama-0.5b", "--batch-size=16"),
        1_500,
        75,
        50,
        ("--dtype=bfloat16",),
    ),
}


def run_flags(scale: Scale, steps: int) -> dict[str, list[str]]:
    """The flags of each run, but seed and folder.

    Weight decay gives the weights a memory 1 / (lr decay) of a part of the run at the peak learning rate. At nano it is
    a quarter, which is what 0.1 does to 100,000 steps at 4e-4; at 0.1 a short run would not feel it.
    """
    peak = scale.lr or DEFAULT_LR["adamw"]
    adam, muon = ([f"--lr={peak:g}"], [f"--adam-lr={peak:g}"]) if scale.lr else ([], [])
    decay = 1 / (scale.memory * peak * steps)
    return {
        "gpt2-wsd": [*scale.gpt2, "--schedule=wsd", *adam],
        "gpt2-step": [*scale.gpt2, "--schedule=step", *adam],
        "gpt2-muon": [*scale.gpt2, "--schedule=wsd", "--optimizer=muon", *muon],
        "llama-cosine": [*scale.llama, "--schedule=cosine", *adam],
        "llama-cosine-decay": [*scale.llama, "--schedule=cosine", *adam, f"--weight-decay={decay:.4g}"],
    }


def subwords(folder: Path, vocab: int) -> Path:
    """Writes shards of the default text, in a byte-level BPE of ``vocab`` subwords trained on it; reused where there.

    The same text gives the same shards. Training and validation are split by file, as `load_text` does.

    Raises:
        ImportError: `tokenizers` is missing.
    """
    shards, marked = folder / "shards", folder / "shards" / "meta.json"
    if marked.exists() and json.loads(marked.read_text())["vocab"] == vocab:
        return shards
    folder.mkdir(parents=True, exist_ok=True)
    for part in shards.glob("*"):  # of a preparation that was interrupted
        part.unlink()
    text = load_text()
    for name in ("train", "val"):
        documents = getattr(text, name).numpy().tobytes()
        (folder / f"{name}.txt").write_bytes(documents.replace(b"\0", b"\n"))
    prepare(
        str(folder / "train.txt"),
        shards,
        f"bpe:{vocab}",
        val_tokens=len(text.val),  # all there are: a subword has a byte or more
        val_source=str(folder / "val.txt"),
    )
    return shards
