"""Several processes that work on one run, over `jax.distributed`; one process is the usual case."""
