"""What a layer's activations took goes back to the system."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.nn import ModuleList

from pi_convert.finetune import run
from tests.pi_convert.finetune.runs import finetuned

# A block is kept above the freed one, so that the heap's end cannot move down past it.
SCRIPT = """
import ctypes, sys
import torch
from pi_convert.finetune.memory import return_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

blocks = torch.nn.ModuleList([torch.nn.Identity()])
if sys.argv[1] == "returned":
    return_freed_memory(blocks)
libc.free(libc.malloc(31 << 20))  # glibc takes the largest that was freed for its bound
freed = [libc.malloc(24 << 20) for _ in range(int(sys.argv[2]))]
kept = libc.malloc(1 << 20)
for block in freed:
    ctypes.memset(block, 1, 24 << 20)
before = resident()
for block in freed:
    libc.free(block)
blocks[0](torch.zeros(1))
print(before - resident() >= 512 << 20)
"""


@pytest.mark.parametrize(
    ("how", "freed", "returned"),
    [
        pytest.param("returned", 44, True, id="grown by more than 1 GiB"),
        pytest.param("returned", 40, False, id="grown by less"),
        pytest.param("left alone", 44, False, id="glibc left alone"),
    ],
)
def test_what_a_layer_freed_goes_back(how: str, freed: int, returned: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how, str(freed)], check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{returned}\n"


@pytest.mark.parametrize("preset", ["quick", "lora"])
def test_a_run_on_a_cpu_looks_after_every_layer(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    looked_after: list[ModuleList] = []
    monkeypatch.setattr(run, "return_freed_memory", looked_after.append)
    finetuned(model, text, tmp_path / "out", "--preset", preset, steps=1)
    (blocks,) = looked_after
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    assert [type(block).__name__ for block in blocks] == ["LlamaDecoderLayer"] * layers
