"""Pages made from the files of runs. No jax, no TensorFlow."""
