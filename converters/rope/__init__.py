"""Rotary position embedding: the one owner of its parameters, its arithmetic and its spellings.

``parameters`` is the value and the formulas, ``contexts`` decides what L and L' are, ``config``
reads and writes Hugging Face's spellings, ``gguf`` GGUF's.
"""

from converters.rope.contexts import Evidence
from converters.rope.parameters import Llama3Scaling, RopeParameters

__all__ = ["Evidence", "Llama3Scaling", "RopeParameters"]
