"""All metrics by name: what each needs, through which network it looks, and which way is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from . import clip_files, clip_scores, inception, lpips, sets
from .images import largest_square
from .psnr import psnr
from .ssim import ssim
from .weights import Weights

Source = str | Path | None
Loader = Callable[[Source], Callable[..., Any]]


@dataclass(frozen=True)
class Metric:
    """A row of the table. ``needs`` says how what ``load`` returns is called, and what it gives:

    ``pairs``    (images, reference) → [B]; ``prompts``  (images, prompts) → [B]; ``alone``  (images) → [B];
    ``sets``     (images, reference) → SetDistance, of two whole sets.
    """

    name: str  # on the command line
    title: str  # in a table
    key: str  # in a report; a Fréchet distance that may not be called FID says so in SetDistance.name
    needs: str
    higher_is_better: bool
    source: str
    _load: Loader = field(repr=False)
    weights: Weights | None = None  # of the network that it looks through, if any
    unit: str = ""

    @property
    def network(self) -> str:
        """The network's name, or nothing."""
        return self.weights.network if self.weights else ""

    def load(self, place: Source = None) -> Callable[..., Any]:
        """The metric, ready to be called; ``place`` is a file or folder with its network's weights, by default the
        hub's.

        Raises ArtifactError when weights are missing or damaged, AdapterError when a package is.
        """
        return self._load(place)


def _lpips(trunk: lpips.Trunk) -> Loader:
    return lambda place: lpips.load(trunk, place)


def _clip_score(place: Source) -> clip_scores.ClipScore:
    return clip_scores.ClipScore(clip_files.load(place))


def _clip_iqa(place: Source) -> clip_scores.ClipIqa:
    return clip_scores.ClipIqa(clip_files.load(place))


def _fid(place: Source) -> sets.SetMetric:
    network = inception.load(place)
    return sets.frechet(network, network.title, network.published)


def _kid(place: Source) -> sets.SetMetric:
    network = inception.load(place)
    return sets.kernel_inception(network, network.title)


def _cmmd(place: Source) -> sets.SetMetric:
    network = clip_files.load_336(place)
    return sets.clip_discrepancy(
        lambda images: network.encode_images(images, largest_square), clip_files.L14_336.network
    )


_LOW, _HIGH = False, True

METRICS = {
    metric.name: metric
    for metric in (
        Metric("psnr", "PSNR", "psnr_db", "pairs", _HIGH, "per image over [0,1]", lambda place: psnr, unit="dB"),
        Metric("ssim", "SSIM", "ssim", "pairs", _HIGH, "Wang et al., IEEE TIP 2004", lambda place: ssim),
        Metric(
            "lpips",
            "LPIPS (AlexNet)",
            "lpips",
            "pairs",
            _LOW,
            "arXiv 1801.03924",
            _lpips(lpips.ALEX),
            lpips.ALEX.weights,
        ),
        Metric(
            "lpips-vgg",
            "LPIPS (VGG-16)",
            "lpips_vgg",
            "pairs",
            _LOW,
            "arXiv 1801.03924",
            _lpips(lpips.VGG),
            lpips.VGG.weights,
        ),
        Metric(
            "clip-score", "CLIP score", "clip_score", "prompts", _HIGH, "arXiv 2104.08718", _clip_score, clip_files.L14
        ),
        Metric("clip-iqa", "CLIP-IQA", "clip_iqa", "alone", _HIGH, "arXiv 2207.12396", _clip_iqa, clip_files.L14),
        Metric("fid", "FID", "fid", "sets", _LOW, "arXiv 1706.08500", _fid, inception.WEIGHTS),
        Metric("kid", "KID", "kid", "sets", _LOW, "arXiv 1801.01401", _kid, inception.WEIGHTS),
        Metric("cmmd", "CMMD", "cmmd", "sets", _LOW, "arXiv 2401.09603", _cmmd, clip_files.L14_336),
    )
}
DEFAULT = ("psnr", "ssim")  # need neither a network nor a download


def metric(name: str) -> Metric:
    """A row of the table; RecipeError, with the names there are, on any other."""
    if name not in METRICS:
        raise RecipeError(f"no metric {name!r}; there are {', '.join(METRICS)}")
    return METRICS[name]
