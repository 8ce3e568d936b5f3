"""The gallery: people who are enrolled, found and deleted without training; see `gallery`.

`gallery` is what a user calls from Python, `commands` what a user types. `vectors` turns clips into
vectors with a trained run, `backend` whitens vectors, `index` compares them with enrolled people.
`calibration` sets thresholds, `store` reads and writes the file, `answers` and `qdrant` export.
"""
