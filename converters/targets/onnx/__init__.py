"""The ONNX target: one folder that ONNX Runtime and its clients load as it is.

``plan_onnx`` says what a file will hold, ``preflight`` whether it can run, ``write_onnx`` does it.
``graph`` builds the decoder from ``attention`` and ``linear``, ``padding`` turns padded rows and
``masking`` masks them, ``weights`` lays out blocks, ``notices`` says what they cost, ``clients``
writes the small files and ``readback`` checks the result.
"""

from converters.targets.onnx.options import GraphOptions, Storage, WeightOptions
from converters.targets.onnx.plan import PRECISIONS, OnnxPlan, plan_onnx
from converters.targets.onnx.preflight import Device, preflight
from converters.targets.onnx.write import OnnxArtifact, OnnxTarget, write_onnx

__all__ = [
    "PRECISIONS",
    "Device",
    "GraphOptions",
    "OnnxArtifact",
    "OnnxPlan",
    "OnnxTarget",
    "Storage",
    "WeightOptions",
    "plan_onnx",
    "preflight",
    "write_onnx",
]
