"""What an evaluation tells beyond MAP: the content of `analysis.npz`, and the result files."""
