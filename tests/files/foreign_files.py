"""Files of other programs under the names that people give them, damaged ones, and ones with code in them."""

import gzip
import io
import os
import pickle
import tarfile
import warnings
import zipfile

import numpy as np
import torch
from making import Made, file, made, random
from torch import nn


def _refused(name: str, content: bytes, says: str):
    def make(folder):
        return Made(made(folder / name, content), {}, says)

    make.__name__ = f"{says[:40]} as {name}"
    file(make)


def _zip(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.ones((3, 4)))
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"))
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 5000000000\n"
for name, content, says in (
    ("pytorch_model.bin", POINTER, "a pointer of Git LFS, not the weights. Run `git lfs pull`"),
    ("model.safetensors", POINTER, "a pointer of Git LFS"),
    ("pytorch_model.bin", b"<!DOCTYPE html>\n<html><body>Sign in", "a web page, such as a server's message. Download"),
    ("model.safetensors", b"\n <html>502 Bad Gateway", "a web page"),
    ("model.ckpt", b'<?xml version="1.0"?><Error><Code>AccessDenied', "a web page"),
    ("x.pt", b"These are notes on the model.\n" * 30, "which is text .'These are notes"),
    ("x.pt", b"", "it is empty"),
    ("x.pt", b"a", "which is text"),
    ("model.bin", b'{"error": "Repository not found"}', "which is text"),
    ("model.safetensors", b'{"error": "Repository not found"}', "cannot be read"),
    ("model.onnx", b"\x08\x07\x12\x07pytorch\x1a\x05" + bytes(range(200)), "an ONNX file"),
    ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file. Load it with Keras or h5py"),
    ("model.bin", b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    ("w.npy", b"\x93NUMPY\x01\x00" + bytes(100), "a NumPy array"),
    ("w.npz", _npz(), "an npz file of NumPy"),
    ("w.pt", _npz(), "an npz file of NumPy"),
    ("m.keras", _zip(**{"config.json": b"{}", "model.weights.h5": b"\x89HDF"}), "a .keras file"),
    ("flax_model.msgpack", b"\x82\xa6params\x80", "a msgpack file of Flax"),
    ("m.pt", _zip(**{"readme.txt": b"no weights"}), "a zip archive of other files .'readme.txt'.. Unpack it"),
    ("m.pt", gzip.compress(b"weights"), "a gzip archive. Unpack it"),
    ("m.pt", _tar(), "a tar archive. Unpack it"),
    ("m.bin", b"ggml" + bytes(60), "a GGML file, which came before GGUF"),
    ("m.pt", b"PK\x03\x04" + bytes(100), "cannot be read"),
    ("m.pt", b"\x80\x02}q\x00.", "not a file of torch.save"),
    ("m.safetensors", bytes(7) + b"\x7f{}", "cannot be read"),
):  # fmt: skip
    _refused(name, content, says)


@file
def torchscript(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(3, 4)), folder / "m.pt")
    return Made(folder / "m.pt", {}, "a TorchScript module. Load it with torch.jit.load")


@file
def exported(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(nn.Linear(3, 4), (torch.ones(2, 3),)), folder / "m.pt2")
    return Made(folder / "m.pt2", {}, "a program of torch.export")


@file
def a_whole_model(folder):
    return Made(
        made(folder / "m.pt", nn.Linear(3, 4)), {}, r"other objects .*nn.modules.linear.Linear.*save model.state"
    )


@file
def a_quantised_tensor_of_torch(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = torch.quantize_per_tensor(random(3, 4), 0.1, 0, torch.qint8)
        path = made(folder / "m.pt", {"q": q, "s": random(4, 4).to_sparse(), "w": random(3, 4)})
    return Made(path, {"w": random(3, 4)}, "left out 2 tensors that are not plain")


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@file
def code_in_a_torch_file(folder):
    path = made(folder / "m.pt", {"w": random(3, 4), "bomb": Bomb(folder / "ran")})
    return Made(path, {}, "expected tensors only, got path=.* .posix.mkdir.. Nothing in it was run")


@file
def code_in_an_old_torch_file(folder):
    state = {"w": random(3, 4), "bomb": Bomb(folder / "ran")}
    path = made(folder / "m.pt", state, _use_new_zipfile_serialization=False)
    return Made(path, {}, "posix.mkdir.. Nothing in it was run")


@file
def code_in_a_pickle(folder):
    return Made(made(folder / "m.bin", pickle.dumps(Bomb(folder / "ran"))), {}, "posix.mkdir.. Nothing in it was run")
