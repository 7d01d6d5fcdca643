"""A LightningModule with the spectra in its run directory and in its logger (needs lightning).

python examples/lightning_module.py [RUN_DIR], then python -m sosd_fast report RUN_DIR
"""

import sys
import tempfile

import lightning
import torch

from sosd_fast.integrations.lightning import LightningCallback


class Regression(lightning.LightningModule):
    """Two layers."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))

    def training_step(self, batch, _):
        """Returns the loss."""
        return (self.net(batch) - batch.flip(1)).square().mean()

    def configure_optimizers(self):
        """Returns AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


run_dir = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
trainer = lightning.Trainer(
    max_steps=20, accelerator="cpu", default_root_dir=run_dir, log_every_n_steps=1, enable_checkpointing=False,
    callbacks=[LightningCallback(run_dir=run_dir)],
)  # fmt: skip
trainer.fit(Regression(), torch.utils.data.DataLoader(torch.randn(256, 32), batch_size=8))
