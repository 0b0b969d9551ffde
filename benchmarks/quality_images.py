"""Fréchet distances and classifier scores of the bundled model's cells, against Fashion-MNIST."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from measures.classifier import agreement, classifier_score, confidence, posteriors, train_classifier
from measures.efficientnet_lite0 import FeatureExtractor
from measures.fashion_mnist import load_fashion_mnist
from measures.reference import load_reference
from measures.sampling import sample_cached
from quality_cells import FLOAT, WORK, cell_name, kept, write_json
from quality_models import BUNDLED

import tfmq_fx
from tfmq_fx.data.bundled_model import load_model

__all__ = ["BUNDLED_WORK", "measure_images"]

BUNDLED_WORK = WORK / BUNDLED


def measure_images(method: str, bits: str, seed: int, options: argparse.Namespace) -> None:
    """Sample many images with the lowered program (or the float model) and hold them against the test split."""
    name = FLOAT if method == FLOAT else cell_name(method, bits, seed)
    label = f"float-s{seed}" if method == FLOAT else name
    model, scheduler = load_model(None)
    denoiser: Any
    if method == FLOAT:
        model = model.to(memory_format=torch.channels_last)
        denoiser = model
    else:
        denoiser = tfmq_fx.lower(tfmq_fx.load(BUNDLED_WORK / "programs" / name))

    def images_of(what: str, denoise: Any) -> Any:
        folder = BUNDLED_WORK / "images" / f"{what}-{options.image_steps}steps"
        return sample_cached(
            denoise, scheduler, folder, identity=what, steps=options.image_steps, count=options.images, seed=seed
        )

    samples = images_of(label, denoiser)
    train, labels = load_fashion_mnist("train")
    classifier = train_classifier(train, labels, BUNDLED_WORK / "classifier.pt")
    extractor = FeatureExtractor()
    reference = load_reference(BUNDLED_WORK / "reference", extractor, count=options.images)
    distances = reference.distances(extractor(samples.pixels))
    probabilities = posteriors(classifier, samples.pixels)
    original = BUNDLED_WORK / "posteriors" / f"float-s{seed}-{options.image_steps}steps.pt"
    if method == FLOAT:
        kept(original, lambda: probabilities)
    result = {
        "model": BUNDLED,
        "method": method,
        "bits": bits,
        "seed": seed,
        "steps": options.image_steps,
        "images": len(samples.pixels),
        "fd": distances.pooled,
        "sfd": distances.spatial,
        "classifier_score": classifier_score(probabilities),
        "confidence": confidence(probabilities),
        "agreement": agreement(probabilities, torch.load(original)) if original.is_file() else None,
        "floor": {key: dataclasses.asdict(value) for key, value in reference.floor.items()},
    }
    write_json(BUNDLED_WORK / "image-cells" / f"{label}-{options.image_steps}steps.json", result)
