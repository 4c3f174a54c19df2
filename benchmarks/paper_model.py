"""The small LLaMA of `benchmarks/paper.py`: its texts, its tokenizer, its first weights."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pi_convert.evaluate.passkey import DIGITS, FILLER, QUESTION, TASK, TOLD

L = 128  # tokens; what the base is pretrained on
VOCABULARY = 2048
EOS = "<|endoftext|>"
PASSKEY_SHARE = 0.2  # of the tokens trained on
TAUGHT_SHARE = 0.8  # of the tokens of what is taught to find passkeys
_LINES_FOR_THE_TOKENIZER = 2000
_SENTENCES = FILLER.count(".")
_MARGIN = 8  # tokens; sentences are not all of one length


def passkey_text(lines: int, draw: random.Random) -> str:
    """The paper's prompt with its answer, the key told after a random share of ``lines``."""
    before = draw.randint(0, lines)
    key = "".join(draw.choices("0123456789", k=DIGITS))
    filler = FILLER * before, FILLER * (lines - before)
    return f"{TASK}{filler[0]}{TOLD.format(key=key)}{filler[1]}{QUESTION} {key}."


def train_tokenizer(texts: Path, out: Path) -> None:
    """Byte-level BPE over the speeches and the passkey prompt; every digit is a token."""
    draw = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    # The space is a token of its own before a digit, and the digits are single.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def lines() -> Iterator[str]:
        for file in sorted(texts.iterdir()):
            yield file.read_text("utf-8")
        for _ in range(_LINES_FOR_THE_TOKENIZER):
            yield passkey_text(1, draw)

    tokenizer.train_from_iterator(lines(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(out)


def write_base(texts: Path, out: Path) -> None:
    """The model with random weights, 3.7 M parameters."""
    train_tokenizer(texts, out)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=L,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(out)


def with_context(folder: Path, context: int, out: Path) -> Path:
    """The model in ``folder`` with ``context`` for its L and the RoPE that it has."""
    if not out.is_dir():
        partial = out.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial, ignore=shutil.ignore_patterns("run", "pi_convert*"))
        config = json.loads((partial / "config.json").read_text())
        config["max_position_embeddings"] = context
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        partial.rename(out)
    return out


def write_passkeys(tokenizer: Path, window: int, tokens: int, out: Path) -> None:
    """JSONL of passkey texts of every length up to ``window`` tokens, ``tokens`` in all."""
    encode = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    draw = random.Random(window)

    def length(text: str) -> int:
        return len(encode(text)["input_ids"])

    least, line = length(passkey_text(0, draw)), length(FILLER)
    most = (window - least - 1) // line
    lines, written = [], 0
    while written < tokens:
        count = draw.randint(0, most)
        lines.append(json.dumps({"text": passkey_text(count, draw)}))
        written += least + count * line
    out.write_text("\n".join(lines) + "\n")


def write_taught(tokenizer: Path, window: int, tokens: int, out: Path) -> None:
    """JSONL of the paper's prompt with its answer at distances of any number of filler sentences.

    Every text fills a window of its own: what is left behind the answer is filler. With whole lines
    a window of L has two distances, which a model learns by heart instead of looking for the key.
    """
    encode = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    draw = random.Random(window)

    def length(text: str) -> int:
        return len(encode(text)["input_ids"])

    sentence, least = length(FILLER) / _SENTENCES, length(passkey_text(0, draw))
    lines = []
    for _ in range(tokens // window):
        total = draw.randint(0, int((window - least - _MARGIN) / sentence))
        left = window - least - total * sentence
        text = _taught_text(total, draw) + _sentences(1 + int(left / sentence), draw)
        lines.append(json.dumps({"text": text}))
    out.write_text("\n".join(lines) + "\n")


def _taught_text(sentences: int, draw: random.Random) -> str:
    before = draw.randint(0, sentences)
    key = "".join(draw.choices("0123456789", k=DIGITS))
    parts = _sentences(before, draw), _sentences(sentences - before, draw)
    return f"{TASK}{parts[0]}{TOLD.format(key=key)}{parts[1]}{QUESTION} {key}.\n"


def _sentences(count: int, draw: random.Random) -> str:
    """So many sentences of the filler from any one on, and a line's end."""
    if not count:
        return ""
    sentences = [f"{sentence.strip()}." for sentence in FILLER.split(".")[:_SENTENCES]]
    start = draw.randrange(_SENTENCES)
    said = [sentences[(start + i) % _SENTENCES] for i in range(count)]
    ends = ["\n" if (start + i) % _SENTENCES == _SENTENCES - 1 else " " for i in range(count)]
    return "".join(s + e for s, e in zip(said, ends, strict=True)).strip() + "\n"
