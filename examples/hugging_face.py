"""The Hugging Face Trainer with the spectra in its run directory and in TensorBoard.

Needs transformers, accelerate and tensorboard:
python examples/hugging_face.py [OUTPUT_DIR], then python -m sosd_fast report OUTPUT_DIR
"""

import sys
import tempfile

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from sosd_fast.integrations.hugging_face import HuggingFaceCallback
from sosd_fast.integrations.tensorboard import TensorBoardWriter

output_dir = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
rows = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(0))
trainer = Trainer(
    model=GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    args=TrainingArguments(output_dir=output_dir, max_steps=20, logging_steps=1, report_to=[], save_steps=10),
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    callbacks=[HuggingFaceCallback(run_dir=output_dir, on_record=TensorBoardWriter(SummaryWriter(output_dir)))],
)
trainer.train()
