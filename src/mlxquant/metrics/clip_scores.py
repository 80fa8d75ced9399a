"""What CLIP says of pictures: whether one shows its prompt, and whether it is a good photo."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import NumericsError
from .clip import Clip
from .images import Images, checked, shortest_side


class ClipScore:
    """``100·max(cos, 0)`` of each picture and its own prompt (arXiv 2104.08718), ViT-L/14, without that paper's prefix
    and factor 2.5.
    """

    def __init__(self, clip: Clip):
        self._clip = clip

    def __call__(self, images: Images, prompts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Scores [B] of pictures [B,H,W,3] in [0,1] and B prompts; NumericsError on other counts or values."""
        images = checked(images, "clip score")
        if len(images) != len(prompts):
            raise NumericsError(f"clip score: {len(images)} pictures and {len(prompts)} prompts do not pair")
        pictures, texts = self._clip.encode_images(images, shortest_side), self._clip.encode_texts(prompts)
        return 100 * np.maximum((pictures.astype(np.float64) * texts).sum(axis=1), 0)


class ClipIqa:
    """CLIP-IQA (arXiv 2207.12396, eq. 2): how much more a picture is a good photo than a bad one, from 0 to 1.

    Departs from the paper in using ViT-L/14, with its position embedding, in place of a ResNet-50 without one.
    """

    PROMPTS = ("Good photo.", "Bad photo.")

    def __init__(self, clip: Clip):
        self._clip = clip
        self._texts = clip.encode_texts(self.PROMPTS).astype(np.float64)

    def __call__(self, images: Images) -> npt.NDArray[np.float64]:
        """Scores [B] of pictures [B,H,W,3] in [0,1]."""
        good, bad = (100 * self._clip.encode_images(images, shortest_side) @ self._texts.T).T
        return np.asarray(1 / (1 + np.exp(np.minimum(bad - good, 700))))
