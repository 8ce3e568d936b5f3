"""Commands over many clips: a folder of parquet tables in, a folder of tables out, part by part.

    INPUT/NAME.parquet    clips, as `vidjax.data.clip_files` reads them; all frames of a clip in one
    OUT/NAME.parquet      what was found for them, and in its metadata of what it was made, `Facts`

A table of OUT appears whole or not at all, facts included. A call skips the tables that are done:
it goes on where another was cut off, and `--shard=1/4` to `--shard=4/4` share the work between any
four processes or machines. Two that make the same table write the same.

`runner` makes the tables; `rankings` are tables of lists, which are joined to one.
"""
