"""Reads and validates architecture descriptions; sources, targets and tests share them."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Literal, TypeVar

from converters.architectures.hparams import HParams
from converters.errors import SourceError, TensorError, UnsupportedError, shown

T = TypeVar("T")

UNTIED = "untied"  # the group of tensors that a checkpoint with tied embeddings leaves out


@dataclass(frozen=True, slots=True)
class Window:
    """Where a config says its attention window: ``switch`` turns it on, where there is one."""

    key: str
    default: int | None = None
    switch: str = ""


@dataclass(frozen=True, slots=True)
class HuggingFaceSpelling:
    """One model_type and class of transformers that this architecture describes."""

    model_type: str
    class_name: str
    window: Window | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor, or one a layer where the name has ``{i}``. Shapes name fields of ``HParams``."""

    name: str  # Hugging Face's
    gguf: str
    shape: tuple[str, ...]
    rope: str = ""  # the field that counts the heads whose rows RoPE rotates; "" for none
    group: str = ""  # present or absent as one; "" is always present


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model family as data."""

    name: str
    gguf_name: str
    rope_pairing: Literal["interleaved", "halves"]  # in llama.cpp; Hugging Face has halves
    free_head_dim: bool  # whether llama.cpp takes heads * head_dim apart from the hidden size
    loads_rope_freqs: bool
    default_theta: float | None
    expects: Mapping[str, object]  # config keys that must have this value where present
    flags: Mapping[str, str]  # config key -> the tensor group it announces
    huggingface: tuple[HuggingFaceSpelling, ...]
    tensors: tuple[TensorSpec, ...]

    def expected_tensors(
        self, hparams: HParams, groups: Iterable[str]
    ) -> Iterator[tuple[str, str, tuple[int, ...], TensorSpec]]:
        """(Hugging Face name, GGUF name, shape, spec) of every tensor, globals first."""
        present = {"", *groups}
        if not hparams.tied_embeddings:
            present.add(UNTIED)
        for spec in self.tensors:
            if spec.group in present and "{i}" not in spec.name:
                yield spec.name, spec.gguf, _shape(spec, hparams), spec
        for layer in range(hparams.layers):
            for spec in self.tensors:
                if spec.group in present and "{i}" in spec.name:
                    names = spec.name.format(i=layer), spec.gguf.format(i=layer)
                    yield *names, _shape(spec, hparams), spec

    def rope_heads(self, spec: TensorSpec, hparams: HParams) -> int:
        """Heads to permute between Hugging Face's layout and GGUF's; 0 where rows stay."""
        if not spec.rope or self.rope_pairing == "halves":
            return 0
        return int(getattr(hparams, spec.rope))

    def groups_present(self, names: Iterable[str], *, gguf: bool = False) -> frozenset[str]:
        """The groups of which at least one tensor is among ``names``, UNTIED included."""
        found = set(names)
        return frozenset(
            spec.group
            for spec in self.tensors
            if spec.group and (spec.gguf if gguf else spec.name).format(i=0) in found
        )


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raises ``TensorError`` listing all that is missing, unexpected and wrongly shaped at once."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    wrong = sorted(
        f"{name} {list(found[name])}, expected {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    )
    parts = [
        f"{len(names)} {label}: {_some(names)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrongly shaped", wrong),
        )
        if names
    ]
    if parts:
        raise TensorError(
            f"{where}: tensors do not fit the architecture: {'; '.join(parts)}",
            hint="Check that the config belongs to these weights and the download is complete.",
        )


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _shape(spec: TensorSpec, hparams: HParams) -> tuple[int, ...]:
    return tuple(int(getattr(hparams, axis)) for axis in spec.shape)


@functools.cache
def architectures() -> tuple[Architecture, ...]:
    """Every architecture, by name."""
    folder = resources.files(__package__)
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return tuple(parse_architecture(tomllib.loads(f.read_text("utf-8")), f.name) for f in files)


def architecture_named(gguf_name: str, where: str) -> Architecture:
    """The architecture that GGUF's ``general.architecture`` names, or ``UnsupportedError``."""
    for architecture in architectures():
        if architecture.gguf_name == gguf_name:
            return architecture
    raise _unsupported(f"{where}: architecture {shown(gguf_name)}")


