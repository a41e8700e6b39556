"""The study directory: manifest, fingerprints, atomic writes, resume.

A study holds everything one audit has computed. Each stage reads files of it and
writes files of it, so that any stage can be rerun, resumed or replaced alone. Every
write is atomic: a reader finds the old file or the new one, never half of either.
"""

from holdfast.study.directory import Study
from holdfast.study.files import (
    DamagedTableError,
    atomic_file,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_table,
    atomic_write_text,
    canonical_json,
    claim,
    file_sha256,
    fingerprint,
    read_table,
    require_place,
    storing,
)

__all__ = [
    "DamagedTableError",
    "Study",
    "atomic_file",
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_table",
    "atomic_write_text",
    "canonical_json",
    "claim",
    "file_sha256",
    "fingerprint",
    "read_table",
    "require_place",
    "storing",
]
