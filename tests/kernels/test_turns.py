"""What is launched beside other work: everything waits for what it needs, and memory for what still reads it."""

import functools

import pytest
import torch

from sosd_fast.kernels import turns


def test_on_the_host_calls_follow_one_another():
    order = []
    calls = [functools.partial(lambda i: order.append(i) or torch.tensor(i), i) for i in range(3)]
    assert [int(t) for t in turns.at_once(calls, [1, 3, 2], torch.device("cpu"))] == order == [0, 1, 2]


class Streams:
    """Streams that write down what they are asked for, in place of those of a GPU."""

    def __init__(self, monkeypatch, capturing=False):
        self.said, self.made = [], 0
        self.active = self.stream("current")
        for name, value in {
            "Stream": lambda _: self.stream(f"side {self.made - 1}"),
            "current_stream": lambda _=None: self.active,
            "is_current_stream_capturing": lambda: capturing,
            "stream": self.on,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(turns, "_beside", functools.cache(turns._beside.__wrapped__))

    def stream(self, name):
        streams = self
        self.made += 1

        class Stream:
            def __init__(self):
                self.name = name

            def record_event(self):
                streams.said.append(f"{name} records")
                return "event"

            def wait_event(self, event):
                assert event == "event"
                streams.said.append(f"{name} waits")

            def wait_stream(self, other):
                streams.said.append(f"{name} waits for {other.name}")

        return Stream()

    def on(self, stream):
        streams = self

        class On:
            def __enter__(self):
                self.before, streams.active = streams.active, stream

            def __exit__(self, *_):
                streams.active = self.before

        return On()

    def call(self, name, fails=False):
        def run():
            self.said.append(f"{name} on {self.active.name}")
            if fails:
                raise MemoryError(name)
            return Result(self, name)

        return run


class Result:
    """What a call returns."""

    def __init__(self, streams, name):
        self.streams, self.name = streams, name

    def record_stream(self, stream):
        self.streams.said.append(f"{self.name} is kept for {stream.name}")


DEVICE = torch.device("cuda", 0)


def test_calls_run_beside_the_largest_one(monkeypatch):
    streams = Streams(monkeypatch)
    for _ in range(2):  # by the same streams
        del streams.said[:]
        found = turns.at_once([streams.call(x) for x in "abc"], [5, 9, 7], DEVICE)
        assert [r.name for r in found] == ["a", "b", "c"]
        assert streams.said == [
            "current records", "b on current",
            "side 0 waits", "c on side 0", "current waits for side 0", "c is kept for current",
            "side 1 waits", "a on side 1", "current waits for side 1", "a is kept for current",
        ]  # fmt: skip


def test_an_error_leaves_nothing_behind_that_is_not_waited_for(monkeypatch):
    streams = Streams(monkeypatch)
    with pytest.raises(MemoryError, match="b"):
        turns.at_once([streams.call("a"), streams.call("b", fails=True), streams.call("c")], [3, 2, 1], DEVICE)
    assert streams.said[-2:] == ["b on side 0", "current waits for side 0"]


def test_one_call_and_a_graph_take_the_current_stream(monkeypatch):
    streams = Streams(monkeypatch)
    turns.at_once([streams.call("a")], [1], DEVICE)
    assert streams.said == ["a on current"]
    streams = Streams(monkeypatch, capturing=True)
    turns.at_once([streams.call("a"), streams.call("b")], [1, 2], DEVICE)
    assert streams.said == ["a on current", "b on current"]
