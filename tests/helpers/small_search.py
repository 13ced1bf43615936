"""Settings of searches that are over in seconds."""

SMALL = """
batch_size: 32
seed: 7
log_every: 5
threads: 1
generator: {width: 4, latent: 8}
discriminator: {width: 4, hidden: 16}
evaluation: {reference: mnist, samples: 60, images: 60}
"""

SPACE = """
optimizer.lr_g: {kind: log, low: 0.0001, high: 0.01}
optimizer.lr_d: {kind: log, low: 0.0001, high: 0.01}
discriminator.depth: {kind: int, low: 1, high: 3}
generator.depth: {kind: int, low: 1, high: 3, at_most: discriminator.depth}
"""
