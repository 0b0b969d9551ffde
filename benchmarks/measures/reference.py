"""What generated images are measured against: statistics of the real ones, computed once and kept in a folder.

The reference is the whole test split (10,000 images). The floor is the distance to it of disjoint parts of the
train split, each with as many images as the generated sets have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .efficientnet_lite0 import Features
from .fashion_mnist import DATA, load_fashion_mnist
from .frechet import Floor, Gaussian, frechet_distance, real_floor

__all__ = ["KINDS", "Distances", "Reference", "load_reference"]

#: The two kinds of features, and what a distance on them is called.
KINDS = {"pooled": "FD-EffLite0", "spatial": "sFD-EffLite0"}


@dataclass(frozen=True)
class Distances:
    """Distances of a set of images to the reference, by kind of feature.

    Attributes:
        pooled: FD-EffLite0.
        spatial: sFD-EffLite0.
        count: Images in the set.
    """

    pooled: float
    spatial: float
    count: int


@dataclass(frozen=True)
class Reference:
    """Statistics of the test split, and the floor.

    Attributes:
        pooled: Of the pooled features.
        spatial: Of the spatial features.
        floor: Distances of real images to the reference, by kind of feature.
    """

    pooled: Gaussian
    spatial: Gaussian
    floor: dict[str, Floor]

    def distances(self, features: Features) -> Distances:
        """Measure a set of images; compare it with the floor only at the floor's number of images."""
        pooled = frechet_distance(Gaussian.of(features.pooled), self.pooled)
        return Distances(pooled, frechet_distance(Gaussian.of(features.spatial), self.spatial), len(features))


def load_reference(
    cache: str | Path,
    extractor: Callable[[Tensor, Callable[[int, int], None] | None], Features],
    *,
    count: int,
    parts: int = 4,
    data: str | Path = DATA,
    on_batch: Callable[[str, int, int], None] | None = None,
) -> Reference:
    """Load the reference from ``cache``, or compute what is not there yet.

    Args:
        cache: The folder of the results; the statistics and the floor, each written when it is whole.
        extractor: Computes the features: a :class:`FeatureExtractor`.
        count: Images in a part of the floor: as many as in the generated sets.
        parts: Disjoint parts of the train split.
        data: The folder of the idx files.
        on_batch: Called with what is computed, the images done, and all of them.

    Raises:
        ValueError: The train split does not hold so many parts.
    """
    cache = Path(cache)

    def features(what: str, images: Tensor) -> Features:
        return extractor(images, None if on_batch is None else lambda done, total: on_batch(what, done, total))

    files = {kind: cache / f"test-{kind}.pt" for kind in KINDS}
    if not all(file.is_file() for file in files.values()):
        found = features("test split", load_fashion_mnist("test", data)[0])
        for kind, file in files.items():
            Gaussian.of(getattr(found, kind)).save(file)
    gaussians = {kind: Gaussian.load(file) for kind, file in files.items()}

    floor_file = cache / f"floor-{count}x{parts}.json"
    if not floor_file.is_file():
        images = load_fashion_mnist("train", data)[0]
        if count * parts > len(images):
            msg = f"{parts} parts of {count} images do not fit into the train split of {len(images)}"
            raise ValueError(msg)
        found_parts = [
            features(f"train part {index + 1} of {parts}", part)
            for index, part in enumerate(torch.split(images[: count * parts], count))
        ]
        floors = {
            kind: asdict(real_floor([getattr(part, kind) for part in found_parts], gaussians[kind])) for kind in KINDS
        }
        part_file = floor_file.with_name(f"{floor_file.name}.{os.getpid()}.part")
        part_file.write_text(json.dumps(floors, indent=2) + "\n", encoding="utf-8")
        part_file.replace(floor_file)
    stored = json.loads(floor_file.read_text(encoding="utf-8"))
    floor = {kind: Floor(**{**values, "parts": tuple(values["parts"])}) for kind, values in stored.items()}
    return Reference(**gaussians, floor=floor)
