"""Training: our models against the same ones of stock torch.nn modules, and what each rank's tracker costs.

With ranks, the tracker's share of each under DDP and under FSDP2 + TP, in as many processes by their CPU time; and what
8 ranks send in each layout, as computed from the layout.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import sosd_fast
from bench.harness import ROOT, finish, interleaved, parser, show
from sosd_fast.distributed.layout import boxes_on, mesh_of, shape_of, spread
from sosd_fast.distributed.ways import full_bytes
from sosd_fast.matrices import find_matrices
from training.model import PRESETS, Transformer, flops_per_token
from training.optimizers import build_optimizers
from training.parallel import Parallel
from training.presets import RUNS

LAYOUTS = {"ddp": "DDP", "fsdp+tp": "FSDP2 + TP"}  # whose ranks share the tracker's work


class StockAttention(nn.Module):
    """Attention with one nn.Linear for each of q, k, v and the rotation written as x cos + rotate(x) sin."""

    def __init__(self, config):
        super().__init__()
        d = config.width
        self.n_head = config.n_head
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x, cos, sin):
        B, T, d = x.shape

        def heads(y):
            return y.view(B, T, self.n_head, -1).transpose(1, 2)

        def turn(y):
            a, b = y.chunk(2, dim=-1)
            return y * cos + torch.cat((-b, a), dim=-1) * sin

        q, k, v = turn(heads(self.q(x))), turn(heads(self.k(x))), heads(self.v(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(B, T, d))


class StockTransformer(nn.Module):
    """The modded GPT-2 of stock modules: nn.RMSNorm, nn.Linear, nn.Embedding, nn.CrossEntropyLoss."""

    def __init__(self, ours: Transformer):
        super().__init__()
        c = self.config = ours.config
        d = c.width
        self.wte, self.head = nn.Embedding(c.vocab, d), nn.Linear(d, c.vocab, bias=False)
        self.head.weight = self.wte.weight
        self.attention = nn.ModuleList(StockAttention(c) for _ in range(c.n_layer))
        self.fc = nn.ModuleList(nn.Linear(d, c.ff_width, bias=False) for _ in range(c.n_layer))
        self.proj = nn.ModuleList(nn.Linear(c.ff_width, d, bias=False) for _ in range(c.n_layer))
        self.norm = nn.RMSNorm(d, eps=1e-6, elementwise_affine=False)
        self.relu, self.loss = nn.ReLU(), nn.CrossEntropyLoss()
        self.register_buffer("cos", ours.cos)
        self.register_buffer("sin", ours.sin.chunk(2, -1)[1].repeat(1, 2))  # turn() has the sign
        with torch.no_grad():
            self.wte.weight.copy_(ours.wte.weight)
            for i, block in enumerate(ours.h):
                for part, W in zip("qkv", block.attn.c_attn.weight.chunk(3), strict=True):
                    getattr(self.attention[i], part).weight.copy_(W)
                self.attention[i].o.weight.copy_(block.attn.c_proj.weight)
                self.fc[i].weight.copy_(block.mlp.c_fc.weight)
                self.proj[i].weight.copy_(block.mlp.c_proj.weight)

    def forward(self, tokens, targets):
        T = tokens.shape[1]
        x = self.wte(tokens)
        for attention, fc, proj in zip(self.attention, self.fc, self.proj, strict=True):
            x = x + attention(self.norm(x), self.cos[:T], self.sin[:T])
            x = x + proj(self.relu(fc(self.norm(x))) ** 2)
        return self.loss(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def throughput(name: str, batch: int, context: int, repeats: int, device: str) -> dict:
    """Times a training step of both, of the same weights and tokens, and checks that their losses agree."""
    config = replace(PRESETS[name], context=context)
    torch.manual_seed(0)
    ours = Transformer(config).to(device)
    models = {"ours": ours, "stock": StockTransformer(ours).to(device)}
    x = torch.randint(config.vocab, (batch, context + 1), device=device)
    losses = {each: model(x[:, :-1], x[:, 1:]).item() for each, model in models.items()}
    gate = abs(losses["ours"] / losses["stock"] - 1) < 1e-5

    def step_of(model):
        adam = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        optimizers = build_optimizers(model, "adamw", 1e-4) if model is ours else [adam]

        def step():
            model(x[:, :-1], x[:, 1:]).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return step

    steps = {each: step_of(model) for each, model in models.items()}
    times = interleaved(steps, repeats)
    ratio = times["stock"]["ms"] / times["ours"]["ms"]
    tokens = batch * context
    return {
        "model": name, "tokens": tokens, "gate": gate, "ratio": ratio, **times,
        "gflops": flops_per_token(config) * tokens / times["ours"]["ms"] / 1e6,
    }  # fmt: skip


def tracker_shares(name: str, ranks: int, repeats: int) -> dict:
    """The CPU seconds of measuring everything in full as each of the ranks of each layout, over those alone.

    Alone each of the processes measures a model of its own, all at the same time, so that all have the same machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_as_rank, (ranks, name, repeats, folder), nprocs=ranks)
        times = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    middle = [{what: statistics.median(seconds) for what, seconds in t.items()} for t in times]
    shares = {kind: [t[kind] / t["none"] for t in middle] for kind in LAYOUTS}
    return {"model": name, "ranks": ranks, "shares": shares, "cpu_s": times}


