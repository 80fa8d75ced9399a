"""A small GPT: network, tokenizers, files, and the adapter of the embedded one."""
