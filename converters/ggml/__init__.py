"""libggml and libllama by ctypes: quantizers on numpy arrays, and the libraries themselves."""

from converters.ggml.quantize import Floats, Ggml, Raw, load_ggml

__all__ = ["Floats", "Ggml", "Raw", "load_ggml"]
