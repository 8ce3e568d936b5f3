"""Helpers that every other folder may use: errors, files, tables, messages and the machine.

They import nothing else of vidjax, and neither JAX nor TensorFlow.
"""
