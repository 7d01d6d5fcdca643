import numpy as np
import pytest

from sosd_fast.runs.curves import variation_by_kind
from sosd_fast.runs.plot import plot_run
from sosd_fast.runs.records import JsonLines, Record, RunWriter, load


@pytest.fixture
def run(tmp_path):
    writer = RunWriter(tmp_path)
    log = JsonLines(tmp_path / "log.jsonl")
    for step in range(5):
        writer.append(
            [
                Record(step=step, name=name, shape=(4, 4), method="gram32", sd_variation=v if step else None)
                for name, v in (("h.0.attn.w", 1e-3), ("h.1.attn.w", 3e-3), ("h.2.attn.w", 2e-3), ("h.0.mlp.w", 1e-4))
            ]
        )
        log.write({"step": step, "loss": 5.0 - step} | ({"val_loss": 5.5 - step} if step % 2 else {}))
    writer.close()
    log.close()
    return load(tmp_path)


def test_variation_by_kind(run):
    by_kind = variation_by_kind(run)
    assert list(by_kind) == ["attention", "mlp"]
    steps, variation = by_kind["attention"]
    assert steps.tolist() == [1, 2, 3, 4] and np.allclose(variation, [1e-3, 2e-3, 3e-3])


def test_matrices_that_take_turns_do_not_make_the_curve_jump(tmp_path):
    writer = RunWriter(tmp_path)
    for step in range(1, 9):
        name, variation = (("h.0.mlp.w", 1e-3), ("h.1.mlp.w", 3e-3))[step % 2]
        writer.append([Record(step=step, name=name, shape=(4, 4), method="gram32", sd_variation=variation)])
    writer.append([Record(step=40, name="h.0.mlp.w", shape=(4, 4), method="gram32", sd_variation=5e-3)])
    writer.close()
    ((steps, variation),) = variation_by_kind(load(tmp_path)).values()
    assert steps.tolist() == [*range(1, 9), 40]
    assert np.allclose(variation[1:8, 1], 2e-3) and np.allclose(variation[0], 3e-3) and np.allclose(variation[8], 5e-3)


def test_the_figure_says_what_it_shows(run, tmp_path):
    figure = plot_run(run)
    top, bottom = figure.axes
    assert "loss" in top.get_ylabel() and "nats" in top.get_ylabel()
    assert "SD variation" in bottom.get_ylabel() and bottom.get_xlabel() == "training step"
    assert bottom.get_yscale() == "log"
    assert [t.get_text() for t in bottom.get_legend().get_texts()] == ["attention", "mlp"]
    assert [t.get_text() for t in top.get_legend().get_texts()] == ["training", "validation"]
    assert bottom.lines[0].get_ydata().tolist() == [2e-3] * 4
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_an_empty_run(tmp_path):
    RunWriter(tmp_path).close()
    plot_run(load(tmp_path)).savefig(tmp_path / "run.png")


def test_a_long_curve_is_drawn_with_its_extremes(tmp_path):
    steps, spike = np.arange(1, 4001), 2345
    writer = RunWriter(tmp_path)
    for step in steps.tolist():
        variation = 0.5 if step == spike else 1e-3
        writer.append([Record(step=step, name="h.0.mlp.w", shape=(4, 4), method="gram32", sd_variation=variation)])
    writer.close()
    _, bottom = plot_run(load(tmp_path)).axes
    assert len(bottom.lines[0].get_xdata()) < 1000 and set(bottom.lines[0].get_ydata()) == {1e-3}, "the median"
    band = np.concatenate([path.vertices for path in bottom.collections[0].get_paths()])
    assert abs(band[band[:, 1].argmax(), 0] - spike) <= 4 and band[:, 1].max() == 0.5
