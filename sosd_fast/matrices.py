"""A model's matrices: what counts as one, its name, and the view of its parameter that is measured."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from sosd_fast.fused import Fused, fused_in
from sosd_fast.kinds import kind as kind
from sosd_fast.places import Place, places_of
from sosd_fast.stored import is_scale, reader_of

# Fused queries, keys and values of equal sizes, one above the other: GPT-2's, torch.nn.MultiheadAttention's, timm's.
DEFAULT_SPLIT = {"*c_attn.weight": 3, "*in_proj_weight": 3, "*qkv.weight": 3}


@dataclass(frozen=True)
class Matrix:
    """One matrix inside a parameter; `tensor()` returns it as it is now."""

    name: str
    parameter: Tensor
    index: tuple[int, ...] = ()  # into the leading dimensions, for stacks of matrices
    part: tuple[int, int, int] | None = None  # (dim, start, length), for fused matrices
    flatten: int = 0  # leading dimensions that make the rows: 1 of a convolution's (out, in, *kernel)
    period: int = 0  # the part stands in each so many rows or columns, for those fused head by head; 0: it stands once
    read: Callable[[Tensor], Tensor] | None = None  # returns the parameter's values, where they are not plain

    def tensor(self) -> Tensor:
        """Returns the detached (m, n) values: a view, or a copy where they are converted or their rows stand apart."""
        W = self.read(self.parameter) if self.read else self.parameter.detach()
        if self.flatten:
            W = W.flatten(0, self.flatten - 1).flatten(1)
        elif self.index:
            W = W[self.index]
        if self.part is None:
            return W
        dim, start, length = self.part
        if not self.period:
            return W.narrow(dim, start, length)
        return W.unflatten(dim, (-1, self.period)).narrow(dim + 1, start, length).flatten(dim, dim + 1)


def find_matrices(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    split: Mapping[str, int | Sequence[int]] = DEFAULT_SPLIT,
    left_out: dict[str, str] | None = None,
    unreadable: dict[str, str] | None = None,
) -> list[Matrix]:
    """Lists the matrices of a model: every floating-point parameter of two or more dimensions, tied ones once.

    Args:
        model: compiled and DistributedDataParallel models, and other wrappers, are looked through.
        include: shell patterns of parameter names to keep.
        exclude: shell patterns of parameter names to leave out.
        split: shell pattern -> number of equal parts, or the parts' sizes, of a fused matrix, cut along its larger
            dimension (dimension 0 of a square). Three parts are called [q], [k], [v]; others [0], [1], ...
            The default cuts what is three squares, and what an attention module is known to hold in another order or
            in other sizes (`sosd_fast.fused`); where the module says that its parts are neither, it stays whole.
        left_out: takes the names of the parameters that are not listed, and why.
        unreadable: takes those of `left_out` that are included, but whose values cannot be read: of a tensor subclass
            that computes in its own way and offers no `dequantize`, of integers, eight-bit floats without their
            scale, uninitialized.

    Returns:
        Matrices in the model's order. What a parameter of three or more dimensions holds:

        - a convolution's kernel, pruned or parametrized ones too, is one matrix (out, rest), and so is any parameter
          of four or more dimensions; Keras's (*kernel, in, out) is (rest, out);
        - one of three dimensions (b, m, n) is a stack of b matrices, named [i], where b is at most min(m, n), else one
          matrix (b, m n): XLNet's weights (d, heads, head_dim);
        - whatever is named after experts is a stack;
        - (1, m, n) is one matrix.

        A single row or column is no matrix, nor is a bias, a table (1, ...) of four dimensions or more, or the gain
        of a normalization. Of a parametrized weight the originals are listed, for computing the weight itself may
        change state (spectral_norm's); nothing here computes it. Its name is the weight's, with a part [original0]
        where there are several. Where computing changes nothing (weight_norm), `sosd_fast.svdvals(module.weight)`
        measures the weight itself.

    Raises:
        ValueError: no matrix, an include pattern without a match, parts that do not fit, or the flat parameters of
            FullyShardedDataParallel.
    """
    include, exclude = ((p,) if isinstance(p, str) else tuple(p) for p in (include, exclude))
    _check_sharding(model)
    candidates, without, cannot_read = [], dict[str, str](), dict[str, str]()
    places = list(places_of(model))
    for place in places:
        reader = reader_of(place.parameter, place.owner, place.own_name)
        if isinstance(reader, str):
            cannot_read[place.name] = reader
        elif place.parameter.ndim < 2 or not place.parameter.numel():
            without[place.name] = "has fewer than two dimensions" if place.parameter.ndim < 2 else "is empty"
        else:
            candidates.append((place, reader))
    if not candidates:
        why = ", ".join(f"{name} {why}" for name, why in cannot_read.items())
        raise ValueError(
            f"track: expected a model with at least one parameter of two dimensions, got model={type(model).__name__} "
            f"{f'whose {why}' if why else 'without any'}. Pass the nn.Module that holds the weights."
        )
    for pattern in include:
        if not any(place.fits(pattern) for place in places if place.name not in without):
            names = [place.name for place, _ in candidates]
            raise ValueError(
                f"track: expected include patterns that match a parameter, got include={pattern!r}. "
                f"The model has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
            )
    wanted = {p.name for p in places if any(map(p.fits, include)) and not any(map(p.fits, exclude))}
    found: list[Matrix] = []
    for place, reader in candidates:
        if place.name in wanted:
            listed = _matrices_in(place, split, reader)
            if isinstance(listed, str):
                without[place.name] = listed
            else:
                found += listed
    cannot_read = {name: why for name, why in cannot_read.items() if name in wanted}
    if unreadable is not None:
        unreadable.update(cannot_read)
    if left_out is not None:
        excluded = {place.name: "is excluded" for place in places if place.name not in wanted}
        reasons = excluded | without | cannot_read
        left_out.update({place.name: reasons[place.name] for place in places if place.name in reasons})
    if not found:
        names = [place.name for place, _ in candidates if place.name in wanted]
        but = ", ".join(f"{name} {without[name]}" for name in names)
        raise ValueError(
            f"track: expected at least one matrix to be left, got include={include}, exclude={exclude}"
            f"{f' ({but})' if but else ''}. Exclude fewer parameters."
        )
    return found


def _check_sharding(model: nn.Module):
    """Refuses flat parameters, and brings sharded ones to their usual state."""
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


def _matrices_in(
    place: Place, split: Mapping[str, int | Sequence[int]], read: Callable[[Tensor], Tensor] | None
) -> list[Matrix] | str:
    """The matrices in a parameter of a model, or why it holds none."""
    owner = place.owner
    if hasattr(owner, "normalized_shape"):
        return "is the gain of a normalization"
    if is_scale(owner, place.own_name):
        return "is the scale of another parameter"
    convolution = isinstance(owner, nn.modules.conv._ConvNd) or (
        hasattr(owner, "kernel_size") and any(hasattr(owner, name) for name in ("stride", "padding", "dilation"))
    )
    if isinstance(owner, nn.ParameterDict):  # which knows nothing of the layer: Keras's
        convolution = None
    fused = fused_in(place.weight, max(place.parameter.shape), place.around)
    return matrices_of(
        place.weight, place.parameter, split, convolution=convolution, fused=fused, read=read, original=place.original
    )


def matrices_of(
    name: str,
    parameter: Tensor,
    split: Mapping[str, int | Sequence[int]] = DEFAULT_SPLIT,
    *,
    convolution: bool | None = None,
    fused: Fused | str | None = None,
    read: Callable[[Tensor], Tensor] | None = None,
    original: str = "",
) -> list[Matrix] | str:
    """Lists the matrices inside one parameter, as `find_matrices` does.

    Args:
        name: of the weight, without its original.
        parameter: of two or more dimensions.
        split: see `find_matrices`.
        convolution: whether it is a convolution's kernel; None asks its name.
        fused: how it holds queries, keys and values, for the default split; a reason leaves it whole.
        read: returns its values, where they are not plain.
        original: which of the originals of a parametrized weight.

    Returns:
        The matrices, or why there are none.
    """
    shape, lower = tuple(parameter.shape), name.lower()
    if re.search(r"(^|_)bias(es)?(_|$)", lower.rpartition(".")[2]):
        return "is a bias"
    shown, stacked = name + (original and f"[{original}]"), re.search(r"expert|(^|[._])moe", lower) is not None
    out_last = False  # Keras and Flax call (*kernel, in, out) kernel
    if convolution is None:
        convolution = "conv" in ".".join(lower.split(".")[-2:])
        out_last = lower.endswith("kernel") and (convolution or len(shape) > 3)
    if len(shape) > 2 and not convolution and not stacked and shape[0] == 1:
        if max(shape[:-2]) > 1:
            return "is a table that is broadcast"
        found = [Matrix(shown, parameter, index=(0,) * (len(shape) - 2), read=read)]
    elif len(shape) > 2 and (convolution or not (stacked or (len(shape) == 3 and shape[0] <= min(shape[1:])))):
        rows = len(shape) - (2 if "depthwise" in lower else 1) if out_last else 1
        found = [Matrix(shown, parameter, flatten=rows, read=read)]
        shape = math.prod(shape[:rows]), math.prod(shape[rows:])
    elif len(shape) > 2:
        indices = itertools.product(*map(range, shape[:-2]))
        found = [Matrix(f"{shown}[{','.join(map(str, i))}]", parameter, index=i, read=read) for i in indices]
    else:
        found = [
            Matrix(f"{shown}{label and f'[{label}]'}", parameter, part=part, period=period, read=read)
            for label, part, period in _parts(name, shape, split, fused)
        ]
    return found if min(shape[-2:]) > 1 else "has a single row or column"


def _parts(
    name: str, shape: tuple[int, ...], split: Mapping[str, int | Sequence[int]], fused: Fused | str | None
) -> list[tuple[str, tuple[int, int, int] | None, int]]:
    """The label, the place (dim, start, length) and the period of each part of a matrix, which may be the whole."""
    whole: list[tuple[str, tuple[int, int, int] | None, int]] = [("", None, 0)]
    if split is DEFAULT_SPLIT and isinstance(fused, Fused):
        size, rest = divmod(shape[0], fused.groups * sum(fused.heads))
        if rest:
            return whole
        lengths, period = [size * heads for heads in fused.heads], shape[0] // fused.groups
        starts = itertools.accumulate(lengths, initial=0)
        period = period if fused.groups > 1 else 0
        return [
            (label, (0, start, length), period)
            for label, start, length in zip(fused.labels, starts, lengths, strict=False)
        ]
    parts = next((parts for pattern, parts in split.items() if fnmatchcase(name, pattern)), None)
    if split is DEFAULT_SPLIT and (
        isinstance(fused, str) or (isinstance(parts, int) and max(shape) != parts * min(shape))
    ):
        parts = None
    if parts is None:
        return whole
    dim = 0 if shape[0] >= shape[1] else 1
    size = shape[dim]
    sizes = [size // parts] * parts if isinstance(parts, int) else list(parts)
    if sum(sizes) != size or min(sizes) < 1:
        raise ValueError(
            f"track: expected parts that add up to {size}, dimension {dim} of {name}, got split={parts}. "
            "Give the parts' sizes, or exclude the parameter."
        )
    labels = "qkv" if len(sizes) == 3 else map(str, range(len(sizes)))
    starts = itertools.accumulate(sizes, initial=0)
    return [(label, (dim, start, length), 0) for label, start, length in zip(labels, starts, sizes, strict=False)]
