"""Networks that know classes: what a class changes, and that each sample has its own."""

import pytest
import torch
from torch import nn

from cl_ray.networks.build import FAMILIES, build_discriminator, build_generator
from cl_ray.networks.config import DiscriminatorConfig, GeneratorConfig
from cl_ray.networks.discriminator import Discriminator
from cl_ray.networks.generator import Generator, to_sphere

CLASSES = 4


def generator(family: str) -> Generator:
    torch.manual_seed(1)
    config = GeneratorConfig(depth=2, width=4, latent=8, family=family)
    network = build_generator((28, 28, 1), config, CLASSES).double()
    for module in network.modules():  # blocks begin at zero, where nothing is told apart
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.2)
    return network


def discriminator(projects: bool) -> Discriminator:
    torch.manual_seed(2)
    config = DiscriminatorConfig(depth=2, width=4, hidden=16, embedding=8)
    return build_discriminator((28, 28, 1), config, CLASSES, projects).double()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_of_its_own_class(family: str) -> None:
    network = generator(family)
    z, labels = drawn(6, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    together = network.decode(z, labels=labels)
    for number, label in enumerate(labels.tolist()):
        alone = network.decode(z[number : number + 1], labels=torch.tensor([label]))
        assert torch.allclose(alone[0], together[number], rtol=0, atol=1e-12)
        other = network.decode(z[number : number + 1], labels=torch.tensor([(label + 1) % 4]))
        assert not torch.allclose(other[0], together[number], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_fakes_of_images_and_of_noise_take_their_labels_in_order(family: str) -> None:
    network = generator(family)
    images, noise, labels = drawn(3, 1, 28, 28).tanh(), drawn(2, 8), torch.tensor([3, 0, 1, 2, 2])
    fakes, latents = network(images, noise, torch.zeros(3, 8).double(), None, labels)
    assert torch.allclose(latents, network.encode(images), rtol=0, atol=1e-12)
    expected = [
        network.decode(latents, labels=labels[:3]),
        network.decode(noise, labels=labels[3:]),
    ]
    assert torch.allclose(fakes, torch.cat(expected), rtol=0, atol=1e-12)


def test_a_class_is_the_columns_of_a_one_hot_vector_beside_the_latent_one() -> None:
    network = generator("convolutional")
    assert network.classes is not None
    first = network.decoder[0]  # type: ignore[index]
    z, labels = drawn(5, 8), torch.tensor([0, 3, 1, 1, 2])
    beside = torch.cat([to_sphere(z), nn.functional.one_hot(labels, CLASSES).double()], 1)
    columns = torch.cat([first.weight, first.weight @ network.classes.weight.T], 1)
    ours = first(to_sphere(z) + network.classes(labels))
    assert torch.allclose(beside @ columns.T + first.bias, ours, rtol=0, atol=1e-12)


def test_truncation_pulls_a_style_to_its_own_class_s_mean() -> None:
    network = generator("style")
    assert network.classes is not None
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    alike = network.decode(drawn(6, 8), truncation=0.0, labels=labels)
    for a, b in ((0, 2), (1, 3), (4, 5)):
        assert torch.allclose(alike[a], alike[b], rtol=0, atol=1e-10)
    for a, b in ((0, 1), (0, 4), (1, 4)):
        assert not torch.allclose(alike[a], alike[b], atol=1e-3)
    mean = network.decoder.average(network.classes(labels))  # type: ignore[operator]
    z = to_sphere(torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))).double()
    for number, label in enumerate(labels):
        styles = network.decoder.styles(z + network.classes(label))  # type: ignore[operator]
        assert torch.allclose(mean[number], styles.mean(0), rtol=0, atol=1e-10)


def test_a_second_style_is_of_the_same_class() -> None:
    network = generator("style")
    z, labels = drawn(5, 8), torch.tensor([0, 1, 2, 3, 0])
    extras = torch.zeros(5, network.extras, dtype=torch.float64)
    extras[:, -10:-2] = drawn(5, 8).flip(0)
    extras[:, -2:] = -10.0  # from the first layer that may, and surely
    mixed = network.decode(z, extras, labels=labels)
    other = (labels + 1) % CLASSES
    kinds = network.classes
    assert kinds is not None
    w, second = (
        network.decoder.styles(to_sphere(v) + kinds(labels))  # type: ignore[operator]
        for v in (z, extras[:, -10:-2])
    )
    several = network.decoder._mixed(w, second, extras)  # type: ignore[operator]
    assert torch.equal(several[0], w)
    assert torch.equal(several[-1], second)
    assert not torch.allclose(mixed, network.decode(z, extras, labels=other), atol=1e-3)


def test_a_projection_adds_the_class_s_inner_product() -> None:
    network = discriminator(projects=True)
    assert network.classes is not None
    images, labels = drawn(5, 1, 28, 28).tanh(), torch.tensor([0, 3, 1, 1, 2])
    features = network.features(images)
    scores, _ = network(images, labels)
    for number, label in enumerate(labels.tolist()):
        bare = network.score(features[number])[0]
        inner = torch.dot(network.classes.weight[label], features[number])
        assert scores[number].item() == pytest.approx((bare + inner).item(), abs=1e-12)


def test_who_only_names_classes_scores_without_them() -> None:
    network = discriminator(projects=False)
    images = drawn(5, 1, 28, 28).tanh()
    with_labels, _ = network(images, torch.tensor([0, 1, 2, 3, 0]))
    assert torch.equal(with_labels, network(images)[0])
    assert network.classify(network.features(images)).shape == (5, CLASSES)
