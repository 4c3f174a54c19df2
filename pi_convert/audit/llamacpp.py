"""What llama.cpp does with a GGUF's keys, by architecture.

Read in llama.cpp 0c1e57098, vendored by llama-cpp-python 0.3.36: ``llama-model.cpp``
(``load_hparams``, ``llama_model_rope_type``), ``llama-vocab.cpp`` (``load``) and ``models/*.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.containers.gguf import ValueType
from converters.rope import gguf as spelling
from pi_convert.audit import tokenizer_keys


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LLAMA_CPP_VERSION = "0c1e57098"
MAX_TENSOR_NAME = 63  # GGML_MAX_NAME - 1
WINDOW_KEY = "attention.sliding_window"

# A key of another type is not converted: the loader refuses the file.
LOADED_TYPES: Mapping[str, ValueType] = {
    spelling.CONTEXT_KEY: ValueType.UINT32,
    spelling.THETA_KEY: ValueType.FLOAT32,
    spelling.DIMENSION_KEY: ValueType.UINT32,
    spelling.TYPE_KEY: ValueType.STRING,
    spelling.FACTOR_KEY: ValueType.FLOAT32,
    spelling.LEGACY_FACTOR_KEY: ValueType.FLOAT32,
    spelling.ATTENTION_KEY: ValueType.FLOAT32,
    spelling.ORIGINAL_KEY: ValueType.UINT32,
    spelling.FINETUNED_KEY: ValueType.BOOL,
}

TOKENIZER_TYPES: Mapping[str, ValueType] = {
    tokenizer_keys.MODEL: ValueType.STRING,
    tokenizer_keys.PRE: ValueType.STRING,
    tokenizer_keys.BOS: ValueType.UINT32,
    tokenizer_keys.EOS: ValueType.UINT32,
    tokenizer_keys.ADD_BOS: ValueType.BOOL,
    tokenizer_keys.ADD_EOS: ValueType.BOOL,
}

# LLM_ARCH_NAMES in llama-arch.cpp.
ARCHITECTURES = _names(
    "afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bert"
    " bitnet bloom chameleon chatglm clip codeshell cogvlm cohere2 cohere2moe command-r dbrx"
    " deci deepseek deepseek2 deepseek2-ocr deepseek32 deepseek4 dflash dots1 dots3note dream"
    " eagle3 ernie4_5 ernie4_5-moe eurobert exaone exaone-moe exaone4 falcon falcon-h1 gemma"
    " gemma-embedding gemma2 gemma3 gemma3n gemma4 gemma4-assistant glm-dsa glm4 glm4moe"
    " glm5-next gpt-oss gpt2 gptj gptneox granite granite_swa granitehybrid granitemoe"
    " graniteswitch grok grovemoe hrm_text hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 hy_v4"
    " internlm2 jais jais2 jamba jina-bert-v2 jina-bert-v3 kimi-k3 kimi-linear laguna lfm2"
    " lfm2moe llada llada-moe llama llama-embed llama4 maincoder mamba mamba2 maple mellum"
    " mimo2 minicpm minicpm3 minimax-01 minimax-m2 minimax-m3 mistral3 mistral4 modern-bert"
    " mpt muse-glimmer nanbeige nemotron nemotron_h nemotron_h_moe neo-bert nomic-bert"
    " nomic-bert-moe olmo olmo2 olmoe openelm orion paddleocr pangu-embedded phi2 phi3 phimoe"
    " plamo plamo2 plamo3 plm pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe"
    " qwen3moe qwen3next qwen3tts qwen3vl qwen3vlmoe qwen4exp refact rnd1 rwkv6 rwkv6qwen2"
    " rwkv7 seed_oss smallthinker smollm3 spark2_5 stablelm starcoder starcoder2 step35 t5"
    " t5encoder talkie wavtokenizer-dec xverse"
)

# llama_model_rope_type gives NONE, and starcoder and refact, whose graphs call no RoPE.
WITHOUT_ROPE = _names(
    "arwkv7 bloom clip glm5-next gpt2 gptj jais jamba jina-bert-v2 kimi-k3 kimi-linear mamba mamba2"
    " mpt nemotron_h nemotron_h_moe refact rwkv6 rwkv6qwen2 rwkv7 starcoder t5 t5encoder"
    " wavtokenizer-dec"
)

# Layers with a sliding window rotate with scale 1, whatever the file says.
WINDOW_LAYERS_UNSCALED = _names(
    "gemma-embedding gemma3 gemma3n gemma4 gemma4-assistant laguna mellum mimo2 modern-bert"
    " muse-glimmer olmo2 plamo3 step35"
)

# The graph attends without a window whatever the key says (phi3 disables it with a warning).
WINDOW_IGNORED = _names("llama qwen2 qwen2moe qwen3 qwen3moe phi3 starcoder2")

# Their tensor loaders take rope_freqs.weight; any other architecture refuses a file that has it,
# since the number of tensors then differs from the number it created.
LOADS_ROPE_FREQS = _names(
    "apertus arcee cogvlm deci dflash eagle3 exaone exaone-moe exaone4 falcon-h1 gemma4"
    " gemma4-assistant granite granite_swa granitehybrid granitemoe llada llama llama4 minicpm"
    " mistral3 nanbeige pangu-embedded refact step35"
)
# Loaded, and not handed to any RoPE operation.
IGNORES_ROPE_FREQS = _names("cogvlm falcon-h1 llada pangu-embedded refact")

# The loader refuses a rotated width other than the head's.
WHOLE_HEAD_ROTATED = _names("deci falcon llama llama-embed")
# The graph asserts the same, GGML_ASSERT(n_embd_head == n_rot) in models/*.cpp: the file loads, and
# the process aborts when a context is made.
WHOLE_HEAD_ASSERTED = _names(
    "apertus arcee arctic baichuan chameleon codeshell cogvlm cohere2moe dbrx deepseek dots1 dream"
    " ernie4_5 ernie4_5-moe exaone exaone-moe exaone4 granite granite_swa graniteswitch grok"
    " grovemoe hunyuan-moe hunyuan_vl hy_v3 internlm2 jais2 llada llada-moe llama4 maincoder"
    " mellum mistral3 olmo olmo2 olmoe orion paddleocr pangu-embedded plamo pockettts qwen2"
    " qwen2moe qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe rnd1 seed_oss smallthinker smollm3"
    " starcoder2 talkie xverse"
)

# finetuned = false switches RoPE off. In the hybrid ones published models are made without RoPE.
FINETUNED_SWITCHES_ROPE = _names("granite granite_swa granitehybrid granitemoe graniteswitch")
PUBLISHED_WITHOUT_ROPE = _names("granitehybrid graniteswitch")

# No published model of these has theta 10000, which a missing key means.
THETA_NEVER_DEFAULT = _names("gemma3 gemma3n gpt-oss llama4 qwen2 qwen2moe qwen3 qwen3moe smollm3")

# tokenizer.ggml.model: any other is refused. gemma4 brings its own pre-tokenizer.
BPE_MODELS_WITH_PRE = frozenset({"gpt2", "hybriddna", "whitespace"})
GEMMA4_MODEL = "gemma4"
BPE_MODELS = BPE_MODELS_WITH_PRE | {GEMMA4_MODEL}
SPM_MODEL = "llama"
NO_VOCABULARY = frozenset({"no_vocab", "none"})
TOKENIZER_MODELS = BPE_MODELS | NO_VOCABULARY | {SPM_MODEL} | _names("bert plamo2 rwkv t5 test")

PRE_TOKENIZERS = _names(
    "a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe"
    " command-r dbrx deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone"
    " exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o"
    " gpt3-finnish granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2 hunyuan"
    " hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es"
    " jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3"
    " llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo"
    " phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe seed-coder smaug-bpe"
    " smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya trillion"
    " ufakzeka viking whitespace youtu"
)
# Where add_bos_token is not stated: SPM adds BOS, BPE does not, but for these pre-tokenizers.
PRE_TOKENIZERS_ADDING_BOS = _names(
    "chameleon falcon-h1 falcon3 jina-v5-nano lfm2 llama-bpe llama-v3 llama3 midm-2.0 pixtral"
    " tekken"
)
MERGES_NOT_NEEDED = frozenset({"kimi-k2"})
