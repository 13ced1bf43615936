"""Data at rest and in training: sources, datasets, pairs and loaders."""
