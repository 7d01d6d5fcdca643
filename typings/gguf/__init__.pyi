from enum import IntEnum

from . import quants as quants

class GGMLQuantizationType(IntEnum): ...

GGML_QUANT_SIZES: dict[GGMLQuantizationType, tuple[int, int]]
