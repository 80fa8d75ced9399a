"""The picture of a quantization config: one row a layer, one column a timestep, coloured by tier, with the layer's
range as a line.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..numerics.arrays import Array

COLOURS = {4: (198, 224, 190), 6: (250, 226, 160), 8: (243, 182, 160)}
INK, PALE, PAPER, CURVE = (25, 25, 28), (105, 105, 112), (255, 255, 255), (60, 60, 90)
ROW, PLOT, GAP, HEADER, FOOTER, NOTES = 44, 920, 24, 116, 52, 360  # twice the size at which the page is shown


def draw_tiers(sigmas: Array, bits: Mapping[str, Array], ranges: Mapping[str, Array], title: str) -> Image.Image:
    """``bits`` and ``ranges`` [T] of each layer over ``sigmas`` [T] ascending; drawn as the sampler runs, from noise to
    picture.

    Each line is scaled to its own layer; the largest range stands beside it.
    """
    title_font, font, small = (ImageFont.load_default(size) for size in (30, 26, 22))
    names = max(round(font.getlength(path)) for path in bits) + 2 * GAP
    width = max(names + PLOT + NOTES, round(title_font.getlength(title)) + 2 * GAP)
    page = Image.new("RGB", (width, HEADER + ROW * len(bits) + FOOTER), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((GAP, 16), title, INK, title_font)
    for column, (tier, colour) in enumerate(COLOURS.items()):
        x = GAP + 120 * column
        pen.rectangle((x, 68, x + 28, 92), fill=colour)
        pen.text((x + 40, 66), f"A{tier}", INK, small)
    pen.text((GAP + 120 * len(COLOURS), 66), "line: range over time, from 0 to its largest", PALE, small)
    edges = names + np.linspace(0, PLOT, len(sigmas) + 1)
    for row, (path, tiers) in enumerate(bits.items()):
        top = HEADER + row * ROW
        pen.text((GAP, top + 6), path, INK, font)
        for t, tier in enumerate(tiers[::-1]):
            pen.rectangle((edges[t], top + 2, edges[t + 1], top + ROW - 4), fill=COLOURS[int(tier)])
        peak = float(ranges[path].max())
        heights = top + ROW - 8 - (ROW - 16) * ranges[path][::-1] / peak
        pen.line(list(zip((edges[1:] + edges[:-1]) / 2, heights, strict=True)), fill=CURVE, width=3)
        pen.text((names + PLOT + GAP, top + 8), f"mean {np.mean(tiers):.1f} bits, to {peak:.3g}", PALE, small)
    foot, last = HEADER + ROW * len(bits) + 8, f"sigma {sigmas[0]:.3g}"
    pen.text((names, foot), f"sigma {sigmas[-1]:.3g}", PALE, small)
    pen.text((names + PLOT - small.getlength(last), foot), last, PALE, small)
    return page.resize((page.width // 2, page.height // 2), Image.Resampling.LANCZOS)
