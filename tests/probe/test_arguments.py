"""What `track` says of arguments that are none of what they may be, and that it leaves nothing behind then."""

import math
import os

import pytest
import torch
from torch import nn

import sosd_fast
from sosd_fast.probe.hooks import live

WRONG = {
    "split": [{"weight": 0}, {"weight": []}, {"weight": [2, 0]}, {"weight": True}, None, {"*": "a"}, {3: 3}, 3, "qkv"],
    "include": [None, 3, [3], b"*"],
    "exclude": [None, 3, [None]],
    "run_dir": [5, 3.5, "", b"x", True],
    "every": [True, 0, 2.5, None, "1"],
    "budget": [True, 0, -1, 1.5, math.nan, math.inf, None, "1 %", 1j],
    "k": [True, 0, 2.5, None, "32"],
    "step": [True, -1, 1.5, "3"],
    "reference": ["foo", 3, {3: [1.0]}, {"weight": 1.0}, {"weight": "abc"}, {"weight": None}, [1.0], torch.ones(3)],
    "on_record": [3, "print", [print]],
    "on_event": [3, "print", [print]],
    "optimizers": [5, "adam", [3], {"a": 1}, [None], torch.optim.SGD],
    "method": ["fast", None, 3, ["auto"]],
    "audit": [None, 1, "no"],
    "theory_bound": [None, 0],
}


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (nn.LayerNorm(3), {}, "got model=LayerNorm without any"),
        ("model", {}, "track: expected an nn.Module, got model=str"),
        (nn.Linear(3, 3), {"method": "fast"}, "expected one of auto, full, topk, exact, got method='fast'"),
        (nn.Linear(3, 3), {"k": 0}, "got k=0"),
        (nn.Linear(3, 3), {"k": 1.5}, "got k=1.5"),
        (nn.Linear(3, 3), {"step": -1}, "got step=-1"),
        (nn.Linear(3, 3), {"on_record": 3}, "got on_record=3"),
        (nn.Linear(3, 3), {"optimizers": "adam"}, "expected torch optimizers, got optimizers='adam'"),
        (nn.Linear(3, 3), {"optimizers": 3}, "expected torch optimizers, got optimizers=3"),
        (nn.Linear(3, 3), {"reference": "foo"}, "got reference='foo'"),
        (nn.Linear(3, 3, device="meta"), {}, "on the meta device"),
        (nn.Linear(3, 3), {"every": 0}, "every=0"),
        (nn.Linear(3, 3), {"budget": 0}, "got budget=0"),
        (nn.Linear(3, 3), {"reference": {"weight": torch.ones(2)}}, "expected 3 singular values for weight"),
        *[
            (nn.Linear(3, 3), {name: value}, rf"track: expected .*, got {name}=.*\. \S.*\.$")
            for name, values in WRONG.items()
            for value in values
        ],
        (nn.Linear(3, 3), {"run_dir": os.devnull + "/run"}, "expected a directory that can be written, got run_dir="),
    ],
)
def test_bad_input(net, options, message):
    before = live()
    with pytest.raises(ValueError, match=message):
        sosd_fast.track(net, **options)
    assert {id(probe) for probe in live()} <= {id(probe) for probe in before}


def test_a_run_directory_of_another_probe(tmp_path):
    with sosd_fast.track(nn.Linear(3, 3), run_dir=tmp_path):
        with pytest.raises(
            ValueError, match=r"^track: expected a file that nobody else writes, got path=.*\. Close the"
        ):
            sosd_fast.track(nn.Linear(3, 3), run_dir=tmp_path)