def _as_rank(rank: int, ranks: int, name: str, repeats: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("shard", "tp"))
    seconds: dict[str, list[float]] = {}
    for kind in ("none", *LAYOUTS):
        torch.manual_seed(0)
        parallel = Parallel(kind, torch.device("cpu"), rank, ranks, mesh, tp=2 if "tp" in kind else 1)
        model = parallel.wrap(Transformer(PRESETS[name]), "float32")
        probe = sosd_fast.track(model, optimizers=[], method="full", audit=False)
        probe.step()  # the first one has no spectra to start from
        seconds[kind] = []
        for _ in range(repeats):
            dist.barrier()
            began = time.process_time()
            probe.step()
            seconds[kind].append(time.process_time() - began)
        probe.close()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def bytes_moved(name: str, ranks: int) -> list[dict]:
    """Bytes that all ranks send for one full measurement in each layout, results told to all included; no process runs.

    EP: each product of the feed-forward layers a stack of as many experts as there are ranks, one on each, and rows of
    the rest as under FSDP2. Under DDP each rank records its share, and nobody is told.
    """
    sizes = {
        "FSDP2": {"shard": ranks},
        "HSDP": {"replicate": 2, "shard": ranks // 2},
        "TP": {"tp": ranks},
        "FSDP2 + TP": {"shard": ranks // 2, "tp": 2},
        "EP": {"shard": ranks},
    }
    kinds = {"FSDP2": "fsdp", "HSDP": "hsdp", "TP": "tp", "FSDP2 + TP": "fsdp+tp", "EP": "fsdp"}
    rows = [{"model": name, "ranks": ranks, "layout": "DDP", "sent_mb": 0.0, "ratio": 0.0}]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)  # for meshes; nothing is sent by it
    for layout, mesh_sizes in sizes.items():
        mesh = init_device_mesh("cpu", tuple(mesh_sizes.values()), mesh_dim_names=tuple(mesh_sizes))
        with torch.device("meta"):
            model = Transformer(PRESETS[name])
        for product in (p for block in model.h for p in block.mlp.children() if layout == "EP"):
            product.weight = nn.Parameter(product.weight.expand(ranks, -1, -1).contiguous())
        Parallel(kinds[layout], torch.device("cpu"), 0, ranks, mesh, mesh_sizes.get("tp", 1)).wrap(model, "float32")
        model.to_empty(device="cpu")  # the meta device has no matrices; nothing is written, so it takes no memory
        matrices = find_matrices(model)
        meshes = [mesh_of(m.parameter) for m in matrices]
        boxes = [
            tuple(boxes_on(m.parameter.shape, at, m.parameter.placements)[rank] for rank in range(ranks))
            for m, at in zip(matrices, meshes, strict=True)
        ]
        sent = full_bytes(matrices, spread(matrices, boxes, meshes))
        size = sum(4 * m * n for m, n in map(shape_of, matrices))
        rows.append({"model": name, "ranks": ranks, "layout": layout, "sent_mb": sent / 1e6, "ratio": sent / size})
    dist.destroy_process_group()
    return rows


def start_presets(steps: int) -> dict:
    """Starts each of the paper's runs at 64 tokens a step; of the 2 B model it asks only for what would run."""
    found = {}
    for name in (name for name in RUNS if not name.startswith("nano-")):
        flags = [f"--preset={name}", "--dry-run"]
        with tempfile.TemporaryDirectory() as folder:
            if "2b" not in name:
                flags = [f"--preset={name}", f"--steps={steps}", "--context=32", "--batch-tokens=64", "--no-compile"]
                flags += [
                    "--eval-sequences=1",
                    "--checkpoint-every=1000000",
                    "--tracker=off",
                    f"--run-dir={folder}/run",
                ]
            began = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "training" / "run.py", *flags], check=True, capture_output=True)
            log = Path(folder) / "run" / "log.jsonl"
            losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.exists() else []
        found[name] = {"seconds": time.perf_counter() - began, "losses": losses}
    return found


