"""The kind of module that a matrix belongs to, told by the last telling part of its name."""

import re

# Parts that say what a block is for. The last one in a name decides: an MLP inside an attention block is an MLP.
_TELLING = re.compile(
    r"(?P<attention>\w*(attn|attention|mhs?a)\w*|\w*att(_\w+)?|(q|k|v|kv|qkv|query|key|value)_heads?)"
    r"|(?P<head>(embed_out|\w*unembed\w*|score|cls|readout|(pre_|to_)?logits(_proj|_projection|_layer|_linear)?)"
    r"|lm_(out|proj)\w*|(to_)?vocab(_proj\w*|_transform)?"
    r"|(\w+_)?(heads?(_\w+)?|classifier|predictions|outputs))"
    r"|(?P<mlp>(\w+_)?(mlp|ffn?|feed_?forward|experts?|moe|intermediate)(_\w+)?|dense_\w*(relu|act)\w*|pwconv\d?)"
    r"|(?P<embedding>(\w+_)?(emb|embd|embeds?|embeddings?|embedders?)(_\w+)?|w[tp]e"
    r"|(\w+_)?pos(ition(al)?)?_enc(od(ing|er)s?)?(_\w+)?)"
    r"|(?P<other>se(_\w+)?|squeeze_excit\w*|(\w+_)?(rnn|lstm|gru)(_[a-z]+)?|norm(\d*|_\w+))"
)
_ROUTER = re.compile(r"(\w+_)?router")
# What a layer's own matrices are usually called: asked where no part says what the block is for.
_USUAL = re.compile(
    r"(?P<attention>(\w+_)?(q|k|v|kv|qk|qkv|query|key|value)(_\w+)?|w(q|k|v|o|kv|qkv)|o|o_proj)"
    r"|(?P<mlp>(gate_up|gate|up|down)_proj|c_fc|(linear_)?fc\d?|fc_(in|out)|w\d|wi(_\d)?|(linear|lin)_?\d)"
)
_LAST_LAYER = re.compile(r"out|output|output_(projection|layer)|proj_out(_\d)?|fc(_out)?")
_LAST_OF_MODEL = re.compile(r"out(put)?_proj|(last|final)_(linear|layer|proj|projection|fc)")
# Learned inputs of a model, which are looked up or repeated and no layer multiplies by: SAM's mask_tokens.
_TOKENS = re.compile(r"(?!linear|mlp|fc|conv|proj|to_)(\w+_)?(tokens?|latents|latent_quer(y|ies))")


def kind(name: str) -> str:
    """Returns the module kind that a matrix's name tells: attention, mlp, embedding, head or other.

    Args:
        name: of a parameter or of a matrix in it, with or without a part such as [q].

    Returns:
        What the last telling part of the name says. A router is "other": it chooses experts and is none. Learned
        tokens are embeddings. A layer that is called an output is the head where its model has it, not a block.
    """
    parts = re.sub(r"\[.*\]$", "", name).split(".")
    if len(parts) > 1 and parts[-1].startswith("weight"):
        parts.pop()
    parts = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", part).lower() for part in parts]
    if any(map(_ROUTER.fullmatch, parts)):
        return "other"
    if _TOKENS.fullmatch(parts[-1]):
        return "embedding"
    if said := _last(_TELLING, parts):
        at, found = said
        return "other" if found == "mlp" and "gate" in parts[at + 1 :] else found  # mlp.gate: a router
    if any(part.isdigit() for part in parts):  # one block of several
        if any(re.match(r"output(_|$)", part) for part in parts):  # BERT's, whose attention has an output of its own
            return "mlp"
    elif _LAST_LAYER.fullmatch(parts[-1]) or (parts[:-1] in ([], ["model"]) and _LAST_OF_MODEL.fullmatch(parts[-1])):
        return "head"
    elif parts[-1] == "shared":  # by an encoder and a decoder: T5's, BART's
        return "embedding"
    said = _last(_USUAL, parts)
    return said[1] if said else "other"


def _last(pattern: re.Pattern[str], parts: list[str]) -> tuple[int, str] | None:
    """The place of the last part that a pattern fits, and the kind that it tells."""
    for at in reversed(range(len(parts))):
        match = pattern.fullmatch(parts[at])
        if match and match.lastgroup:
            return at, match.lastgroup
    return None
