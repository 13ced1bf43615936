"""Data at rest and on its way: sources, data sets, pairs and shards."""
