"""Every constant that a link passes or fails by, with the reason it was measured to have.

Measured on x86-64 with two cores, SmolLM2-135M and seeded tiny models, llama.cpp 0c1e57098 (of
llama-cpp-python 0.3.36), torch 2.13 in float32, chunks of 512 tokens, unless said.
"""

from __future__ import annotations

from dataclasses import dataclass

# Link 1. float32 frequencies, CPU. numpy's pow and torch's differ by one unit in the last place,
# the division by the factor rounds once more.
OUR_FREQUENCY_ULP = 2
# llama.cpp's converter computes llama3's factors in float64 and is 3 to 4 off; a wrong factor of
# 8.0001 is 100 off.
OTHER_FREQUENCY_ULP = 8

# Link 1. Both runs are one program on one input: on the CPU a right file differs by 0.0 in every
# bit, with any quantization; factor 8.0001 for 8 gives 0.94 on a Q4_1 file, 1e-4 on an f16 file.
# Both at the start and at the far end of L', with a window of:
IDENTITY_TOKENS = 512
IDENTITY_SCORED_TOKENS = 128  # the last ones: whatever differs before reaches them
# The control of link 1: 8.0001 for 8, in proportion.
IDENTITY_CONTROL_STRETCH = 1 + 1.25e-5
# Kernels on a GPU may add up in another order from run to run: there the imposed run may differ
# from the plain one by no more than this times what two plain runs differ by. Chosen, not measured:
# no build of llama.cpp for a GPU has been tried.
DEVICE_REPEAT_MARGIN = 2.0

# Link 1 of an ONNX file. torch's cos and numpy's differ in the last bit of 5 to 17 % of a table's
# entries: with torch's tables imposed a right file comes to this mean KL at most, in float32.
TORCH_TABLES_KL = 1e-8

# Link 2. Root mean square error against the source, artifact's over this machine's quantizer's.
# Builds with and without FMA differ in 1 to 2 % of the K-quant blocks, and by 1e-4 in this ratio.
OTHER_BUILD_ERROR_RATIO = 1.01


@dataclass(frozen=True, slots=True)
class BuildSpread:
    """How far two right builds may be apart in one tensor."""

    row_error_ratio: float  # of a row's root mean square errors
    differing_blocks: float  # share; not held to where an importance matrix was used


# Every value moved by up to one unit in the last place before quantizing, which is more than FMA
# moves: 8,192 blocks of normal, Laplace and Student-t (3 degrees) values. Types whose scales are
# searched for differ in up to 8.8 % of the blocks (real builds: 2 %); one block in itself by up to
# 1.12, q2_k with Student-t by 1.67 in one of 8,192, which is 1.37 in a row of two blocks. A zeroed
# row comes to 1.5 (q2_k, Student-t) and mostly to over 2.
SEARCHED_SPREAD = BuildSpread(row_error_ratio=1.5, differing_blocks=0.1)
# The others differ in no block between the builds tried, and in 0.04 % when so moved; one block by
# up to 1.027. A zeroed row comes to 1.045 (ternary) and more.
DIRECT_SPREAD = BuildSpread(row_error_ratio=1.04, differing_blocks=1e-3)
# float16's rounding, which the scale of every block has: errors below it are no measure.
LEAST_RELATIVE_ERROR = 2.0**-11

# Link 4. Mean KL(llama.cpp || torch) in nats. An f16 SmolLM2 gives 1.6e-6, with a factor of 2.002
# for 2 it gives 2e-5.
FLOAT_MEAN_KL = 5e-6
# How far rounding alone takes a model from torch is measured for every model (runtimes.rounding),
# on the control window. On the same window llama.cpp came to 0.42 to 1.09 of it in 34 runs (f32,
# f16, bf16, q8_0, q4_0, q4_k_m, q6_k, q2_k, iq4_xs, tq1_0; 2 to 16 layers) that lay between 4e-6
# and 0.21; between windows of one model it differed by 1.35. Q4_1 SmolLM2: 4.0e-3.
ROUNDING_MARGIN = 3.0
# CUDA multiplies quantized weights by q8_1 or dequantizes to f16: not modelled, so not held to it.
# Chosen, not measured: 5 times what a Q4_1 SmolLM2 comes to on the CPU.
CUDA_QUANTIZED_MEAN_KL = 2e-2
# A control that is not this many times the right run's KL says nothing about the right run. The
# least on a Q4_1 SmolLM2, factor doubled, is 27 times it (0.092 to 0.0034).
CONTROL_RATIO = 10.0

# Link 4's windows, in tokens. One pass over 9,216 tokens of SmolLM2 takes 40 to 60 s in llama.cpp
# and 36 s in torch on two cores: so quick has one window past L, and short ones for the controls.
PAST_TOKENS = 1024  # scored past L
# KL is heavy-tailed: over 12 tokens a right f16 file came to 2.9 times rounding, over 140 to 0.8.
LEAST_SCORED_TOKENS = 256  # of them before L where L' is nearer than this, as with factor 1.1
FAR_TOKENS = 512  # at the far end of L'
CONTROL_TOKENS = 2048  # the second half is scored
# Quick reads no more than this before L; positions still cross L where it is longer.
QUICK_LEAD_TOKENS = 16_384
FULL_WINDOW = 1.5  # of L, scored past L

# Link 5, full preset: several documents.
QUALITY_DOCUMENTS = 24
QUALITY_DOCUMENT_TOKENS = 2048
# Fewer documents than this give no interval to gate by: it would reach 3.18 standard errors each
# way with 4 documents and 12.7 with 2, and so decide nothing.
QUALITY_CLUSTERS = 8
# Margins where none are given. Q4_K_M of a 135M model costs about 0.03 nats and 3 % of perplexity;
# 2-bit types cost more than this and have to be asked for by --max-kl and --max-ppl-increase.
MAX_KL = 0.1
MAX_PPL_INCREASE = 0.05
