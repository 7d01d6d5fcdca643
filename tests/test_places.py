"""Names are those that people know: free of what wraps a module or parametrizes a weight."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import sosd_fast
from sosd_fast.matrices import find_matrices
from sosd_fast.places import places_of, plain_name


class Forwards(nn.Module):
    """Wraps a module as Fabric, DeepSpeed and FSDP do: it hands on what is asked of it."""

    def __init__(self, part, module):
        super().__init__()
        self._modules[part] = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(next(iter(self.__dict__["_modules"].values())), name)


class Fabric(Forwards):
    """Holds the module twice."""

    def __init__(self, module):
        super().__init__("_forward_module", Forwards("module", module))
        self._original_module = module


class Averaged(nn.Module):
    """Copies of a model, as of averaged weights."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.register_buffer("n_averaged", torch.zeros(2, 2))


class Keras(nn.Module):
    """Keeps the parameters of all layers in one place, as Keras's models do."""

    def __init__(self, module):
        super().__init__()
        self._torch_params = nn.ParameterDict({n.replace(".", "/"): p for n, p in module.named_parameters()})


class KerasSequential(Keras):
    """Holds the parameters twice."""

    def __init__(self, module):
        super().__init__(module)
        self._modules = {"_functional": Keras(module)} | self._modules


class Mine(nn.Module):
    """A module of one's own, which is no wrapper."""

    def __init__(self, part):
        super().__init__()
        self.add_module(part, nn.Linear(4, 4))


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3)))


WRAPPED = {
    "data parallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled data parallel": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    "data parallel compiled": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    "DeepSpeed": lambda m: Forwards("module", m),
    "Fabric": Fabric,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "averaged by timm": Averaged,
    "checkpointed inside": lambda m: m.__setitem__(1, Forwards("_checkpoint_wrapped_module", m[1])) or m,
    "Keras": Keras,
    "Keras's Sequential": KerasSequential,
    "data parallel inside": lambda m: m.__setitem__(1, nn.DataParallel(m[1])) or m,
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_leave_no_trace_in_names(wrapper):
    left_out = {}
    wrapped = WRAPPED[wrapper](net())
    names = [m.name for m in find_matrices(wrapped, left_out=left_out)]
    assert names == ["0.weight", "1.0.weight"]
    assert list(left_out) == ["0.bias", "1.0.bias"]
    if wrapper not in ("data parallel inside", "Fabric"):  # of a name alone one cannot tell; Fabric saves the module
        saved = [plain_name(key) for key in wrapped.state_dict() if key.endswith("weight")]
        assert list(dict.fromkeys(saved)) == [(n, "") for n in names]


@pytest.mark.parametrize("part", ["module", "_net"])
def test_what_is_no_wrapper_keeps_its_name(part):
    model = nn.Sequential(Mine(part), nn.Linear(4, 4))
    assert [m.name for m in find_matrices(model)] == [f"0.{part}.weight", "1.weight"]


def older(function):
    def apply(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather have the new one
            return function(module)

    return apply


class Halves(nn.Module):
    def forward(self, a, b):
        return a + b

    def right_inverse(self, W):
        return W / 2, W / 2


def halved(module):
    parametrize.register_parametrization(module, "weight", Halves())
    return module


PARAMETRIZED = {
    "weight_norm": (parametrizations.weight_norm, ["weight[original1]"]),
    "spectral_norm": (parametrizations.spectral_norm, ["weight"]),
    "two originals": (halved, ["weight[original0]", "weight[original1]"]),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.3), ["weight_orig"]),
    "older weight_norm": (older(nn.utils.weight_norm), ["weight_v"]),
}


@pytest.mark.parametrize(
    "layer",
    [lambda: nn.Linear(6, 5), lambda: nn.Conv1d(3, 8, 5), lambda: nn.Conv2d(3, 8, 5)],
    ids=["linear", "1d", "2d"],
)
@pytest.mark.parametrize("how", PARAMETRIZED)
def test_originals_have_the_name_of_their_weight(how, layer):
    apply, names = PARAMETRIZED[how]
    shape = (layer().weight.shape[0], layer().weight[0].numel())
    model = nn.Sequential(apply(layer()))
    assert {m.name: tuple(m.tensor().shape) for m in find_matrices(model)} == {f"0.{name}": shape for name in names}
    keys = {name for key in model.state_dict() for name in [plain_name(key)]}
    assert {(place.weight, place.original) for place in places_of(model)} <= keys


def test_patterns_fit_the_weight_and_its_originals():
    model = nn.Sequential(halved(nn.Linear(6, 5)), nn.Linear(5, 4))
    for include, expected in (("0.weight", 2), ("*.original1", 1), ("*weight", 3)):
        assert len(find_matrices(model, include=include)) == expected


def test_the_weight_itself_can_be_measured_where_computing_it_changes_nothing():
    """The recipe in the docstring of `find_matrices`."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        S = sosd_fast.svdvals(model[0].weight)
    g, v = before["0.parametrizations.weight.original0"], before["0.parametrizations.weight.original1"]
    assert torch.allclose(S.double(), torch.linalg.svdvals((g * v / v.norm(dim=1, keepdim=True)).double()), rtol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(2, 6))])
def test_torchscript_modules_are_followed(compiled):
    """Alone, and inside of another module."""
    inner = compiled(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)))
    for net, prefix in ((inner, ""), (nn.Sequential(inner), "0.")):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with sosd_fast.track(net, method="full") as probe:
            net(torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
        assert {(name, r.step) for name, r in probe.latest().items()} == {(f"{prefix}{i}.weight", 1) for i in (0, 1)}
