"""``mlxquant evaluate-compare``: what scales that follow the log-SNR are worth, beside others at the same bits, as
``mlxquant evaluate`` with their recipes.

One scale for all timesteps, one for each, a network of the timestep, and one of the log-SNR. Similarity to the
baseline, size, latency and memory; LPIPS, CLIP score and FID where their networks are asked for with ``--metric``.
"""

from __future__ import annotations

from ._recipe_command import comparison_command

RECIPES = ("rtn-w8a8-static", "rtn-w8a8", "rtn+tdq-w8a8", "rtn+logsnr-w8a8")
command = comparison_command(
    "evaluate-compare",
    RECIPES,
    "Compare log-SNR scales with others.",
    "with one scale for all timesteps, one for each, a network of the timestep, and one of the log-SNR",
)

if __name__ == "__main__":
    command()
