"""Models that leave JAX: a run, or a gallery, in a format that another runtime loads."""
