"""From data to trained weights: the plan of a run, its loop, feeds, step and noise classes."""
