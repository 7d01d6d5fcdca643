"""A model's matrices: what counts as one, its name, and the view of its parameter that is measured."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

# Fused queries, keys and values of equal sizes, one above the other: GPT-2's, torch.nn.MultiheadAttention's, timm's.
DEFAULT_SPLIT = {"*c_attn.weight": 3, "*in_proj_weight": 3, "*qkv.weight": 3}

_KINDS = (  # the first pattern found in a name decides
    ("attention", r"attn|attention|(^|[._])(q|k|v|o|qkv|wq|wk|wv|wo)(_proj)?[._]"),
    ("mlp", r"mlp|ffn|feed_?forward|expert|moe|(^|[._])(c_fc|fc\d?|w\d|linear\d|(up|gate|down)_proj)[._]"),
    ("embedding", r"emb|(^|[._])w[tp]e[._]"),
    ("head", r"head|(^|[._])(output|classifier|score|fc_out)[._]"),
)


@dataclass(frozen=True)
class Matrix:
    """One matrix inside a parameter; `tensor()` views it as it is now."""

    name: str
    parameter: Tensor
    index: tuple[int, ...] = ()  # into the leading dimensions, for stacks of matrices
    part: tuple[int, int, int] | None = None  # (dim, start, length), for fused matrices
    flatten: bool = False  # a convolution's (out, in, *kernel) as (out, rest)

    def tensor(self) -> Tensor:
        """Returns a detached (m, n) view."""
        W = self.parameter.detach()
        W = W.flatten(1) if self.flatten else W[self.index] if self.index else W
        return W.narrow(*self.part) if self.part else W


def find_matrices(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    split: Mapping[str, int | Sequence[int]] = DEFAULT_SPLIT,
    left_out: dict[str, str] | None = None,
) -> list[Matrix]:
    """Lists the matrices of a model: every floating-point parameter of two or more dimensions, tied ones once.

    Args:
        model: compiled and DistributedDataParallel models are looked through.
        include: shell patterns of parameter names to keep.
        exclude: shell patterns of parameter names to leave out.
        split: shell pattern -> number of equal parts, or the parts' sizes, of a fused matrix, cut along its larger
            dimension (dimension 0 of a square). Three parts are called [q], [k], [v]; others [0], [1], ...
            The default pattern cuts only what is three squares, so that grouped queries stay whole.
        left_out: takes the names of included parameters whose values cannot be read as they are, and why: of a tensor
            subclass that computes in its own way, of integers, uninitialized.

    Returns:
        Matrices in the model's order. Dimensions before the last two are a stack of matrices, named [i];
        a convolution kernel counts as one matrix (out, rest). Of a parametrized weight the originals are listed, for
        computing the weight itself may change state (spectral_norm's); nothing here computes it.

    Raises:
        ValueError: no matrix, an include pattern without a match, parts that do not fit, or the flat parameters of
            FullyShardedDataParallel.
    """
    include, exclude = ((p,) if isinstance(p, str) else tuple(p) for p in (include, exclude))
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    for module in model.modules():
        bases = {base.__name__ for base in type(module).__mro__}  # not to import them
        if "FullyShardedDataParallel" in bases:
            raise ValueError(
                f"track: expected parameters with their shapes, got model={type(model).__name__} with the flat ones of "
                "FullyShardedDataParallel. Shard with fully_shard: fsdp_version=2 in accelerate, ModelParallelStrategy "
                "in Lightning."
            )
        if "FSDPModule" in bases:  # whose root holds whole parameters after a forward pass without a backward
            module.reshard()  # pyright: ignore[reportCallIssue]
    kernels = {id(p) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in _kernels(m)}
    candidates, unreadable = {}, {}
    for name, parameter in model.named_parameters():
        name = name.replace("_orig_mod.", "").replace("parametrizations.", "")
        why = _unreadable(parameter)
        if why is not None:
            unreadable[name] = why
        elif parameter.ndim >= 2 and parameter.numel():
            candidates[name] = parameter
    if not candidates:
        but = "without any" if not unreadable else f"whose {', '.join(f'{n} {why}' for n, why in unreadable.items())}"
        raise ValueError(
            f"track: expected a model with at least one parameter of two dimensions, got model={type(model).__name__} "
            f"{but}. Pass the nn.Module that holds the weights."
        )
    for pattern in include:
        if not any(fnmatchcase(name, pattern) for name in (*candidates, *unreadable)):
            raise ValueError(
                f"track: expected include patterns that match a parameter, got include={pattern!r}. "
                f"The model has {', '.join(list(candidates)[:8])}{', ...' if len(candidates) > 8 else ''}."
            )

    def wanted(name: str) -> bool:
        return any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)

    found = []
    for name, parameter in candidates.items():
        if wanted(name):
            found += matrices_of(name, parameter, split, flatten=id(parameter) in kernels)
    if left_out is not None:
        left_out.update({name: why for name, why in unreadable.items() if wanted(name)})
    if not found:
        raise ValueError(
            f"track: expected at least one matrix to be left, got include={include}, exclude={exclude}. "
            "Exclude fewer parameters."
        )
    return found


def _kernels(module: nn.modules.conv._ConvNd) -> Iterator[Tensor]:
    """The parameters of a convolution that have as many dimensions as its kernel: the kernel, or what it is made of.

    A parametrization keeps its originals in `parametrizations`, pruning and the older weight_norm and spectral_norm
    theirs in the module. Nothing asks for `module.weight`, which may be computed, and its computing change state.
    """
    held = list(module._parameters.values())
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is not None:
        held += parametrizations.parameters()
    for p in held:
        if p is not None and _unreadable(p) is None and p.ndim == 2 + len(module.kernel_size):
            yield p


def _unreadable(parameter: Tensor) -> str | None:
    """Why the values of a parameter of two dimensions or more cannot be read as they are; None where they can."""
    if torch.nn.parameter.is_lazy(parameter):
        return "is not initialized"
    if parameter.ndim < 2:
        return None
    local = parameter
    if hasattr(parameter, "placements"):  # a DTensor, whose part here must be plain
        local = parameter.detach().to_local()  # pyright: ignore[reportAttributeAccessIssue]
    if not _dispatches_plainly(type(local)):
        return f"is a {type(local).__name__}"
    if local.layout != torch.strided:
        return f"has layout {local.layout}"
    if not local.is_floating_point() or local.dtype.itemsize < 2:
        return f"has dtype {local.dtype}"
    return None


def kind(name: str) -> str:
    """Returns the module kind that a matrix's name tells: attention, mlp, embedding, head or other."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name.lower())), "other")


def matrices_of(
    name: str, parameter: Tensor, split: Mapping[str, int | Sequence[int]] = DEFAULT_SPLIT, flatten: bool = False
) -> list[Matrix]:
    """Lists the matrices inside one parameter, as `find_matrices` does; `flatten` it as a convolution's kernel."""
    parts = next((parts for pattern, parts in split.items() if fnmatchcase(name, pattern)), None)
    if split is DEFAULT_SPLIT and isinstance(parts, int) and max(parameter.shape) != parts * min(parameter.shape):
        parts = None
    if flatten and parameter.ndim > 2:
        return [Matrix(name, parameter, flatten=True)]
    if parameter.ndim > 2:
        indices = itertools.product(*map(range, parameter.shape[:-2]))
        return [Matrix(f"{name}[{','.join(map(str, index))}]", parameter, index=index) for index in indices]
    if parts is None:
        return [Matrix(name, parameter)]
    dim = 0 if parameter.shape[0] >= parameter.shape[1] else 1
    size = parameter.shape[dim]
    sizes = [size // parts] * parts if isinstance(parts, int) else list(parts)
    if sum(sizes) != size or min(sizes) < 1:
        raise ValueError(
            f"track: expected parts that add up to {size}, dimension {dim} of {name}, got split={parts}. "
            "Give the parts' sizes, or exclude the parameter."
        )
    labels = "qkv" if len(sizes) == 3 else range(len(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        Matrix(f"{name}[{label}]", parameter, part=(dim, start, length))
        for label, start, length in zip(labels, starts, sizes, strict=True)
    ]


def _dispatches_plainly(kind: type) -> bool:
    """Whether operations on a subclass see its memory as they see a Tensor's."""

    def function(of: type, name: str):
        found = getattr(of, name)
        return getattr(found, "__func__", found)  # a class method is bound anew for each class

    return all(
        function(kind, name) in {function(Tensor, name), function(nn.Parameter, name)}
        for name in ("__torch_dispatch__", "__torch_function__")
    )
