"""Each client loads the folder of one export as it is, and says what transformers says.

Token ids, the rendered chat template, logits of every real token of a padded batch, greedy tokens
alone and in the batch, a beam search. genai pads on the right, the others on the left.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.clients.conftest import CASES, FACTOR, WRONG_FACTOR, Expected
from tests.clients.protocol import Answer
from tests.clients.reference import CLEAR_MARGIN, max_difference, mean_kl

pytestmark = pytest.mark.client

Ask = Callable[..., Answer]
Expect = Callable[[str], Expected]

# Of a logit, float32 on CPU: 1e-4 was measured in every client; a wrong factor moves them by 10.
FP32_LIMIT = 1e-3
assert 2 * FP32_LIMIT < CLEAR_MARGIN  # so greedy tokens must be the same
# Mean KL in nats, 4-bit weights and activations rounded to 8 bits: 5e-3 was measured.
INT4_KL_LIMIT = 1e-2
INT4_REGRET_LIMIT = 1.0
WRONG_IS_OVER = 10  # times a limit

# How a client is told of the file: genai and optimum find the fp32 graph by themselves.
FP32 = {"genai": None, "optimum": None, "node": "model.onnx", "browser": "model.onnx"}
INT4 = "model_q4.onnx"
# The browser's WebAssembly is slow: the tiny model in float32, the default one in 4 bits.
RUNS = [
    (client, case) for client in FP32 for case in CASES if (client, case) != ("browser", "default")
]


@pytest.mark.parametrize(("client", "case"), RUNS)
def test_fp32_is_transformers(client: str, case: str, answer: Ask, expected: Expect) -> None:
    found, right = answer(client, case, FACTOR, file=FP32[client]), expected(case)
    assert found.encoded == right.encoded
    assert max_difference(right.logits, found.logits) <= FP32_LIMIT
    assert found.alone == right.continued
    assert found.batch == right.continued
    assert found.prompt == right.prompt
    assert found.reply == right.reply
    if client == "optimum":
        assert found.beams == right.beams


@pytest.mark.parametrize("factor", [FACTOR, WRONG_FACTOR])
def test_the_oldest_runtime(factor: int, answer: Ask, expected: Expect) -> None:
    """onnxruntime 1.23.0, the first with every operator of the default file; texts are ids."""
    right = expected("qwen2")
    texts = [" ".join(map(str, ids)) for ids in right.encoded]
    options = {"file": "model.onnx", "messages": (), "beams": 0}
    found = answer("onnxruntime-oldest", "qwen2", factor, texts=texts, **options)
    assert found.client == "onnxruntime 1.23.0"
    logits = right.logits if factor == FACTOR else right.wrong_logits
    assert max_difference(logits, found.logits) <= FP32_LIMIT
    pairs = zip(right.continued, found.alone, strict=True)  # those of transformers end at EOS
    same = [tokens[: len(ids)] == ids for ids, tokens in pairs]
    assert all(same) == (factor == FACTOR)


@pytest.mark.parametrize("client", FP32)
def test_a_folder_of_another_factor_is_seen(client: str, answer: Ask, expected: Expect) -> None:
    """Two of the texts go past L."""
    found = answer(client, "qwen2", WRONG_FACTOR, file=FP32[client], beams=0)
    right = expected("qwen2")
    assert max_difference(right.wrong_logits, found.logits) <= FP32_LIMIT
    assert max_difference(right.logits, found.logits) > WRONG_IS_OVER * FP32_LIMIT
    assert found.alone != right.continued
    assert found.batch != right.continued
    assert found.reply != right.reply


@pytest.mark.parametrize("client", FP32)
def test_int4_is_near_transformers(client: str, answer: Ask, expected: Expect) -> None:
    tokens = 4 if client == "browser" else 16
    found = answer(client, "default", FACTOR, file=INT4, new_tokens=tokens, beams=0)
    right = expected("default")
    assert found.encoded == right.encoded
    assert found.prompt == right.prompt
    assert mean_kl(right.logits, found.logits) <= INT4_KL_LIMIT
    assert mean_kl(right.wrong_logits, found.logits) > WRONG_IS_OVER * INT4_KL_LIMIT
    prompts = [*found.encoded, *found.encoded, found.prompt]
    chosen = [*found.alone, *found.batch, found.reply]
    regrets = [right.reference.regret(*pair) for pair in zip(prompts, chosen, strict=True)]
    assert max(regrets) <= INT4_REGRET_LIMIT
