# Triton's own types know no launch kernel[grid](...), nor that a constexpr is its value.
from typing import Any

def __getattr__(name: str) -> Any: ...
