"""A model's matrices: what counts as one, its name, and the view of its parameter that is measured."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sosd_fast.fused import Fused, fused_in, is_fused
from sosd_fast.kinds import kind as kind
from sosd_fast.places import Place, places_of, without_adapter
from sosd_fast.stored import Reader, is_scale, reader_of

# Fused queries, keys and values of equal sizes, one above the other: GPT-2's, torch.nn.MultiheadAttention's, timm's.
DEFAULT_SPLIT = {"*c_attn.weight": 3, "*in_proj_weight": 3, "*qkv.weight": 3}


@dataclass(frozen=True)
class Matrix:
    """One matrix inside a parameter; `tensor()` returns it as it is now."""

    name: str
    parameter: Tensor
    index: tuple[int, ...] = ()  # into the leading dimensions, for stacks of matrices
    part: tuple[int, int, int] | None = None  # (dim, start, length), for fused matrices
    flatten: int = 0  # of the rest, dimensions that make the rows: 1 of a convolution's (out, in, *kernel)
    first: int = 0  # of the rest, the dimension that the rows are: 1 of (heads, d, head_dim)
    period: int = 0  # the part stands in each so many rows or columns, for those fused head by head; 0: it stands once
    read: Reader | None = None  # returns the parameter's values at an index, where they are not plain

    def tensor(self) -> Tensor:
        """Returns the detached (m, n) values: a view, or a copy where they are converted or their rows stand apart."""
        if self.read:
            W = self.read(self.parameter, self.index)
        else:
            W = self.parameter.detach()[self.index] if self.index else self.parameter.detach()
        W = self.unfolded(W)
        if self.part is None:
            return W
        dim, start, length = self.part
        if not self.period:
            return W.narrow(dim, start, length)
        return W.unflatten(dim, (-1, self.period)).narrow(dim + 1, start, length).flatten(dim, dim + 1)

    def unfolded(self, W: Tensor) -> Tensor:
        """Returns what stands at the index as (m, n), parts of a fused matrix together."""
        return W.movedim(self.first, 0).flatten(0, self.flatten - 1).flatten(1) if self.flatten else W


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
          of four or more dimensions; Keras's (*kernel, in, out) is (rest, out). Where a kernel has more dimensions
          than its convolution, the leading ones count kernels: (1, out, in, k, k) is one matrix (out, in k k), and
          (b, out, in, k, k) is b of them;
        - queries, keys and values (3, ...) in a parameter that is named after them are three matrices [q], [k], [v]
          of the model's width by what all heads have;
        - one of three dimensions (b, m, n) is a stack of b matrices, named [i], where b is at most min(m, n), else one
          matrix (b, m n): XLNet's weights (d, heads, head_dim);
        - whatever is named after experts is a stack.

        A single row or column is no matrix, nor is a table (1, ...) that is broadcast, as position embeddings are (of
        1119 models of transformers, timm, diffusers and torchvision none has a layer's weight of such a shape but
        kernels), a bias, or a gain: what a module whose class is named a Norm has of its own, and what is itself named
        after a scale or a shift. Of a parametrized weight the originals are listed, for computing the weight itself
        may change state (spectral_norm's); nothing here computes it. Its name is the weight's, with a part
        [original0] where there are several. Where computing changes nothing (weight_norm),
        `sosd_fast.svdvals(module.weight)` measures the weight itself.

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


def _matrices_in(place: Place, split: Mapping[str, int | Sequence[int]], read: Reader | None) -> list[Matrix] | str:
    """The matrices in a parameter of a model, or why it holds none."""
    owner = place.owner
    layer = isinstance(owner, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)
    if not layer and any(re.search(r"Norm(\dd)?$", base.__name__) for base in type(owner).__mro__):
        return "is the gain of a normalization"
    if is_scale(owner, place.own_name):
        return "is the scale of another parameter"
    fused = fused_in(place.weight, place.parameter.shape, place.around)
    kernel = None if isinstance(owner, nn.ParameterDict) else _kernel_of(owner, place.parameter.shape)  # Keras's
    return matrices_of(
        place.weight, place.parameter, split, kernel=kernel, fused=fused, read=read, original=place.original
    )


def _kernel_of(owner: nn.Module, shape: torch.Size) -> int:
    """How many dimensions a kernel (out, in, *size) has in a module; 0 where that is no convolution."""
    if isinstance(owner, nn.modules.conv._ConvNd):
        return len(shape)
    size = getattr(owner, "kernel_size", None)
    if size is None or not any(hasattr(owner, name) for name in ("stride", "padding", "dilation", "in_channels")):
        return 0
    told = re.search(r"([123])d", type(owner).__name__, re.IGNORECASE)
    if isinstance(size, Sequence):
        sizes = len(size)
    elif told:
        sizes = int(told[1])
    else:
        sizes = len(list(itertools.takewhile(lambda length: length == size, reversed(shape[2:]))))
    return min(2 + sizes, len(shape)) if sizes else len(shape)


def _kernel_by_shape(shape: tuple[int, ...]) -> int:
    """The same for a kernel of which only its name is known to be a convolution's."""
    if len(shape) == 5 and shape[3] == shape[4] and (shape[2] > 16 or (shape[0] == 1 and shape[2] != shape[3])):
        return 4  # no kernel is so long in time, nor has a video's convolution one output
    return len(shape)


