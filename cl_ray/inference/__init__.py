"""Generate or embed any number of images, part by part, with a pool of model actors."""
