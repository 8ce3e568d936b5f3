"""The gallery: people who are enrolled, found and deleted without training; see `gallery`.

`gallery` is what a user calls from Python, `commands` what a user types. `backend` whitens vectors
and compares them with enrolled people. `answers` sets thresholds and shows answers, `changes` edits
what is held, `store` reads and writes the file. `grouping` groups the clips of unknown people.
`appearances` joins answers in time.

Nothing here imports JAX at the top: only runs and `rank` need it, and people wait.
"""
