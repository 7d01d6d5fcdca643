"""Sentences for files that cannot be read: damaged ones, ones with code, and those of other programs."""

from pathlib import Path

from sosd_fast.checkpoints import archives
from sosd_fast.checkpoints.headers import shown

_SAVE = "Save model.state_dict() with torch.save, or with safetensors"
_HDF5 = ("an HDF5 file", "Load it with Keras or h5py, and save its arrays with safetensors")
_NUMPY = ("a NumPy array", "Load it with numpy.load, and save it with safetensors")
_GGML = ("a GGML file, which came before GGUF", "Convert it to GGUF with llama.cpp")
_ARCHIVES = {
    "a gzip": b"\x1f\x8b", "a Zstandard": b"\x28\xb5\x2f\xfd", "a bzip2": b"BZh", "an xz": b"\xfd7zXZ",
    "a 7z": b"7z\xbc\xaf", "a rar": b"Rar!",
}  # fmt: skip

# What a file begins with -> what it is, and what to do.
_BEGINNINGS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the weights", "Run `git lfs pull`"),
    (b"\x89HDF\r\n\x1a\n", *_HDF5),
    (b"\x93NUMPY", *_NUMPY),
    *((start, f"{name} archive", "Unpack it") for name, start in _ARCHIVES.items()),
    (b"\x7fELF", "a program", "Pass the weights"),
    (b"ggml", *_GGML),
    (b"lmgg", *_GGML),
    (b"PAR1", "a Parquet file", "Pass the weights"),
)
_SUFFIXES = {
    ".onnx": ("an ONNX file", "Save the weights of the model that it was exported from"),
    ".msgpack": ("a msgpack file of Flax", "Load it with flax.serialization, and save its arrays with safetensors"),
    ".tflite": ("a TensorFlow Lite file", "Pass the weights of the model that it was converted from"),
    ".pb": ("a graph of TensorFlow", "Load it with TensorFlow, and save its arrays with safetensors"),
    ".h5": _HDF5,
    ".npy": _NUMPY,
    ".json": ("a JSON file", "Pass the weights, or the folder that they are in"),
    ".index": ("an index of TensorFlow", "Load it with TensorFlow, and save its arrays with safetensors"),
}


def damaged(file: Path, error: Exception | str) -> ValueError:
    """A file that is cut or broken."""
    lines = str(error).splitlines() or [type(error).__name__]
    return ValueError(
        f"analyze: expected a whole file of weights, got path={file}, which cannot be read ({shown(lines[0])}). "
        "It may be truncated: copy or download it again."
    )


def other_objects(file: Path, what: str) -> ValueError:
    """A pickle with code in it, or of objects that are no tensors."""
    return ValueError(
        f"analyze: expected tensors only, got path={file} with other objects ({shown(what)}). "
        "Nothing in it was run; save model.state_dict()."
    )


def not_ours(file: Path) -> ValueError | None:
    """Says what a file of another program is, by its beginning, its name or what a zip archive holds."""
    with open(file, "rb") as opened:
        start = opened.read(512)
    if not start:
        return damaged(file, "it is empty")
    for beginning, what, remedy in _BEGINNINGS:
        if start.startswith(beginning):
            return _refused(file, what, remedy)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return _refused(
            file, "a web page, such as a server's message", "Download the file again, with what it asks for"
        )
    if start[257:262] == b"ustar":
        return _refused(file, "a tar archive", "Unpack it")
    if start.startswith(b"PK\3\4"):
        return _archive(file)
    if file.suffix.lower() in _SUFFIXES:
        return _refused(file, *_SUFFIXES[file.suffix.lower()])
    if not start.startswith((b"\x80", b"GGUF")) and file.suffix != ".safetensors" and _is_text(start):
        return _refused(file, f"text ({start[:40].decode(errors='replace').split(chr(10))[0]!r})", "Pass the weights")
    return None


def _archive(file: Path) -> ValueError | None:
    """What a zip archive of another program is, by the names in it."""
    found = archives.names(file)
    inside = {name.partition("/")[2] for name in found}
    if not found:
        return None
    if all(name.endswith(".npy") for name in found):
        return _refused(file, "an npz file of NumPy", "Load it with numpy.load, and save its arrays with safetensors")
    if any(name.endswith(".weights.h5") for name in found):
        return _refused(file, "a .keras file", "Load it with Keras, and save its arrays with safetensors")
    if "archive_format" in inside or "serialized_exported_program.json" in found:
        return _refused(file, "a program of torch.export", f"{_SAVE}, before the export")
    if any(name.startswith("code/") for name in inside):
        return _refused(file, "a TorchScript module", f"Load it with torch.jit.load. {_SAVE}")
    if "data.pkl" not in inside | set(found):
        return _refused(file, f"a zip archive of other files ({shown(found[0])!r})", "Unpack it")
    return None


def _is_text(start: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\r\n" for byte in start) and start.isascii()


def _refused(file: Path, what: str, remedy: str) -> ValueError:
    return ValueError(
        f"analyze: expected weights of safetensors, torch or GGUF, got path={file}, which is {what}. {remedy}."
    )
