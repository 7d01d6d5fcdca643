"""The paper's runs as defaults of run.py's flags, and the same recipes scaled to a CPU.

Steps, batches, schedules, warm-up and weight decay are the paper's. It does not give learning rates: GPT-2's are those
of the public recipe, LLaMA's from the range in use at these sizes, the smaller for the larger model.
"""

_GPT2 = {
    "model": "gpt2-small",
    "optimizer": "adamw",
    "lr": 1.8e-3,
    "adam_lr": 1.8e-3,
    "weight_decay": 0.0,
    "schedule": "wsd",
    "warmup": 250,
    "steps": 5_100,
    "batch_tokens": 512 * 1024,
    "micro_batch_size": 16,
    "dtype": "bfloat16",
    "compile": True,
    "eval_every": 125,
    "eval_sequences": 10_000_000 // 1024,
    "checkpoint_every": 500,
    "tracker_budget": 0.01,
}
_LLAMA = _GPT2 | {
    "model": "llama-0.5b",
    "lr": 1e-3,
    "weight_decay": 0.1,
    "decay_all": True,
    "clip": 1.0,
    "schedule": "cosine",
    "warmup": 1_000,
    "steps": 100_000,
    "batch_tokens": 512 * 2048,
    "micro_batch_size": 8,
    "eval_every": 1_000,
    "eval_sequences": 10_000_000 // 2048,
    "checkpoint_every": 2_000,
}
_PAPER = {
    "small-adamw-step": _GPT2 | {"schedule": "step", "steps": 20_400},
    "small-adamw-wsd": _GPT2,
    "small-muon-wsd": _GPT2 | {"optimizer": "muon", "lr": 0.02},
    "medium-adamw-wsd": _GPT2 | {"model": "gpt2-medium", "weight_decay": 0.125, "warmup": 500, "micro_batch_size": 8},
    "llama-0.5b-cosine": _LLAMA,
    "llama-0.5b-cosine-nodecay": _LLAMA | {"weight_decay": 0.0},
    "llama-2b-cosine": _LLAMA | {"model": "llama-2b", "lr": 4e-4, "micro_batch_size": 4},
}


def _nano(run: dict) -> dict:
    """The recipe at width 256, 4 layers, 2,048 tokens a step and 1/12 of the steps (LLaMA: 1/200)."""
    llama = run["model"].startswith("llama")
    fraction = 1 / 200 if llama else 1 / 12
    lr = {"adamw": 1e-3, "muon": 0.02}[run["optimizer"]]  # measured at this size, see optimizers.py
    return run | {
        "model": "llama-nano" if llama else "gpt2-nano",
        "lr": lr,
        "adam_lr": 1e-3,
        "warmup": max(1, round(run["warmup"] * fraction)),
        "steps": round(run["steps"] * fraction),
        "batch_tokens": 8 * 256,
        "micro_batch_size": None,
        "dtype": "float32",
        "compile": False,
        "eval_every": 25,
        "eval_sequences": 32,
        "checkpoint_every": 100,
        "tracker_budget": 0.03,
    }


RUNS = _PAPER | {
    f"nano-{name}": _nano(_PAPER[paper])
    for name, paper in {
        "adamw-step": "small-adamw-step",
        "adamw-wsd": "small-adamw-wsd",
        "muon-wsd": "small-muon-wsd",
        "adamw-decay": "medium-adamw-wsd",
        "llama-cosine": "llama-0.5b-cosine",
        "llama-cosine-nodecay": "llama-0.5b-cosine-nodecay",
    }.items()
}
