"""PixArt-α and PixArt-Σ in MLX: the transformer, its chain of stages, and the hosts around it."""
