"""A GGUF file opened for verification, and run by llama.cpp."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from converters.architectures import HParams
from converters.architectures.hparams import read_gguf_hparams
from converters.checkpoint import Checkpoint
from converters.containers.gguf import GgufFile, read_gguf_file
from converters.errors import RopeError, SourceError
from converters.rope import RopeParameters
from converters.rope.gguf import DIVISORS_TENSOR, EffectiveRope, effective_rope
from converters.tensor import Tensor
from converters.transforms import deinterleave_rope
from pi_convert.runtimes.llamacpp import (
    ImposedRope,
    LlamaCppModel,
    LlamaCppOptions,
    cores,
    load_in_child,
)
from pi_convert.verify.artifact import Artifact

_SIZES = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim")


@dataclass(frozen=True, slots=True)
class GgufArtifact(Artifact):
    """A GGUF file. ``rope`` None: ``rope_problem`` says why llama.cpp could not load it."""

    file: GgufFile
    keys: Mapping[str, object]  # without the architecture's prefix
    rope: EffectiveRope | None
    options: LlamaCppOptions

    runtime_name: ClassVar[str] = "llama.cpp"
    packages: ClassVar[tuple[str, ...]] = ("llama-cpp-python",)
    keeps_row_order: ClassVar[bool] = False

    @property
    def claimed_factor(self) -> float | None:
        """The factor that llama.cpp would apply."""
        return None if self.rope is None else float(str(np.float32(self.rope.factor)))

    @property
    def on_gpu(self) -> bool:
        """Whether llama.cpp uses a GPU."""
        return self.options.device != "cpu" or bool(self.options.n_gpu_layers)

    def load(self, imposed: RopeParameters | None = None) -> LlamaCppModel:
        """The file in llama.cpp, as it is or with a RoPE imposed."""
        return self.load_with(None if imposed is None else ImposedRope.of(imposed))

    def load_with(self, imposed: ImposedRope | None) -> LlamaCppModel:
        """The file in llama.cpp, with some keys imposed."""
        return LlamaCppModel(self.path, self.architecture, self.options, imposed)

    def load_problem(self) -> str | None:
        """Why llama.cpp cannot load it; tried in a child process, since llama.cpp may abort."""
        problem = load_in_child(self.path)
        return None if problem is None else f"llama.cpp cannot load the file: {problem}"

    def size_findings(self, expected: HParams) -> Iterator[str]:
        """Where GGUF's size keys are not the source's."""
        try:
            found = read_gguf_hparams(
                self.keys,
                vocab_size=expected.vocab_size,
                tied_embeddings=expected.tied_embeddings,
                where=self.path.name,
            )
        except SourceError as error:
            yield error.message
            return
        for field in _SIZES:
            have, want = getattr(found, field), getattr(expected, field)
            if have != want:
                yield f"{field} is {have}, the source's is {want}"
        if np.float32(found.norm_eps) != np.float32(expected.norm_eps):
            yield f"norm_eps is {found.norm_eps:g}, the source's is {expected.norm_eps:g}"

    def environment(self) -> dict[str, str]:
        """llama.cpp's settings."""
        options = self.options
        return {
            "llama.cpp device": options.device,
            "threads": str(options.threads or cores()),
            "ubatch": str(options.ubatch),
            "flash attention": {None: "auto", True: "on", False: "off"}[options.flash_attention],
            "kv cache": options.kv_cache_type,
            "gpu layers": str(options.n_gpu_layers or 0),
        }


def open_gguf_artifact(path: Path, source: Checkpoint, options: LlamaCppOptions) -> GgufArtifact:
    """Reads the header. Raises ``SourceError`` where the file is no whole GGUF."""
    file = read_gguf_file(path)
    architecture, keys = file.architecture, file.scoped_keys()
    divisors = None
    if DIVISORS_TENSOR in file.tensors:
        tensor = file.tensor(DIVISORS_TENSOR)
        divisors = tensor.read_f32(0, tensor.rows).reshape(-1)
    rope, problem = None, None
    try:
        rope = effective_rope(keys, divisors, rotary_dim=source.hparams.head_dim, where=path.name)
    except RopeError as error:
        problem = error.message
    tensors: dict[str, Tensor] = {}
    missing, misshapen = [], []
    expected = list(source.architecture.expected_tensors(source.hparams, source.groups))
    for name, gguf, shape, spec in expected:
        found = file.tensors.get(gguf)
        if found is None:
            missing.append(gguf)
        elif found.shape != shape:
            misshapen.append(f"{gguf} is {list(found.shape)}, expected {list(shape)}")
        else:
            heads = source.architecture.rope_heads(spec, source.hparams)
            renamed = dataclasses.replace(file.tensor(gguf), name=name)
            tensors[name] = deinterleave_rope(renamed, heads) if heads else renamed
    known = {gguf for _, gguf, _, _ in expected} | {DIVISORS_TENSOR}
    return GgufArtifact(
        path=path,
        architecture=architecture,
        record=file.keys,
        rope_problem=problem,
        tensors=tensors,
        missing=tuple(missing),
        unexpected=tuple(name for name in file.tensors if name not in known),
        misshapen=tuple(misshapen),
        file=file,
        keys=keys,
        rope=rope,
        options=options,
    )
