"""An ONNX folder or one file of it, as far as it can be read: what the audit looks at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from converters.architectures import Architecture, architecture_of_config
from converters.containers.onnx import OnnxFile, companion_folder, graph_files, read_onnx_file
from converters.containers.strict_json import read_json_object
from converters.errors import ConvertError, SourceError
from converters.rope import RopeParameters
from converters.rope.config import RopeContext, read_config
from converters.rope.gguf import RECORD_PREFIX
from converters.rope.parameters import FloatArray, uniform_ratio
from pi_convert.runtimes.onnx_tables import Tables, recovered_frequencies, stored_tables

CONFIG, GENAI = "config.json", "genai_config.json"
# Frequencies recovered from float32 tables spread by 1e-6 around one factor, from float16 by 5e-3.
_SPREAD = {"float32": 1e-4, "float16": 1e-2}


@dataclass(frozen=True)
class Graph:
    """One .onnx file; ``file`` None: ``problem`` says why it cannot be read."""

    path: Path
    file: OnnxFile | None
    problem: ConvertError | None

    @cached_property
    def tables(self) -> Tables | SourceError:
        """The cos and sin tables, or why there are none."""
        if self.file is None:
            return SourceError("the graph cannot be read", hint="Export it again.")
        try:
            return stored_tables(self.file)
        except SourceError as error:
            return error

    def record(self) -> Mapping[str, str]:
        """What the file says of its making, without our prefix."""
        properties = {} if self.file is None else self.file.properties
        return {
            k.removeprefix(RECORD_PREFIX): v for k, v in properties.items() if RECORD_PREFIX in k
        }

    def recorded_rope(self) -> Mapping[str, Any]:
        """kind, theta, factor, original_context and context; {} where nothing is recorded."""
        try:
            found = json.loads(self.record().get("rope", "{}"))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class OnnxExport:
    """Graphs and the files beside them. A file that cannot be read stands in ``problems``."""

    path: Path
    folder: Path  # of config.json and the tokenizer
    graphs: tuple[Graph, ...]
    config: Mapping[str, object] | None
    genai: Mapping[str, object] | None
    problems: Mapping[str, ConvertError]

    @cached_property
    def architecture(self) -> Architecture | None:
        """The architecture of config.json; None where it has none that is described here."""
        if self.config is None:
            return None
        try:
            return architecture_of_config(self.config, CONFIG)[0]
        except ConvertError:
            return None

    @cached_property
    def stated_rope(self) -> RopeParameters | ConvertError | None:
        """The RoPE that config.json gives, why it gives none, or None without a config.json."""
        tables = next((g.tables for g in self.graphs if isinstance(g.tables, Tables)), None)
        if self.config is None or tables is None:
            return None
        theta = self.architecture.default_theta if self.architecture else None
        about = RopeContext(CONFIG, rotary_dim=tables.rotary_dim, default_theta=theta)
        try:
            return read_config(self.config, about)
        except ConvertError as error:
            return error


def is_onnx(path: Path) -> bool:
    """Whether ``path`` is an .onnx file or a folder with some."""
    return path.suffix == ".onnx" or (path.is_dir() and bool(graph_files(path)))


def open_export(path: Path) -> OnnxExport:
    """Reads graphs and small files; raises nothing but what the operating system does."""
    graphs = tuple(_graph(file) for file in (graph_files(path) if path.exists() else [path]))
    folder = path if path.is_dir() else companion_folder(path)
    files, problems = {}, {}
    for name in (CONFIG, GENAI):
        if (folder / name).is_file():
            try:
                files[name] = read_json_object(folder / name)
            except SourceError as error:
                problems[name] = error
    return OnnxExport(path, folder, graphs, files.get(CONFIG), files.get(GENAI), problems)


def _graph(path: Path) -> Graph:
    try:
        return Graph(path, read_onnx_file(path), None)
    except ConvertError as error:
        return Graph(path, None, error)


def factor_of(tables: Tables, unscaled: FloatArray) -> float | None:
    """By how much the tables' frequencies lie below ``unscaled``; None: by no one factor."""
    found = recovered_frequencies(tables)
    if len(found) != len(unscaled):
        return None
    spread = _SPREAD[tables.cos.dtype.name]
    return uniform_ratio(unscaled, found.astype(np.float32), tolerance=spread)


def agree(tables: Tables, frequencies: FloatArray) -> bool:
    """Whether the tables were made of ``frequencies``, to what their type can tell."""
    ratio = factor_of(tables, frequencies)
    return ratio is not None and abs(ratio - 1) < _SPREAD[tables.cos.dtype.name] / 10
