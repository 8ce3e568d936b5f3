"""Reads and writes the configuration, checkpoints, results and logs of a run (a training).

Functions raise UserError if a file is damaged or the user must correct a value.
"""
