"""Stable Diffusion 3 Medium, run by DiffusionKit."""
