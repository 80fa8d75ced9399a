"""Stable Diffusion 1.5 and 2.1: a UNet of convolutions and cross attention, under diffusers' own names."""
