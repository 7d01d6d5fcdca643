"""A Trainer object in the style of torchtitan: configuration, accumulation, clipping, metrics, state to resume from.

python examples/torchtitan_style.py [RUN_DIR], then python -m sosd_fast report RUN_DIR
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import sosd_fast
from sosd_fast.runs.records import JsonLines


@dataclass
class Config:
    """What a run is."""

    run_dir: Path
    steps: int = 40
    accumulate: int = 2
    lr: float = 3e-3
    max_norm: float = 1.0
    checkpoint_every: int = 20


class Trainer:
    """Trains, and resumes from the last checkpoint in the run directory where there is one."""

    def __init__(self, config: Config):
        torch.manual_seed(0)
        self.config, self.step = config, 0
        layer = torch.nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True)
        self.model = torch.nn.Sequential(torch.nn.TransformerEncoder(layer, 2), torch.nn.Linear(48, 48))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: min(1.0, (s + 1) / 10))
        if found := sorted(config.run_dir.glob("step-*.pt")):
            state = torch.load(found[-1], weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.step = state["step"]
        # After the weights are loaded; `step` cuts off what was recorded after the checkpoint.
        in_proj = {"*.in_proj_weight": 3}  # torch's fused q, k, v
        self.probe = sosd_fast.track(self.model, split=in_proj, run_dir=config.run_dir, step=self.step)
        self.metrics = JsonLines(config.run_dir / "log.jsonl", self.step)

    def train_step(self) -> float:
        """Makes one optimizer step of several micro-batches; the probe counts it once."""
        total = 0.0
        for _ in range(self.config.accumulate):
            x = torch.randn(8, 12, 48)
            loss = (self.model(x) - x.cumsum(1)).square().mean() / self.config.accumulate
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return total

    def train(self):
        """Trains to the end, with checkpoints."""
        while self.step < self.config.steps:
            lr = self.scheduler.get_last_lr()[0]
            loss = self.train_step()
            self.step += 1
            self.metrics.write({"step": self.step, "loss": loss, "lr": lr, "overhead": self.probe.overhead})
            if self.step % self.config.checkpoint_every == 0:
                parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")}
                torch.save(parts | {"step": self.step}, self.config.run_dir / f"step-{self.step:06d}.pt")
                self.probe.flush()
                print(f"step {self.step}: loss {loss:.3f}, tracker {self.probe.overhead:.1%}")
        self.probe.close()
        self.metrics.close()


if __name__ == "__main__":
    run_dir = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    run_dir.mkdir(parents=True, exist_ok=True)
    Trainer(Config(run_dir)).train()
    print(f"run directory: {run_dir}")
