"""Reads the code of Triton's compiler, TTGIR, into the operations that `ttsem` runs."""

import functools
import re
import tempfile

import triton
from triton._C.libtriton import ir, nvidia
from ttsem import mlir
from ttsem.ir_types import Module

OURS = re.compile(r'"([^"]*)":(\d+):\d+')


def generic(text: str) -> str:
    """TTGIR in MLIR's generic form, which is the same for all operations."""
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(text)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    # MLIR prints what is not valid in its generic form; Triton's wheel has no other way to ask for that. A function
    # whose only block does not end makes the module invalid, and changes nothing of the kernel.
    builder = ir.builder(context)
    unfinished = builder.get_or_insert_function(module, "unfinished", builder.get_function_ty([], []), "private", False)
    module.push_back(unfinished)
    unfinished.add_entry_block()
    found = str(module)
    if '"builtin.module"' not in found:
        raise RuntimeError(f"Triton {triton.__version__} printed a module that is not valid in the short form.")
    return found


@functools.lru_cache(maxsize=4)
def parsed(text: str) -> Module:
    """TTGIR as operations; the location of each is the line of the kernel that it comes from."""
    text = generic(text)
    aliases = dict(re.findall(r"^#(loc\d*) = loc\((.*)\)$", text, re.MULTILINE))

    @functools.cache
    def line(name: str) -> str:
        raw = aliases.get(name, "")
        for path, number in OURS.findall(raw):
            if "/triton/" not in path:
                return f"{path.rsplit('/')[-1]}:{number}"
        return next(filter(None, map(line, re.findall(r"#(loc\d*)", raw))), "")

    text = re.sub(r"loc\(#(loc\d*)\)", lambda found: f'loc("{line(found[1])}")', text)
    layouts = dict(re.findall(r"^#(\w+) = (#.*)\n", text, re.MULTILINE))
    text = re.sub(r"^#\w+ = .*\n", "", text, flags=re.MULTILINE)

    def whole(part: str) -> str:
        return re.sub(r"#(\w+)\b(?!\.)", lambda found: layouts.get(found[1], found[0]), part)

    for name, layout in layouts.items():  # the parent of a layout comes before it
        layouts[name] = whole(layout)
    return mlir.parse(whole(text))
