"""Evaluation of trained models: reference features, metrics of samples, probes of features."""
