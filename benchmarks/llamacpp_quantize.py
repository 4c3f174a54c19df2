"""The peer's second step: llama_model_quantize of the installed libllama, as its own process.

usage: python llamacpp_quantize.py INPUT.gguf OUTPUT.gguf FTYPE THREADS
"""

from __future__ import annotations

import sys

import llama_cpp

FTYPES = {"q4_k_m": 15, "q8_0": 7, "f16": 1}


def main(source: str, target: str, ftype: str, threads: str) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FTYPES[ftype]
    parameters.nthread = int(threads)
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters)
    sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
