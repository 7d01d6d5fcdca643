"""Which files make one checkpoint, which are a series, and how known trainers cut a weight into several files.

Names of files say it: an index, `-00001-of-00002`, a step. Where the same key stands in several files and no layout is
known, nothing is guessed.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sosd_fast.checkpoints.dcp import INDEX
from sosd_fast.checkpoints.formats import FORMATS
from sosd_fast.checkpoints.headers import shown

_NO_WEIGHTS = re.compile(r"optim|scheduler|scaler|rng_state|training_args|^random_states|^zero_pp_rank")
_STEP = re.compile(r"(?:^|[^a-z])(?:step|iter|iteration|checkpoint|ckpt|globalstep)s?[-_=.]?0*(\d{1,15})(?![0-9a-z])")
log = logging.getLogger("sosd_fast")
_MAX_INDEX, _MAX_ENTRIES = 24 * 2**20, 400_000  # JSON takes up to 20 times its text


class Layout(NamedTuple):
    """How a trainer cuts weights among the processes of tensor parallelism.

    Attributes:
        files: of each process, by their names.
        columns: keys of weights that are cut along their columns.
        rows: keys of those that are cut along their rows; others must be equal everywhere.
        width: the key of a vector, and of a weight that is cut along its rows where these are as long as the vector,
            else along its columns.
    """

    files: re.Pattern[str]
    columns: re.Pattern[str]
    rows: re.Pattern[str]
    width: tuple[str, str] = ("", "")

    def cut(self, key: str, parts: Sequence[tuple[int, ...]], vectors: Mapping[str, int]) -> int | None:
        """The dimension along which a weight is cut in these parts: None where it is not, or not certainly."""
        if any(len(shape) != 2 for shape in parts):
            return None
        rows, columns = bool(self.rows.search(key)), bool(self.columns.search(key))
        if key == self.width[1]:  # LLaMA 3 cuts the vocabulary, LLaMA 1 and 2 what stands for each word
            width = vectors.get(self.width[0], 0)
            rows = {shape[1] for shape in parts} == {width}
            columns = not rows and sum(shape[1] for shape in parts) == width
        kept = 1 if rows else 0
        return 1 - kept if (rows or columns) and len({shape[kept] for shape in parts}) == 1 else None


# From the code that converts them: llama/model.py (meta-llama/llama), megatron/core/tensor_parallel/layers.py.
LAYOUTS = {
    "LLaMA": Layout(
        re.compile(r"consolidated\.\d\d\.pth"),
        re.compile(r"\.(wo|w2)\.weight$"),
        re.compile(r"\.(wq|wk|wv|w1|w3)\.weight$|^output\.weight$"),
        ("norm.weight", "tok_embeddings.weight"),
    ),
    "Megatron": Layout(
        re.compile(r"mp_rank_\d\d(_model_states\.pt|/model_optim_rng\.pt|/model_rng\.pt)"),
        re.compile(r"(attention\.dense|self_attention\.linear_proj|dense_4h_to_h|linear_fc2)\.weight$"),
        re.compile(
            r"(^|\.)(query_key_value|linear_qkv|dense_h_to_4h|linear_fc1|word_embeddings|embed_tokens|output_layer|lm_head)"
            r"\.weight$"
        ),
    ),
}


class Found(NamedTuple):
    """The files of one checkpoint.

    Attributes:
        files: in their order.
        home: key -> the name of its file, where an index says it.
        layout: of parts that stand in several files.
        left_out: files in the folder that are not read, and why.
    """

    files: list[Path]
    home: dict[str, str] | None = None
    layout: Layout | None = None
    left_out: dict[str, str] = {}


def step_of(path: Path) -> int | None:
    """The step in a path's name, where the name says that it is one: step-100, epoch=3-step=400, checkpoint_5."""
    name = path.name if path.is_dir() else path.stem
    found = _STEP.findall(name.lower().replace("global_step", "globalstep"))
    return int(found[-1]) if found else None


def series(path: Path) -> list[Path]:
    """The checkpoints in a path: itself, or those of one run that a folder holds, in the order of their steps."""
    if not path.is_dir() or (path / INDEX).is_file():
        return [path]
    files, _ = _weight_files(path)
    stepped = [file for file in files if step_of(file) is not None]
    if files and len(stepped) < 2:
        return [path]
    others = [shown(file.name) for file in files if file not in stepped]
    if others:
        log.warning("analyze: %s: left out %s, whose name tells no step.", path, ", ".join(others[:8]))
    if not files:
        stepped = stepped_folders(path) or stepped_folders(path / "checkpoints")
    steps = [step_of(each) for each in stepped]
    if len(set(steps)) != len(steps):
        twice = next(each for each in stepped if steps.count(step_of(each)) > 1)
        raise ValueError(
            f"analyze: expected a step once, got path={path} with more than one checkpoint of step {step_of(twice)}, "
            f"such as {twice.name}. Pass the ones that you mean, in their order."
        )
    return sorted(stepped, key=lambda each: step_of(each) or 0) or [path]


