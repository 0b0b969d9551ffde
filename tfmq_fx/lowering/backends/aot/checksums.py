"""Checksums of the files in a package: torch reads compiled code and constants without looking at any."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfmq_fx.artefact.fields import checked
from tfmq_fx.errors import ArtefactError

__all__ = ["UNREADABLE", "check_members", "read_checksums", "record_checksums"]

#: What reading a damaged archive raises.
UNREADABLE = (EOFError, NotImplementedError, OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)
HEX_DIGITS = 64


def record_checksums(path: Path) -> dict[str, str]:
    """The sha256 of every file in a package, by name."""
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: _digest(archive, entry) for entry in archive.infolist()}


def read_checksums(value: Any) -> dict[str, str]:
    """Such a record, read from a description.

    Raises:
        ArtefactError: It is none.
    """
    record = checked(value, dict, "'members'")
    for name, digest in record.items():
        what = f"'members'[{name[:60]!r}]"
        if len(checked(digest, str, what)) != HEX_DIGITS or not set(digest) <= set("0123456789abcdef"):
            msg = f"{what} is {digest[:80]!r}, which is no sha256; compile the package again"
            raise ArtefactError(msg)
    return dict(record)


def check_members(path: Path, record: Mapping[str, str], about: str) -> None:
    """Find out whether a package holds what it was written with, before anything in it is used.

    Args:
        path: The package.
        record: The checksums of its files.
        about: How the name of the description ends, which holds the record and is not in it.

    Raises:
        ArtefactError: A file is missing, changed, there twice, or was not there.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.filename.endswith(f"/{about}")]
            found = {entry.filename: entry for entry in entries}
            for name in sorted(found.keys() | record.keys()):
                if name not in found:
                    reason = f"it lacks the file {name[:200]!r}"
                elif name not in record or len(found) != len(entries):
                    reason = f"it has files that it was not written with, such as {name[:200]!r}"
                elif _digest(archive, found[name]) != record[name]:
                    reason = f"the checksum of {name[:200]!r} differs"
                else:
                    continue
                break
            else:
                return
    except UNREADABLE as error:
        reason = f"its archive cannot be read ({type(error).__name__})"
    msg = f"{path} is damaged: {reason}; copy it again or compile it again"
    raise ArtefactError(msg)


def _digest(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> str:
    digest = hashlib.sha256()
    with archive.open(entry) as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
