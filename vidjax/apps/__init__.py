"""Applications: galleries of people, names for films, a server, and tables of clips.

`forget` finds people and clips in everything that vidjax has stored, and deletes them.
"""
