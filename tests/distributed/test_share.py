"""What ranks agree on from what they tell one another, without processes."""

import torch

from sosd_fast.distributed.layout import Mesh
from sosd_fast.distributed.share import Held, agreed, fingerprint

MESH = Mesh((2,), (4, 6))


def held(name, box=((0, 8), (0, 6)), mesh=None, why="", values=0, shape=(8, 6), dtype=torch.float32):
    return Held(name, shape, dtype, ((), None, 0, 0), box, mesh, why, values)


def test_parts_of_one_matrix():
    rows = [((0, 4), (0, 6)), ((4, 8), (0, 6))]
    common, left_out = agreed([[held("a", values=1), held("w", rows[p], MESH)] for p in range(2)], [4, 6])
    assert [each.name for each in common] == ["a", "w"] and not left_out
    assert common[1].boxes == tuple(rows) and common[1].places == (1, 1) and common[1].mesh == Mesh((2,), (0, 1))
    assert common[0].boxes == (((0, 8), (0, 6)),) * 2 and common[0].mesh is None


def test_plain_parameters_that_differ_are_told_apart():
    everyone = [[held("w", values=v)] for v in (1, 2, 1)] + [[held("w", ((0, 4), (0, 6)), shape=(4, 6), values=1)], []]
    common, left_out = agreed(everyone, [3, 5, 7, 8, 9])
    assert [each.name for each in common] == ["w[rank 3]", "w[rank 5]", "w[rank 8]"] and not left_out
    assert [each.places for each in common] == [
        (0, None, 0, None, None),
        (None, 0, None, None, None),
        (None, None, None, 0, None),
    ]


def test_what_cannot_be_measured_is_left_out_on_every_rank():
    lost = held("w[q]", ((0, 4), (0, 6)), MESH)
    for other, why in (
        (held("w[q]", ((4, 8), (0, 6)), MESH, why="holds sums"), "holds sums"),
        (held("w[q]", ((0, 4), (0, 6)), MESH), "is not held whole by the 2 ranks that have it"),
        (held("w[q]", ((4, 8), (0, 6)), MESH, dtype=torch.float64), "has another shape or dtype on another rank"),
    ):
        assert agreed([[lost], [other]], [4, 6]) == ([], {"w": why})


def test_meshes_of_other_ranks_are_joined():
    meshes = [Mesh((2,), (0, 2)), Mesh((2,), (1, 3))]
    boxes = [((0, 8), (0, 3)), ((0, 8), (3, 6))]
    (common,), _ = agreed([[held("w", boxes[p // 2], meshes[p % 2])] for p in range(4)], range(4))
    assert common.mesh == Mesh((2, 2), (0, 2, 1, 3))


def test_fingerprints_tell_values_apart():
    W = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    other, turned = W.clone(), W.clone()
    other[3, 4] = torch.nextafter(other[3, 4], torch.tensor(9.0))
    turned[[0, 1]] = W[[1, 0]]
    prints = [fingerprint(each) for each in (W, other, turned, W.double(), W.bfloat16(), W * torch.nan)]
    assert len(set(prints)) == len(prints) and fingerprint(W.mT.contiguous().mT) == prints[0]
    large = torch.zeros(2**20 + 3)
    assert fingerprint(large) != fingerprint(large.index_fill(0, torch.tensor([2**20 + 1]), 1.0))
