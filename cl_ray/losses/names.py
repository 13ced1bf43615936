"""What an epoch's metrics are called, known from the config alone."""

from cl_ray.train_config import GANConfig


def loss_names(config: GANConfig) -> list[str]:
    """The names of the losses and scores that `Adversary.step` gives, in its order."""
    weights = config.losses
    named = config.condition == "classifier"
    there = {
        "d/adversarial": True,
        "d/contrastive": weights.contrastive,
        "d/fakes": weights.form == "contrad" and weights.fakes,
        "d/pair": weights.pair,
        "d/classification": named,
        "score/real": True,
        "score/fake": True,
        "d/approximate_r1": weights.approximate_r1,
        "d/r1": weights.r1,
        "d/r2": weights.r2,
        "d/gradient_penalty": weights.gradient_penalty,
        "g/adversarial": True,
        "g/reconstruction": True,
        "g/uniformity": weights.uniformity,
        "g/pair_confusion": weights.pair_confusion,
        "g/classification": named,
    }
    return [name for name, is_there in there.items() if is_there]
