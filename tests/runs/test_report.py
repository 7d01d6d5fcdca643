import json
import re
import unicodedata
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import sosd_fast
from sosd_fast import Event
from sosd_fast.__main__ import main
from sosd_fast.runs import plot
from sosd_fast.runs.events import append, to_line
from sosd_fast.runs.records import JsonLines, Record, RunWriter
from sosd_fast.runs.report import write_report

SPIKE = Event(30, "spike", ("mlp.weight",), 30, 7.0)


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory):
    """Two real runs of a tiny model, the first with a spike that is made up."""
    folders, parent = [], tmp_path_factory.mktemp("runs")
    for name, lr in (("slow", 1e-3), ("fast & <loose>", 1e-2)):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"attn": torch.nn.Linear(24, 24), "mlp": torch.nn.Linear(24, 40)})
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        folder = parent / name
        with sosd_fast.track(model, method="full", run_dir=folder) as probe:
            log = JsonLines(folder / "log.jsonl")
            for step in range(1, 40):
                loss = model["mlp"](model["attn"](torch.randn(8, 24))).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                log.write({"step": step, "loss": loss.item(), "lr": lr, "overhead": probe.overhead, "step_ms": 1.5})
                if step % 13 == 0:
                    torch.save(model.state_dict(), folder / f"step-{step}.pt")
            log.close()
        (folder / "config.json").write_text(json.dumps({"lr": lr, "name": "<script>alert(1)</script>"}))
        folders.append(folder)
    append(folders[0], [to_line(SPIKE)])
    (folders[1] / "events.jsonl").unlink()
    return folders


def test_a_run_in_the_place_of_its_folder(run_dirs):
    with pytest.raises(ValueError, match="report: expected paths of run directories, got a Run"):
        write_report([sosd_fast.load(run_dirs[0])])


@pytest.fixture(scope="module")
def compared(run_dirs, tmp_path_factory):
    """The page about both, and the figures of spectra in it."""
    drawn, real, path = [], plot.plot_spectra, tmp_path_factory.mktemp("page") / "r.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "plot_spectra", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
        write_report(run_dirs, path)
    return path.read_text(), drawn


