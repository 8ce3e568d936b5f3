"""Helpers for errors, files, tables, command lines, messages, processes and limits of the machine.

Every other folder of vidjax may import the helpers. The helpers import no other folder of vidjax
and no TensorFlow. Only `distributed` imports JAX, and only if several processes train a run.
"""
