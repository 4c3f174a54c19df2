"""Whether a graph can run, asked before any work.

The installed ONNX Runtime is asked by a skeleton of the same graph: one layer with the same heads,
head_dim, types and block sizes, a small vocabulary and hidden size, and zeros for weights. It is
opened and run; ``get_all_opkernel_def`` is no way to ask, since onnxruntime-gpu 1.31 crashes in it
on a machine without CUDA's libraries.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from converters.checkpoint import Checkpoint
from converters.encodings import F16, F32, Encoding
from converters.errors import EnvironmentNotReadyError, UnsupportedError
from converters.install import install_line
from converters.targets.onnx.graph import build_graph
from converters.targets.onnx.notices import notices
from converters.targets.onnx.options import GraphOptions
from converters.targets.onnx.plan import COS, SIN, OnnxPlan, plan_onnx
from converters.targets.onnx.weights import BITS
from converters.tensor import Tensor

Device = Literal["cpu", "cuda", "web"]

# Of the memory that is free now, what the two tables may take; weights and cache need the rest.
TABLE_SHARE_OF_MEMORY = 0.5
# onnxruntime-web is a 32-bit WebAssembly program (memory32: at most 65,536 pages of 64 KiB).
WEB_MEMORY_BYTES = 1 << 32
_WEB_FLOAT16 = (
    "in a browser float16 wants WebGPU with shader-f16, which was not tried; int4 and int8 run"
    " everywhere"
)
# The instances of the class in libonnxruntime_providers_cuda.so of onnxruntime-gpu 1.31.
_NO_CUDA_KERNEL = (
    "its CUDA provider has GroupQueryAttention for float16 and bfloat16 alone, this graph has"
    " float32 activations"
)
_PROVIDERS: Mapping[Device, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    # onnxruntime-web cannot be asked from here. It lacks kernels that this provider has, such as
    # GatherBlockQuantized; the default files have none of those (docs/clients.md: Chromium).
    "web": "CPUExecutionProvider",
}
_HINTS: Mapping[Device, str] = {
    "cpu": "--portable takes shapes that fused attention does not.",
    "cuda": "Give --precision fp16, int4f16 or int8f16, or --portable.",
    "web": "--portable takes shapes that fused attention does not.",
}
_FATAL_ONLY = 4  # ORT_LOGGING_LEVEL_FATAL: what is refused is told by the exception
_SMALL = 256  # a multiple of every block that a source may have
_ROWS = 64
# Where one of these runs on the CPU, the hidden states leave the device in every layer.
_COMPUTE = frozenset(
    {
        "Attention",
        "Gather",
        "GatherBlockQuantized",
        "Gemm",
        "GroupQueryAttention",
        "MatMul",
        "MatMulNBits",
        "RMSNormalization",
        "RotaryEmbedding",
        "SkipSimplifiedLayerNormalization",
    }
)


def preflight(
    checkpoint: Checkpoint,
    plans: Sequence[OnnxPlan],
    options: GraphOptions,
    device: Device | None = None,
) -> tuple[str, ...]:
    """What the user should know about ``plans`` and about running them on ``device``.

    Raises ``UnsupportedError`` for what cannot run there, ``EnvironmentNotReadyError`` where the
    runtime is missing that ``device`` names. Without a ``device`` the CPU is asked; there, and for
    the web, a missing runtime is a notice, as a missing CUDA device always is. What a target itself
    refuses (``require_writable``) is not asked again.
    """
    said = [notice for plan in plans for notice in notices(checkpoint, plan, options)]
    if device == "web":
        said += _web_notices(plans)
    if device == "cuda" and (reason := _no_cuda()) is not None:
        said += _cuda_notices(plans, options, reason)
    elif device in (None, "web") and find_spec("onnxruntime") is None:
        said.append("onnxruntime is not installed: whether it can run the graph was not asked")
    else:
        for plan in plans:
            said += _ask(checkpoint, plan, options, device or "cpu")
    return tuple(dict.fromkeys(said))


def require_writable(plan: OnnxPlan, options: GraphOptions) -> None:
    """Raises ``UnsupportedError`` where ``options`` exclude a plan or its tables fit no memory."""
    blocks = sorted({e.name for e in plan.encodings.values() if e in BITS})
    if options.portable and blocks:
        raise UnsupportedError(
            f"{plan.precision.name}: standard operators have no product with {', '.join(blocks)}"
            " blocks",
            hint="Leave --portable out, or give --precision fp32 or fp16.",
        )
    size = sum(plan.places[table][0].part.size_bytes for table in (COS, SIN))
    limit = TABLE_SHARE_OF_MEMORY * available_memory_bytes()
    if size > limit:
        raise UnsupportedError(
            f"{plan.precision.name}: the cos and sin tables of {plan.table_rows:,} positions take"
            f" {size / 2**20:,.0f} MiB; with {limit / 2**20:,.0f} MiB for them here no runtime"
            " could load the file",
            hint="Give a smaller --scale, fp16 (half the size), or a machine with more memory.",
        )


def available_memory_bytes() -> int:
    """Memory that a new program can have without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def skeleton(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with one small layer of zeros: every shape that decides about a kernel."""
    sizes = checkpoint.hparams
    small = dataclasses.replace(
        sizes,
        vocab_size=min(sizes.vocab_size, _ROWS),
        hidden_size=_small(sizes.hidden_size),
        intermediate_size=_small(sizes.intermediate_size),
        layers=1,
    )
    expected = checkpoint.architecture.expected_tensors(small, checkpoint.groups)
    tensors = {
        name: Tensor(name, shape, _encoding(checkpoint, name, shape), _no_rows)
        for name, _, shape, _ in expected
    }
    rope = dataclasses.replace(checkpoint.rope, context=min(checkpoint.rope.context, _ROWS))
    return dataclasses.replace(checkpoint, hparams=small, tensors=tensors, rope=rope)


def _encoding(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Encoding:
    found = checkpoint.tensors[name].encoding
    return F32 if shape[-1] % found.block_elements else found


def _no_rows(start: int, stop: int) -> npt.NDArray[np.uint8]:
    raise AssertionError("a skeleton is planned, never read")


def _small(size: int) -> int:
    """A size that divides by 32 where ``size`` does."""
    return min(size, _SMALL + size % _SMALL)


def _ask(
    checkpoint: Checkpoint, plan: OnnxPlan, options: GraphOptions, device: Device
) -> Iterator[str]:
    """Opens and runs the skeleton; a notice where the device's provider does not come up."""
    import onnx_ir as ir

    small = skeleton(checkpoint)
    small_plan = plan_onnx(small, plan.precision.name, plan.options)
    with tempfile.TemporaryDirectory(prefix="pi-convert-") as folder:
        path = Path(folder) / plan.precision.file_name
        with (Path(folder) / plan.precision.data_name).open("wb") as data:
            data.truncate(small_plan.data_bytes)
        ir.save(build_graph(small, small_plan, options, {}), path)
        asked = _try(path, plan, device)
    if not asked:
        reason = f"ONNX Runtime has no working {_PROVIDERS[device]} here"
        yield from _cuda_notices([plan], options, reason)


def _try(path: Path, plan: OnnxPlan, device: Device) -> bool:
    """Whether the device's provider took the graph at ``path``; raises where it cannot run it."""
    runtime = _import_runtime()
    settings = runtime.SessionOptions()
    settings.log_severity_level = _FATAL_ONLY
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    provider = _PROVIDERS[device]
    try:
        session = runtime.InferenceSession(str(path), settings, providers=[provider])
        if session.get_providers()[0] != provider:
            return False
        strays = sorted(set(_strays(session, provider)))
        for feeds in _steps(session):
            session.run(None, feeds)
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise _refusal(plan, device, str(error).split("Status Message: ")[-1].strip()) from error
    if strays:
        raise _refusal(plan, device, f"{provider} has no kernel for {', '.join(strays)}")
    return True


def _refusal(plan: OnnxPlan, device: Device, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{plan.precision.name}: ONNX Runtime here cannot run this graph on {device}: {reason}",
        hint=_HINTS[device],
    )


def _strays(session: Any, provider: str) -> Iterator[str]:
    """The kinds of node that compute on hidden states and were left to another provider."""
    for subgraph in session.get_provider_graph_assignment_info():
        if subgraph.ep_name != provider:
            for node in subgraph.get_nodes():
                if node.op_type in _COMPUTE and not node.name.startswith("/model/rows/"):
                    yield node.op_type


def _steps(session: Any) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """A prefill of two tokens, and a batch of two that goes on with one."""
    for batch, past, new in ((1, 0, 2), (2, 2, 1)):
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.zeros((batch, new), np.int64),
            "attention_mask": np.ones((batch, past + new), np.int64),
        }
        for value in session.get_inputs():
            if value.name not in feeds:
                kind = np.float16 if value.type == "tensor(float16)" else np.float32
                feeds[value.name] = np.zeros((batch, value.shape[1], past, value.shape[3]), kind)
        yield feeds


