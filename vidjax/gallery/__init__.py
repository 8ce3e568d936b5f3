"""The gallery: people who are enrolled, found and deleted without training; see `gallery`.

| file | holds |
|---|---|
| `gallery.py` | what a user calls from Python, `vidjax.Gallery` |
| `commands.py` | what a user types, `python -m vidjax.gallery` |
| `vectors.py` | clips to vectors, by a trained run |
| `front.py` | the coordinates and settings in which vectors are compared |
| `coordinates.py` | vectors in these coordinates, and the coefficients of people |
| `index.py` | exact search over identities |
| `people.py` | who is enrolled by which clips: changes on disk, then in memory |
| `calibration.py` | thresholds from strangers |
| `store.py` | the file: whole or not at all, and nothing of what was removed |
| `answers.py` | answers as a table or a file |
| `qdrant.py` | export to a vector database |
"""
