"""How good a run is: 1-NN on D's features, and the Fréchet distance of its samples.

`python benchmarks/quality.py runs/demo`. The bank are all training digits and the questions all
test digits, Euclidean over the frozen features. The distance is over the packaged classifier's
features, so not an FID, beside its floor: as many training digits against the test digits.
"""

import sys

import torch

from cl_ray.data.dataset import Dataset
from cl_ray.evaluation.fidelity import frechet_distance
from cl_ray.evaluation.probes import nearest_neighbours
from cl_ray.evaluation.reference import ReferenceClassifier
from cl_ray.model import load

SAMPLES = 10_000


def main() -> None:
    """Print the metrics of the run that is named."""
    run = load(sys.argv[1])
    digits = Dataset.open("mnist")
    train, test = digits.read("train"), digits.read("test")
    assert train.label is not None
    assert test.label is not None
    bank, asked = (torch.from_numpy(run.embed(rows.image)) for rows in (train, test))
    found = torch.from_numpy(train.label)[nearest_neighbours(bank, asked, 1)[:, 0]]
    right = (found == torch.from_numpy(test.label)).double().mean().item()
    print(f"{run.checkpoint}: 1-NN of D's features ({run.config.pairs.mode}) {right:.2%}")
    reference = ReferenceClassifier.load("mnist")
    real = reference.features(test.image)
    distance = frechet_distance(real, reference.features(run.generate(SAMPLES, seed=1)))
    floor = frechet_distance(real, reference.features(train.image[:SAMPLES]))
    print(f"Fréchet distance {distance:.3f}, floor {floor:.4f}: {distance / floor:.0f} x")


if __name__ == "__main__":
    main()
