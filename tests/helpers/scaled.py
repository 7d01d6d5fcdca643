"""A tensor without memory of its own, as quantised weights are."""

import torch


class Scaled(torch.Tensor):
    """Values with a scale: nothing is computed with it but what a subclass offers."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, requires_grad=False)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(str(function))  # as of torchao's types, for what they do not know
