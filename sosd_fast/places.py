"""Where a model's parameters stand, under the names that people know."""

import itertools
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

# In the names of saved weights, where no module can be asked: torch.compile, Fabric, FSDP, activation checkpointing,
# Keras.
_PRIVATE = (
    r"_(orig_mod|forward_module|original_module|fsdp_wrapped_module|checkpoint_wrapped_module|functional|"
    r"torch_params)\."
)
_WRAPPERS = re.compile(rf"^(module\.|{_PRIVATE})+|(?<=\.)({_PRIVATE})+")

_ADAPTED = "base_layer"  # what an adapter calls the layer in whose place it stands: peft's LoRA and its kin


class Place(NamedTuple):
    """A parameter in a model.

    Attributes:
        weight: the name that people know, without what wraps a module or parametrizes a weight.
        original: which of the originals of a parametrized weight; empty where there is one.
        parameter: the parameter.
        own_name: of the weight in its module.
        owner: the module that uses the weight.
        around: the module around the owner, and around the adapter that has it.
    """

    weight: str
    original: str
    parameter: Tensor
    own_name: str
    owner: nn.Module
    around: nn.Module

    @property
    def name(self) -> str:
        """The weight's name, with the part of it that the parameter is."""
        return self.weight + (self.original and f"[{self.original}]")

    def fits(self, pattern: str) -> bool:
        """Whether a shell pattern fits the weight's name, or that with a dot and the original."""
        return any(fnmatchcase(name, pattern) for name in (self.weight, f"{self.weight}.{self.original}"))


def places_of(model: nn.Module) -> Iterator[Place]:
    """Yields the places of a model's parameters in its order, tied ones once."""
    wraps: dict[tuple[int, str], bool] = {}
    for name, parameter in model.named_parameters():
        *path, own = name.split(".")
        modules, shown, original = [model], list[str](), ""
        for i, part in enumerate(path):
            module = modules[-1]
            if part not in module._modules:  # the model names its parameters in a way of its own
                shown += path[i:]
                break
            child = module._modules[part]  # TorchScript's mapping has no get
            assert child is not None  # a parameter lies in it
            if isinstance(child, ParametrizationList) and own.startswith("original") and part == path[-1]:
                shown.pop()  # parametrizations
                modules.pop()
                own, original = part, own.removeprefix("original") and own
                break
            key = id(module), part
            if key not in wraps:
                wraps[key] = _wraps(module, part, child, outermost=not shown)
            if wraps[key]:
                modules[-1] = child
            else:
                modules.append(child)
                shown.append(part)
        adapters = len(list(itertools.takewhile(_ADAPTED.__eq__, reversed(shown))))
        around = modules[max(-2 - adapters, -len(modules))]
        shown = [part for part in shown if part != "parametrizations"]  # whose modules have parameters of their own
        *path, own = own.split("/")  # Keras keeps the weights of all layers in one ParameterDict, by their paths
        shown += path
        yield Place(".".join([*shown, own]), original, parameter, own, modules[-1], around)


def without_adapter(name: str) -> str:
    """Returns the name that a weight has in the same model without adapters."""
    return ".".join(part for part in name.split(".") if part != _ADAPTED)


def plain_name(key: str) -> tuple[str, str]:
    """Returns a weight's name and its original from the name that a state dict has, as `places_of` does."""
    name = _WRAPPERS.sub("", key).replace("/", ".")
    found = re.fullmatch(r"(.*?)parametrizations\.(\w+)\.original(\d*)", name)
    if found:
        return found[1] + found[2], found[3] and f"original{found[3]}"
    return name.replace("parametrizations.", ""), ""


def _wraps(module: nn.Module, part: str, child: nn.Module, outermost: bool) -> bool:
    """Whether a module only wraps its child, which then stands for it.

    It has no parameters but the child's, holds it under a private name or as `module`, and hands on what is asked of
    it, or is known not to. Whatever wraps the whole model as `module` counts too: copies with averaged weights. So does
    what keeps its parameters in a private ParameterDict: Keras's models.
    """
    if part != "module" and not part.startswith("_"):
        return False
    parallel = isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
    hands_on = type(module).__getattr__ is not nn.Module.__getattr__
    inner = ((part, child), *child.named_children())
    keeps = any(name.startswith("_") and isinstance(m, nn.ParameterDict) for name, m in inner)
    if not (parallel or hands_on or keeps or (outermost and part == "module")):
        return False
    inside = set(map(id, child.parameters()))
    return all(id(p) in inside for p in module.parameters())
