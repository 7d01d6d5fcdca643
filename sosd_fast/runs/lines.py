"""Files that only grow, and JSON lines in them: what a kill at any moment leaves whole."""

import contextlib
import errno
import fcntl
import io
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 2**16  # bytes that are read at a time, from the end


class AppendOnly:
    """A file that only grows, without a buffer: nothing is pending when it is closed, collected or forked.

    A forked process closes its copy, which would keep the file's lock after the end of the process that opened it, and
    what is written there goes nowhere.

    Args:
        path: created where missing.
        mode: "ab" to go on behind what is there, "wb" to start over.
    """

    def __init__(self, path: Path, mode: str = "ab"):
        self.file = open(path, mode, buffering=0)
        self._pid = os.getpid()
        _open_files.add(self)

    @property
    def inherited(self) -> bool:
        """Whether another process opened the file."""
        return self._pid != os.getpid()

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self.file.fileno()).st_size

    def append(self, data: bytes):
        """Hands all of `data` to the operating system, or raises OSError and leaves the file as it was."""
        if self.inherited:
            return
        start, rest = self.size, memoryview(data)
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except BaseException:
            self.file.truncate(start)
            raise
        if not os.fstat(self.file.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "the file was removed while it was being written", self.file.name)

    def truncate(self, size: int):
        """Cuts the file off after `size` bytes."""
        self.file.truncate(size)

    def flush(self):
        """Forces what was written to disk."""
        if not self.inherited:
            os.fsync(self.file.fileno())

    def close(self):
        """Closes the file; closing twice is fine."""
        self.file.close()


_open_files: "weakref.WeakSet[AppendOnly]" = weakref.WeakSet()


def _close_inherited():
    for file in list(_open_files):
        file.close()


os.register_at_fork(after_in_child=_close_inherited)


class JsonLines:
    """An append-only file of JSON objects, one a line; see `AppendOnly` for what a forked process does with it.

    Args:
        path: created where missing. A torn last line is cut off.
        step: cut off the lines whose "step" is greater.

    Raises:
        ValueError: a damaged line that is not the last, or a file that another process has open for writing.
    """

    def __init__(self, path: str | os.PathLike[str], step: int | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.is_file():  # a pipe, for instance, would be waited for
            raise ValueError(f"JsonLines: expected a file, got path={self.path}, which is none. Choose another name.")
        self._file = self._locked()
        try:
            end = 0
            for line, start, stop in lines(self.path):
                at = line.get("step", 0)
                if step is not None and isinstance(at, (int, float)) and at > step:
                    end = start
                    break
                end = stop
            self.truncate(end)
        except BaseException:
            self._file.close()
            raise

    def _locked(self) -> AppendOnly:
        while True:
            file = AppendOnly(self.path)
            try:
                fcntl.flock(file.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                raise ValueError(
                    f"JsonLines: expected a file that nobody else writes, got path={self.path}. "
                    "Close the other run, or choose another directory."
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.file.fileno()), self.path.stat()):
                    return file
            file.close()  # its writer closed a segment meanwhile, and what is locked goes by another name

    def write(self, *objects: dict[str, Any]):
        """Appends objects in one write and hands them to the operating system."""
        self._file.append(b"".join(_encode(o) for o in objects))

    def truncate(self, size: int):
        """Cuts the file off after `size` bytes."""
        self._file.truncate(size)

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._file.size

    @property
    def inherited(self) -> bool:
        """Whether another process opened the file."""
        return self._file.inherited

    def start_over(self, closed: Path):
        """Names what was written `closed`, forces it to disk, and goes on in an empty file of the old name.

        The old name is never missing: for a moment the file has both, which readers and the next writer recognise.
        """
        self._file.flush()
        fresh = JsonLines(self.path.with_suffix(".next"))  # locked before it takes the name
        try:
            try:
                os.link(self.path, closed)
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                self.path.rename(closed)
            fresh.path.rename(self.path)
        except BaseException:
            fresh.close()
            raise
        self._file.close()
        self._file = fresh._file
        sync_folder(self.path.parent)

    def flush(self):
        """Forces what was written to disk."""
        self._file.flush()

    def close(self):
        """Closes the file; closing twice is fine."""
        self._file.close()


def sync_folder(folder: Path):
    """Forces the names in a folder to disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_text(path: Path, text: str):
    """Writes a small file whole or not at all, and forces it to disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def opened(source: Path | BinaryIO) -> Iterator[BinaryIO]:
    """Opens a file, or goes to the start of one that is open and stays so."""
    if isinstance(source, Path):
        with open(source, "rb") as file:
            yield file
    else:
        source.seek(0)
        yield source


def lines(source: Path | BinaryIO) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Yields (object, first byte, byte after) of each whole line of a file of JSON lines."""
    start = 0
    with opened(source) as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return  # torn, by definition the last
            yield parsed(raw, file.name, f"line {number}"), start, start + len(raw)
            start += len(raw)


def parsed(raw: bytes, path: str | Path, where: str) -> dict[str, Any]:
    """Reads one line.

    Raises:
        ValueError: a line that holds no JSON object.
    """
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise damaged(path, where)
    return found


def damaged(path: str | Path, where: str) -> ValueError:
    """The error that says which line is damaged."""
    return ValueError(f"load: expected JSON, got a damaged {where} in {path}. Cut the file off before that line.")


def complete_end(source: Path | BinaryIO) -> int:
    """Returns the byte after the last complete step of a file of JSON lines, each with its step's count in "of"."""
    with opened(source) as file:
        whole, found, step, of = 0, 0, None, 0
        for raw, _, end in _backwards(file):
            line = parsed(raw, file.name, "line at its end")
            whole = whole or end
            if step is None:
                step, of = line.get("step"), line.get("of", 0)
                if type(of) is not int:
                    raise damaged(file.name, "line at its end")
            if line.get("step") != step:
                return whole if found >= of else end
            found += 1
        return whole if found >= of else 0


def last_line(source: Path | BinaryIO) -> dict[str, Any] | None:
    """Reads the last whole line of a file of JSON lines, where there is one."""
    with opened(source) as file:
        for raw, *_ in _backwards(file):
            return parsed(raw, file.name, "line at its end")
    return None


def _backwards(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yields (line, first byte, byte after) of each whole line, the last one first; a torn one is left out."""
    position, tail, torn = file.seek(0, io.SEEK_END), b"", True  # `tail` is what is known from `position` on
    while True:
        if torn and (whole := tail.rfind(b"\n") + 1):
            tail, torn = tail[:whole], False
        before = tail.rfind(b"\n", 0, max(len(tail) - 1, 0)) + 1
        if not torn and tail and (before or not position):
            yield tail[before:], position + before, position + len(tail)
            tail = tail[:before]
            continue
        if not position:
            return
        size = min(position, BLOCK)
        position = file.seek(position - size)
        tail = file.read(size) + (b"" if torn else tail)


def _encode(o: dict[str, Any]) -> bytes:
    return (json.dumps(o, separators=(",", ":")) + "\n").encode()
