"""The GGUF target: one pass from source tensors to the quantized file."""
