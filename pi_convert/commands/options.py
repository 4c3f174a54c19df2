"""Arguments and options that commands share."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
_WEIGHTS = (".safetensors", ".bin", ".pth")  # of a checkpoint's folder


class ScaleType(click.ParamType[float]):
    """A finite number of at least 1."""

    name = "number"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The scale, or a usage error (exit 2)."""
        try:
            scale = float(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a number, such as 8.", param, ctx)
        if not (math.isfinite(scale) and scale >= 1):
            self.fail(
                f"{value!r} does not extend a context; give 1 or more, such as 8.", param, ctx
            )
        return scale


class FiniteRange(click.FloatRange):
    """A number in a range; nan, which every range of click's holds, and infinity are refused."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number, or a usage error (exit 2)."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def model_argument(function: Decorated) -> Decorated:
    """``[MODEL]``."""
    return click.argument("model", required=False)(function)


def scale_option(*, required: bool, help: str) -> Callable[[Decorated], Decorated]:  # noqa: A002
    """``--scale S``."""
    return click.option("--scale", type=ScaleType(), required=required, metavar="S", help=help)


def json_option(function: Decorated) -> Decorated:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(
        function
    )


def force_option(function: Decorated) -> Decorated:
    """``--force``."""
    return click.option("--force", is_flag=True, help="Replace an existing output.")(function)


def revision_option(function: Decorated) -> Decorated:
    """``--revision``."""
    return click.option("--revision", help="Branch, tag or commit of a hub id.")(function)


def original_context_option(function: Decorated) -> Decorated:
    """``--original-context N``."""
    return click.option(
        "--original-context",
        type=click.IntRange(min=1, max=2**31 - 1),  # llama.cpp counts positions in 32 bits
        metavar="N",
        help="L in tokens, where the checkpoint does not say or is wrong.",
    )(function)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def require_gguf_file(path: Path, command: str) -> None:
    """Raises ``SourceError`` where ``path`` is no file, naming the GGUF that may be meant.

    ``check`` and ``verify`` take ONNX files and folders too, and ask this of what is neither.
    """
    from converters.errors import SourceError

    weights = path.suffix in _WEIGHTS and path.is_file() and not _is_gguf(path)
    if path.exists() and not path.is_dir() and not weights:
        return
    takes = "one GGUF file" if command == "fix" else "a GGUF file, an ONNX file or its folder"
    if not path.exists():
        raise SourceError(f"{path}: there is no such file", hint="Check the path.")
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        found = f"a folder with {len(ggufs)} GGUF files in it" if ggufs[1:] else "a folder"
        hint = f"Give the file itself: pi-convert {command} {shlex.quote(str(ggufs[0]))}"
    elif any(path.glob("*.onnx")) or any(path.glob("onnx/*.onnx")):  # only fix asks this of one
        found, hint = "an ONNX folder", "Export it again from its source; fix repairs GGUF files."
    elif weights or (path / "config.json").is_file():
        found = "a checkpoint's weights" if weights else "a Hugging Face folder"
        folder = shlex.quote(str(path.parent if weights else path))
        hint = (
            f"Export it first: pi-convert export {folder} --to gguf --scale S (no --scale where it"
            " is interpolated already)"
        )
    else:
        found, hint = "a folder", f"Give {takes}; there is none in this folder."
    raise SourceError(f"{path} is {found}, and {command} takes {takes}", hint=hint)