def architecture_of_config(
    config: Mapping[str, object], where: str
) -> tuple[Architecture, HuggingFaceSpelling]:
    """The architecture of a ``config.json``, by its class, else its model_type."""
    classes = config.get("architectures")
    model_type = config.get("model_type")
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(c, str) for c in classes)
    ):
        raise SourceError(
            f"{where}: architectures is {shown(classes)}", hint="Expected a list of names."
        )
    for architecture in architectures():
        for spelling in architecture.huggingface:
            if classes == [spelling.class_name] or (
                not classes and model_type == spelling.model_type
            ):
                _expect(architecture, config, where)
                return architecture, spelling
    raise _unsupported(f"{where}: architecture {_named(classes, model_type)}")


def _named(classes: object, model_type: object) -> str:
    names = classes if isinstance(classes, list) and classes else [model_type]
    return ", ".join(name if isinstance(name, str) else shown(name) for name in names)


def _expect(architecture: Architecture, config: Mapping[str, object], where: str) -> None:
    for key, value in architecture.expects.items():
        if config.get(key, value) != value:
            raise UnsupportedError(
                f"{where}: {key} is {shown(config[key])}",
                hint=f"{architecture.name} is supported with {key} {value!r} only.",
            )


def _unsupported(message: str) -> UnsupportedError:
    known = sorted(
        {s.class_name for a in architectures() for s in a.huggingface}
        | {f"{a.gguf_name} (GGUF)" for a in architectures()}
    )
    return UnsupportedError(message, hint=f"Supported are {', '.join(known)}.")


def parse_architecture(data: Mapping[str, object], where: str) -> Architecture:
    """An architecture from its TOML. Raises ``ValueError`` for an unknown or missing key."""
    spellings = tuple(_parse_spelling(item, where) for item in _tables(data, "huggingface", where))
    tensors = tuple(_parse_tensor(item, where) for item in _tables(data, "tensors", where))
    plain = {key: value for key, value in data.items() if key not in ("huggingface", "tensors")}
    architecture = _construct(
        Architecture, {**plain, "huggingface": spellings, "tensors": tensors}, where
    )
    if architecture.rope_pairing not in ("interleaved", "halves"):
        raise ValueError(f"{where}: rope_pairing {architecture.rope_pairing!r}")
    return architecture


def _parse_spelling(item: Mapping[str, object], where: str) -> HuggingFaceSpelling:
    values = dict(item)
    values["class_name"] = values.pop("class", None)
    if isinstance(window := values.get("window"), Mapping):
        values["window"] = _construct(Window, window, where)
    return _construct(HuggingFaceSpelling, values, where)


def _parse_tensor(item: Mapping[str, object], where: str) -> TensorSpec:
    shape = item.get("shape")
    if not isinstance(shape, list):
        raise ValueError(f"{where}: {item.get('name')} has no shape")
    spec = _construct(TensorSpec, {**item, "shape": tuple(shape)}, where)
    axes = {f.name for f in fields(HParams)} | {"query_size", "kv_size"}
    unknown = {*spec.shape, *([spec.rope] if spec.rope else [])} - axes
    if unknown:
        raise ValueError(f"{where}: {spec.name} names {sorted(unknown)}, not fields of HParams")
    if ("{i}" in spec.name) != ("{i}" in spec.gguf):
        raise ValueError(f"{where}: {spec.name} and {spec.gguf} differ in {{i}}")
    return spec


def _tables(data: Mapping[str, object], key: str, where: str) -> list[Mapping[str, object]]:
    tables = data.get(key)
    if not isinstance(tables, list) or not all(isinstance(t, Mapping) for t in tables):
        raise ValueError(f"{where}: [[{key}]] is missing")
    return tables


def _construct(kind: type[T], values: Mapping[str, object], where: str) -> T:
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
