"""From data to trained weights: the plan of a run, its loop, and what is fitted beside it."""
