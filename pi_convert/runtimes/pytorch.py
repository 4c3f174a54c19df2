"""transformers' own model code on a checkpoint's weights: the oracle of what a graph should give.

Weights are dequantized to float32 by gguf-py, RoPE is what transformers makes of the config that
``converters.rope.config.write_config`` spells; none of our own arithmetic takes part. PI over
llama3 has no kind of its own there: it is transformers' llama3 frequencies divided by the factor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from converters.architectures.hparams import write_config_hparams
from converters.checkpoint import Checkpoint
from converters.encodings import Encoding, decode_f32
from converters.errors import ConvertError, EnvironmentNotReadyError, UnsupportedError
from converters.ggml import load_ggml
from converters.install import install_line
from converters.progress import Progress, silent
from converters.rope import RopeParameters
from converters.rope.config import write_config
from converters.rope.parameters import FloatArray, ulp_distance
from converters.tensor import Tensor
from pi_convert.runtimes.base import Closing, Logits, Tokens
from pi_convert.runtimes.rounding import rounded_activations

if TYPE_CHECKING:
    import torch

# float32 frequencies, any device: numpy's and torch's pow differ by one unit in the last place,
# the division by the factor adds one.
BUILT_FREQUENCY_ULP = 2

_READ_BYTES = 64 << 20  # rows dequantized at once


class TorchModel:
    """A checkpoint in transformers, float32, with the RoPE of the checkpoint.

    The RoPE is a small module beside the weights: ``open_session`` takes another one, so that
    controls run on the same weights.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        progress: Progress = silent,
    ) -> None:
        """Raises ``EnvironmentNotReadyError`` where torch or the device is missing."""
        torch = _torch(device)
        self._checkpoint, self._device = checkpoint, torch.device(device)
        self.vocabulary = checkpoint.hparams.vocab_size
        with _quiet(), torch.device("meta"):
            self._model = _build(checkpoint, checkpoint.rope)
        self._load(progress)
        self._rotary = self.rotary(checkpoint.rope)
        self._model.model.rotary_emb = self._rotary
        _refuse_meta(self._model)
        self._model.eval().requires_grad_(False)

    def rotary(self, rope: RopeParameters) -> Any:
        """Transformers' rotary module for ``rope``, checked against the frequencies it should have.

        Raises ``ConvertError`` where transformers makes another RoPE of the config than was meant.
        """
        module = build_rotary(self._checkpoint, rope).to(self._device)
        found = module.inv_freq.cpu().numpy()
        distance = ulp_distance(rope.inv_freq(), found)
        if distance > BUILT_FREQUENCY_ULP or module.attention_scaling != rope.attention_factor:
            raise ConvertError(
                f"transformers builds other frequencies than {rope.kind} with factor"
                f" {rope.factor:g} should have ({distance} units in the last place)",
                hint="This version of transformers reads the config otherwise; report it.",
            )
        return module

    def open_session(
        self, context_tokens: int, *, rope: RopeParameters | None = None, rounded: bool = False
    ) -> TorchSession:
        """An empty sequence, with ``rope`` in place of the checkpoint's own where it is given.

        ``rounded`` rounds activations as ggml does, see ``rounding``.
        """
        encodings = {name: t.encoding for name, t in self._checkpoint.tensors.items()}
        return TorchSession(
            self._model,
            self._rotary if rope is None else self.rotary(rope),
            context_tokens,
            encodings if rounded else None,
        )

    def close(self) -> None:
        """Frees the weights."""
        self._model = None

    def _load(self, progress: Progress) -> None:
        import torch

        targets = dict(self._model.named_parameters(remove_duplicate=False))
        if self._checkpoint.hparams.tied_embeddings:
            targets.pop("lm_head.weight")
        total = len(self._checkpoint.tensors)
        for done, (name, tensor) in enumerate(self._checkpoint.tensors.items()):
            progress("loading weights into torch", done, total)
            value = torch.from_numpy(read_values(tensor)).to(self._device)
            _put(self._model, name, torch.nn.Parameter(value, requires_grad=False))
            del targets[name]
        if targets:
            raise ValueError(f"no tensor for {', '.join(sorted(targets))}")
        if self._checkpoint.hparams.tied_embeddings:
            _put(self._model, "lm_head.weight", self._model.model.embed_tokens.weight)
        progress("loading weights into torch", total, total)


class TorchSession(Closing):
    """One sequence in transformers, with a cache and a RoPE of its own."""

    def __init__(
        self,
        model: Any,
        rotary: Any,
        context_tokens: int,
        rounded: Mapping[str, Encoding] | None = None,
    ) -> None:
        self._model, self._rotary, self._rounded = model, rotary, rounded
        self._context_tokens = context_tokens
        self.keep(0)

    def keep(self, count: int) -> int:
        """See ``Session.keep``."""
        from pi_convert.runtimes.reserved_cache import reserve

        if count == 0:
            self._cache = reserve(self._model.config.num_hidden_layers, self._context_tokens)
        else:
            for layer in self._cache.layers:
                layer.keep(count)
        return count

    def feed(self, tokens: Tokens, *, position: int, logits: bool) -> Logits | None:
        """See ``Session.feed``."""
        import torch

        decoder = self._model.model
        device = decoder.embed_tokens.weight.device
        decoder.rotary_emb = self._rotary
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None].to(device)
        positions = torch.arange(position, position + len(tokens), device=device)[None]
        with torch.inference_mode(), self._rounding():
            hidden = decoder(
                input_ids=ids, position_ids=positions, use_cache=True, **self._cache_argument()
            ).last_hidden_state
            if not logits:
                return None
            out: Logits = self._model.lm_head(hidden[0]).float().cpu().numpy()
        return out

    def _cache_argument(self) -> dict[str, object]:
        return {cache_argument(): self._cache}

    def _rounding(self) -> contextlib.AbstractContextManager[None]:
        if self._rounded is None:
            return contextlib.nullcontext()
        return rounded_activations(self._model, self._rounded)

    def close(self) -> None:
        """Frees the cache."""
        self._cache = None


