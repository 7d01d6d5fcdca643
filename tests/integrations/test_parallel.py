"""The callbacks in runs of two processes: DistributedDataParallel and fully_shard, through the real Trainers."""

import csv
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchrun import torchrun
from transformers import LlamaConfig, LlamaForCausalLM

import sosd_fast
from sosd_fast.integrations.common import METRICS, scalars
from sosd_fast.testing import sd_distance

WORKER = Path(__file__).with_name("trainers_worker.py")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("library", ["hugging_face", "lightning"])
def test_each_process_measures_its_share(tmp_path, library, kind):
    done = torchrun(2, WORKER, library, kind, tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout
    weights = {name: W for name, W in torch.load(tmp_path / "weights.pt").items() if W.ndim > 1}
    prefix = "model." if library == "lightning" else ""
    run = sosd_fast.load(tmp_path / "run")
    assert {r.name for r in run.records} == {prefix + name for name in weights}
    assert len(run.records) == 7 * len(weights) and {r.step for r in run.records} == set(range(7))
    owners = [{r.name for r in sosd_fast.load(path).records} for path in sorted((tmp_path / "run").glob("rank-*"))]
    assert len(owners) == 2 and all(owners) and not owners[0] & owners[1]
    for name, W in weights.items():
        S = torch.from_numpy(run.spectra(prefix + name)[1][-1])
        assert sd_distance(S, torch.linalg.svdvals(W.double())) <= 1e-6, "of the weights after the last step"
    steps = [line["step"] for line in run.log if "loss" in line]
    assert steps == [2, 4, 6]
    if library == "hugging_face":
        found = {}
        for path in {path.parent for path in (tmp_path / "tb").rglob("events*")}:
            events = EventAccumulator(str(path))
            events.Reload()
            keys = [key for key in events.Tags()["scalars"] if "spectra/" in key]
            found |= {(e.step, key.removeprefix("train/")): e.value for key in keys for e in events.Scalars(key)}
        expected = {(r.step, key): v for r in run.records if r.step in steps for key, v in scalars(r, METRICS).items()}
        assert found == pytest.approx(expected, rel=1e-6), "of both processes"
    if library == "lightning":
        with open(tmp_path / "csv/version_0/metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["spectra/model.lm_head.weight/sigma_max"]]
        assert [int(row["step"]) for row in rows] == [0, 2, 4, 6]
        for r in run.records:
            for key, value in scalars(r, METRICS).items() if r.step % 2 == 0 else ():
                assert float(rows[r.step // 2][key]) == value, "of both processes"


def test_a_plan_of_tensor_parallelism(tmp_path):
    """Of transformers: the spectra of a training run are those of one process."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    for processes, kind in ((1, "alone"), (2, "parallel")):
        worker = Path(__file__).with_name("tensor_parallel_worker.py")
        done = torchrun(processes, worker, tmp_path, kind, timeout=600)
        assert done.returncode == 0, done.stdout
    assert done.stdout.count("16 DTensors") == 2, done.stdout
    alone, run = (sosd_fast.load(tmp_path / kind) for kind in ("alone", "parallel"))
    assert run.names == alone.names and len(run.names) == 16
    keys = [(r.step, r.name) for r in run.records]
    assert len(set(keys)) == len(keys) == 4 * 16
    for name in run.names:
        for own, other in zip(run.spectra(name)[1], alone.spectra(name)[1], strict=True):
            assert sd_distance(torch.from_numpy(own), torch.from_numpy(other)) <= 1e-5, name


def test_flat_parameters_are_refused_and_end_no_training(tmp_path):
    done = torchrun(2, WORKER, "hugging_face", "fsdp1", tmp_path, timeout=600)
    assert done.returncode == 0 and "Shard with fully_shard: fsdp_version=2 in accelerate" in done.stdout
    assert "training goes on without the spectra" in done.stdout and (tmp_path / "weights.pt").exists()
