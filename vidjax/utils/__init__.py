"""Helpers for errors, files, tables, command lines, messages and the limits of the machine.

Every other folder of vidjax may import them. They import no other folder of vidjax, and neither JAX
nor TensorFlow.
"""
