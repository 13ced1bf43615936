"""Flags of a run that trains in seconds."""

SMALL_RUN = [
    "--batch-size=32",
    "--generator.width=4",
    "--generator.latent=8",
    "--discriminator.width=4",
    "--discriminator.hidden=16",
    "--seed=7",
    "--log-every=5",
    "--threads=1",  # two that share a busy core take twice the time
]
