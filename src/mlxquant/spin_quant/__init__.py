"""Learned rotations of language models (SpinQuant, arXiv 2405.16406)."""
