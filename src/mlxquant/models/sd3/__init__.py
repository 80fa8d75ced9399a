"""Stable Diffusion 3 and 3.5 in MLX, from diffusers' folders and from original single files."""
