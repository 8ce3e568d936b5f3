"""Applications that train nothing: galleries of people, films, a server, and tables of clips.

The module `forget` finds and deletes what vidjax has stored about a person.
"""