def _cuda_notices(plans: Sequence[OnnxPlan], options: GraphOptions, reason: str) -> Iterator[str]:
    """What is known without asking."""
    for plan in plans:
        if plan.precision.activations is F32 and not options.portable:
            raise _refusal(plan, "cuda", _NO_CUDA_KERNEL)
    yield f"{reason}: whether the graph can run on CUDA was not asked"


def _web_notices(plans: Sequence[OnnxPlan]) -> Iterator[str]:
    for plan in plans:
        name = plan.precision.name
        if plan.data_bytes > WEB_MEMORY_BYTES:
            raise UnsupportedError(
                f"{name}: {plan.data_bytes / 2**20:,.0f} MiB of weights and tables; onnxruntime-web"
                f" can address {WEB_MEMORY_BYTES / 2**20:,.0f} MiB",
                hint="Give --precision int4, or a smaller model.",
            )
        if plan.precision.activations is F16:
            yield f"{name}: {_WEB_FLOAT16}"


def _no_cuda() -> str | None:
    """Why CUDA cannot be asked here; None where it can.

    The driver is asked for a device: ONNX Runtime lists the provider of its build, device or not.
    """
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver here"
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "no CUDA device here"
    if _PROVIDERS["cuda"] not in _import_runtime().get_available_providers():
        return "this build of ONNX Runtime has no CUDA provider"
    return None


def _import_runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentNotReadyError(
            f"onnxruntime cannot be imported: {error}",
            hint=install_line("onnx"),
        ) from error
    return onnxruntime