def reference_rope(checkpoint: Checkpoint, rope: RopeParameters) -> tuple[FloatArray, float]:
    """(inverse frequencies, attention factor) that transformers computes for ``rope``."""
    module = build_rotary(checkpoint, rope)
    frequencies: FloatArray = module.inv_freq.cpu().numpy()
    return frequencies, float(module.attention_scaling)


def build_rotary(checkpoint: Checkpoint, rope: RopeParameters) -> Any:
    """Transformers' rotary module of the checkpoint's architecture for ``rope``, on the CPU.

    Over llama3 the factor divides the frequencies, which is what PI means.
    """
    import torch

    with _quiet(), torch.device("meta"):
        # The class is taken from a model without layers: it has no other public name.
        rotary = type(_build(checkpoint, rope, layers=0).model.rotary_emb)
    with _quiet():
        module = rotary(_config(checkpoint, rope, layers=0))
    if rope.llama3 is not None:
        module.inv_freq = module.inv_freq / torch.tensor(rope.factor, dtype=torch.float32)
    return module


def read_values(tensor: Tensor) -> npt.NDArray[np.float32]:
    """The whole tensor as float32, in its shape, with no second copy of it."""
    out = np.empty((tensor.rows, tensor.row_elements), dtype=np.float32)
    step = max(1, _READ_BYTES // (4 * tensor.row_elements))
    independent = decodes_independently(tensor.encoding)
    for start in range(0, tensor.rows, step):
        stop = min(start + step, tensor.rows)
        if independent:
            out[start:stop] = tensor.read_f32(start, stop)
        else:
            out[start:stop] = load_ggml().dequantize(tensor.encoding, tensor.read_rows(start, stop))
    return out.reshape(tensor.shape)


@functools.cache
def decodes_independently(encoding: Encoding) -> bool:
    """Whether gguf-py decodes it; else libggml does, which is no oracle of its own."""
    block = np.zeros((1, encoding.block_bytes), dtype=np.uint8)
    try:
        decode_f32(block, encoding)
    except UnsupportedError:
        return False
    return True


def limit_threads(threads: int) -> None:
    """Torch uses no more than so many threads from here on, in the whole process."""
    _torch("cpu").set_num_threads(threads)


def cache_argument() -> str:
    """What transformers calls the cache: ``past_key_values`` up to 5.3x, ``cache`` after it."""
    import inspect

    from transformers import LlamaModel

    names = inspect.signature(inspect.unwrap(LlamaModel.forward)).parameters
    return "cache" if "cache" in names else "past_key_values"


def _build(checkpoint: Checkpoint, rope: RopeParameters, *, layers: int | None = None) -> Any:
    import transformers

    spelling = checkpoint.architecture.huggingface[0]
    model_class = getattr(transformers, spelling.class_name)
    return model_class(_config(checkpoint, rope, layers))


def _config(checkpoint: Checkpoint, rope: RopeParameters, layers: int | None = None) -> Any:
    """A transformers config; RoPE is in it before any module is built, for later is too late.

    Raises ``UnsupportedError`` where transformers refuses the sizes.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    architecture = checkpoint.architecture
    if rope.llama3 is not None:
        rope = dataclasses.replace(rope, factor=1.0)  # ``build_rotary`` divides by it
    keys = {
        **write_config_hparams(checkpoint.hparams),
        **{key: value for key, value in write_config(rope).items() if value is not None},
        **{flag: group in checkpoint.groups for flag, group in architecture.flags.items()},
        **architecture.expects,
        "attn_implementation": "sdpa",
        "use_cache": True,
    }
    keys.pop("rope_scaling", None)  # rope_parameters says the same
    keys.pop("rope_theta", None)
    if layers is not None:
        keys["num_hidden_layers"] = layers
    try:
        return transformers.AutoConfig.for_model(architecture.huggingface[0].model_type, **keys)
    except StrictDataclassError as error:
        sizes = checkpoint.hparams
        raise UnsupportedError(
            f"transformers refuses a model of hidden size {sizes.hidden_size} with"
            f" {sizes.heads} heads: {_last_line(error)}",
            hint="Verification runs transformers' own code, so it cannot verify this model.",
        ) from error


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _put(model: Any, name: str, parameter: torch.nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    expected = module.get_parameter(leaf).shape
    if parameter.shape != expected:
        raise ValueError(f"{name}: {list(parameter.shape)}, expected {list(expected)}")
    setattr(module, leaf, parameter)


def _refuse_meta(model: Any) -> None:
    left = [
        name
        for named in (model.named_parameters(), model.named_buffers())
        for name, value in named
        if value.is_meta
    ]
    if left:
        raise ValueError(f"never loaded: {', '.join(left)}")


def _torch(device: str) -> Any:
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise EnvironmentNotReadyError(
            f"verification needs torch and transformers: {error}",
            hint=f"Install them: {install_line('verify')}",
        ) from error
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentNotReadyError(
            "torch sees no CUDA device",
            hint="Leave --device at cpu, or install a build of torch for your GPU.",
        )
    return torch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers warns of factors below 1 and of keys it does not know; both are meant here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
