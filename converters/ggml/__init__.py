"""libggml and libllama by ctypes, and quantizers that make ggml's bytes.

``quantize`` is ggml itself, ``kernels`` are pi-convert's own, ``quantizer`` picks between them.
"""

from converters.ggml.quantize import Floats, Ggml, Raw, load_ggml
from converters.ggml.quantizer import Choice, Quantizer, load_quantizer

__all__ = ["Choice", "Floats", "Ggml", "Quantizer", "Raw", "load_ggml", "load_quantizer"]
