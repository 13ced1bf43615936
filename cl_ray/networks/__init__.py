"""The generator and discriminator families."""
