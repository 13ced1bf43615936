"""Hosts a run on the workers of a Ray Train job."""
