"""The run's pictures, curves and metrics as one HTML file that needs nothing else."""
