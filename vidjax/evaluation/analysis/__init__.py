"""Measures more than MAP, for `analysis.npz`, and writes the result files of an evaluation."""
