"""transformers 5 in float32 on the source's own weights: what every client should agree with.

The factor is set by hand in transformers' config, so that nothing of our own takes part: not our
reading of the source, nor our spelling of the factor.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.clients.protocol import Logits

# Between a choice and the next best, in logits. Runtimes of float32 differ by less (see
# test_clients), so that greedy tokens are the same wherever a margin is over this.
CLEAR_MARGIN = 5e-3


class Reference:
    """A model and its tokenizer, with RoPE scaled linearly by what ``scale`` was given last."""

    def __init__(self, source: Path) -> None:
        """``source`` is a folder or a GGUF file whose own RoPE is unscaled."""
        where: dict[str, Any] = {"pretrained_model_name_or_path": source}
        if source.is_file():
            where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        with contextlib.redirect_stderr(io.StringIO()):
            self._tokenizer = _tokenizer(source, where)
            self._model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        self._model.eval().requires_grad_(False)
        chosen = self._model.generation_config
        chosen.pad_token_id = chosen.eos_token_id  # or transformers guesses it aloud
        self._theta = float(self._model.config.rope_parameters["rope_theta"])
        assert self._model.config.rope_parameters["rope_type"] == "default"

    def scale(self, factor: float) -> None:
        """Divides positions by ``factor``, whatever was before."""
        config, rotary = self._model.config, self._model.model.rotary_emb
        scaled = {"rope_type": "linear", "factor": factor, "rope_theta": self._theta}
        config.rope_parameters = scaled
        self._model.model.rotary_emb = type(rotary)(config)

    def encode(self, text: str) -> list[int]:
        """As the source's own tokenizer does."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of ``messages`` in the chat template, up to where the reply begins."""
        ids: list[int] = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True
        )["input_ids"]
        return ids

    def continued(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """The greedy continuation, the end token left out, seen to be clear at every step."""
        found = self._generate(ids, new_tokens, output_logits=True, return_dict_in_generate=True)
        best = torch.stack(found.logits)[:, 0].topk(2).values
        margin = float((best[:, 0] - best[:, 1]).min())
        assert margin > CLEAR_MARGIN, f"no clear choice: {margin}; take another text"
        return self._without_end(found.sequences[0, len(ids) :].tolist())

    def regret(self, ids: Sequence[int], continuation: Sequence[int]) -> float:
        """By how many logits at most the choices of ``continuation`` are behind the best ones."""
        if not continuation:
            return 0.0
        logits = self.logits([*ids, *continuation])[len(ids) - 1 : -1]
        chosen = np.take_along_axis(logits, np.array(continuation)[:, None], axis=1)[:, 0]
        return float((logits.max(-1) - chosen).max())

    def beams(self, ids: Sequence[int], new_tokens: int, beams: int) -> list[int]:
        """The best of a beam search."""
        found = self._generate(ids, new_tokens, num_beams=beams)
        return self._without_end(found[0, len(ids) :].tolist())

    def logits(self, ids: Sequence[int]) -> Logits:
        """(tokens, vocabulary)"""
        found: Logits = self._model(torch.tensor([list(ids)])).logits[0].numpy()
        return found

    def _generate(self, ids: Sequence[int], new_tokens: int, **settings: Any) -> Any:
        row = torch.tensor([list(ids)])
        settings |= {"max_new_tokens": new_tokens, "do_sample": False}
        return self._model.generate(row, attention_mask=torch.ones_like(row), **settings)

    def _without_end(self, ids: list[int]) -> list[int]:
        end = self._model.generation_config.eos_token_id
        return ids[: ids.index(end)] if end in ids else ids


def _tokenizer(source: Path, where: dict[str, Any]) -> Any:
    """A folder's is its tokenizer.json; AutoTokenizer may split as the model's first checkpoint."""
    known = AutoTokenizer if source.is_file() else PreTrainedTokenizerFast
    return known.from_pretrained(**where)


def mean_kl(expected: Sequence[Logits], found: Sequence[Logits]) -> float:
    """Mean KL divergence in nats of ``found`` from ``expected`` over the tokens of all rows."""
    rows = []
    for p_logits, q_logits in zip(expected, found, strict=True):
        p, q = _log_softmax(p_logits), _log_softmax(q_logits)
        rows.append((np.exp(p) * (p - q)).sum(-1))
    return float(np.concatenate(rows).mean())


def max_difference(expected: Sequence[Logits], found: Sequence[Logits]) -> float:
    """Of any logit of any token."""
    pairs = zip(expected, found, strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    found: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return found
