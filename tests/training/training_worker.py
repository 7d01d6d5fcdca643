"""training/run.py on tiny models; run by test_distributed.py, alone or under torchrun.

"--next" separates the flags of runs that follow each other, in one process group; "--float64" before a run's flags
trains it in that. DIE=rank:step kills that rank in that step, HANG=rank:step lets it sleep.
"""

import os
import signal
import sys
import time

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
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or torchrun waits 30 seconds for the step to end
            time.sleep(1000)
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
status, argv = 0, []
for flag in [*sys.argv[1:], "--next"]:
    if flag == "--next":
        torch.set_default_dtype(torch.float64 if "--float64" in argv else torch.float32)
        status, argv = status or run.main([each for each in argv if each != "--float64"]), []
    else:
        argv.append(flag)
if "--next" in sys.argv and dist.is_initialized():
    close()
sys.exit(status)
