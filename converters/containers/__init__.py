"""File containers (GGUF, safetensors): strict parsing of headers, no knowledge of models."""