def _is_gain(name: str, of_module: bool) -> bool:
    """Whether a weight scales or shifts what passes, by its own name, or by that of what has it where no module can."""
    *path, own = name.split(".")
    if re.fullmatch(r"(\w+_)?(gamma|beta|alpha|gain|scale|shift)s?(_?\d+|_\w+)?", own):
        return True
    # Of two dimensions it is one a head, which q_norm and its kin have.
    return not of_module and bool(path) and re.fullmatch(r"\w+_norm\d*", path[-1]) is not None


def matrices_of(
    name: str,
    parameter: Tensor,
    split: Mapping[str, int | Sequence[int]] = DEFAULT_SPLIT,
    *,
    kernel: int | None = None,
    fused: Fused | str | None = None,
    read: Reader | None = None,
    original: str = "",
) -> list[Matrix] | str:
    """Lists the matrices inside one parameter, as `find_matrices` does.

    Args:
        name: of the weight, without its original.
        parameter: of two or more dimensions.
        split: see `find_matrices`.
        kernel: how many dimensions a kernel of its module has, 0 where that is no convolution; None where no module
            can be asked, so that names tell.
        fused: how it holds queries, keys and values, for the default split; a reason leaves it whole.
        read: returns its values, where they are not plain.
        original: which of the originals of a parametrized weight.

    Returns:
        The matrices, or why there are none.
    """
    shape, lower = parameter.shape, name.lower()
    if re.search(r"(^|_)bias(es)?(_|$)", lower.rpartition(".")[2]):
        return "is a bias"
    if _is_gain(lower, of_module=kernel is not None):
        return "is a gain"
    stacked = re.search(r"expert|(^|[._])moe", lower) is not None
    out_last = False  # Keras and Flax call (*kernel, in, out) kernel
    if kernel is None:
        convolution = "conv" in ".".join(lower.split(".")[-2:])
        out_last = lower.endswith("kernel") and (convolution or len(shape) > 3)
        kernel = len(shape) if out_last else _kernel_by_shape(shape) if convolution else 0
    # Of the dimensions, so many count matrices; of the rest, so many make the rows, the first of them at a place.
    ndim, counted, rows, first, labels = parameter.ndim, 0, 1, 0, None
    if ndim == 2:
        rows = 0
    elif kernel:
        counted = ndim - kernel
        rows = ndim - (2 if "depthwise" in lower else 1) if out_last else 1
    elif stacked:
        counted, rows = ndim - 2, 0
    elif shape[0] == 3 and split is DEFAULT_SPLIT and not isinstance(fused, str) and is_fused(name):
        counted, labels = 1, "qkv"
        width = max(range(ndim - 1), key=lambda i: (shape[1 + i], i == ndim - 3))
        rows, first = (0, 0) if ndim == 3 else (ndim - 2, 0) if width == ndim - 2 else (1, width)
    elif shape[0] == 1:
        return "has a single row or column" if math.prod(shape) == max(shape) else "is a table that is broadcast"
    elif ndim == 3 and shape[0] <= min(shape[1:]):
        counted, rows = 1, 0
    indices = list(itertools.product(*map(range, shape[:counted])))
    one = Matrix("", parameter, index=indices[0], flatten=rows, first=first, read=read)
    m, n = one.unfolded(torch.empty(shape[counted:], device="meta")).shape
    if min(m, n) < 2:
        return "has a single row or column"
    if counted and (len(indices) > 1 or stacked):
        shown = [labels[i[0]] if labels else ",".join(map(str, i)) for i in indices]
        found = [(label, index, None, 0) for label, index in zip(shown, indices, strict=True)]
    else:
        if kernel and not (isinstance(fused, Fused) and m * n == math.prod(shape[:2])):
            fused = "a convolution does not tell the order of its outputs"
        found = [(label, indices[0], part, period) for label, part, period in _parts(name, (m, n), split, fused)]
    whole = name + (original and f"[{original}]")
    return [
        dataclasses.replace(one, name=f"{whole}{label and f'[{label}]'}", index=index, part=part, period=period)
        for label, index, part, period in found
    ]


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
    names = name, without_adapter(name)
    parts = next((parts for pattern, parts in split.items() if any(fnmatchcase(n, pattern) for n in names)), None)
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
