"""Whether all cases run: on a GPU, and where SOSD_EVERY is set, as `make check` does; else those that say most."""

import os

import torch

EVERY = torch.cuda.is_available() or "SOSD_EVERY" in os.environ
