"""The Muon optimizer, with the arguments and the update rule of `torch.optim.Muon`."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sosd_fast.distributed.exchange import apply_to_whole, boxes_of
from sosd_fast.distributed.layout import is_sharded
from sosd_fast.kernels import multiplies_bfloat16
from sosd_fast.kernels.newton_schulz import HALF, check_dtype, newton_schulz, triples_of


class Muon(torch.optim.Optimizer):
    r"""Momentum, orthogonalised by Newton-Schulz, for the matrices of a model's body.

        M <- momentum M + (1 - momentum) g;   u = g + momentum (M - g) if nesterov else M
        W <- W (1 - lr weight_decay) - lr adjust(m, n) newton_schulz(u)

    Args:
        params: parameters or groups; each a matrix. Embeddings, heads and gains belong to another optimizer.
        lr: learning rate, a number or a tensor of one element.
        weight_decay: decoupled, as in AdamW.
        momentum: of the running mean of gradients.
        nesterov: look ahead by one gradient.
        ns_coefficients: (a, b, c) of each iteration, or what else `newton_schulz` takes.
        eps: the smallest gradient norm that is divided by; updates of smaller gradients shrink with them.
        ns_steps: iterations.
        adjust_lr_fn: "original" or None: sqrt(max(1, m / n)); "match_rms_adamw": 0.2 sqrt(max(m, n)).
        split: how many matrices a parameter holds, one above the other; each is orthogonalised by itself. 3 for fused
            queries, keys and values.
        ns_dtype: of the products of the iteration, as `dtype` of `newton_schulz`; None: bfloat16 as torch.optim.Muon on
            CUDA and on CPUs that multiply it natively, else the dtype of the gradient.

    Parameters of one shape are updated together. Of DTensors of any placement each matrix is gathered to one of the
    ranks that hold parts of it, orthogonalised there and scattered again; copies are updated without communication.
    Weights, gradients and momenta keep their dtype whatever the iteration runs in.

    Raises:
        ValueError: a parameter that is no matrix, rows that split does not divide, an option out of its range, or, at
            a step, sparse gradients, or a parameter of which ranks hold partial sums.

    Source: Jordan et al., Muon (2024); Liu et al., Muon is Scalable (arXiv 2502.16982) for match_rms_adamw.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | tuple = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        split: int = 1,
        ns_dtype: torch.dtype | None = None,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "split": split,
            "ns_dtype": ns_dtype,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        """Adds a group of matrices; one that is refused leaves the optimizer as it was."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state):
        """Takes up a state that was saved before there was `split` or `ns_dtype`."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("split", 1)
            group.setdefault("ns_dtype", None)

    @torch.no_grad()
    def step(self, closure=None) -> Any:  # the loss, or None without a closure
        """Performs one step; `closure` reevaluates the loss and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            _check_gradient(p)  # before anything is updated
        alike: dict[tuple, list[Tensor]] = {}  # parameters of one shape, dtype and device, updated together
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    key = number, p.shape, p.dtype, p.grad.dtype, p.device
                    alike.setdefault(key, []).append(p)
        batches = [(self.param_groups[key[0]], params) for key, params in alike.items()]
        updates = [self._directions(params, group) for group, params in batches]
        results = apply_to_whole(
            [u for own in updates for u in own],
            [p for _, params in batches for p in params],
            [i for i, (_, params) in enumerate(batches) for _ in params],
            lambda i, X: _orthogonalised(X, batches[i][0]),
        )
        for group, params in batches:
            _move(params, results[: len(params)], group)
            del results[: len(params)]
        return loss

    def _directions(self, params: list[Tensor], group: dict) -> list[Tensor]:
        """Takes the gradients into the momenta and returns this rank's parts of what is to be orthogonalised."""
        grads = []
        for p in params:
            assert p.grad is not None
            grad = p.grad
            if is_sharded(p) and is_sharded(grad) and grad.placements != p.placements:  # such as partial sums
                grad = grad.redistribute(placements=p.placements)
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(grad)
            grads.append(_local(grad))
        momenta = [_local(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
        # what ranks exchange; CPUs of one group may differ in what they multiply, so the owner rounds there
        return [u.bfloat16() if u.is_cuda and group["ns_dtype"] in (None, *HALF) else u for u in updates]


def _orthogonalised(X: Tensor, group: dict) -> Tensor:
    """Orthogonalises each of `split` matrices that stand one above the other in X (B, m, n)."""
    parts = X.reshape(len(X) * group["split"], -1, X.shape[-1])
    dtype = group["ns_dtype"]
    if dtype is None and not X.is_cuda and multiplies_bfloat16():
        dtype = torch.bfloat16
    options = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"], "eps": group["eps"]}
    return newton_schulz(parts, **options, dtype=dtype).reshape(X.shape)


def _move(params: list[Tensor], updates: list[Tensor], group: dict):
    """Adds to parameters of one shape, dtype and device their orthogonalised updates."""
    m, n = params[0].shape
    m //= group["split"]
    ratio = 0.2 * math.sqrt(max(m, n)) if group["adjust_lr_fn"] == "match_rms_adamw" else math.sqrt(max(1, m / n))
    local = [_local(p) for p in params]
    updates = [u.to(p.dtype) for u, p in zip(updates, local, strict=True)]
    lr = group["lr"]
    if isinstance(lr, Tensor):  # its value is not read, which would wait for a GPU
        lr = lr.reshape(()).to(local[0].device)
        torch._foreach_mul_(local, 1 - lr * group["weight_decay"])
        torch._foreach_add_(local, torch._foreach_mul(updates, -lr * ratio))
    else:
        torch._foreach_mul_(local, 1 - lr * group["weight_decay"])
        torch._foreach_add_(local, updates, alpha=-lr * ratio)


def _check_gradient(p: Tensor):
    """Raises ValueError for a parameter that cannot be updated by its gradient."""
    assert p.grad is not None
    if p.grad.layout != torch.strided:
        raise ValueError(
            f"Muon: expected dense gradients, got one of layout {p.grad.layout} for a parameter of shape "
            f"{tuple(p.shape)}. Give embeddings with sparse=True to SparseAdam."
        )
    if is_sharded(p):
        try:
            boxes_of(tuple(p.shape), p.device_mesh, tuple(p.placements))
        except ValueError as error:
            raise ValueError(
                f"Muon: expected a parameter that ranks hold parts or copies of, got one of shape {tuple(p.shape)} "
                f"that {error}. Redistribute it to Shard or Replicate."
            ) from None


def _check_group(group: dict):
    """Raises ValueError for a group that cannot be updated."""
    lr, weight_decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Muon: expected one learning rate, got lr of shape {tuple(lr.shape)}. Give each its group.")
    flags = any(isinstance(value, bool) for value in (lr, weight_decay, momentum))
    if flags or lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
        raise ValueError(
            f"Muon: expected lr >= 0, weight_decay >= 0, 0 <= momentum < 1, got lr={lr}, "
            f"weight_decay={weight_decay}, momentum={momentum}. Start from lr=0.02, momentum=0.95."
        )
    if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
        raise ValueError(
            f"Muon: expected original or match_rms_adamw, got adjust_lr_fn={group['adjust_lr_fn']!r}. Leave it at None."
        )
    triples_of(group["ns_steps"], group["ns_coefficients"], group["eps"], "Muon", "ns_")
    check_dtype(group["ns_dtype"], "Muon", "ns_")
    for p in group["params"]:
        if p.ndim != 2:
            raise ValueError(
                f"Muon: expected matrices, got a parameter of shape {tuple(p.shape)}. "
                "Give gains, biases and kernels to AdamW."
            )
        if group["split"] < 1 or p.shape[0] % group["split"]:
            raise ValueError(
                f"Muon: expected a number of parts that divides {p.shape[0]} rows, got split={group['split']}. "
                "Give parameters that hold one matrix a group with split=1."
            )


def _local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor, in place; other tensors as they are."""
    return t.to_local() if is_sharded(t) else t
