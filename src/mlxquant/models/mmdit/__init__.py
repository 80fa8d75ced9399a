"""The MMDiT of Stable Diffusion 3 in MLX, and its chain of stages."""
