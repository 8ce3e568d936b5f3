"""From trained weights to a ranking: restored runs, the step, scores of a split, the top k."""
