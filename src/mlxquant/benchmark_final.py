"""``mlxquant benchmark-final``: log-SNR scales, sequential GPTQ and Qronos compared on one model, as ``mlxquant
evaluate`` with their recipes.

Similarity to the baseline, size, latency and memory; LPIPS, CLIP score and FID where their networks are asked for with
``--metric``.
"""

from __future__ import annotations

from ._recipe_command import comparison_command

RECIPES = ("rtn+logsnr-w8a8", "gptq+sequential-w4a8", "qronos+damped-w4a8", "qronos+damped-w4a4")
command = comparison_command(
    "benchmark-final", RECIPES, "Compare quantized models with their baseline.", "by four recipes"
)

if __name__ == "__main__":
    command()
