"""Options of the commands that measure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from pi_convert.commands.options import PATH, Decorated

if TYPE_CHECKING:
    from pi_convert.evaluate.texts import Document
    from pi_convert.report.document import Report

RUNTIMES = ("pytorch", "llama.cpp")
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
_OF_LLAMACPP = ("ubatch", "flash_attention", "kv_cache_type", "n_gpu_layers")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How models are run."""

    device: Literal["cpu", "cuda"]
    threads: int | None
    ubatch: int
    flash_attention: bool | None
    kv_cache_type: str
    n_gpu_layers: int | None
    given: tuple[str, ...] = ()  # llama.cpp's options that the command line has

    def settings(self, runtimes: Collection[str]) -> dict[str, object]:
        """What a run in ``runtimes`` was set to; llama.cpp's options only where it took part."""
        names = ("device", "threads", *(_OF_LLAMACPP if "llama.cpp" in runtimes else ()))
        return {name: getattr(self, name) for name in names}


def take_run(flags: dict[str, Any]) -> RunOptions:
    """The options of the command that runs, and which of llama.cpp's were given to it."""
    source = click.get_current_context().get_parameter_source
    given = tuple(name for name in _OF_LLAMACPP if source(name) is not ParameterSource.DEFAULT)
    return RunOptions(**flags, given=given)


def run_options(function: Decorated) -> Decorated:
    """The options of ``RunOptions``, to be given to it by name."""
    options = [
        click.option(
            "--device",
            type=click.Choice(("cpu", "cuda")),
            default="cpu",
            help="Device of every runtime; never falls back.",
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), metavar="N", help="Default: every core."
        ),
        click.option(
            "--ubatch",
            type=click.IntRange(min=32, max=512),
            default=512,
            metavar="N",
            help="Tokens llama.cpp evaluates at once. Default: 512.",
        ),
        click.option(
            "--flash-attention/--no-flash-attention",
            default=None,
            help="llama.cpp's. Default: its own choice.",
        ),
        click.option(
            "--kv-cache-type",
            type=click.Choice(CACHE_TYPES),
            default="f16",
            help="llama.cpp's cache. Default: f16.",
        ),
        click.option(
            "--n-gpu-layers",
            type=click.IntRange(min=0),
            metavar="N",
            help="Layers llama.cpp offloads. Default: all on cuda, none on cpu.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def text_option(function: Decorated) -> Decorated:
    """``--text PATH``."""
    return click.option(
        "--text",
        "texts",
        type=PATH,
        multiple=True,
        help="UTF-8 text, one document a file, or a folder of them; may be repeated. Default: the"
        " Python documentation.",
    )(function)


def report_option(function: Decorated) -> Decorated:
    """``--report DIR`` and ``--force``."""
    function = click.option("--force", is_flag=True, help="Replace an existing report.")(function)
    return click.option(
        "--report",
        type=PATH,
        metavar="DIR",
        help="Write report.html, report.md, report.json and junit.xml there.",
    )(function)


def require_report(folder: Path | None, *, force: bool) -> None:
    """Refuses a report that would replace another without ``--force``, before any work."""
    from pi_convert.report.folder import require_writable

    if folder is not None:
        require_writable(folder, force=force)


def write_page(page: Report, folder: Path, *, force: bool) -> None:
    """Writes a report and says on stderr where it is."""
    from pi_convert.report.folder import write_report

    write_report(page, folder, force=force)
    click.echo(f"report: {folder / 'report.html'}", err=True)


def runtime_option(name: str = "--runtime", of: str = "GGUF files") -> Callable[..., Any]:
    """``--runtime``."""
    return click.option(
        name,
        type=click.Choice(RUNTIMES),
        help=f"What runs {of}. Default: llama.cpp; pytorch takes their dequantized weights.",
    )


def read_texts(paths: Sequence[Path]) -> tuple[tuple[Document, ...], dict[str, object]]:
    """(the documents at ``paths`` or the default ones, which they are for the record)."""
    from pi_convert.evaluate.texts import default_documents, read_documents
    from pi_convert.report.provenance import texts_record

    given = read_documents(paths)
    return given or default_documents(), texts_record(given)


def take(flags: dict[str, Any], fields: type) -> dict[str, Any]:
    """The flags that a dataclass has fields for, taken out of ``flags``."""
    return {name: flags.pop(name) for name in fields.__dataclass_fields__}  # type: ignore[attr-defined]
