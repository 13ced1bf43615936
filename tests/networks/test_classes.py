"""Conditional networks: the effect of a class, and that each sample has its own."""

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
    for module in network.modules():  # blocks start at zero
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.2)
    return network


def discriminator(is_projection: bool) -> Discriminator:
    torch.manual_seed(2)
    config = DiscriminatorConfig(depth=2, width=4, hidden=16, embedding=8)
    return build_discriminator((28, 28, 1), config, CLASSES, is_projection).double()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sample_has_its_own_class(family: str) -> None:
    network = generator(family)
    z, labels = normal(6, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    batch = network.decode(z, labels=labels)
    for number, label in enumerate(labels.tolist()):
        alone = network.decode(z[number : number + 1], labels=torch.tensor([label]))
        assert torch.allclose(alone[0], batch[number], rtol=0, atol=1e-12)
        other = network.decode(z[number : number + 1], labels=torch.tensor([(label + 1) % 4]))
        assert not torch.allclose(other[0], batch[number], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_fakes_of_images_and_noise_take_labels_in_order(family: str) -> None:
    network = generator(family)
    images, noise, labels = normal(3, 1, 28, 28).tanh(), normal(2, 8), torch.tensor([3, 0, 1, 2, 2])
    fakes, latents = network(images, noise, torch.zeros(3, 8).double(), None, labels)
    assert torch.allclose(latents, network.encode(images), rtol=0, atol=1e-12)
    expected = [
        network.decode(latents, labels=labels[:3]),
        network.decode(noise, labels=labels[3:]),
    ]
    assert torch.allclose(fakes, torch.cat(expected), rtol=0, atol=1e-12)


def test_class_embedding_equals_a_one_hot_input() -> None:
    network = generator("convolutional")
    assert network.class_embedding is not None
    first = network.decoder[0]  # type: ignore[index]
    z, labels = normal(5, 8), torch.tensor([0, 3, 1, 1, 2])
    beside = torch.cat([to_sphere(z), nn.functional.one_hot(labels, CLASSES).double()], 1)
    columns = torch.cat([first.weight, first.weight @ network.class_embedding.weight.T], 1)
    ours = first(to_sphere(z) + network.class_embedding(labels))
    assert torch.allclose(beside @ columns.T + first.bias, ours, rtol=0, atol=1e-12)


def test_truncation_pulls_styles_to_the_mean_of_their_class() -> None:
    network = generator("style")
    assert network.class_embedding is not None
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    truncated = network.decode(normal(6, 8), truncation=0.0, labels=labels)
    for a, b in ((0, 2), (1, 3), (4, 5)):
        assert torch.allclose(truncated[a], truncated[b], rtol=0, atol=1e-10)
    for a, b in ((0, 1), (0, 4), (1, 4)):
        assert not torch.allclose(truncated[a], truncated[b], atol=1e-3)
    mean = network.decoder.mean_style(network.class_embedding(labels))  # type: ignore[operator]
    z = to_sphere(torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))).double()
    for number, label in enumerate(labels):
        of_noise = network.decoder.styles(z + network.class_embedding(label))  # type: ignore[operator]
        assert torch.allclose(mean[number], of_noise.mean(0), rtol=0, atol=1e-10)


def test_mixed_style_has_the_same_class() -> None:
    network = generator("style")
    z, labels = normal(5, 8), torch.tensor([0, 1, 2, 3, 0])
    decoder_noise = torch.zeros(5, network.decoder_noise_dim, dtype=torch.float64)
    decoder_noise[:, -10:-2] = normal(5, 8).flip(0)
    decoder_noise[:, -2:] = -10.0  # from the first possible layer, always
    mixed = network.decode(z, decoder_noise, labels=labels)
    other = (labels + 1) % CLASSES
    embedding = network.class_embedding
    assert embedding is not None
    w, second = (
        network.decoder.styles(to_sphere(v) + embedding(labels))  # type: ignore[operator]
        for v in (z, decoder_noise[:, -10:-2])
    )
    styles = network.decoder.mix_styles(w, second, decoder_noise)  # type: ignore[operator]
    assert torch.equal(styles[0], w)
    assert torch.equal(styles[-1], second)
    assert not torch.allclose(mixed, network.decode(z, decoder_noise, labels=other), atol=1e-3)


def test_projection_adds_the_inner_product_of_the_class() -> None:
    network = discriminator(is_projection=True)
    assert network.class_head is not None
    images, labels = normal(5, 1, 28, 28).tanh(), torch.tensor([0, 3, 1, 1, 2])
    features = network.features(images)
    scores = network(images, labels).score
    for number, label in enumerate(labels.tolist()):
        bare = network.score(features[number])[0]
        inner = torch.dot(network.class_head.weight[label], features[number])
        assert scores[number].item() == pytest.approx((bare + inner).item(), abs=1e-12)


def test_auxiliary_classifier_scores_without_labels() -> None:
    network = discriminator(is_projection=False)
    images = normal(5, 1, 28, 28).tanh()
    with_labels = network(images, torch.tensor([0, 1, 2, 3, 0])).score
    assert torch.equal(with_labels, network(images).score)
    assert network.classify(network.features(images)).shape == (5, CLASSES)
