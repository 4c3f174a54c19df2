"""``pi-convert verify``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pi_convert.commands._measuring import report_option, require_report, write_page
from pi_convert.commands.options import (
    PATH,
    json_option,
    original_context_option,
    require_gguf_file,
    revision_option,
    scale_option,
)

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from pi_convert.verify import VerifyRequest
    from pi_convert.verify.verdict import Preset, Verdict

PRESETS = ("quick", "full")
RUNTIMES = {"llama.cpp": ".gguf", "onnxruntime": ".onnx"}
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What the command line asked for."""

    preset: Preset
    runtime: str | None
    texts: tuple[Path, ...]
    max_kl: float | None
    max_ppl_increase: float | None
    device: Literal["cpu", "cuda"]
    threads: int | None
    ubatch: int
    flash_attention: bool | None
    kv_cache_type: str
    n_gpu_layers: int | None


@click.command()
@click.argument("artifact", type=PATH)
@click.option(
    "--against",
    metavar="SOURCE",
    help="What the artifact was made from. Left out: the default model where the recorded hash is"
    " its hash, else the recorded hub id.",
)
@scale_option(required=False, help="The scale that the export was asked for.")
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    default="quick",
    help="quick (default): links 1 to 4 gated and 5 reported, in minutes. full: several documents,"
    " quality gated too.",
)
@click.option(
    "--text",
    "texts",
    type=PATH,
    multiple=True,
    help="UTF-8 text to measure on, a file or a folder; may be repeated. Default: the Python"
    " documentation.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0),
    metavar="NATS",
    help="full: largest mean KL against the source's own weights.",
)
@click.option(
    "--max-ppl-increase",
    type=click.FloatRange(min=0),
    metavar="SHARE",
    help="full: largest relative increase of perplexity, such as 0.02.",
)
@click.option(
    "--runtime",
    type=click.Choice(tuple(RUNTIMES)),
    help="What runs the artifact. Default: llama.cpp for GGUF, onnxruntime for ONNX.",
)
@click.option(
    "--device",
    type=click.Choice(("cpu", "cuda")),
    default="cpu",
    help="Device of both runtimes; never falls back.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Default: every core.")
