"""The gallery: people who are enrolled, found and deleted without training; see `gallery`.

`gallery` is what a user calls from Python, `commands` what a user types. `vectors` has clips turned
into vectors by a trained run; `backend` has the coordinates in which `index` compares them,
`calibration` thresholds from strangers, `store` the file; `answers` and `qdrant` write for others.
"""
