"""Damages files of every format, and sees that each is measured or refused in a sentence.

A mutant fails where analyze raises anything but a ValueError that begins as ours do, takes more than 10 seconds, or
does what no reading does (starts a program, makes or writes a file, opens a connection), or where the process dies or
takes more memory than `MEMORY`.

    python tests/checkpoints/fuzz.py COUNT SEED    prints a line of JSON with the counts
"""

import collections
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from sosd_fast.checkpoints.analyze import analyze

MEMORY = 200 * 2**20
FORBIDDEN = ("os.", "subprocess.", "shutil.", "socket.", "ctypes.dlopen", "pty.", "webbrowser.", "builtins.input")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
# Opcodes that ask for much, or nest, share or call.
HOSTILE = [
    b"r\x00\x00\x00\x10", b"r\xff\xff\xff\x7f", b"\x8a\xff" + b"\x7f" * 255, b"\x8b\xff\xff\xff\x7f", b"2\x86" * 40,
    b"\x85" * 5000, b"(" * 3000, b"]q\x00" * 2000, b"cos\nsystem\n", b"cbuiltins\neval\n", b"\x8cX", b"R", b"b",
    b"\x8e" + b"\xff" * 8, b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b"Q", b"P1\n", b"i", b"o", b"t", b"s", b"u", b"}",
    b"\x81", b"0", b"h\x00", b"h\x05", b"I99999999999999999999\n", b"L" + b"9" * 6000 + b"L\n", b"\x95" + b"\xff" * 8,
]  # fmt: skip
NUMBERS = [0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]

executed: list[str] = []
watching = False


def watch(event, arguments):
    if not watching:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or (event.startswith(FORBIDDEN) and event not in HARMLESS):
        executed.append(f"{event}{arguments}"[:200])


