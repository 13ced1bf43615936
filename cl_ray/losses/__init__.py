"""Losses: pure functions of scores, embeddings and images, each citing its equation."""
