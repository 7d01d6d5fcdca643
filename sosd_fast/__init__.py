"""The singular values of every weight matrix of a language model, at every training step."""

from sosd_fast.kernels.distribution import Distribution, singular_distribution
from sosd_fast.kernels.newton_schulz import newton_schulz
from sosd_fast.muon import Muon
from sosd_fast.probe.probe import Probe
from sosd_fast.runs.events import Event
from sosd_fast.runs.records import Record, Run, load
from sosd_fast.spectra.svdvals import svdvals
from sosd_fast.spectra.topk import TopK, topk_svdvals
from sosd_fast.track import track

__version__ = "0.2.0.dev0"

__all__ = [
    "Distribution",
    "Event",
    "Muon",
    "Probe",
    "Record",
    "Run",
    "TopK",
    "load",
    "newton_schulz",
    "singular_distribution",
    "svdvals",
    "topk_svdvals",
    "track",
]
