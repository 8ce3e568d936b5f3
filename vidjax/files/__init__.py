"""Files: `reading` trusts no file, `writing` writes whole files, `locks` locks folders."""

from os.path import lexists as exists

from vidjax.files.locks import foreign_part, lock
from vidjax.files.reading import (
    ARCHIVE_BYTES,
    CONFIG_BYTES,
    INTEGER_LIMIT,
    JSON_BYTES,
    LARGE_BYTES,
    MAX_ITEMS,
    MB,
    absolute,
    cache_root,
    each_line,
    load_npz,
    local,
    open_input,
    open_regular,
    parse_json,
    parse_line,
    read_bytes,
    read_json,
    read_npz,
    sha256_file,
    sha256_folder,
    sha256_json,
    sha256_opened,
    walk,
)
from vidjax.files.writing import (
    append,
    atomic_file,
    atomic_folder,
    make_folder,
    make_private,
    open_log,
    read_manifest,
    remove_tree,
    to_json,
    write_bytes,
    write_json,
    write_manifest,
    write_text,
)
