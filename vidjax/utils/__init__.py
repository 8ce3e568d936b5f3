"""Helpers for errors, files, tables, command lines, messages, processes and limits of the machine.

Every other folder of vidjax may import them. They import no other folder of vidjax and no
TensorFlow. Only functions of `distributed` import JAX, if several processes train a run.
"""
