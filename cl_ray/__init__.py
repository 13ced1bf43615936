"""cl_ray: adversarial contrastive learning from images, on one laptop or a Ray cluster."""