def seeds(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Whole files: what to analyze, and which file of it to damage."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Conv1d(4, 5, 3), torch.nn.Linear(8, 6))
    state = model.state_dict()
    save_file(state, folder / "a.safetensors")
    packed = {"a.qweight": torch.ones(8, 32).int(), "a.qzeros": torch.ones(4, 4).int(), "a.scales": torch.rand(4, 32)}
    packed |= {"b.weight": torch.ones(16, 8).to(torch.float8_e4m3fn), "b.weight_scale_inv": torch.ones(2, 1)}
    quant_state = json.dumps({"shape": [4, 32], "blocksize": 64, "dtype": "float32"}).encode()
    packed |= {
        "c.weight": torch.ones(64, 1).byte(),
        "c.weight.absmax": torch.ones(2),
        "c.weight.quant_map": torch.ones(16),
    }
    packed["c.weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(quant_state), dtype=torch.uint8)
    save_file(packed, folder / "packed.safetensors")
    torch.save({"model": state, "optimizer": {"m": torch.ones(3, 3)}, "args": Path("a")}, folder / "zip.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "shards").mkdir()
    save_file(state, folder / "shards/model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (folder / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "shards/config.json").write_text(
        json.dumps({"model_type": "bloom", "n_head": 4, "text_config": {"a": 1}})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state, "step": 3}, checkpoint_id=folder / "dcp")
    found = {
        "safetensors": ("a.safetensors", "a.safetensors"), "quantised": ("packed.safetensors", "packed.safetensors"),
        "zip": ("zip.pt", "zip.pt"), "old": ("old.pt", "old.pt"), "dcp index": ("dcp", "dcp/.metadata"),
        "dcp data": ("dcp", "dcp/__0_0.distcp"), "index": ("shards", "shards/model.safetensors.index.json"),
        "config": ("shards", "shards/config.json"),
    }  # fmt: skip
    try:
        import gguf

        writer = gguf.GGUFWriter(folder / "a.gguf", "llama")
        writer.add_array("tokens", ["a", "b", "c"])
        for name, W in state.items():
            if W.ndim == 2:
                writer.add_tensor(name, W.numpy())
        writer.add_tensor("q", gguf.quantize(torch.randn(4, 64).numpy(), gguf.GGMLQuantizationType.Q8_0),
                          raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        found["gguf"] = ("a.gguf", "a.gguf")
    except ImportError:
        pass
    return {name: (folder / path, folder / damaged) for name, (path, damaged) in found.items()}


def mutate(whole: bytes, rng: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        # Where the structure is, at the beginning and the end, more often than among numbers.
        size = max(len(data), 1)
        at = min(
            rng.choice([rng.randrange(size), rng.randrange(min(size, 400)), size - 1 - rng.randrange(min(size, 600))]),
            size,
        )
        kind = rng.randrange(8)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.choice([1, 2, 8, 60])]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice([1, 2, 8, 60]))
        elif kind == 4:
            size = rng.choice([1, 2, 4, 8])
            number = rng.choice(NUMBERS) % 2 ** (8 * size)
            data[at : at + size] = number.to_bytes(size, rng.choice(["little", "big"]))
        elif kind == 5:
            other = rng.randrange(size)
            data[at : at + 40] = data[other : other + 40]
        elif kind == 6:
            hostile = rng.choice(HOSTILE)
            data[at : at + rng.choice([0, len(hostile)])] = hostile
        else:
            digits = [i for i in range(len(data)) if 48 <= data[i] < 58]
            if digits:
                at = rng.choice(digits)
                data[at : at + 1] = rng.choice([b"0", b"-1", b"9999999999999", b"1e999", b"null", b"[]", b"NaN"])
    return bytes(data)


def hostile_pickle(rng: random.Random) -> bytes:
    """A pickle of opcodes at random, which are more often valid than damaged ones."""
    parts = [b"N", b"K\x01", b"X\x01\x00\x00\x00a", b"(", b"t", b"]", b"}", b"a", b"s", b"u", b"e", b"q\x00", b"h\x00",
             b"2", b"\x85", b"\x86", b"\x87", b"R", b"b", b"\x81", b"Q", b"ctorch._utils\n_rebuild_tensor_v2\n", b"0",
             b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"X\x07\x00\x00\x00storage", b"ctorch\nSize\n",
             b"ctorch.distributed.checkpoint.metadata\nMetadata\n", *HOSTILE]  # fmt: skip
    return b"\x80\x02" + b"".join(rng.choices(parts, k=rng.randrange(1, 60))) + b"."


def main(count: int, seed: int) -> int:
    global watching
    torch.set_num_threads(1)
    sys.addaudithook(watch)
    rng, outcomes, failures = random.Random(seed), collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        made = seeds(Path(folder))
        for path, _ in made.values():  # what is imported, and thread pools
            list(analyze([path]))
        address = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (address + 2 * MEMORY, resource.RLIM_INFINITY))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        base = peak()
        wholes = {damaged: damaged.read_bytes() for _, damaged in made.values()}
        for i in range(count):
            name = rng.choice(list(made))
            path, damaged = made[name]
            mutant = mutate(wholes[damaged], rng)
            if name in ("old", "dcp index") and rng.random() < 0.3:
                magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
                mutant = (magic if name == "old" else b"") + hostile_pickle(rng)
            damaged.write_bytes(mutant)
            signal.alarm(10)
            watching = True
            try:
                list(analyze([path]))
                outcome = "measured"
            except ValueError as error:
                outcome = "refused"
                if not str(error).startswith("analyze: expected") or "\n" in str(error) or len(str(error)) > 1500:
                    outcome = f"sentence: {str(error)[:200]!r}"
                elif re.search("MemoryError|llocate", str(error)):
                    outcome = f"asked for too much: {str(error)[:200]!r}"
            except BaseException as error:  # a panic of Rust is none that others catch
                outcome = f"{type(error).__name__}: {traceback.format_exc(limit=-2)}"
            watching = False
            signal.alarm(0)
            if executed:
                outcome = f"executed {executed.pop()}"
            if peak() - base > MEMORY:
                outcome = f"{(peak() - base) >> 20} MB"
                Path("/proc/self/clear_refs").write_text("5")
            kind = outcome if outcome in ("measured", "refused") else "failed"
            outcomes[kind] += 1
            if kind == "failed":
                failures.append((name, i, outcome))
                if len(sys.argv) > 3:
                    shutil.copy(damaged, Path(sys.argv[3]) / f"{i}-{damaged.name}")
            damaged.write_bytes(wholes[damaged])
        print(json.dumps({**outcomes, "peak_mb": (peak() - base) >> 20, "failures": failures[:20]}))
    return bool(failures)


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def alarmed(*_):
    raise TimeoutError("a mutant took 10 seconds")


if __name__ == "__main__":
    import logging

    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, alarmed)
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
