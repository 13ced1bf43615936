"""The search for the balance between G and D. The package `cl_ray` never imports it."""
