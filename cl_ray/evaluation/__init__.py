"""What a run is worth: reference features, fidelity of samples, and the representation."""