def stepped_folders(path: Path) -> list[Path]:
    """The checkpoints in a folder whose names tell a step, in any order."""
    if not path.is_dir():
        return []
    found = [each for each in path.iterdir() if step_of(each) is not None]
    return [
        each
        for each in found
        if (each.is_dir() and files_of(each).files) or (each.is_file() and each.suffix in FORMATS)
    ]


def files_of(folder: Path) -> Found:
    """The weight files of a folder: the shards that an index names, or else those of the best kind there is."""
    if (folder / INDEX).is_file():
        return Found([folder / INDEX])
    for suffix in FORMATS:
        indices = sorted(folder.glob(f"*{suffix}.index.json"), key=lambda p: (not p.name.startswith("model."), p.name))
        if indices:
            home = _index(folder, indices[0])
            others, left_out = _weight_files(folder)
            left_out |= {p.name: f"{indices[0].name} does not name it" for p in others}
            left_out = {name: why for name, why in left_out.items() if name not in home.values()}
            return Found([folder / shard for shard in sorted(set(home.values()))], home, None, left_out)
    files, left_out = _weight_files(folder)
    ranks = sorted(folder.glob("mp_rank_*/model_*rng.pt")) if not files else []
    files = files or ranks or sorted(folder.glob(f"pytorch_model_fsdp*/{INDEX}"))[:1]  # as the Trainer saves FSDP's
    shards = [file for file in files if re.search(r"-\d+-of-\d+", file.name)]
    if shards:
        left_out |= {file.name: "others are numbered as shards" for file in files if file not in shards}
        files = _complete(folder, shards)
    known = (each for each in LAYOUTS.values() if all(each.files.search(file.as_posix()) for file in files))
    return Found(files, None, next(known, None) if len(files) > 1 else None, left_out)


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of the first format that a folder holds, and why its other files of weights are left out."""
    chosen: list[Path] = []
    left_out: dict[str, str] = {}
    for suffix in FORMATS:
        found = sorted(path for path in folder.glob(f"*{suffix}") if not _NO_WEIGHTS.search(path.name))
        if chosen:
            left_out |= {path.name: f"{chosen[0].suffix} files come first" for path in found}
        else:
            chosen = found
    return chosen, left_out


def _complete(folder: Path, shards: Sequence[Path]) -> list[Path]:
    """Shards that are numbered, all of one count."""
    numbers = [re.search(r"^(.*)-0*(\d+)-of-0*(\d+)", shard.name) for shard in shards]
    counts = {(n[1], int(n[3])) for n in numbers if n}
    if len(counts) > 1:
        raise ValueError(
            f"analyze: expected the shards of one model, got path={folder} with {shards[0].name} and "
            f"{shards[-1].name}. Move each model into a folder of its own."
        )
    missing = set(range(1, max(c for _, c in counts) + 1)) - {int(n[2]) for n in numbers if n}
    if missing and not (missing == {len(shards)} and any(n and int(n[2]) == 0 for n in numbers)):  # counted from 0
        raise ValueError(
            f"analyze: expected all shards of {shards[0].name}, got path={folder} without number "
            f"{', '.join(map(str, sorted(missing)[:8]))}. Download them."
        )
    return list(shards)


def _index(folder: Path, index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise ValueError
        text = index.read_bytes()
        if max(map(text.count, (b"[", b"{", b",", b":"))) > _MAX_ENTRIES:
            raise ValueError
        home = json.loads(text)["weight_map"]
        shards = sorted(set(home.values()), key=str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"analyze: expected an index with a weight_map, got a damaged {index}.") from None
    outside = [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
    if outside:
        raise ValueError(
            f"analyze: expected files inside {folder}, got {index.name} with {str(outside[0])[:200]!r}. "
            "Move the shards beside their index."
        )
    present = {path.name for path in folder.iterdir()}
    missing = [shown(shard) for shard in shards if shard not in present]
    if missing:
        raise ValueError(
            f"analyze: expected all shards of {index.name}, got path={folder} without {', '.join(missing[:8])}. "
            "Download them."
        )
    return home
