"""The figures of a report: what every metric says of pictures, with intervals, picture by picture and over all.

The intervals are paired: all models are resampled by the same prompts. What cannot be said (no interval from one
picture, no text to score against) is None, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics.attributes import Marks, accuracy, shares
from ..metrics.bootstrap import interval
from ..metrics.catalog import Metric
from ..numerics.arrays import Array
from ..progress import Progress

Attributes = Callable[[Array, Sequence[str]], Sequence[Marks] | None]
Features = dict[tuple[str, Path | None, str], Array]  # by network, place of its weights, and folder of the pictures
ACCURACY = {
    "key": "accuracy",
    "title": "Attribute accuracy",
    "unit": "",
    "higher_is_better": True,
    "network": "",
    "source": "",
    "per_image": True,
}
WEIGHTS = {"accuracy": "asked"}  # what the values of a figure's pictures count in its mean; all others count alike


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one model: ``batches()`` gives them [b,H,W,3] in [0,1], in the order of the prompts, in the same
    batches for all.
    """

    name: str
    folder: str
    batches: Callable[[], Iterator[Array]]

    def each(self) -> Iterator[Array]:
        """One picture [H,W,3] after the other."""
        for batch in self.batches():
            yield from batch


class Judge:
    """Scores pictures against a reference; ``texts`` are the prompts, where they are known, ``attributes`` the model's
    own judge.

    The networks of ``metrics`` are loaded now, from ``places`` by the metric's name or else from the hub: a missing
    file is an ArtifactError before anything is drawn.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        texts: Sequence[str] | None = None,
        attributes: Attributes = lambda images, texts: None,
        places: Mapping[str, Path] | None = None,
    ):
        self._metrics, self._texts, self._attributes, self._places = metrics, texts, attributes, places or {}
        self._scores: dict[str, Any] = {metric.name: metric.load(self._places.get(metric.name)) for metric in metrics}
        self._features: Features = {}  # of references
        self.notes: list[str] = []

    def table(self, accuracy: bool) -> list[dict[str, Any]]:
        """What a report says about the metrics, in the order of its columns."""
        rows = [
            {
                "key": self.key(metric),
                "title": (
                    metric.title if self.key(metric) == metric.key else self.key(metric).replace("_", " ").capitalize()
                ),
                "unit": metric.unit,
                "higher_is_better": metric.higher_is_better,
                "network": self._scores[metric.name].features if metric.needs == "sets" else metric.network,
                "source": metric.source,
                "per_image": metric.needs != "sets",
            }
            for metric in self._metrics
        ]
        return [*rows, ACCURACY] if accuracy else rows

    def key(self, metric: Metric) -> str:
        """What a report calls it: a distance between sets is called by the network that was really loaded."""
        return str(self._scores[metric.name].name) if metric.needs == "sets" else metric.key

    def score(self, pictures: PictureSet, reference: PictureSet | None, progress: Progress) -> dict[str, Any]:
        """Every metric of ``pictures``: its value, ``_interval``, and in ``each`` one value a picture. Without a
        ``reference``, which is how that itself is scored, there is nothing to pair with.
        """
        figures: dict[str, Any] = {}
        each: dict[str, list[float]] = {}
        features: Features = {}
        for metric in self._metrics:
            if metric.needs == "sets":
                figures |= self._set_distance(metric, pictures, reference, features)
            elif metric.needs != "pairs" or reference is not None:
                each[metric.key] = self._one_by_one(metric, pictures, reference, progress)
            else:
                figures |= {metric.key: None, f"{metric.key}_interval": None}
        for key, values in each.items():
            figures |= {key: float(np.mean(values)), f"{key}_interval": interval(values)}
        table = None
        if (marks := self._marks(pictures)) is not None:
            table = accuracy(marks)
            each["accuracy"], asked = shares(marks)
            figures |= {"accuracy": table["mean"], "accuracy_interval": interval(each["accuracy"], asked)}
            each[WEIGHTS["accuracy"]] = [float(count) for count in asked]
        return figures | {"attributes": table, "each": each}

    def _one_by_one(
        self, metric: Metric, pictures: PictureSet, reference: PictureSet | None, progress: Progress
    ) -> list[float]:
        values, score, first = list[float](), self._scores[metric.name], 0
        batches = zip(pictures.batches(), reference.batches() if reference else pictures.batches(), strict=True)
        for batch, exact in progress(batches, f"{pictures.name}: {metric.title}"):
            texts = [] if self._texts is None else list(self._texts[first : first + len(batch)])
            arguments = {"pairs": (batch, exact), "prompts": (batch, texts), "alone": (batch,)}[metric.needs]
            values += [float(value) for value in score(*arguments)]
            first += len(batch)
        return values

    def _set_distance(
        self, metric: Metric, pictures: PictureSet, reference: PictureSet | None, features: Features
    ) -> dict[str, Any]:
        key = self.key(metric)
        if reference is None:
            return dict.fromkeys((key, f"{key}_interval", f"{key}_samples"))
        exact = self._encoded(metric, reference, self._features)
        distance = self._scores[metric.name].between(self._encoded(metric, pictures, features), exact)
        if distance.warning is not None and distance.warning not in self.notes:
            self.notes.append(distance.warning)
        return {key: float(distance.value), f"{key}_interval": None, f"{key}_samples": distance.samples}

    def _encoded(self, metric: Metric, pictures: PictureSet, known: Features) -> Array:
        """What the network of a set metric makes of pictures: once for all metrics that look through the same
        weights.
        """
        score = self._scores[metric.name]
        key = (score.features, self._places.get(metric.name), pictures.folder)
        if key not in known:
            known[key] = score.encode(pictures.batches())
        return known[key]

    def _marks(self, pictures: PictureSet) -> list[Marks] | None:
        """The model's own judgement of each picture; None where it has none."""
        if self._texts is None:
            return None
        marks = list[Marks]()
        for batch in pictures.batches():
            some = self._attributes(batch, self._texts[len(marks) : len(marks) + len(batch)])
            if some is None:
                return None
            marks += some
        return marks


def differences(
    metrics: Sequence[Mapping[str, Any]], reference: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> list[Any]:
    """Paired differences with intervals: every result against the first, and what the models judge alone against the
    reference too.
    """
    pairs = [(result, results[0]) for result in results[1:]] + [(result, reference) for result in results]
    rows = []
    for metric in metrics:
        key = metric["key"]
        for a, b in pairs:
            if key in a["each"] and key in b["each"]:
                values = np.array(a["each"][key]) - np.array(b["each"][key])
                weights = a["each"].get(WEIGHTS.get(key))
                rows.append(
                    {
                        "metric": key,
                        "a": a["name"],
                        "b": b["name"],
                        "mean": float(np.average(values, weights=weights)),
                        "interval": interval(values, weights),
                    }
                )
    return rows
