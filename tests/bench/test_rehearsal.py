"""What a GPU has to prove runs on a stub of one, line by line, and every bar is spoken of."""

import json

import pytest
from prepared import run

from bench import gpu

pytest.importorskip("triton")

FRESH = """
import sys, triton
for name in [name for name in sys.modules if name.split(".")[0] in ("sosd_fast", "kernels", "training", "bench")]:
    del sys.modules[name]  # those were imported without Triton, and have no kernels
"""


def fresh(code: str, *arguments: str):
    done = run(FRESH + code, *arguments, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_every_benchmark_runs_on_the_stub():
    said = fresh(
        """
from bench import gpu, rehearse
for name in gpu.BARS:
    print("part", name)
    sys.argv = ["rehearse", *gpu.PARTS[name][1]]
    rehearse.main()
"""
    )
    for part in said.split("\npart ")[1:] or [said]:
        name, *lines = part.removeprefix("part ").splitlines()
        bars = [line for line in lines if line.startswith("bar: ")]
        missing = gpu.not_reached(name, bars)
        if "fast measured nothing in these steps" in part:  # within its budget, which holds nothing then
            missing = [bar for bar in missing if "fast, " not in bar]
        assert bars and not missing, name
        assert all("not measured" in line for line in bars)
        assert json.loads(next(line for line in lines if line.startswith("{")))["gate"]
        assert int(next(line for line in lines if "to compile" in line).split()[0]) > 0  # kernels were launched


def test_the_stub_is_as_strict_as_a_gpu():
    fresh(
        """
import torch
from bench import stub_gpu
from bench.rehearse import TARGET
before = torch.cuda.is_available, torch.version.cuda, torch.Generator
with stub_gpu.installed(TARGET) as launches:
    from sosd_fast.spectra.svdvals import spectra
    net = torch.nn.Linear(8, 8, device="cuda")
    W = net.weight.detach()
    assert torch.cuda.is_available() and W.is_cuda and W.device == torch.device("cuda:0") and net.weight.is_cuda
    assert not W.cpu().is_cuda and W.cpu().cuda().is_cuda and torch.zeros(2, device=W.device).is_cuda
    assert (W @ W).is_cuda and not torch.empty(8, 8).copy_(W, non_blocking=True).is_cuda
    for wrong in (lambda: W + torch.ones(8, 8), lambda: net(torch.ones(8))):
        try:
            wrong()
        except RuntimeError as error:
            assert "on one device" in str(error)
        else:
            raise AssertionError("operands on two devices")
    found = spectra([W], "gram32")  # its launches, and the references' results
    assert [x.kernel.__name__ for x in launches] == [
        "_elements_kernel", "_syrk_kernel", "_correct_kernel", "_tridiagonal_kernel", "_scale_kernel", "_sturm_kernel"
    ]
    torch.testing.assert_close(found.S[0].cpu().float(), torch.linalg.svdvals(W.cpu()), rtol=1e-4, atol=1e-4)
    torch.cuda.set_sync_debug_mode("error")
    spectra([W], "gram32")
    for waits in (W.sum().item, W.cpu, lambda: W.to("cpu"), lambda: bool(W.sum() > 0)):
        try:
            waits()
        except RuntimeError as error:
            assert "synchronizing" in str(error)
        else:
            raise AssertionError("a wait")
    torch.cuda.set_sync_debug_mode("default")
assert before == (torch.cuda.is_available, torch.version.cuda, torch.Generator)
"""
    )


def test_a_record_on_the_stub_is_that_of_the_host():
    fresh(
        """
import dataclasses, math, torch
from bench import stub_gpu
from bench.rehearse import TARGET
import sosd_fast

def record(device):
    W = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))
    net = torch.nn.Linear(20, 16, bias=False, device=device)
    with torch.no_grad():
        net.weight.copy_(W)
        probe = sosd_fast.track(net, optimizers=[], method="full", k=5)
        net.weight.add_(W[:, torch.arange(19, -1, -1)].to(device), alpha=0.01)
    probe.step()
    probe.flush()
    return dataclasses.asdict(probe.latest()["weight"])

host = record("cpu")
with stub_gpu.installed(TARGET) as launches:
    found = record("cuda")
    assert any(x.kernel.__name__ == "_singular_distribution_kernel" for x in launches)
compared = {name for name, value in host.items() if isinstance(value, float)} - {"sd_error"}
assert compared > {"sd_variation", "sd_variation_topk", "cosine", "nuclear_norm", "effective_rank"}
for name in compared:
    assert math.isclose(found[name], host[name], rel_tol=1e-3), (name, found[name], host[name])
"""
    )


def test_the_model_reads_loops_and_keeps_its_order():
    """A loop's turn takes as long as its control bits say, and longer where loads come from further away."""
    rows = json.loads(
        fresh(
            """
import ast, json, torch
from bench import timing_model as model
from bench.stub_gpu import launches
from triton.backends.compiler import GPUTarget
from sosd_fast.kernels.sturm import sturm
from sosd_fast.kernels.syrk import syrk
from sosd_fast.kernels.tridiagonal import tridiagonal
with launches(GPUTarget("cuda", 90, 32)) as record:
    for r in (768, 1536):
        sturm(torch.empty(72, r, device="cuda"), torch.empty(72, r - 1, device="cuda"))
    for k in (768, 3072):
        syrk(torch.empty(72, 768, k, device="cuda"))
    for programs in (1, 3):
        tridiagonal(torch.empty(1, 256, 256, device="cuda"), programs=programs)
codes = [model.code_of(x) for x in record if x.kernel.__name__ in model.MODELS]
loop = codes[0].most("FFMA")
product = codes[2].most("HGMMA")
print(json.dumps({
    "cycles": [model.MODELS[c.launch.kernel.__name__](c)[0] for c in codes],
    "turns": [loop.cycles(latency) for latency in (model.L1, model.L2, model.HBM)],
    "stalls": sum(max(i.stall, 1) for i in loop.own), "loads": loop.count("LDG"), "products": product.count("HGMMA"),
    "turning": [[ast.unparse(x.iter) for x in model.written(c)[1]] for c in codes[4:]],
    "loops": len(codes[0].root.all()), "together": [c.together for c in codes],
}))
"""
        ).splitlines()[-1]
    )
    near, far, farther = rows["turns"]
    assert rows["stalls"] <= near < far < farther and rows["loads"] == 8 and rows["loops"] >= 3
    sturm, twice, product, longer, alone, shared = rows["cycles"]
    assert 1.5 <= alone / shared <= 3
    for turning in rows["turning"]:  # each loop of the reduction, and none twice
        assert len(turning) == 14 and "range(first_event, last_event)" in turning and "range(0, parts, ROWS)" in turning
    assert 2.5 <= twice / sturm <= 3.2  # twice the rows, and twice the values, in programs of twice as many
    assert 3 <= longer / product <= 4.2 and rows["products"] == 12 and rows["together"][2] == 3


def test_a_bar_that_was_not_reached_is_said():
    said = ["bar: gpt2-small: all values, ms: 9.5, at most 10: holds", "bar: gpt2-small: SD error: 1e-8"]
    assert len(gpu.not_reached("svdvals", said)) == 2
    assert all(line.endswith("not reached") for line in gpu.not_reached("svdvals", said))
    assert set(gpu.BARS) <= set(gpu.PARTS) and not gpu.not_reached("compile", [])


def test_a_graph_reads_nothing_from_the_host():
    """What is captured runs again when the host's memory is others'."""
    fresh(
        """
import torch
from bench import stub_gpu
from bench.rehearse import TARGET
with stub_gpu.installed(TARGET):
    from sosd_fast.spectra.svdvals import spectra
    shapes = (8, 12), (8, 8), (12, 8), (8, 12)  # those of one shape come together, and go back to their places
    matrices = [torch.randn(*shape, device="cuda") for shape in shapes]
    expected = spectra(matrices, "gram32")
    def refuse(*_, **__):
        raise AssertionError("numbers from the host")
    torch.cuda.is_current_stream_capturing, tensor, torch.tensor = lambda: True, torch.tensor, refuse
    found = spectra(matrices, "gram32")
    torch.tensor = tensor
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
    truth = torch.stack([torch.linalg.svdvals(W.cpu()) for W in matrices])
    torch.testing.assert_close(found.S.cpu().float(), truth, rtol=1e-4, atol=1e-4)
"""
    )
