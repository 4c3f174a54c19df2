"""How much of an export's processor time is quantizing.

usage: python benchmarks/quantizer_share.py MODEL TYPE...
Prints seconds in the quantizer and of the whole process, over all threads, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from converters.ggml import Quantizer
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf


def main(model: str, *types: str) -> None:
    spent: list[float] = []  # appended by several threads
    quantize = Quantizer.quantize

    def timed(self: Quantizer, *arguments: Any) -> Any:
        started = time.thread_time()
        made = quantize(self, *arguments)
        spent.append(time.thread_time() - started)
        return made

    Quantizer.quantize = timed  # type: ignore[method-assign]
    checkpoint = open_checkpoint(model).interpolate(8)
    with tempfile.TemporaryDirectory(dir=Path(model).parent) as out:
        write_gguf(checkpoint, plan_gguf(checkpoint, types), Path(out))
    print(json.dumps({"quantizer_s": sum(spent), "process_s": time.process_time()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
