"""Hooks on optimizer steps that are compiled: they break the graph, or, where it must be whole, are told after it."""

# Dynamo has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import itertools
import logging
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

Hook = Callable[[Optimizer, Any, Any], None]
_numbers = itertools.count()
_said: set[str] = set()  # versions of torch whose compiler is not understood

log = logging.getLogger("sosd_fast")


class Mailbox(types.ModuleType):
    """Receives the optimizers whose steps were in a whole graph, each time after the graph has run.

    A whole graph calls no Python. But what the code that was traced stores in a module, dynamo stores there again after
    each run of the graph, by a plain assignment. This module passes on what is assigned to it.

    Args:
        receive: called with an optimizer that has stepped, and with those inside of whose `step` it did, the innermost
            first.
    """

    def __init__(self, receive: Callable[[Optimizer, Sequence[Optimizer]], None]):
        super().__init__("mailbox")
        self.__dict__.update(receive=receive, inner=threading.local())

    def __setattr__(self, name: str, value: Any):
        depth = int(name.split("_")[1])
        stepped: list[tuple[int, Optimizer]] = self.__dict__["inner"].__dict__.setdefault("stepped", [])
        stepped.append((depth, value))
        if depth > 1:
            return  # the step that this one was inside of comes next
        self.__dict__["inner"].stepped = []
        for i, (depth, optimizer) in enumerate(stepped):
            outer: list[Optimizer] = []
            for other_depth, other in stepped[i + 1 :]:
                if other_depth < depth:
                    outer.append(other)
                    depth = other_depth
            self.__dict__["receive"](optimizer, outer)


def compilable(hook: Hook, is_step: Callable[[types.CodeType], bool], mailbox: Mailbox | None = None) -> Hook:
    """Returns a hook whose call breaks the graph of a compiled `step`; in a whole graph the mailbox is told instead.

    Args:
        hook: called with the graph broken.
        is_step: whether code is that which calls the hooks of a step.
        mailbox: told of the optimizer after each run of a whole graph.
    """
    disable: Any = torch.compiler.disable  # dynamo does not trace into a disabled function, nor guards what it reads
    constant: Any = torch.compiler.assume_constant_result  # called while dynamo traces
    call, label = disable(hook), constant(lambda: _label(is_step))

    def compiled_or_not(optimizer: Optimizer, args: Any, kwargs: Any):
        name = label() if torch.compiler.is_dynamo_compiling() else None
        if name is None:
            call(optimizer, args, kwargs)
        elif name and mailbox is not None:
            setattr(mailbox, name, optimizer)

    return compiled_or_not


def _label(is_step: Callable[[types.CodeType], bool]) -> str | None:
    """Says what to do with a hook that dynamo meets.

    It asks for what torch 2.13 has, some of which earlier ones lack: a frame without a `parent` is the outermost.

    Returns:
        A new name for a step in a graph that must stay whole, as with fullgraph=True; None where the graph may be
        broken; "" where this version of dynamo does not tell.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tx: Any = InstructionTranslator.current_tx()
        if not (tx.one_graph or getattr(tx, "error_on_graph_break", False)):
            return None
        depth, tx = 0, tx.output.current_tx
        while tx is not None:  # from the code being traced to its callers
            depth, tx = depth + is_step(tx.f_code), getattr(tx, "parent", None)
    except (AttributeError, ImportError):
        if torch.__version__ not in _said:
            _said.add(torch.__version__)
            log.warning(
                "sosd_fast: the compiler of torch %s does not tell whether a compiled optimizer step must stay one "
                "graph, so steps that are compiled are not counted. Pass optimizers=[] and call Probe.step after each.",
                torch.__version__,
            )
        return ""  # to break a graph that must be whole would end the training
    return f"step_{depth}_{next(_numbers)}"
