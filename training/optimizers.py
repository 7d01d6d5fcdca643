"""AdamW for everything, or Muon for the body's matrices and AdamW for the rest."""

import torch

import sosd_fast

# Validation loss of gpt2-nano after 150 steps of 8 x 256 bytes, wsd, warm-up 20:
# adamw 5e-4 2.08, 1e-3 1.99, 2e-3 2.09, 4e-3 2.46, 8e-3 2.71; muon 0.02 2.00, 0.04 2.00.
DEFAULT_LR = {"adamw": 1e-3, "muon": 0.02}


def build_optimizers(
    model: torch.nn.Module,
    optimizer: str,
    lr: float,
    weight_decay: float = 0.0,
    adam_lr: float | None = None,
    decay_all: bool = False,
) -> list[torch.optim.Optimizer]:
    """AdamW for every parameter, or Muon for the body's matrices (those in ``h``) and AdamW for the rest.

    Args:
        model: a Transformer.
        optimizer: "adamw" or "muon".
        lr: peak learning rate of the body, kept as each group's "initial_lr" for the schedule.
        weight_decay: on the body's matrices; gains have none.
        adam_lr: with "muon", the learning rate of embedding, head and gains; None is AdamW's default.
        decay_all: on embedding and head, too.

    Returns:
        The optimizers, the body's first.
    """
    named = list(model.named_parameters())
    body = [p for name, p in named if name.startswith("h.") and p.ndim == 2]
    outer = [p for name, p in named if not name.startswith("h.") and p.ndim == 2]
    gains = [p for name, p in named if p.ndim < 2]
    adam = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": body[0].device.type in ("cpu", "cuda")}
    if decay_all:
        rest = [{"params": outer, "weight_decay": weight_decay}] + [{"params": gains}] * bool(gains)
    else:
        rest = [{"params": outer + gains}]
    if optimizer == "muon":
        adam_lr = DEFAULT_LR["adamw"] if adam_lr is None else adam_lr
        # Apart, q, k and v end lower: validation 1.438 against 1.552, gpt2-nano after 300 steps, one seed
        # (LOG.md#muon-split).
        fused = {id(p) for name, p in named if name.endswith("c_attn.weight")}
        groups = [
            {"params": [p for p in body if id(p) not in fused]},
            {"params": [p for p in body if id(p) in fused], "split": 3},
        ]
        # On a CPU in float32, so that runs on any number of ranks and of any age agree; on CUDA as torch.optim.Muon.
        dtype = torch.float32 if body[0].device.type == "cpu" else None
        optimizers = [
            sosd_fast.Muon(groups, lr=lr, weight_decay=weight_decay, momentum=0.95, ns_dtype=dtype),
            torch.optim.AdamW(rest, lr=adam_lr, **adam),
        ]
    elif optimizer == "adamw":
        optimizers = [torch.optim.AdamW([{"params": body, "weight_decay": weight_decay}, *rest], lr=lr, **adam)]
    else:
        raise ValueError(
            f"build_optimizers: expected one of {list(DEFAULT_LR)}, got optimizer={optimizer!r}. Choose one."
        )
    for group in (group for each in optimizers for group in each.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers
