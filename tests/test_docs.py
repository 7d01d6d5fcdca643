"""The pages: README's size, links, commands and flags, code blocks and what they print."""

import contextlib
import functools
import inspect
import io
import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
from prepared import run

import sosd_fast
from sosd_fast.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md", "training/README.md")),
    *(ROOT / "training/paper").rglob("*.md"),
    *sorted((ROOT / "docs").glob("*.md")),
]
TOLD = [page for page in PAGES if page.name not in ("CHANGELOG.md", "LOG.md")]  # which say what was, too
RUN = [ROOT / "README.md", ROOT / "docs/tutorial.md", ROOT / "docs/methods.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return FENCE.sub("", text)


# --- README


def figures(text: str) -> list[str]:
    """The numbers in prose and tables; not those in code, addresses, names of files and words such as L2."""
    prose = re.sub(r"`[^`\n]*`|\]\([^)\s]*\)", "", without_code(text))
    return re.findall(r"(?<![\w.])\d[\d.,]*(?:e-?\d+)?", prose)


def test_readme_is_short_and_has_a_picture_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100 and any(re.match(r"!\[.+\]\(docs/\w+\.png\)", line) for line in lines[:25])
    assert len(figures("\n".join(lines))) <= 30


def test_figures_are_counted():
    text = "Costs 5.7 % of 2,048 tokens, 3e-4 σ₁, by `k=32` ([paper](https://arxiv.org/abs/2605)).\n```\n1 2\n```\n"
    assert figures(text) == ["5.7", "2,048", "3e-4"]


def test_readme_says_what_one_gets_and_what_not():
    text = (ROOT / "README.md").read_text()
    bullets = {
        title: re.findall(r"^- ", part, re.M) for title, part in re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", text, re.M)
    }
    assert len(bullets["What you get"]) == 5 and len(bullets["What it is not for"]) == 4
    first = re.search(r"^- (.*)", text.split("## What it is not for")[1], re.M)
    assert first and "GPU" in first[1]


# --- Links


def anchors(page: Path) -> set[str]:
    """The places of a page that a link can lead to: headings, by GitHub's rule, and anchors of their own."""
    text = without_code(page.read_text())
    headings = (re.sub(r"[^\w\- ]", "", each.lower().replace("`", "")) for each in re.findall(r"^#+ (.*)$", text, re.M))
    return {each.strip().replace(" ", "-") for each in headings} | set(re.findall(r'<a id="([\w-]+)">', text))


def wrong_links(page: Path) -> list[str]:
    """The links of a page that lead to no file, or to no place in it. A folder is no file: the site cannot show it."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert not wrong_links(page)


def test_wrong_links_are_found(tmp_path):
    (tmp_path / "a.md").write_text("# A place\n[a](b.md) [b](a.md#a-place) [c](#none) [d](https://x.y/z) [e](.)\n")
    assert wrong_links(tmp_path / "a.md") == ["b.md", "#none", "."]


# --- Commands and flags

COMMAND = re.compile(
    r"(?:python|torchrun [^\n`]*?) ?(-m (?:sosd_fast|bench|training)[\w.]*|(?:training|docs|examples)/\w+\.py)"
    r"( (?:report|analyze|doctor|watch))?\b([^#\n`]*)"
)


def commands(text: str) -> list[tuple[str, str]]:
    """The commands in a text, and what is given to each."""
    return [(m[1] + (m[2] or ""), m[3]) for m in COMMAND.finditer(text)]


DOCUMENTED = sorted({command for page in TOLD for command in commands(page.read_text())})


@functools.cache
def help_of(command: str) -> str:
    """What a command says of itself, run in this process: importing torch anew for each takes seconds."""
    name, *rest = command.removeprefix("-m ").split()
    argv, path, out = sys.argv, list(sys.path), io.StringIO()
    for module in (name, f"{name}.__main__"):  # runpy warns of what others imported
        if module != "sosd_fast":
            sys.modules.pop(module, None)
    try:
        sys.argv, sys.path[:0] = [name, *rest, "--help"], [str(ROOT)]
        with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(out):
            if name.endswith(".py"):
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally:
        sys.argv, sys.path[:] = argv, path
    assert ended.value.code == 0
    return out.getvalue()


def wrong_flags(command: str, documented: list[tuple[str, str]]) -> list[str]:
    """The flags that are given to a command, and that it does not know."""
    own = [flags.split(" -- ")[0] for c, flags in documented if c == command]  # the others are for another command
    given = [flag for flags in own for flag in re.findall(r"(?<= )--[a-z][\w-]*", flags)]
    return [flag for flag in given if not re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(command))]


@pytest.mark.parametrize("command", sorted({command for command, _ in DOCUMENTED if "examples/" not in command}))
def test_documented_commands_have_their_flags(command):
    assert "usage" in help_of(command) and not wrong_flags(command, DOCUMENTED)


def test_stale_flags_are_found():
    """Also where the beginning of a flag that there is, is left of it."""
    text = "```\npython -m sosd_fast watch runs/a --html --colour --htm --port 8000   # --none\n```\n"
    assert wrong_flags("-m sosd_fast watch", commands(text)) == ["--colour", "--htm"]


def test_commands_are_found():
    found = {command for command, _ in DOCUMENTED}
    assert {"-m sosd_fast report", "-m sosd_fast doctor", "-m bench.probe", "training/run.py"} <= found
    assert len(found) > 15


FOREIGN = {"--nnodes", "--rdzv-"}  # torchrun's


@pytest.mark.parametrize("page", TOLD, ids=name_of)
def test_flags_in_prose_are_flags_of_some_command(page):
    """Of any command that is documented somewhere."""
    prose = without_code(page.read_text())
    code = " ".join(re.findall(r"`([^`\n]*)`", prose))
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
    known = "".join(help_of(command) for command in {c for c, _ in DOCUMENTED if "examples/" not in c}) if flags else ""
    assert not [flag for flag in flags - FOREIGN if not re.search(rf"{flag}\b", known)]


@pytest.mark.parametrize("page", TOLD, ids=name_of)
def test_extras_exist(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"pip install (?:-e )?'\.\[([\w,]+)\]'", page.read_text())
    assert {extra for each in named for extra in each.split(",")} <= set(extras)


@pytest.mark.parametrize("page", TOLD, ids=name_of)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", page.read_text(), re.M)
    assert {a or b for a, b in named} <= targets


def test_examples_that_are_named_exist():
    assert all((ROOT / command).is_file() for command, _ in DOCUMENTED if command.endswith(".py"))


# --- Tests and arguments that pages name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_are_named_exist(page):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text())
    assert all((ROOT / file).is_file() for file, _ in named)
    missing = [name for file, name in named if name and f"\ndef {name}(" not in (ROOT / file).read_text()]
    assert not missing


@pytest.mark.slow
def test_cases_of_the_table_of_layouts_are_tested():
    page = (ROOT / "docs/distributed.md").read_text()
    tests = dict(re.findall(r"^- ([A-Z]): `(.+?)`", page, re.M))
    rows = re.search(r"^\| layout \|.*\n(?:\|.*\n)+", page, re.M)[0]
    cases = set(re.findall(r"\b([A-Z]) `(\[.+?\])`", rows))
    command = "import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    files = {tests[letter].split("::")[0] for letter, _ in cases}
    done = run(command, "--collect-only", "-q", "--no-header", *files, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert len(cases) > 10 and set(re.findall(r"\b[A-Z]\b", rows)) == set(tests)
    missing = {tests[letter] + case for letter, case in cases} - set(done.stdout.splitlines())
    assert not missing


def test_every_argument_of_track_is_described():
    part = (ROOT / "docs/methods.md").read_text().split("## Arguments of `track`")[1].split("\n## ")[0]
    described = {name for cell in re.findall(r"^\| (`.*?) \|", part, re.M) for name in re.findall(r"`(\w+)`", cell)}
    assert described == set(inspect.signature(sosd_fast.track).parameters) - {"model"}


# --- Code blocks


def alike(printed: str, documented: str) -> bool:
    """Whether texts agree but for numbers with a fraction, which may be 30 % apart: other machines round otherwise."""
    number = r"\d+\.\d+(?:e[-+]\d+)?"
    if re.sub(number, "#", printed).split() != re.sub(number, "#", documented).split():
        return False
    pairs = zip(re.findall(number, printed), re.findall(number, documented), strict=True)
    return all(abs(float(a) - float(b)) <= 0.3 * abs(float(b)) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    """The blocks of a page are one program; a block of text says what the block before it prints.

    README and the tutorial end with a report on what their code has written.
    """
    monkeypatch.chdir(tmp_path)
    names, printed, blocks = {}, "", [block for block in FENCE.findall(page.read_text()) if block[0]]
    assert blocks and {kind for kind, _ in blocks} <= {"python", "text"}
    for kind, code in blocks:
        if kind == "text":
            assert alike(printed, code), printed
        else:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, name_of(page), "exec"), names)
            printed = out.getvalue()
    reports = re.findall(r"^python -m sosd_fast (report \S+ -o report\.html)", page.read_text(), re.M)
    assert len(reports) == (page.name != "methods.md")
    for command in reports:
        assert main(command.split()) == 0 and "<svg" in Path("report.html").read_text()


def test_another_output_is_found():
    assert alike("a 1.21 of 3\n", "a  1.2 of 3") and alike("1.5e-04", "1.6e-04")
    assert not alike("a 1.21 of 4", "a 1.2 of 3") and not alike("a 2.4", "a 1.2") and not alike("", "a")


@pytest.mark.parametrize("page", TOLD, ids=name_of)
def test_python_blocks_are_python(page):
    for kind, code in FENCE.findall(page.read_text()):
        if kind in ("python", "py"):
            compile(code, name_of(page), "exec")


# --- Figures


def rows(title: str) -> dict[str, list[float]]:
    """The numbers in the table below a heading of the benchmarks, by the first cell of each row."""
    part = (ROOT / "docs/benchmarks.md").read_text().split(f"## {title}")[1].split("\n## ")[0]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return {row[0]: [float(n) for n in re.findall(r"\d+\.?\d*", " ".join(row[1:]))] for row in cells[2:]}


XEON = "intel(r)-xeon(r)-processor"


def kept(name: str, machine="amd-epyc", part="rows"):
    return json.loads((ROOT / "bench/results" / machine / f"{name}.json").read_text())[part]


def test_the_tables_are_those_of_the_results():
    """To the digits that they show."""
    near = functools.partial(pytest.approx, rel=0.06)
    for title, machine in (("What does measuring cost in", "amd-epyc"), ("And in a step on an Intel Xeon", XEON)):
        adamw, muon, table = kept("svd_overhead", machine), kept("svd_overhead-muon", machine), rows(title)
        for shown, (name, *_) in ((numbers, tracker.split(",")) for tracker, numbers in table.items()):
            pairs = [(each[name]["tracker_ms"], each[name]["overhead_percent"]) for each in (adamw, muon)]
            assert shown[:4] == near([*pairs[0], *pairs[1]])
        assert len(table) == 4
    budgets, shown = kept("probe_budget")["budget"], rows("Is the budget kept?")["cost, % of the step"]
    assert shown == near([100 * cost for cost in budgets.values()])
    for title, name, columns in (
        ("How fast are all", "svdvals", ("sosd_fast", "torch svdvals", "eigvalsh of the Gram")),
        ("How fast are the leading", "topk", ("m", "svdvals")),
        ("How fast is Newton", "newton_schulz", ("plain", "gram")),
    ):
        table = rows(title)
        for shape, found in kept(name).items():
            values = [found[column]["ms"] if isinstance(found[column], dict) else found[column] for column in columns]
            assert table.pop(shape.replace("x", "×"))[: len(values)] == near(values), shape
        assert not table


def test_the_tables_beside_others_are_those_of_the_results():
    near = functools.partial(pytest.approx, rel=0.06)
    table = rows("And beside torch.optim.Muon")
    for shape, found in kept("newton_schulz", XEON).items():
        ours, theirs = found["bfloat16"]["ms"], found["torch.optim.Muon"]["ms"]
        assert table.pop(shape.replace("x", "×")) == near([ours, theirs, theirs / ours]), shape
    assert not table
    table, spectra = rows("How do other tools"), kept("peers-nano", XEON, "spectra")
    for name in ("sosd_fast", "WeightWatcher", "torch.linalg.svdvals"):
        ms = spectra[name]["body_ms"]
        shown = next(numbers for row, numbers in table.items() if row.strip("`") == name)
        assert near(ms) in shown and near(ms / spectra["sosd_fast"]["body_ms"]) in shown, name


def test_the_pictures_are_drawn_from_what_is_kept():
    pictures = runpy.run_path(str(ROOT / "docs/pictures.py"))
    assert list(pictures["costs"]().values()) == pytest.approx([40.4, 5.67, 5.34, 0.978], rel=0.01)
    runs = json.loads((ROOT / "docs/pictures.json").read_text())
    top, bottom = pictures["draw_loss"](runs).axes
    assert list(runs) == ["AdamW", "Muon"] and len(top.lines) == 4 and bottom.get_yscale() == "log"
    assert len(pictures["draw_costs"](pictures["costs"]()).axes[0].patches) == 4


# --- The tree


def test_the_tree_of_the_architecture_is_the_tree():
    """What it names is there; it names every room of the library, and every file that lies in no room."""
    tree = next(code for kind, code in FENCE.findall((ROOT / "docs/architecture.md").read_text()) if not kind)
    top, named = "", {}
    for line in tree.splitlines():
        if match := re.match(r"([\w.]+)/ ", line + " "):
            top = match[1]
        for name in re.findall(r"^  +([\w/]+(?:\.py|/)) ", line) + re.findall(r"\b\w+\.(?:py|cpp)\b", line):
            named.setdefault(top, set()).add(name)
            assert any((ROOT / top).rglob(name.rstrip("/"))), f"{top}: {name}"
    assert set(named) >= {"kernels", "sosd_fast", "bench", "training"}
    for folder in ("kernels", "sosd_fast", "training"):
        assert not {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"} - named[folder]
    rooms = {f"{path.parent.name}/" for path in (ROOT / "sosd_fast").glob("*/__init__.py")} - {"kernels/"}
    assert rooms == {name for name in named["sosd_fast"] if name.endswith("/")}


def test_every_page_is_in_the_menu():
    """Or mkdocs, which is seldom installed, warns."""
    menu = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    assert not {page.name for page in (ROOT / "docs").glob("*.md")} - set(re.findall(r": ([\w-]+\.md)$", menu, re.M))
