"""The callbacks and writers by the module's name of version 0.1; each of them is in `sosd_fast.integrations`."""

import importlib

_MODULES = {
    "HuggingFaceCallback": "hugging_face", "LightningCallback": "lightning", "TensorBoardWriter": "tensorboard",
    "WandbWriter": "wandb", "METRICS": "common", "scalars": "common",
}  # fmt: skip


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sosd_fast.integrations.{_MODULES[name]}"), name)
