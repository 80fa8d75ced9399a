"""What a diffusion model predicts: the flow, the noise, v, or the image.

All four are mixtures of the same two things. A model reads ``alpha image + sigma noise`` and predicts ``p image + q
noise``, so two of these numbers give every other: one pair of equations in image and noise, solved for what is asked.
That is all that a sampler needs to know of a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..errors import AdapterError

FLOW, EPSILON, V, SAMPLE = KINDS = ("flow", "epsilon", "v", "sample")


def mixture(kind: str, alpha: float, sigma: float) -> tuple[float, float]:
    """How much of the image and how much of the noise a prediction is, where the model reads ``alpha image + sigma
    noise``.

    Args:
        kind: "flow" for ``noise - image`` (arXiv 2210.02747; rectified flow has alpha = 1 - sigma), "epsilon" for the
            noise (arXiv 2006.11239), "v" for ``alpha noise - sigma image`` (arXiv 2202.00512), "sample" for the image.
        alpha: Of the image.
        sigma: Of the noise.
    """
    return {FLOW: (-1.0, 1.0), EPSILON: (0.0, 1.0), V: (-sigma, alpha), SAMPLE: (1.0, 0.0)}[kind]


@dataclass(frozen=True)
class Parameterization:
    """What a model's output is.

    Attributes:
        kind: One of ``KINDS``; see ``mixture``.
        learned_variance: The second half of the output's channels is the variance of a random step (arXiv 2102.09672).
            No sampler here asks for it.

    Raises:
        AdapterError: The kind is unknown.
    """

    kind: str = FLOW
    learned_variance: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AdapterError(f"a model cannot predict {self.kind!r}; expected one of {', '.join(KINDS)}")

    def prediction(self, output: mx.array) -> mx.array:
        """The output [...,C] without a learned variance: of 2C channels the first C.

        Raises:
            AdapterError: The number of channels is odd, and half of them were to be a variance.
        """
        if not self.learned_variance:
            return output
        if output.shape[-1] % 2:
            raise AdapterError(
                f"a model with a learned variance writes an even number of channels, found {output.shape[-1]}; its"
                " channels are to be the last axis"
            )
        return output[..., : output.shape[-1] // 2]

    def target(self, image: mx.array, noise: mx.array, alpha: float, sigma: float) -> mx.array:
        """What a perfect model predicts where it reads ``alpha image + sigma noise``."""
        of_image, of_noise = mixture(self.kind, alpha, sigma)
        return of_image * image + of_noise * noise

    def weights(self, kind: str, alpha: float, sigma: float) -> tuple[float, float]:
        """Another kind of prediction as ``u latent + w prediction``: (u, w).

        Args:
            kind: What is asked for.
            alpha: The latent is ``alpha image + sigma noise``.
            sigma: The same.

        Raises:
            AdapterError: The latent and the prediction say the same at this level, such as the noise where there is
                nothing else.
        """
        if kind == self.kind:
            return 0.0, 1.0
        p, q = mixture(self.kind, alpha, sigma)
        of_image, of_noise = mixture(kind, alpha, sigma)
        if (determinant := alpha * q - sigma * p) == 0:
            raise AdapterError(
                f"a model that predicts {self.kind!r} says nothing new of a latent that is {alpha:g} image and"
                f" {sigma:g} noise; use a schedule without that level, or a model that predicts 'v' or 'sample'"
            )
        return (of_image * q - of_noise * p) / determinant, (alpha * of_noise - sigma * of_image) / determinant

    def convert(self, prediction: mx.array, latent: mx.array, alpha: float, sigma: float, kind: str) -> mx.array:
        """What the model would have said if it predicted another kind; the very same array where it does.

        Args:
            prediction: Of this kind, without a learned variance.
            latent: What the model read, ``alpha image + sigma noise``, in the same shape.
            alpha: See there.
            sigma: See there.
            kind: What is asked for.

        Raises:
            AdapterError: As for ``weights``.
        """
        if kind == self.kind:
            return prediction
        of_latent, of_prediction = self.weights(kind, alpha, sigma)
        return of_latent * latent + of_prediction * prediction
