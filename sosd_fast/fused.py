"""How a fused weight holds its queries, keys and values: told by its attention module, or by a model's config.

Its outputs are groups, one after the other, each of so many heads of queries, keys and values. [q; k; v] is one group;
where each head has its three parts side by side, there are as many groups as heads:

    [q; k; v]                  one group           GPT-2, torch.nn.MultiheadAttention, timm
    [q_1; k_1; v_1; q_2; ...]  a group a head      GPT-NeoX, BLOOM, MaxViT
    [q_1; q_2; k; v; ...]      a group a key head  Falcon's grouped queries, InternLM2, torchtitan
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from sosd_fast.places import without_adapter


class Fused(NamedTuple):
    """The order of outputs in a fused weight."""

    groups: int
    heads: tuple[int, ...]  # of each part in a group
    labels: str = "qkv"  # of the parts, in their order


_KV_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_n_heads", "kv_heads", "n_head_kv",
    "num_query_groups", "n_query_groups",
)  # fmt: skip


class _Settings:
    """What an attention module, or a model's config, says of heads, by whichever of the usual names it has."""

    def __init__(self, *sources: object):
        self._sources = [source for source in sources if source is not None]

    def get(self, *names: str):
        """The first setting of these names, None where there is none."""
        for source in self._sources:
            for name in names:
                value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
                if isinstance(value, bool | int):
                    return value
        return None

    @property
    def heads(self) -> int:
        """Of queries; 0 where nothing says how many."""
        return self.get("num_heads", "num_attention_heads", "n_heads", "n_head", "heads") or 0

    @property
    def kv_heads(self) -> int:
        """Of keys and of values: as many as of queries where nothing says otherwise."""
        return self.get(*_KV_HEADS) or self.heads


def _by_head(of: _Settings) -> Fused:
    return Fused(of.heads, (1, 1, 1))


def _one_after_the_other(of: _Settings) -> Fused:
    return Fused(1, (of.heads, of.kv_heads, of.kv_heads))


def _bigcode(of: _Settings) -> Fused:
    return Fused(1, (of.heads, 1, 1)) if of.get("multi_query") else _by_head(of)


def _by_key_head(of: _Settings) -> Fused:
    return Fused(of.kv_heads, (of.heads // max(of.kv_heads, 1), 1, 1))


def _falcon(of: _Settings) -> Fused:
    return _by_key_head(of) if of.get("new_decoder_architecture") else _bigcode(of)


# Read from the models' own code (transformers 5.23; InternLM2's own): how each views the output of its fused layer.
_FAMILIES: dict[str, Callable[[_Settings], Fused]] = {
    "bloom": _by_head,
    "codegen": lambda _: Fused(4, (1, 1, 1), "qvk"),  # groups of the four TPU cores that it was trained on
    "falcon": _falcon,
    "gptbigcode": _bigcode,
    "gptneox": _by_head,
    "internlm2": _by_key_head,
    "modernbert": _one_after_the_other,
    "mpt": _one_after_the_other,
    "persimmon": _by_head,
    "minimaxlightning": _by_head,
    "phi3": _one_after_the_other,
    "phi4multimodal": _one_after_the_other,
}
_FUSED_LAYER = re.compile(r"(^|\.)(query_key_value|c_attn|[Ww]qkv|(\w+_)?qkv(_proj)?)\.weight$")
# Names of the parameter itself, or of the layer that has it, which hold queries, keys and values one beside another.
_FUSED = re.compile(r"(^|[._])(qkv|c_attn|in_proj|query_key_value)(_\w+)?(\.weight)?$", re.IGNORECASE)


def is_fused(name: str) -> bool:
    """Whether a weight is named after queries, keys and values together."""
    return _FUSED.search(without_adapter(name)) is not None or _FUSED_LAYER.search(without_adapter(name)) is not None


def fused_in(name: str, shape: Sequence[int], attention: nn.Module) -> Fused | str | None:
    """Says how a weight holds queries, keys and values, as its attention module tells.

    Args:
        name: of the weight.
        shape: of the weight.
        attention: the module around the layer that has it.

    Returns:
        The order of its outputs; why they cannot be told apart, where the module says that they are not [q; k; v];
        None where it says nothing.
    """
    if getattr(attention, "is_cross_attention", False):  # whose fused weight has no queries
        return None
    families = [base.__name__.lower() for base in type(attention).__mro__]
    return _fused(name, shape, families, _Settings(attention, getattr(attention, "config", None)))


def fused_by_config(name: str, shape: Sequence[int], config: dict) -> Fused | str | None:
    """Says the same as `fused_in`, from a model's config.json."""
    text = config.get("text_config")  # of a model of images, too
    config = text if isinstance(text, dict) else config
    return _fused(name, shape, [str(config.get("model_type", "")).replace("_", "").lower()], _Settings(config))


def _fused(name: str, shape: Sequence[int], families: list[str], settings: _Settings) -> Fused | str | None:
    if not _FUSED_LAYER.search(without_adapter(name)):
        return None
    for family, order in _FAMILIES.items():
        if any(each.startswith(family) for each in families):
            found = order(settings)
            return found if found.groups and min(found.heads) else "unknown numbers of heads"
    head_first = settings.get("head_first")  # timm's MaxViT and CoAtNet
    if head_first is not None and (head_first or settings.heads):
        told = _by_head(settings) if head_first else _one_after_the_other(settings)
        return told if settings.heads else "unknown numbers of heads"
    head_dim = settings.get("head_dim", "dim_head", "head_size", "d_head")
    queries = settings.get("heads_per_kv")
    if (
        queries is not None and settings.get("r_dim") == queries + 2
    ):  # torchtitan views (..., key heads, r_dim, head_dim)
        groups, rest = divmod(shape[0], (queries + 2) * (head_dim or shape[0] + 1))
        return "unknown numbers of heads" if rest or queries < 1 else Fused(groups, (queries, 1, 1))
    whole = 3 * settings.heads * head_dim if head_dim and settings.heads else max(shape)
    return (
        None if settings.kv_heads == settings.heads and whole == max(shape) else "grouped queries in an unknown order"
    )