class Page(HTMLParser):
    """Collects tags and attributes, and checks that what opens closes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self._open = [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "br", "path", "use", "image"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if self._open and tag == self._open[-1]:
            self._open.pop()
        else:
            assert tag in ("path", "use", "image"), (tag, self._open)


def rows_of(text):
    """The texts of the cells of each row of each table."""
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]


def test_one_page_that_needs_nothing_else(compared):
    text, _ = compared
    page = Page(text)
    assert page.tags.count("svg") == 2 * (2 + 2 * 2), "loss, alignment, two kinds of two runs; wide, narrow"
    outside = [v for k, v in page.attributes if k in ("src", "href", "xlink:href") and not v.startswith(("data:", "#"))]
    assert not outside and "script" not in page.tags and "@import" not in text
    ids = [v for k, v in page.attributes if k == "id"]
    assert len(ids) == len(set(ids)), "or a figure would clip another"
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {
        v[1:] for k, v in page.attributes if k == "xlink:href" and v[0] == "#"
    }
    assert used <= set(ids)
    assert "prefers-color-scheme: dark" in text and "var(--ink)" in text
    assert "#000000" not in text and "fill: #222222" not in text, "ink is the reader's"
    assert "&lt;script&gt;" in text and "fast &amp; &lt;loose&gt;" in text
    for heading in (
        "Loss and SD variation",
        "Alignment",
        "By module kind",
        "Spectra over time",
        "Overhead",
        "Settings",
    ):
        assert heading in text
    assert "Dashed: cosine of the parameters" in text, "the checkpoints were found"


def test_one_run(run_dirs, tmp_path, capsys):
    assert main(["report", str(run_dirs[0]), "-o", str(tmp_path / "page" / "r.html")]) == 0
    text = (tmp_path / "page" / "r.html").read_text()
    assert capsys.readouterr().out.strip().endswith("r.html")
    assert Page(text).tags.count("svg") == 8
    rows = [row[1:4] for row in rows_of(text) if len(row) == 10 and row[1] in ("attention", "mlp")]
    run = sosd_fast.load(run_dirs[0])
    last = {r.name: r.sd_variation for r in run.records if r.step == 39}
    assert [(kind, count) for kind, count, _ in rows] == [("attention", "1"), ("mlp", "1")]
    assert [float(v) for *_, v in rows] == pytest.approx([last["attn.weight"], last["mlp.weight"]], rel=1e-2)


def test_the_numbers_behind_the_figures(run_dirs, compared):
    """In tables that are closed at first, and where a pointer rests on a line."""
    text, _ = compared
    assert text.count("<summary>numbers</summary>") == 2 + 2 * 2
    run = sosd_fast.load(run_dirs[0])
    last = {r.name: r for r in run.records if r.step == 39}
    loss = next(line["loss"] for line in run.log if line["step"] == 39)
    attn, mlp = (f"{last[name].sd_variation:.2e}" for name in ("attn.weight", "mlp.weight"))
    assert ["slow", "39", f"{loss:.4g}", attn, mlp] in rows_of(text)
    S = run.spectra("mlp.weight")[1].astype(float)
    share, half = (S / S.sum(1, keepdims=True))[[0, -1]], lambda p: int((p.cumsum() < 0.5).sum()) + 1
    row = ["mlp.weight", "0 to 39", f"{share[0, 0]:.4f} → {share[1, 0]:.4f}", f"{half(share[0])} → {half(share[1])}"]
    assert row in rows_of(text)
    hints = re.findall(r"<title>(.*?)</title>", text)[1:]
    assert any(re.match(rf"slow: {last['mlp.weight'].sd_variation:.4g} at step 39; largest", hint) for hint in hints)


def test_runs_that_are_compared_share_their_colours(run_dirs, compared):
    _, drawn = compared
    scales = [figure.axes[0].collections[0].get_clim() for figure in drawn]
    assert len(scales) == 8 and scales[:4] == scales[4:] and scales[0] != scales[2], "one scale for each kind"
    alone = plot.plot_spectra(sosd_fast.load(run_dirs[0]), ["attn.weight"]).axes[0].collections[0].get_clim()
    assert alone != scales[0]


def test_events_are_told(compared):
    rows = rows_of(compared[0])
    assert ["slow", "30", str(SPIKE)] in rows and ["fast &amp; &lt;loose&gt;", "–", "none was found"] in rows


def test_a_run_without_anything_measured(tmp_path):
    RunWriter(tmp_path / "empty").close()
    assert main(["report", str(tmp_path / "empty"), "-o", str(tmp_path / "r.html")]) == 0
    Page((tmp_path / "r.html").read_text())


def test_diverged_and_sparse_runs(tmp_path):
    writer = RunWriter(tmp_path / "odd")
    for step in range(6):
        S = np.full(4, np.nan if step > 3 else step)  # zero, then not, then NaN
        records = [Record(step, "h.mlp.w", (4, 4), "gram32", 1, float(S[0]), spectrum=S, effective_rank=float(S[0]))]
        writer.append(records + ([Record(step, "h.attn.w", (4, 9), "topk", topk=(1.0,))] if step % 2 else []))
    writer.close()
    assert main(["report", str(tmp_path / "odd"), "-o", str(tmp_path / "r.html")]) == 0
    assert Page((tmp_path / "r.html").read_text()).tags.count("svg") == 6


def test_bounds_and_audits(tmp_path):
    writer = RunWriter(tmp_path / "run")
    for step, (error, moved) in enumerate([(None, 1.0), (2e-8, 2.0), (8e-8, 4.0)]):
        fields = {"sd_variation": moved, "theory_bound": 3.0, "sd_error": 1e-7, "audit_error": error}
        writer.append([Record(step, "h.mlp.w", (4, 4), "gram32", 1, **fields)])
    writer.close()
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]) == 0
    cells = ["run", "1.0e-07", "1.0e-07", "1 of 3", "2", "0.5", "0.8"]
    assert cells in rows_of((tmp_path / "r.html").read_text())


def test_no_run_directory(tmp_path, capsys):
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 2
    assert "expected a run directory" in capsys.readouterr().err and not (tmp_path / "r.html").exists()


def test_no_run_at_all():
    with pytest.raises(ValueError, match="expected at least one run directory"):
        write_report([])


MARKUP = ["</title><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "'\"><svg onload=alert(1)>", "]]><!--"]
CONTROL = ["a\x1b[2J\x1b]0;owned\x07", "\u202egpj.exe", "\x00\x08"]
OTHER = ["$\\frac{1$", "$\\x$ $", "_hidden", "${title} $sections", "javascript:alert(1)", "²", "x" * 300]
HOSTILE = [*MARKUP, *CONTROL, *OTHER]


def test_names_settings_and_logs_are_shown_as_data(tmp_path):
    run = tmp_path / "run"
    # Each is drawn, which takes most of the time: those that do not mind what stands beside them are in one name.
    matrices = [f"h.attn.{name}" for name in ("".join(MARKUP + CONTROL), *OTHER[:4], "".join(OTHER[4:]))]
    writer = RunWriter(run, {"settings": {name: name for name in HOSTILE}, "matrices": matrices})
    for step in range(4):
        spectrum = np.arange(4, 0, -1.0) + step
        writer.append([Record(step, m, (4, 4), "exact", 1, 1.0 + step, spectrum=spectrum) for m in matrices])
    writer.close()
    log = JsonLines(run / "log.jsonl")
    for name in HOSTILE:
        for value in (1.0, name, [name], {name: 1}, True, 10**400, None):
            log.write({"step": 1, "loss": value, "overhead": value, "step_ms": value, "lr": value, name: value})
            log.write({"step": value, "loss": 1.0})
    log.write({"loss": 2.0})
    log.close()
    (run / "config.json").write_text(json.dumps({name: [name, {name: None}] for name in HOSTILE}))
    assert main(["report", str(run), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    assert not [k for k, v in page.attributes if k.startswith("on") or (v or "").startswith("javascript:")]
    assert not {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t"}
    assert page.tags.count("svg") == 6


BROKEN = [b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": %s}' % (b"9" * 5000)]


def test_a_broken_config_is_shown_as_such(tmp_path):
    runs = [tmp_path / str(i) for i in range(len(BROKEN) + 2)]
    for run, config in zip(runs, [*BROKEN, b"[1]", b'"x"'], strict=True):
        RunWriter(run).close()
        (run / "config.json").write_bytes(config)
    assert main(["report", *map(str, runs), "-o", str(tmp_path / "r.html")]) == 0
    damaged = ["damaged: it holds no JSON"] * len(BROKEN)
    assert ["config.json", *damaged, "[1]", "x"] in rows_of((tmp_path / "r.html").read_text())


def test_errors_write_no_escape_sequence_to_a_terminal(tmp_path, capsys):
    assert main(["report", str(tmp_path / "a\x1b[2J\nb"), "-o", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and len(said.splitlines()) == 1
