"""The report of a run: images, charts and metrics as one HTML page."""
