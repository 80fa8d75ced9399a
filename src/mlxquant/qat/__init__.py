"""Quantization-aware training: a model learns with its weights and activations rounded as they will be."""
