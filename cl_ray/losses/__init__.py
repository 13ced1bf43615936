"""What is minimised: pure functions of scores and embeddings, each citing its equation."""
