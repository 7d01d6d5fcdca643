"""What one step's measurement of a matrix found, on the host, and the `Record` that is made of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from sosd_fast.runs.records import Record

Kind = Literal["full", "leading"]  # all singular values of a matrix, or the k leading ones
Values = TypeVar("Values")


@dataclass(slots=True)
class FullValues:
    """All singular values of a matrix at one step; the fields are those of `Record` of the same names.

    The variation is None where the step before was not measured in full.
    """

    method: str
    spectrum: NDArray[Any]
    topk: tuple[float, ...]
    sd_error: float
    nuclear_norm: float
    frobenius_norm: float
    sigma_max: float
    sigma_min: float
    stable_rank: float
    effective_rank: float
    spectral_entropy: float
    participation_ratio: float
    cosine: float | None = None
    interval: int | None = None
    sd_variation: float | None = None
    sd_variation_topk: float | None = None
    theory_bound: float | None = None

    @classmethod
    def unmeasured(cls, shape: tuple[int, int], k: int, method: str) -> "FullValues":
        """The values of a matrix that could not be measured, which are those of one that holds NaN."""
        r, nan = min(shape), math.nan
        numbers: dict[str, Any] = {f.name: nan for f in fields(cls) if f.type is float}
        return cls(method=method, spectrum=np.full(r, nan), topk=(nan,) * min(k, r), **numbers)


@dataclass(slots=True)
class LeadingValues:
    """The k leading singular values of a matrix at one step; the fields are those of `Record` of the same names.

    Attributes:
        S: (k,), the leading values.
        rest: Frobenius norm of what the other singular values make up.
    """

    S: NDArray[Any]
    rest: float
    frobenius_norm: float
    sigma_max: float
    stable_rank: float
    residual: tuple[float, ...]
    interval: int | None = None
    sd_variation_topk: float | None = None
    sd_variation_carried: float | None = None
    sd_variation_floor: float | None = None

    @classmethod
    def unmeasured(cls, shape: tuple[int, int], k: int) -> "LeadingValues":
        """The values of a matrix that could not be measured, which are those of one that holds NaN."""
        r = min(k, *shape)
        return cls(np.full(r, math.nan), math.nan, math.nan, math.nan, math.nan, (math.nan,) * r)


@dataclass(slots=True)
class Measurement:
    """What one step's measurement of a matrix found: all singular values, the leading ones, or both.

    Attributes:
        place: of the matrix among those that the probe follows.
        mine: whether this rank records the matrix.
        failure: why the values of one kind or of both could not be measured.
        lost: whether nothing could be measured; the values are NaN then.
        audit_error: |SD - SD_true|_2, where the spectrum was audited.
        lr: the learning rate of the step, where it is known.
    """

    step: int
    place: int
    name: str
    shape: tuple[int, int]
    mine: bool = True
    full: FullValues | None = None
    leading: LeadingValues | None = None
    failure: Exception | None = None
    lost: bool = False
    audit_error: float | None = None
    lr: float | None = None

    @property
    def sigma_max(self) -> float:
        """The largest singular value."""
        values = self.full or self.leading
        assert values is not None
        return values.sigma_max

    @property
    def moved(self) -> float | None:
        """How far the singular distribution moved since the step before, as well as it is known."""
        if self.full is not None and self.full.sd_variation is not None:
            return self.full.sd_variation
        return None if self.leading is None else self.leading.sd_variation_carried

    def record(self) -> Record:
        """Returns the `Record`; where both kinds were measured, all singular values are preferred."""
        full, leading = self.full, self.leading
        if full is None:
            assert leading is not None
            return Record(
                step=self.step,
                name=self.name,
                shape=self.shape,
                method="topk",
                interval=leading.interval,
                sd_variation_topk=leading.sd_variation_topk,
                sd_variation_carried=leading.sd_variation_carried,
                sd_variation_floor=leading.sd_variation_floor,
                frobenius_norm=leading.frobenius_norm,
                sigma_max=leading.sigma_max,
                stable_rank=leading.stable_rank,
                topk=tuple(leading.S.tolist()),
                residual=leading.residual,
                lr=self.lr,
            )
        interval, floor = full.interval, full.sd_variation_topk  # of all values nothing is carried: they are known
        variation_topk, carried = full.sd_variation_topk, None
        if leading is not None:
            carried = leading.sd_variation_carried
            if interval is None:
                interval, floor = leading.interval, leading.sd_variation_floor
                variation_topk = leading.sd_variation_topk
        return Record(  # by hand: 25 of them take a tenth of a step's Python
            step=self.step,
            name=self.name,
            shape=self.shape,
            method=full.method,
            interval=interval,
            sd_variation=full.sd_variation,
            sd_variation_topk=variation_topk,
            sd_variation_carried=carried,
            sd_variation_floor=floor,
            cosine=full.cosine,
            nuclear_norm=full.nuclear_norm,
            frobenius_norm=full.frobenius_norm,
            sigma_max=full.sigma_max,
            sigma_min=full.sigma_min,
            stable_rank=full.stable_rank,
            effective_rank=full.effective_rank,
            spectral_entropy=full.spectral_entropy,
            participation_ratio=full.participation_ratio,
            sd_error=full.sd_error,
            audit_error=self.audit_error,
            theory_bound=full.theory_bound,
            lr=self.lr,
            topk=full.topk,
            spectrum=full.spectrum,
        )


def of_each(count: int, values: Callable[[int], Values]) -> list[Values | Exception]:
    """Returns values(0), values(1), ...; in the place of one that raises, what it raised: the others go on."""
    found: list[Values | Exception] = []
    for j in range(count):
        try:
            found.append(values(j))
        except Exception as error:
            found.append(error)
    return found
