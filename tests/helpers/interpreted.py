"""One thread, and Triton's interpreter where there is no GPU, made faster; imported before the first test."""

import functools
import importlib.util
import math
import os

import numpy as np
import torch

if importlib.util.find_spec("triton"):  # before sosd_fast, which then defines its kernels
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    import triton.language
    from triton import knobs
    from triton._C.libtriton import ir
    from triton.language import core as tl_core
    from triton.runtime import interpreter

    import sosd_fast  # noqa: F401

    knobs.runtime.interpret = not torch.cuda.is_available()
    os.environ.pop("TRITON_INTERPRET", None)  # not for the processes that tests start

    def patch_tensor(tensor, scope, patch=interpreter._patch_lang_tensor):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # NumPy 2.4 refuses int(array([1]))

    def create_dot(self, a, b, d, precision, *rest, dot=interpreter.InterpreterBuilder.create_dot):
        def as_multiplied(t):
            bits = t.data
            if t.dtype == triton.language.bfloat16:  # kept as bits, which Triton 3.6 multiplies as integers
                bits = bits.astype(np.uint32) << 16
            elif t.dtype == triton.language.float32 and precision == ir.INPUT_PRECISION.TF32:
                bits = bits.view(np.uint32) & 0xFFFFE000  # what tensor cores read
            else:
                return t
            return interpreter.TensorHandle(bits.view(np.float32), triton.language.float32)

        return dot(self, as_multiplied(a), as_multiplied(b), d, precision, *rest)

    def patch_once(fn, patch=interpreter._patch_lang, done=set()):  # noqa: B006
        # At every call of every function Triton puts its language in the interpreter's place: half of the time.
        modules = frozenset(
            name for name, value in fn.__globals__.items() if value is triton.language or value is tl_core
        )
        if modules not in done:
            done.add(modules)
            patch(fn)
        return interpreter._LangPatchScope()  # and nothing to put back

    # Every value makes anew what follows from its shape and type: two fifths of the time that is left.
    @functools.cache
    def size_and_shape(shape):
        return tl_core.constexpr(math.prod(shape)), tl_core.tuple([tl_core.constexpr(side) for side in shape])

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = size_and_shape(type.shape if type.is_block() else ())

    def np_dtype(type, find=interpreter._get_np_dtype, known={}):  # noqa: B006
        name = type.scalar.name
        if name not in known:
            known[name] = find(type)
        return known[name]

    def block_type(_, scalar, shape, known={}):  # noqa: B006
        key = scalar.name, *shape
        if key not in known:
            known[key] = tl_core.block_type(scalar, shape)
        return known[key]

    def equal(self, other, compare=tl_core.tuple.__eq__):
        return same if self is other else compare(self, other)

    if not torch.cuda.is_available():  # these are the compiler's, too
        same = tl_core.constexpr(True)
        tl_core.tuple.__eq__ = equal
        tl_core.block_type.with_element_ty = lambda self, scalar: block_type(None, scalar, self.shape)
        tl_core.tensor.__init__ = init_tensor
    interpreter.InterpreterBuilder.get_block_ty = block_type
    interpreter._get_np_dtype = np_dtype
    interpreter._patch_lang = patch_once
    interpreter._patch_lang_tensor = patch_tensor
    interpreter.InterpreterBuilder.create_dot = create_dot

# Small matrices, and parallel test runs must not fight over cores; beside a GPU they are large, and alone.
torch.set_num_threads(min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
