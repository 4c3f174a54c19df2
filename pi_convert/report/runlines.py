"""The lines that run an exported GGUF, with a context that fits this machine's memory."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from converters.architectures import HParams
from pi_convert.report.console import size, tokens

_MEMORY_SHARE = 0.8  # of what is free now; the rest is left to compute buffers and other programs
_CONTEXT_STEP = 1024


@dataclass(frozen=True, slots=True)
class RunLines:
    """Commands for one file, no RoPE flags among them: the file says it all."""

    context: int  # tokens, at most L'
    kv_cache_bytes: int  # float16, at ``context``
    fits_whole_context: bool
    llama_cli: str
    llama_server: str
    ollama: str


def run_lines(
    path: Path, hparams: HParams, context: int, *, memory_bytes: int | None = None
) -> RunLines:
    """Lines for ``path``; ``context`` is L'. ``memory_bytes`` defaults to what is free here."""
    free = available_memory_bytes() if memory_bytes is None else memory_bytes
    room = free * _MEMORY_SHARE - path.stat().st_size
    fitting = int(room / hparams.kv_cache_bytes(1)) // _CONTEXT_STEP * _CONTEXT_STEP
    chosen = min(context, max(fitting, _CONTEXT_STEP))
    # Ollama's names: lower case, digits, and . _ -
    name = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-.") or "model"
    file = shlex.quote(str(path))
    resolved = shlex.quote(str(path.resolve()))
    return RunLines(
        context=chosen,
        kv_cache_bytes=hparams.kv_cache_bytes(chosen),
        fits_whole_context=chosen == context,
        llama_cli=f"llama-cli -m {file} -c {chosen}",
        llama_server=f"llama-server -m {file} -c {chosen}",
        ollama=f"printf 'FROM %s\\nPARAMETER num_ctx {chosen}\\n' {resolved}"
        f" > Modelfile && ollama create {name} -f Modelfile && ollama run {name}",
    )


def run_text(lines: RunLines, context: int) -> str:
    """The lines for people."""
    fit = (
        "all of L'"
        if lines.fits_whole_context
        else f"what fits this machine's memory now; L' is {tokens(context)}"
    )
    return "\n".join(
        [
            f"Run it (no RoPE flags; {tokens(lines.context)} tokens is {fit},"
            f" KV cache {size(lines.kv_cache_bytes)}):",
            f"  {lines.llama_cli}",
            f"  {lines.llama_server}",
            f"  {lines.ollama}",
        ]
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
