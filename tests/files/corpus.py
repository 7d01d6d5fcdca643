"""Files as people have them, small, made here: no byte of them is anybody else's.

`FILES` has a function for each. It writes into a folder, and returns the path to analyze with what comes out: matrices
by name, or a pattern of the sentence that refuses them.

    python tests/files/corpus.py FOLDER
"""

import sys
from pathlib import Path

import foreign_files
import packed_files
import plain_files
from making import FILES, Made

__all__ = ["FILES", "Made", "foreign_files", "packed_files", "plain_files"]

if __name__ == "__main__":
    for name, make in FILES.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True)
        print(name, make(folder).path)
