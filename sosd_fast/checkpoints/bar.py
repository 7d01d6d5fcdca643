"""How much of a checkpoint is read, on a terminal."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from sosd_fast.runs.text import plain

T = TypeVar("T")


class Bar:
    """A progress bar on stderr where that is a terminal and rich is installed; else nothing."""

    def __init__(self):
        self._progress = None
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            console = Console(stderr=True)
            if console.is_terminal:
                text = TextColumn("{task.description}", markup=False)
                columns = text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
                self._progress = Progress(*columns, console=console, transient=True)
                self._task = self._progress.add_task("")

    def advance(self, path: Path, done: int, total: int):
        """Shows how much of a checkpoint is read."""
        if self._progress is not None:
            if not done:
                self._progress.reset(self._task, description=plain(path.name), total=total)
            self._progress.start()
            self._progress.update(self._task, completed=done)

    def beside(self, found: Iterable[T]) -> Iterator[T]:
        """Yields what is found, and takes the bar away meanwhile, for it may be printed."""
        try:
            for each in found:
                self._stop()
                yield each
        finally:
            self._stop()

    def _stop(self):
        if self._progress is not None:
            self._progress.stop()
