"""Float data and metadata against llama.cpp's own converter, run on the same folders."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.containers.gguf import GgufFile, ValueType, read_gguf_file
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf
from tests.tiny import APART, ODD, ODD4, Shape, write_tiny

# Runs the converter in its own process, with its own gguf-py; only the lookup of the tiny
# tokenizer's hash, which no table can hold, is answered for it.
RUN_CONVERTER = """
import json, sys
source, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, source)
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
for job in jobs:
    sys.argv = ["convert_hf_to_gguf.py", *job]
    convert_hf_to_gguf.main()
"""

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"max_position_embeddings": 512, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
# As LongChat's and Vicuna 16k's: max_position_embeddings is L.
LEGACY = {
    "max_position_embeddings": 128,
    "max_sequence_length": 512,
    "rope_scaling": {"type": "linear", "factor": 4.0},
}
README = """---
license: apache-2.0
language:
- en
- "no"
tags:
- tiny
base_model: example-org/base-model-1B
---
# A tiny model
"""


@dataclass(frozen=True)
class Case:
    name: str
    architecture: str
    shape: Shape
    dtype: str
    outtype: str
    tied: bool = False
    rope: Any = None
    config: Any = None


CASES = [
    Case("llama-f32", "llama", ODD, "f32", "f32", tied=True),
    Case("llama-bf16", "llama", APART, "bf16", "bf16", rope=LINEAR),
    Case("llama-f16", "llama", ODD, "bf16", "f16", config={"attention_bias": True}),
    Case("llama-f16-of-f32", "llama", ODD, "f32", "f16", rope={"rope_scaling": LLAMA3}),
    Case("llama-q8_0", "llama", ODD4, "f16", "q8_0", config={"mlp_bias": True}),
    Case("llama-legacy", "llama", ODD, "f16", "f16", rope=LEGACY),
    Case("qwen2-f32", "qwen2", ODD4, "bf16", "f32"),
    Case("qwen2-bf16", "qwen2", ODD, "f32", "bf16", tied=True, rope=LINEAR),
    Case("qwen2-f16", "qwen2", ODD, "f16", "f16", config={"use_sliding_window": False}),
]


@dataclass(frozen=True)
class Pair:
    case: Case
    ours: GgufFile
    theirs: GgufFile


@pytest.fixture(scope="module")
def pairs(llama_cpp_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    root = tmp_path_factory.mktemp("converter")
    jobs, ours = [], {}
    for case in CASES:
        folder = write_tiny(
            root / case.name / "Tiny-20M-Instruct", architecture=case.architecture,
            shape=case.shape, dtype=case.dtype, tied=case.tied, rope=case.rope, config=case.config,
        )  # fmt: skip
        (folder / "README.md").write_text(README)
        (folder / "generation_config.json").write_text(
            json.dumps({"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1})
        )
        jobs.append(
            [str(folder), "--outtype", case.outtype, "--outfile", str(their_file(root, case))]
        )
        checkpoint = open_checkpoint(str(folder))
        (artifact,) = write_gguf(
            checkpoint, plan_gguf(checkpoint, [case.outtype]), root / f"{case.name}-ours"
        )
        ours[case.name] = artifact.path
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_LOCAL_GGUF", "PYTHONPATH")}
    environment["PYTHONPATH"] = str(llama_cpp_source / "gguf-py")
    subprocess.run(
        [sys.executable, "-c", RUN_CONVERTER, str(llama_cpp_source), json.dumps(jobs)],
        check=True, env=environment, capture_output=True,
    )  # fmt: skip
    return {
        case.name: Pair(
            case, read_gguf_file(ours[case.name]), read_gguf_file(their_file(root, case))
        )
        for case in CASES
    }


def their_file(root: Path, case: Case) -> Path:
    return root / f"{case.name}-theirs.gguf"


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_data_equals_the_converters(pairs: dict[str, Pair], name: str) -> None:
    ours, theirs = pairs[name].ours, pairs[name].theirs
    assert ours.tensors.keys() == theirs.tensors.keys()
    for tensor in theirs.tensors:
        mine, other = ours.tensor(tensor), theirs.tensor(tensor)
        assert (mine.shape, mine.encoding) == (other.shape, other.encoding), tensor
        if tensor == "rope_freqs.weight":
            # Theirs is computed in float64 of Python and up to 4 ulp from transformers' own.
            np.testing.assert_array_max_ulp(
                mine.read_f32(0, 1).copy(), other.read_f32(0, 1).copy(), maxulp=8
            )
            continue
        assert np.array_equal(mine.read_rows(0, mine.rows), other.read_rows(0, other.rows)), tensor


def documented_differences() -> dict[str, str]:
    """The table in docs/gguf-metadata.md: key -> "added", "left out" or "other value"."""
    text = (Path(__file__).parents[4] / "docs" / "gguf-metadata.md").read_text("utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| (added|left out|other value) \|", text, re.MULTILINE)
    return dict(rows)


def differences(pair: Pair) -> dict[str, str]:
    prefix = f"{pair.ours.architecture}."
    found = {}
    for key in sorted(pair.ours.keys.keys() | pair.theirs.keys.keys()):
        name = key.replace(prefix, "{arch}.", 1) if key.startswith(prefix) else key
        if key not in pair.theirs.keys:
            found[name] = "added"
        elif key not in pair.ours.keys:
            found[name] = "left out"
        elif not same(pair, key):
            found[name] = "other value"
    return found


def same(pair: Pair, key: str) -> bool:
    ours, theirs = pair.ours.keys[key], pair.theirs.keys[key]
    if pair.ours.key_types[key] != pair.theirs.key_types[key]:
        return False
    if isinstance(theirs, np.ndarray):
        return (
            isinstance(ours, np.ndarray)
            and ours.dtype == theirs.dtype
            and bool(np.array_equal(ours, theirs))
        )
    return bool(ours == theirs)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_metadata_differs_only_where_documented(pairs: dict[str, Pair], name: str) -> None:
    documented = documented_differences()
    undocumented = {
        key: (kind, pairs[name].ours.keys.get(key), pairs[name].theirs.keys.get(key))
        for key, kind in differences(pairs[name]).items()
        if documented.get(key) != kind
    }
    assert undocumented == {}


def test_every_documented_difference_occurs(pairs: dict[str, Pair]) -> None:
    """The control: the list of differences is no longer than it must be."""
    found: dict[str, str] = {}
    for pair in pairs.values():
        found |= differences(pair)
    assert found == documented_differences()


def test_general_keys_come_from_the_card_and_generation_config(pairs: dict[str, Pair]) -> None:
    keys = pairs["llama-bf16"].ours.keys
    types = pairs["llama-bf16"].ours.key_types
    assert pairs["llama-legacy"].ours.keys["llama.context_length"] == 512
    assert pairs["llama-legacy"].theirs.keys["llama.context_length"] == 128
    assert keys["general.license"] == "apache-2.0"
    assert keys["general.languages"] == ["en", "no"]
    assert keys["general.base_model.0.repo_url"] == (
        "https://huggingface.co/example-org/base-model-1B"
    )
    assert types["general.sampling.top_k"] == ValueType.INT32
    assert keys["general.sampling.temp"] == np.float32(0.7)
