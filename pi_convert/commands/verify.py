"""``pi-convert verify``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pi_convert.commands.options import (
    PATH,
    json_option,
    original_context_option,
    revision_option,
    scale_option,
)

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from pi_convert.verify import VerifyRequest
    from pi_convert.verify.verdict import Preset

PRESETS = ("quick", "full")
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What the command line asked for."""

    preset: Preset
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
    help="quick (default): links 1 to 4, in minutes. full: several documents, quality gated.",
)
@click.option(
    "--text",
    "texts",
    type=PATH,
    multiple=True,
    help="UTF-8 text to measure on; may be repeated. Default: the Python documentation.",
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
    type=click.Choice(("llama.cpp",)),
    default="llama.cpp",
    expose_value=False,  # the one there is
    help="What runs the artifact; GGUF files run in llama.cpp.",
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
    type=click.IntRange(min=32),
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
@json_option
def command(
    artifact: Path,
    against: str | None,
    scale: float | None,
    original_context: int | None,
    revision: str | None,
    as_json: bool,
    **flags: Any,
) -> int:
    """Prove that an artifact is its source with the expected RoPE.

    Five links, each with an oracle of its own: the stored RoPE against transformers', the weights
    against the source's, the tokenizer against the tokenizers library, the run in llama.cpp
    against torch, and the quality against the source. Negative controls show that each check
    would have seen a wrong factor. Exit 0 where proven, 3 where not.

    \b
    Examples:
      pi-convert verify SmolLM2-135M-Instruct-PI8-Q4_1.gguf --scale 8
      pi-convert verify model.gguf --against ./vicuna --scale 4 --preset full --json
    """
    options = VerifyOptions(**flags)
    if options.preset == "quick" and (options.max_kl, options.max_ppl_increase) != (None, None):
        raise click.UsageError("--max-kl and --max-ppl-increase are gates of --preset full.")
    from converters.sources import open_checkpoint
    from pi_convert.defaults import ResolvedModel, recorded_source
    from pi_convert.report.console import emit, emit_json, progress
    from pi_convert.report.verdict import verdict_text
    from pi_convert.verify import verify

    source = ResolvedModel(against, f"against: {against}") if against else recorded_source(artifact)
    if not as_json:
        emit(source.announcement)
    checkpoint = open_checkpoint(
        source.reference, revision=revision, original_context=original_context
    )
    with progress() as tell:
        verdict = verify(_request(artifact, checkpoint, scale, options), tell)
    if as_json:
        emit_json(verdict.to_json())
    else:
        emit(verdict_text(verdict))
    return verdict.outcome.exit_code


def _request(
    artifact: Path, source: Checkpoint, scale: float | None, options: VerifyOptions
) -> VerifyRequest:
    from pi_convert.evaluate.texts import read_documents
    from pi_convert.runtimes.llamacpp import LlamaCppOptions
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
        max_kl=options.max_kl,
        max_ppl_increase=options.max_ppl_increase,
    )
