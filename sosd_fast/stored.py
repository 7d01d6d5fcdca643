"""How a parameter's values can be read: as they are, through its own dequantisation, by a scale, or not at all.

Of a stack of matrices only the one that is asked for is converted, where its type can be sliced; else the whole stack
is, once while `keeping_stack` lasts. So no more than one parameter's values are there at a time.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

Reader = Callable[[Tensor, tuple[int, ...]], Tensor]  # of a parameter and an index into its leading dimensions

# What types of quantised weights call their conversion to plain values: torchao's, quanto's; torchao's NF4Tensor.
_CONVERSIONS = ("dequantize", "get_original_weight")


def reader_of(parameter: Tensor, owner: nn.Module, own_name: str) -> Reader | str | None:
    """Says how the values of a parameter of two or more dimensions can be read.

    Args:
        parameter: any.
        owner: the module that has it, where scales of eight-bit values are looked for.
        own_name: under which the owner has it.

    Returns:
        None where the values can be read as they are; a function that returns them as a plain tensor of the same
        shape, and changes nothing; or why they cannot be read.
    """
    if torch.nn.parameter.is_lazy(parameter):
        return "is not initialized"
    if parameter.ndim < 2:
        return None
    if parameter.is_meta:
        return "is on the meta device"
    local = parameter
    if hasattr(parameter, "placements"):  # a DTensor, whose part here must be plain
        local = parameter.detach().to_local()  # pyright: ignore[reportAttributeAccessIssue]
    if not _dispatches_plainly(type(local)) or local.is_quantized:
        return _conversion(local) if local is parameter else f"is a {type(local).__name__}"
    if local.layout != torch.strided:
        return f"has layout {local.layout}"
    if local.is_floating_point() and local.dtype.itemsize == 1 and local is parameter:
        return _by_scale_beside(local, owner, own_name)
    if not local.is_floating_point() or local.dtype.itemsize < 2:
        return f"has dtype {local.dtype}"
    return None


def _conversion(parameter: Tensor) -> Reader | str:
    """The conversion that a type of tensor offers, where it gives what is needed."""
    kind, failed = type(parameter), ""
    for name in _CONVERSIONS:
        own = getattr(kind, name, None)
        if own is None or (own is getattr(Tensor, name, None) and not parameter.is_quantized):
            continue
        read = functools.partial(_converted, name)
        try:
            values = read(parameter, ())
        except Exception as error:  # whatever a foreign type raises
            failed = failed or f", whose {name}() raises {type(error).__name__}"
            continue
        if _is_plain(values) and values.shape == parameter.shape:
            return functools.partial(_converted_slice, name) if _can_be_sliced(read, parameter, values) else read
    return f"is a {kind.__name__}{failed}"


_stack: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("stack", default=None)


@contextmanager
def keeping_stack() -> Iterator[None]:
    """While it lasts, the stack that was converted last is kept for its other matrices; nobody may change it."""
    before = _stack.set([])
    try:
        yield
    finally:
        _stack.reset(before)


def _converted(name: str, parameter: Tensor, index: tuple[int, ...]) -> Tensor:
    kept = _stack.get() if index else None
    if kept and kept[0][0] is parameter:
        return kept[0][1][index]
    if kept:
        kept.clear()  # before the next one is converted
    with torch.no_grad():
        values = getattr(parameter, name)().detach()
    if kept is not None:
        kept.append((parameter, values))
    return values[index] if index else values


def _converted_slice(name: str, parameter: Tensor, index: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return getattr(parameter[index] if index else parameter, name)().detach()


def _can_be_sliced(read: Reader, parameter: Tensor, values: Tensor) -> bool:
    """Whether a slice of a stack converts to the slice of what the stack converts to."""
    if parameter.ndim < 3:
        return False
    read = functools.partial(_converted_slice, *read.args)  # pyright: ignore[reportFunctionMemberAccess]
    try:
        return all(torch.equal(read(parameter, (i,)), values[i]) for i in {0, len(values) - 1})
    except Exception:  # whatever a foreign type raises
        return False


def _is_plain(values: object) -> bool:
    if not isinstance(values, Tensor) or not _dispatches_plainly(type(values)) or values.layout != torch.strided:
        return False
    return values.is_floating_point() and values.dtype.itemsize >= 2


def scale_names(own_name: str) -> tuple[str, ...]:
    """The names that the scale of a weight of eight-bit floats has beside it: what its values are multiplied by."""
    return f"{own_name}_scale", f"{own_name}_scale_inv", f"scale_{own_name}"  # DeepSeek's _inv is to multiply by, too


def is_scale(owner: nn.Module, own_name: str) -> bool:
    """Whether a parameter is the scale of another one of its module."""
    return any(p is not None and p.dtype.itemsize == 1 and own_name in scale_names(name) for name, p in _held(owner))


def by_scale(shape: torch.Size, scale: Tensor, blocks: Sequence[int] | None = None) -> Reader | None:
    """The multiplication of eight-bit floats of a shape by their scale; None where it is not certain what scales what.

    Args:
        shape: of the floats.
        scale: one value, one a row, or one a block.
        blocks: the sizes of blocks along the last dimensions, where they are known; else they are powers of two.
    """
    repeats = _repeats(shape, scale.shape, tuple(blocks) if isinstance(blocks, list | tuple) else ())
    return None if repeats is None else functools.partial(_scaled, scale.detach(), repeats)


def _held(owner: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [*owner._parameters.items(), *owner._buffers.items()]


def _by_scale_beside(parameter: Tensor, owner: nn.Module, own_name: str) -> Reader | str:
    """Multiplication by the one scale that stands beside eight-bit floats, where its shape fits."""
    names = scale_names(own_name)
    scales = [scale for name, scale in _held(owner) if name in names and scale is not None]
    why = f"has dtype {parameter.dtype} and "
    if len(scales) != 1:
        return why + ("no scale beside it" if not scales else "more than one scale beside it")
    blocks = getattr(owner, "block_size", None) or getattr(owner, "weight_block_size", None)
    read = by_scale(parameter.shape, scales[0], blocks) if _is_plain(scales[0]) else None
    return read or f"{why}a scale that does not tell its blocks"


def _repeats(shape: torch.Size, scales: torch.Size, blocks: tuple[int, ...]) -> tuple[int, ...] | None:
    """How many entries share a scale, along each dimension, 0 where all or none do; None where that is not certain."""
    if scales.numel() == 1:
        return (0,) * len(shape)
    if len(scales) == len(shape) - 1 and scales == shape[:-1]:  # one a row
        scales = torch.Size([*scales, 1])
    if len(scales) != len(shape):
        return None
    blocks = (0,) * (len(shape) - len(blocks)) + blocks
    repeats = []
    for size, count, block in zip(shape, scales, blocks, strict=False):
        if count in (1, size):
            repeats.append(0)
        elif isinstance(block, int) and block > 0 and -(-size // block) == count:
            repeats.append(block)
        elif size % count == 0 and (size // count).bit_count() == 1:
            repeats.append(size // count)
        else:
            return None
    return tuple(repeats)


def _scaled(scale: Tensor, repeats: tuple[int, ...], parameter: Tensor, index: tuple[int, ...]) -> Tensor:
    values = parameter.detach()
    scale = scale.reshape(*scale.shape, *(1,) * (values.ndim - scale.ndim)) if scale.numel() > 1 else scale.reshape(())
    for place in index:  # one matrix of a stack
        if scale.ndim:
            block = repeats[0] or (1 if scale.shape[0] > 1 else len(values))
            scale, repeats = scale[place // block], repeats[1:]
        values = values[place]
    values, scale = values.float(), scale.float()
    if not scale.ndim:
        return values * scale
    for dim, block in enumerate(repeats):
        if block:
            scale = scale.repeat_interleave(block, dim).narrow(dim, 0, values.shape[dim])
    return values * scale


def _dispatches_plainly(kind: type) -> bool:
    """Whether operations on a subclass see its memory as they see a Tensor's."""

    def function(of: type, name: str):
        found = getattr(of, name)
        return getattr(found, "__func__", found)  # a class method is bound anew for each class

    return all(
        function(kind, name) in {function(Tensor, name), function(nn.Parameter, name)}
        for name in ("__torch_dispatch__", "__torch_function__")
    )
