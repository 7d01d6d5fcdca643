"""A flat loop in the style of nanochat: one script, two optimizers, one line for the spectra.

python examples/nanochat_style.py
"""

import torch
import torch.nn.functional as F

import sosd_fast

torch.manual_seed(0)
vocab, width, context, steps = 128, 64, 32, 60
text = torch.tensor(list((open(__file__).read() * 50).encode("ascii", "replace")))  # (characters,)


class Block(torch.nn.Module):
    """Attention and MLP, both residual."""

    def __init__(self):
        super().__init__()
        self.c_attn = torch.nn.Linear(width, 3 * width, bias=False)  # q, k, v: measured apart
        self.attn_proj = torch.nn.Linear(width, width, bias=False)
        self.mlp_in = torch.nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = torch.nn.Linear(4 * width, width, bias=False)

    def forward(self, x):  # (B, T, width)
        """Returns x, changed."""
        q, k, v = F.rms_norm(self.c_attn(x), (3 * width,)).chunk(3, -1)
        x = x + self.attn_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp_out(F.relu(self.mlp_in(F.rms_norm(x, (width,)))).square())


model = torch.nn.ModuleDict(
    {
        "wte": torch.nn.Embedding(vocab, width),
        "h": torch.nn.Sequential(Block(), Block()),
        "lm_head": torch.nn.Linear(width, vocab, bias=False),
    }
)
fused = [p for name, p in model["h"].named_parameters() if name.endswith("c_attn.weight")]
body = [p for name, p in model["h"].named_parameters() if p.ndim == 2 and not name.endswith("c_attn.weight")]
muon = sosd_fast.Muon([{"params": body}, {"params": fused, "split": 3}], lr=0.02)
adamw = torch.optim.AdamW([*model["wte"].parameters(), *model["lm_head"].parameters()], lr=1e-3)

probe = sosd_fast.track(model)  # the line: both optimizers make one step

for step in range(1, steps + 1):
    starts = torch.randint(len(text) - context - 1, (8,))
    window = torch.stack([text[s : s + context + 1] for s in starts])  # (8, context + 1)
    logits = model["lm_head"](model["h"](model["wte"](window[:, :-1])))
    loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
    loss.backward()
    for optimizer in (muon, adamw):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if step % 20 == 0:
        latest = [r.sd_variation for r in probe.latest().values() if r.step > step - 20 and r.sd_variation is not None]
        most = f"up to {max(latest):.1e}" if latest else "not measured"  # within 1 % matrices take turns
        print(
            f"step {step:05d}/{steps:05d} | loss {loss.item():.4f} | SD variation {most} "
            f"| tracker {100 * probe.overhead:.1f} %"
        )
probe.close()
