"""training/run.py on tiny models; run by test_distributed.py, alone or under torchrun.

"--next" separates the flags of runs that follow each other, in one process group, where ranks learn once how operations
are spread; "--float64" before a run's flags trains it in that, "--half-of=from:to" copies a run as if it had been
killed after its checkpoint of step 2. DIE=rank:step kills that rank in that step, HANG=rank:step lets it wait until
another has ended.
"""

import atexit
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from training import run
from training.model import PRESETS, Config, Transformer

torch.set_num_threads(1)
# Rows that 2 ranks cannot share equally, 259 of the embedding, nor 2 times 2: 66 of the feed-forward layer.
PRESETS["gpt2-nano"] = Config(n_layer=2, n_head=2, width=44, ff_width=66, context=32, vocab=259)
PRESETS["llama-nano"] = Config(1, 2, 44, 66, 32, 259, activation="swiglu", norm_gain=True, tied=False)

steps, forward = 0, Transformer.forward


def counted(self, *args):
    global steps
    steps += torch.is_grad_enabled()
    for what in ("DIE", "HANG"):
        rank, step = map(int, os.environ.get(what, "-1:0").split(":"))
        if int(os.environ.get("RANK", "0")) == rank and steps == step:
            if what == "DIE":
                os.kill(os.getpid(), signal.SIGKILL)
            while not Path(os.environ["UNTIL"]).exists():
                time.sleep(0.05)
            os._exit(1)
    return forward(self, *args)


class NoFigure:
    """Drawn in half a second after each run; test_run.py looks at one."""

    def savefig(self, *_, **__):
        pass


Transformer.forward = counted
run.plot_run = lambda _: NoFigure()
if sys.argv.count("--next"):
    join, close = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = lambda *args, **kwargs: dist.is_initialized() or join(*args, **kwargs)
    dist.destroy_process_group = lambda: None
if "UNTIL" in os.environ:
    atexit.register(Path(os.environ["UNTIL"]).touch)


def half_done(whole, to):
    if os.environ.get("RANK", "0") == "0":
        shutil.copytree(whole, to)
        shutil.rmtree(Path(to, "checkpoints", "step-000004"))
    if dist.is_initialized():
        dist.barrier()


status, argv = 0, []
for flag in [*sys.argv[1:], "--next"]:
    if flag == "--float64":
        torch.set_default_dtype(torch.float64)
    elif flag.startswith("--half-of="):
        half_done(*flag.split("=")[1].split(":"))
    elif flag == "--next":
        status, argv = status or run.main(argv), []
        torch.set_default_dtype(torch.float32)
    else:
        argv.append(flag)
if "--next" in sys.argv and dist.is_initialized():
    close()
sys.exit(status)
