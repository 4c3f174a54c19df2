"""Texts, windows of tokens, and the statistics of what runtimes make of them."""
