"""A launch like one before takes its code; one that differs in what code is compiled for asks Triton."""

import sys

import pytest
import torch

tl = pytest.importorskip("triton.language")

from sosd_fast.kernels.launch import launch  # noqa: E402

NAMES = ["parts_ptr", "firsts_ptr", "out_ptr", "size", "BLOCK"]


def _kernel(parts_ptr, firsts_ptr, out_ptr, size, BLOCK: "tl.constexpr"):  # noqa: ARG001  # pyright: ignore
    pass


def _short_kernel(out_ptr, size):  # noqa: ARG001
    pass


class Code:
    """Compiled code on the stub: what it is launched with."""

    packed_metadata, function = (), None

    def __init__(self):
        self.taken, self.streams = [], []

    def launch_metadata(self, *_):
        return None

    def run(self, *given):
        self.taken.append((given[:3], given[-len(NAMES) :]))
        self.streams.append(given[3])

    def __getitem__(self, grid):
        return lambda *given, stream: self.run(*grid, stream, *given)


def compiled(function):
    """A kernel with a list of the codes that Triton was asked to compile."""
    from triton.runtime.jit import JITFunction

    found = JITFunction(function)
    found.codes = []  # pyright: ignore[reportAttributeAccessIssue]
    return found


@pytest.fixture
def kernel(monkeypatch):
    """A kernel on a stub of a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from bench import stub_gpu

    found = compiled(_kernel)

    def compile(self, key, *_):
        self.codes.append(Code())
        self.device_caches[90][0][key] = self.codes[-1]
        return self.codes[-1]

    monkeypatch.setattr(sys.modules["sosd_fast.kernels.launch"], "_known", {})
    with stub_gpu.launches(GPUTarget("cuda", 90, 32), "cpu"):
        monkeypatch.setattr(JITFunction, "_do_compile", compile)
        yield found
        monkeypatch.undo()


def test_arguments_come_in_the_order_of_the_kernel(kernel, monkeypatch):
    asked, run = [], type(kernel).run
    monkeypatch.setattr(type(kernel), "run", lambda self, *a, **k: asked.append(self) or run(self, *a, **k))
    for i in range(3):
        out, parts, firsts = torch.empty(8), torch.empty(8), torch.zeros(2, dtype=torch.int64)
        numbers = {"BLOCK": 1024, "size": 7, "num_warps": 4}
        launch(kernel, (1 + i % 2,), out_ptr=out, **numbers, parts_ptr=parts, firsts_ptr=firsts)
        grid, given = kernel.codes[0].taken[-1]
        assert grid == (1 + i % 2, 1, 1) and given[0] is parts and given[1] is firsts and given[2] is out
        assert given[3:] == (7, 1024)
    assert len(kernel.codes) == 1 and len(asked) == 2 and len(kernel.codes[0].taken) == 3


def test_what_code_is_compiled_for_is_told_apart(kernel):
    given = {"parts_ptr": torch.empty(8), "firsts_ptr": torch.zeros(2, dtype=torch.int64), "out_ptr": torch.empty(8)}
    numbers = {"size": 7, "BLOCK": 1024, "num_warps": 4}

    def asked(**changed) -> int:
        launch(kernel, (1,), **given | numbers | changed)
        return len(kernel.codes)

    assert [asked(), asked(), asked(parts_ptr=torch.empty(9))] == [1, 1, 1]
    assert asked(parts_ptr=torch.empty(9)[1:]) == 2  # 4 bytes off
    assert asked(parts_ptr=torch.empty(8, dtype=torch.float64)) == 3
    assert asked(BLOCK=512) == 4 and asked(num_warps=8) == 5
    assert asked() == 5 and [len(code.taken) for code in kernel.codes] == [4, 1, 1, 1, 1]


def test_kernels_share_tensors_and_the_stream_of_their_launcher(kernel, monkeypatch):
    """Of kernels that were launched before; each takes the tensors that it has names for."""
    short, module = compiled(_short_kernel), sys.modules["sosd_fast.kernels.launch"]
    tensors = {"parts_ptr": torch.empty(8), "firsts_ptr": torch.zeros(2, dtype=torch.int64), "out_ptr": torch.empty(8)}
    driver = type(sys.modules["triton"].runtime.driver.active)
    for stream in (0, 5, 7):
        monkeypatch.setattr(driver, "get_current_stream", lambda *_, stream=stream: stream)
        both = module.Launcher(**tensors)
        both(kernel, (3,), size=7, BLOCK=1024, num_warps=4)
        both(short, (2, 4), size=9)
        assert len(kernel.codes) == len(short.codes) == 1
        (long_code,), (short_code,) = kernel.codes, short.codes
        assert long_code.streams[-1] == short_code.streams[-1] == stream
        (grid, given), (short_grid, rest) = long_code.taken[-1], short_code.taken[-1]
        assert grid == (3, 1, 1) and [*map(id, given)] == [*map(id, [*tensors.values(), 7, 1024])]
        assert short_grid == (2, 4, 1) and rest[-2] is tensors["out_ptr"] and rest[-1] == 9