@click.option(
    "--ubatch",
    type=click.IntRange(min=32, max=512),
    default=512,
    metavar="N",
    help="Tokens llama.cpp evaluates at once. Default: 512.",
)
@click.option(
    "--flash-attention/--no-flash-attention",
    default=None,
    help="Default: llama.cpp's own choice.",
)
@click.option(
    "--kv-cache-type",
    type=click.Choice(CACHE_TYPES),
    default="f16",
    help="llama.cpp's cache. Default: f16.",
)
@click.option(
    "--n-gpu-layers",
    type=click.IntRange(min=0),
    metavar="N",
    help="Layers to offload. Default: all on cuda, none on cpu.",
)
@original_context_option
@revision_option
@report_option
@json_option
def command(
    *,
    artifact: Path,
    against: str | None,
    scale: float | None,
    original_context: int | None,
    revision: str | None,
    report: Path | None,
    force: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Prove that an artifact is its source with the expected RoPE.

    ARTIFACT is a GGUF file, an ONNX file or an ONNX folder, whose files are proven one by one.
    Five links, each with an oracle of its own: the stored RoPE against transformers', the weights
    against the source's, the tokenizer against the tokenizers library, the run in its runtime
    against torch, and the quality against the source. Negative controls show that each check
    would have seen a wrong factor. Exit 0 where proven, 3 where not.

    \b
    Examples:
      pi-convert verify SmolLM2-135M-Instruct-PI8-Q4_1.gguf --scale 8
      pi-convert verify SmolLM2-135M-Instruct-PI8-ONNX --scale 8
      pi-convert verify model.gguf --against ./vicuna --scale 4 --preset full --json
    """
    options = VerifyOptions(**flags)
    if options.preset == "quick" and (options.max_kl, options.max_ppl_increase) != (None, None):
        raise click.UsageError("--max-kl and --max-ppl-increase are gates of --preset full.")
    from converters.sources import open_checkpoint
    from pi_convert.commands._scale import note_second_factor
    from pi_convert.defaults import ResolvedModel, recorded_source
    from pi_convert.report.console import emit, emit_json
    from pi_convert.report.verdict import verdict_text
    from pi_convert.report.verdict_page import verdict_page

    require_report(report, force=force)
    files = artifact_files(artifact, options.runtime)
    source = ResolvedModel(against, f"against: {against}") if against else recorded_source(files[0])
    if not as_json:
        emit(source.announcement)
    checkpoint = open_checkpoint(
        source.reference, revision=revision, original_context=original_context
    )
    note_second_factor(scale, checkpoint)
    verdicts = []
    for file in files:
        verdicts.append(prove(_request(file, checkpoint, scale, options)))
        if not as_json:
            emit(verdict_text(verdicts[-1]))
    if as_json:
        several = {"verdicts": [verdict.to_json() for verdict in verdicts]}
        emit_json(several if verdicts[1:] else verdicts[0].to_json())
    if report is not None:
        write_page(verdict_page(verdicts), report, force=force)
    return max(verdict.outcome.exit_code for verdict in verdicts)


def artifact_files(artifact: Path, runtime: str | None = None) -> list[Path]:
    """The files to verify: the one given, or the graphs of an ONNX folder.

    Raises ``SourceError`` where there is none, ``UsageError`` where ``runtime`` runs another kind.
    """
    from converters.containers.onnx import graph_files

    files = graph_files(artifact) if artifact.is_dir() else [artifact]
    if not files or files[0].suffix != ".onnx":
        require_gguf_file(artifact, "verify")
    if runtime is not None and (files[0].suffix == ".onnx") != (RUNTIMES[runtime] == ".onnx"):
        raise click.UsageError(f"--runtime {runtime} runs {RUNTIMES[runtime]} files.")
    return files


def prove(request: VerifyRequest) -> Verdict:
    """The verdict; a text that is too short is said on stderr first, and in the verdict's notes."""
    from pi_convert.report.console import progress
    from pi_convert.verify import verify

    note = _short_text(request)
    if note is not None:
        click.echo(f"note: {note}", err=True)
    with progress() as tell:
        verdict = verify(request, tell)
    return verdict if note is None else _with_note(verdict, note)


def _short_text(request: VerifyRequest) -> str | None:
    """What to say where the text has fewer tokens than the longest window that is run over it."""
    from pi_convert.evaluate.windows import encode_documents
    from pi_convert.verify.tokenizer_reference import reference_encoder

    needed = _longest_window(request)
    reference = reference_encoder(request.source.vocabulary)

    def encode(text: str) -> list[int]:
        return reference.encode(reference.prepare(text), add_special=False, parse_special=False)

    found = len(encode_documents(request.documents(), encode, at_least=needed).tokens)
    if found >= needed:
        return None
    return (
        f"the text has {found:,} tokens, the longest window {needed:,}: the text is repeated in it."
        f" Give {'more' if request.texts else 'a longer'} --text to measure on new tokens only."
    )


def _longest_window(request: VerifyRequest) -> int:
    """Tokens of the longest window, as link 4 itself chooses them."""
    import numpy as np

    from pi_convert.evaluate.windows import TokenStream
    from pi_convert.verify.execution import choose_windows
    from pi_convert.verify.request import expected_rope, open_artifact

    rope = expected_rope(request, open_artifact(request)).rope
    token = np.zeros(1, np.int32)
    windows = choose_windows(TokenStream(token, token), rope, request.preset)
    return max(window.tokens for window in (windows.past, windows.far, windows.control))


def _with_note(verdict: Verdict, note: str) -> Verdict:
    """The verdict with a note on the link that was measured on the windows, if it was."""
    from pi_convert.verify.verdict import LinkName, Status

    links = tuple(
        replace(link, notes=(*link.notes, note))
        if link.name is LinkName.EXECUTION and link.status is not Status.NOT_RUN
        else link
        for link in verdict.links
    )
    return replace(verdict, links=links)


def _request(
    artifact: Path, source: Checkpoint, scale: float | None, options: VerifyOptions
) -> VerifyRequest:
    from pi_convert.evaluate.texts import read_documents
    from pi_convert.runtimes.llamacpp import LlamaCppOptions
    from pi_convert.runtimes.ort import OrtOptions
    from pi_convert.verify import VerifyRequest

    return VerifyRequest(
        artifact=artifact,
        source=source,
        scale=scale,
        preset=options.preset,
        texts=read_documents(options.texts),
        device=options.device,
        llamacpp=LlamaCppOptions(
            threads=options.threads,
            ubatch=options.ubatch,
            flash_attention=options.flash_attention,
            kv_cache_type=options.kv_cache_type,
            device=options.device,
            n_gpu_layers=options.n_gpu_layers,
        ),
        ort=OrtOptions(device=options.device, threads=options.threads),
        max_kl=options.max_kl,
        max_ppl_increase=options.max_ppl_increase,
    )
