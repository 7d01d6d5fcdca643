import numpy as np

from . import GGMLQuantizationType

def dequantize(data: np.ndarray, qtype: GGMLQuantizationType) -> np.ndarray: ...
