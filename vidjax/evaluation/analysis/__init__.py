"""Analyses an evaluation in more detail than MAP, and writes its result files."""