def main(argv=None) -> int:
    """Measures, prints, and returns 1 where a gate is red."""
    p = parser(__doc__, repeats=15)
    p.add_argument(
        "--models",
        nargs="*",
        default=["gpt2-nano", "gpt2-small"],
        help="The models of the throughput comparison, by default gpt2-nano and gpt2-small.",
    )
    p.add_argument(
        "--ranks",
        type=int,
        default=4,
        help="The number of ranks that share the tracker's work, an even one, or 0 for no such part; a third of the "
        "repetitions; %(default)s by default.",
    )
    p.add_argument(
        "--tracker-model",
        default="gpt2-small",
        help="The model whose matrices the ranks share, %(default)s by default.",
    )
    p.add_argument(
        "--presets",
        action="store_true",
        help="Instead of all this, starts each of the paper's runs for two steps of 64 tokens, but for the one of 2 B "
        "parameters, whose --dry-run it asks for; off by default.",
    )
    args = p.parse_args(argv)
    if args.ranks % 2:
        p.error(f"argument --ranks: expected an even number, got {args.ranks}. Two ranks share each product.")
    if args.presets:
        found = start_presets(2)
        show(
            "Presets", ["run", "seconds", "losses"], [[n, f"{r['seconds']:.0f}", r["losses"]] for n, r in found.items()]
        )
        finish({"presets": found}, args.json)
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"gpt2-nano": (8, 256), "gpt2-small": (1, 256)} if device == "cpu" else {}
    rows = [throughput(name, *sizes.get(name, (8, 1024)), args.repeats, device) for name in args.models]
    show(
        "A training step over the same model of stock modules",
        ["model", "tokens", "ours ms", "stock ms", "stock/ours", "GFLOP/s", "losses agree"],
        [
            [r["model"], r["tokens"], f"{r['ours']['ms']:.0f}", f"{r['stock']['ms']:.0f}", f"{r['ratio']:.3f}",
             f"{r['gflops']:.0f}", r["gate"]]
            for r in rows
        ],
    )  # fmt: skip
    result = {"throughput": rows}
    if args.ranks:
        tracker = tracker_shares(args.tracker_model, args.ranks, max(3, args.repeats // 3))
        show(
            f"The tracker's CPU time as one of {args.ranks} ranks, {args.tracker_model}, of that alone",
            ["layout", "rank", "share"],
            [
                [LAYOUTS[kind], r, f"{x:.3f}"]
                for kind, shares in tracker["shares"].items()
                for r, x in enumerate(shares)
            ],
        )
        everything = [row for name in ("gpt2-small", "llama-2b") for row in bytes_moved(name, 8)]
        show(
            "MB sent by 8 ranks for one full measurement",
            ["model", "layout", "sent", "of the matrices' size"],
            [[b["model"], b["layout"], f"{b['sent_mb']:.0f}", f"{b['ratio']:.2f}"] for b in everything],
        )
        result |= {"tracker": tracker, "bytes": everything}
    finish(result, args.json)
    return 0 if all(r["gate"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
