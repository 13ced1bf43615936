"""The run's pictures, curves and figures as one HTML file that needs nothing else."""
