"""From trained weights to a ranking: restored runs, scores of a split, and their metrics."""
