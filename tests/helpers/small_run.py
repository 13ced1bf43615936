"""Flags of a run that is over in seconds."""

SMALL = [
    "--batch-size=32",
    "--generator.width=4",
    "--generator.latent=8",
    "--discriminator.width=4",
    "--discriminator.hidden=16",
    "--seed=7",
    "--log-every=5",
]
