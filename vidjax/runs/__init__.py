"""The folder of a run: its configuration, checkpoints, results and logs. It contains no maths."""
