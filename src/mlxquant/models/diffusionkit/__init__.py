"""Stable Diffusion 3 Medium on DiffusionKit's own modules (argmaxinc, archived), for who has its files."""
