"""Makes HTML pages from the files of runs. Imports neither JAX nor TensorFlow."""
