"""Somebody else's diffusion model in MLX: the UNet of Adaptive Terrain Diffusion, its weights, and its height maps.

The network is that of OpenAI's consistency models (github.com/openai/consistency_models, MIT, copyright 2023 OpenAI),
as Youwei Yu trained it for Adaptive Terrain Diffusion (github.com/youwyu/Adaptive-Diffusion-Terrain, MIT, copyright
2024 Youwei Yu). LICENSES.txt has both licences. The weights are not here: ``pip install
adaptive-terrain-diffusion==0.4.2`` brings them.
"""
