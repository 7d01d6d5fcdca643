"""Where a model holds the parameters that a probe follows, so that one that was replaced is seen at once."""

import operator
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

_get: Callable[..., object] = dict[str, Any].get


class Holders:
    """The entries of modules that hold certain parameters, and those that hold such modules.

    They are looked at in C, an entry in 50 ns, so that a thousand of them may be asked after every step.

    Args:
        model: whose modules hold them; None for one that is gone.
        followed: ids of parameters.
    """

    def __init__(self, model: nn.Module | None, followed: Collection[int]):
        self._entries: list[tuple[dict[str, Any], str, object]] = []
        self._visited: dict[int, bool] = {}  # whether modules hold any
        if model is not None:
            self._visit(model, followed)
        self._visited = {}
        self._dicts = [entries for entries, _, _ in self._entries]
        self._names = [name for _, name, _ in self._entries]
        self._values = [value for _, _, value in self._entries]

    def same(self) -> bool:
        """Whether they hold what they held."""
        return all(map(operator.is_, map(_get, self._dicts, self._names), self._values))

    def _visit(self, module: nn.Module, followed: Collection[int]) -> bool:
        """Notes the entries of a module and of those inside it; returns whether there are any."""
        if id(module) not in self._visited:
            self._visited[id(module)] = False  # a module may lead back to itself
            parameters, children = (_entries(module, name) for name in ("_parameters", "_modules"))
            found = [(parameters, name, p) for name, p in parameters.items() if id(p) in followed]
            for name, child in list(children.items()):
                if isinstance(child, nn.Module) and self._visit(child, followed):
                    found.append((children, name, child))
            self._entries += found
            self._visited[id(module)] = bool(found)
        return self._visited[id(module)]


def _entries(module: nn.Module, name: str) -> Any:
    """The dict of a module; an empty one where the module has a type of its own for it, as TorchScript's have."""
    entries: Any = getattr(module, name, None)
    return entries if issubclass(type(entries), dict) else dict[str, Any]()
