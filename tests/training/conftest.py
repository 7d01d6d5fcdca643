"""Runs in this process draw no figure, which takes half a second of each; tests of figures ask for `real_figures`."""

import pytest


class NoFigure:
    def savefig(self, *_, **__):
        pass


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    if "real_figures" not in request.fixturenames:
        monkeypatch.setattr("training.run.plot_run", lambda _: NoFigure())


@pytest.fixture
def real_figures():
    pass
