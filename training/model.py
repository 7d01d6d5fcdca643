"""GPT-2 (modded) and LLaMA-style decoders from one definition; PRESETS holds the named sizes."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Config:
    """Shape and kind of a decoder.

    The defaults are the modded GPT-2: RMSNorm without gain, RoPE, squared ReLU, tied embedding and head.
    LLaMA is ``activation="swiglu", norm_gain=True, tied=False``.
    """

    n_layer: int
    n_head: int
    width: int
    ff_width: int
    context: int
    vocab: int
    activation: str = "relu2"  # "relu2" or "swiglu"
    norm_gain: bool = False
    tied: bool = True
    rope_base: float = 10000.0

    def __post_init__(self):
        """Refuse shapes that cannot be built."""
        if self.activation not in ("relu2", "swiglu"):
            raise ValueError(
                f"Config: expected activation 'relu2' or 'swiglu', got activation={self.activation!r}. Choose one."
            )
        if self.width % (2 * self.n_head):
            raise ValueError(
                f"Config: expected a width divisible by 2 * n_head (RoPE turns pairs of features), got "
                f"width={self.width}, n_head={self.n_head}. Change one of them."
            )


def _gpt2(n_layer, n_head, width, context=1024, vocab=50304):  # 50257 tokens, padded to a multiple of 64
    return Config(n_layer, n_head, width, 4 * width, context, vocab)


def _llama(n_layer, n_head, width, context=2048, vocab=32000):
    return Config(n_layer, n_head, width, 4 * width, context, vocab, activation="swiglu", norm_gain=True, tied=False)


PRESETS = {
    "gpt2-nano": _gpt2(4, 4, 256, context=256, vocab=256),
    "llama-nano": _llama(4, 4, 256, context=256, vocab=256),
    "gpt2-small": _gpt2(12, 6, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "llama-0.5b": _llama(15, 20, 1280),
    "llama-2b": _llama(30, 32, 2048),
}
PRESETS["nano"] = PRESETS["gpt2-nano"]


def resized(config: Config, layers: int | None = None, width: int | None = None) -> Config:
    """The config with another depth or width; width of a head and ratio of the feed-forward stay."""
    layers, width = layers or config.n_layer, width or config.width
    head = config.width // config.n_head
    if width % head:
        raise ValueError(f"resized: expected a multiple of the head width {head}, got width={width}. Change it.")
    ff = config.ff_width * width // config.width
    return replace(config, n_layer=layers, n_head=width // head, width=width, ff_width=ff)


def flops_per_token(config: Config) -> float:
    """Floating-point operations of training on one token: 6 a weight of every product, and attention in full.

    Source: Chowdhery et al., PaLM (arXiv 2204.02311), appendix B.
    """
    mlp = (3 if config.activation == "swiglu" else 2) * config.ff_width
    weights = config.n_layer * config.width * (4 * config.width + mlp) + config.vocab * config.width
    return 6 * weights + 12 * config.n_layer * config.width * config.context


def rope_tables(context: int, head_width: int, base: float = 10000.0, device=None) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of the angles t * base^(-2i/head_width), each (context, head_width), float32.

    Features i and i + head_width/2 share an angle; the first has -sin, the second sin.
    """
    frequencies = base ** (-torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width)
    angles = torch.outer(torch.arange(context, dtype=torch.float32, device=device), frequencies)
    return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn feature pairs (i, i + D/2) of x (..., D) by the angles of `rope_tables`; same dtype as x.

    Source: Su et al., RoFormer (arXiv 2104.09864), in the half-split layout of GPT-NeoX and LLaMA.
    """
    # The tables keep this in float32 also under bf16: late positions need more than 8 bits of angle
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with a fused query-key-value projection, rows in the order q, k, v."""

    def __init__(self, config: Config):
        super().__init__()
        self.head_width = config.width // config.n_head
        self.c_attn = nn.Linear(config.width, 3 * config.width, bias=False)
        self.c_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend over x (B, T, d)."""
        B, T, _ = x.shape
        # As many heads as c_attn answers with: under tensor parallelism those of this rank.
        # Before the heads come first, so that the gradients of all three are stacked where they belong, in one copy
        q, k, v = self.c_attn(x).view(B, T, 3, -1, self.head_width).unbind(2)  # (B, T, H, D) each
        cos, sin = cos[:, None], sin[:, None]
        q, k, v = (y.transpose(1, 2) for y in (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class SquaredReLU(nn.Module):
    """c_proj(relu(c_fc(x))²)."""

    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.ff_width, bias=False)
        self.c_proj = nn.Linear(config.ff_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of x (B, T, d)."""
        y = F.relu(self.c_fc(x))
        return self.c_proj(y * y)  # square() would copy y for its gradient


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ff_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.ff_width, bias=False)
        self.down_proj = nn.Linear(config.ff_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of x (B, T, d)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), times a gain where the config has one."""

    def __init__(self, config: Config):
        super().__init__()
        self.width = config.width
        self.weight = nn.Parameter(torch.ones(config.width)) if config.norm_gain else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each position of x (B, T, d)."""
        return F.rms_norm(x, (self.width,), self.weight, eps=1e-6)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm = RMSNorm(config)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config)
        self.mlp = SwiGLU(config) if config.activation == "swiglu" else SquaredReLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Transform x (B, T, d)."""
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A causal language model; on the meta device, ``to_empty`` and then ``init_weights`` give it its values."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw matrices from N(0, 0.02²), residual projections from N(0, 0.02² / 2L), from torch's global generator.

        Residual projections start small, not at zero as in some recipes: a zero matrix has no singular distribution.
        """
        if self.config.tied:  # here, and not once in __init__, because to_empty() unties
            self.lm_head.weight = self.wte.weight
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                nn.init.ones_(weight)
                continue
            residual = name.endswith(("c_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=0.02 / (2 * self.config.n_layer) ** 0.5 if residual else 0.02)
        config, device = self.config, self.wte.weight.device
        self.cos, self.sin = rope_tables(config.context, config.width // config.n_head, config.rope_base, device)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab) of tokens (B, T), or with targets (B, T) the mean cross-entropy in nats."""
        T = tokens.shape[1]
        if self.config.context < T:
            raise ValueError(
                f"Transformer: expected at most context={self.config.context} tokens, got T={T}. Shorten the sequence."
            )
        # Of a tied matrix the embedding's gradient is added to the head's: on a CPU, row by row of those that occur,
        # where a dense one would be a second matrix of zeros.
        tied = self.lm_head.weight is self.wte.weight  # else nothing would make the gradient dense again
        sparse = tied and tokens.is_cpu and not torch.compiler.is_compiling()
        if sparse and not isinstance(self.wte.weight, DTensor):
            x = F.embedding(tokens, self.wte.weight, sparse=True)  # (B, T, d)
        else:
            x = self.wte(tokens)
        for block in self.h:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.lm_head(self.norm(x))  # (B, T, vocab)
        if targets is None:
            return logits
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(dtype).flatten(0, 1), targets.flatten())
