"""A plain fine-tuning script on transformers' Trainer: one window of a text, again and again.

usage: python benchmarks/peer_trainer.py MODEL TEXT WINDOW STEPS BATCH OUT DEVICE
float32 weights, bfloat16 over them on cuda, SDPA attention and gradient checkpointing; the loss is
the model's own. Its last line is the peak of the GPU's memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Told(TrainerCallback):
    """A line a step, as soon as it is done."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            print(f"step {state.global_step}: loss {logs['loss']:.4f}", flush=True)


def main(words: list[str]) -> None:
    model, text, window, steps, batch, out, device = words
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(Path(text).read_text())["input_ids"][: int(window)]
    if len(tokens) < int(window):
        sys.exit(f"the text has {len(tokens)} tokens")
    ids = torch.tensor(tokens)
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=int(steps),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=int(batch),
        learning_rate=2e-5,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    )
    loaded.config.use_cache = False
    windows = [{"input_ids": ids, "labels": ids}] * (int(steps) * int(batch))
    trainer = Trainer(loaded, arguments, train_dataset=windows, callbacks=[Told()])
    trainer.train()
    trainer.save_model(out)
    if device == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated()} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
