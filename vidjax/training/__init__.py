"""Training, from data to weights: the plan of a run, its loop, step, feeds and noise classes.

`api` has the functions of `import vidjax`.
"""
