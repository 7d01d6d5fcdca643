"""Parts of files, as files, and zip archives, of which a bounded amount is read at once."""

import io
import zipfile
from pathlib import Path
from typing import IO, cast

_MAX_READ = 32 * 2**20
_MAX_DIRECTORY = 8 * 2**20  # of a zip archive: 100,000 tensors


class Part(io.RawIOBase):
    """A part of a file, as a file; it gives a bounded amount at once."""

    def __init__(self, file: io.BufferedReader, start: int, length: int):
        self._file, self._start, self.length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def seekable(self) -> bool:
        """Whether it has places."""
        return True

    def tell(self) -> int:
        """The place."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a place."""
        self._at = max(0, offset + (0, self._at, self.length)[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Reads bytes, as many as there are."""
        left = max(0, self.length - self._at)
        size = left if size is None or size < 0 else min(size, left)
        if size > _MAX_READ:
            raise ValueError("a part without tensors of more than some megabytes")
        self._file.seek(self._start + self._at)
        found = self._file.read(size)
        self._at += len(found)
        return found

    def peek(self, size: int) -> bytes:
        """Reads bytes and stays."""
        found = self.read(size)
        self._at -= len(found)
        return found

    def readline(self, size: int | None = -1) -> bytes:
        """Reads a line."""
        left = self.length - self._at
        self._file.seek(self._start + self._at)
        found = self._file.readline(min(left, size) if size is not None and size >= 0 else left)
        self._at += len(found)
        return found


class _Bounded:
    """A part of a file for zipfile, which reads the whole directory at once: only where it is of a bounded size."""

    def __init__(self, part: Part):
        self._part = part
        self.seek, self.tell, self.seekable = part.seek, part.tell, part.seekable

    def read(self, size: int = -1) -> bytes:
        left = self._part.length - self._part.tell()
        if min(size if size >= 0 else left, left) > _MAX_DIRECTORY:
            raise ValueError("a zip archive of more parts than weights have")
        return self._part.read(size)

    def close(self):
        pass


def opened(part: Part) -> zipfile.ZipFile:
    """Opens a zip archive in a part of a file."""
    part.seek(0)
    return zipfile.ZipFile(cast(IO[bytes], _Bounded(part)))


def names(file: Path) -> list[str]:
    """The names in a zip archive; none where it is damaged."""
    try:
        with open(file, "rb") as raw, opened(Part(raw, 0, file.stat().st_size)) as archive:
            return archive.namelist()
    except Exception:  # a damaged archive can fail in any way
        return []
