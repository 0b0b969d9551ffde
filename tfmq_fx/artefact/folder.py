"""Put the files of an artefact into a folder: at every moment there is the old artefact or the new one, whole.

A new folder is filled beside its place and renamed. In a folder that is there already, only the files of the artefact
are replaced, and its manifest, which names them, is what switches::

    the old files are linked to ".….previous"  ─▶  the old manifest, naming the links
    the new files take their places            ─▶  the new manifest
    the links go

Whatever is filled holds a locked file, so what a killed save left is told from what a running one needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tfmq_fx.artefact.layout import FILES, GRAPH, MANIFEST, PREVIOUS, TENSORS, is_artefact
from tfmq_fx.artefact.locks import held, hold
from tfmq_fx.artefact.manifest import Manifest
from tfmq_fx.artefact.paths import path_of
from tfmq_fx.errors import ArtefactError

__all__ = ["check_target", "filled_folder"]

#: What a folder that is being filled has in it, locked, besides the files.
MARK = ".saving"
#: What :func:`tempfile.mkdtemp` puts behind a prefix.
RANDOM = re.compile(r"[a-z0-9_]{8}")


def check_target(path: str | Path) -> None:
    """Check that an artefact can be saved to ``path``, before the minutes of work that end in saving it.

    Raises:
        ArtefactError: The path holds something else, or cannot be written.
    """
    target = path_of(path, "an artefact")
    try:
        _check_replaceable(target)
        place, prefix = _staging_parent(target)
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as folder:
            (Path(folder) / MARK).touch()
    except OSError as error:
        msg = f"{target} cannot be written: {error.strerror or error}; choose another path"
        raise ArtefactError(msg) from error


@contextlib.contextmanager
def filled_folder(path: Path) -> Iterator[Path]:
    """An empty folder for the files of an artefact; they are at ``path`` when the block ends without an error.

    Args:
        path: Where they go: an artefact, of which they take the place, an empty folder, or nothing yet.

    Raises:
        ArtefactError: ``path`` holds something else.
        OSError: A file cannot be written; what was at ``path`` before is there.
    """
    _check_replaceable(path)
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    place, prefix = _staging_parent(target)
    part, lock = _new_staging_folder(place, prefix)
    try:
        yield part
        for name in FILES:
            _sync(part / name)
        if place == target or not _rename_into_place(part, target):
            _check_replaceable(target)
            with held(target):
                _switch(part, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(lock)
    (target / MARK).unlink(missing_ok=True)
    for folder, before in ((target.parent, f".{target.name}."), (target, f"{MARK}.")):
        _remove_stale(folder, before)


def _staging_parent(target: Path) -> tuple[Path, str]:
    """Where the files are put together, on the file system of ``target``, and how such a folder's name begins."""
    return (target, f"{MARK}.") if target.is_dir() else (target.parent, f".{target.name}.")


def _check_replaceable(target: Path) -> None:
    """Refuse a path that holds anything but an artefact, damaged or not, or what a killed save left of one."""
    if not target.exists():
        return
    if not (target.is_dir() and (is_artefact(target) or all(map(_is_leftover, target.iterdir())))):
        msg = f"{target} exists and is not an artefact of tfmq_fx; choose another path or remove it first"
        raise ArtefactError(msg)
    for name in (*FILES, *PREVIOUS.values(), MARK):
        if (target / name).is_dir():
            msg = f"{target / name} is a folder where an artefact has a file; remove it first or choose another path"
            raise ArtefactError(msg)


def _is_leftover(path: Path) -> bool:
    return path.name == MARK or (path.name.startswith(f"{MARK}.") and path.is_dir())


def _new_staging_folder(place: Path, prefix: str) -> tuple[Path, int]:
    """A new folder with a locked file in it."""
    while True:
        part = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        try:
            (part / MARK).touch()
            lock = hold(part / MARK, wait=True)
        except FileNotFoundError:
            continue  # another save took it for what a killed one left, before it was locked
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            raise
        assert lock is not None
        if (part / MARK).exists():
            return part, lock
        os.close(lock)


def _rename_into_place(part: Path, target: Path) -> bool:
    """Rename a filled folder to its place; False where another process has put one there meanwhile."""
    # mkdtemp keeps others out; the artefact is as open as any folder that is made here.
    part.chmod(0o777 & ~_umask())
    try:
        part.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _switch(part: Path, target: Path) -> None:
    """Replace the files of an artefact that is there; whoever reads the manifest finds all files that it names."""
    manifest = target / MANIFEST
    try:
        before = manifest.read_bytes()
        files = Manifest.from_bytes(before, str(manifest)).files
    except (OSError, ArtefactError):
        files = {}  # nothing that this version could read, or nothing at all
    # Of an artefact that has lost a file there is nothing to keep until the end.
    complete = all((target / file.name).is_file() for file in files.values())
    if complete and any(file.name == name for name, file in files.items()):
        values = json.loads(before)
        for name, file in files.items():
            _link(target / file.name, target / PREVIOUS[name])
            values["files"][name]["name"] = PREVIOUS[name]
        (part / f"{MANIFEST}.previous").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        _sync(part / f"{MANIFEST}.previous")
        _sync(target)
        (part / f"{MANIFEST}.previous").replace(manifest)
    for name in (TENSORS, GRAPH):
        (part / name).replace(target / name)
    _sync(target)
    (part / MANIFEST).replace(manifest)
    _sync(target)
    for name in PREVIOUS.values():
        (target / name).unlink(missing_ok=True)


def _link(file: Path, name: Path) -> None:
    """Give a file a second name; where the file system cannot, a copy."""
    name.unlink(missing_ok=True)
    try:
        name.hardlink_to(file)
    except OSError:
        shutil.copy2(file, name)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise  # not every file system syncs folders
    finally:
        os.close(descriptor)


def _remove_stale(place: Path, prefix: str) -> None:
    """Remove what killed saves left: folders with our mark, which nobody holds, and with nothing but our files."""
    for part in place.glob(f"{prefix}*"):
        if not RANDOM.fullmatch(part.name.removeprefix(prefix)) or part.is_symlink():
            continue
        with contextlib.suppress(OSError):
            if not (part / MARK).is_file():
                part.rmdir()  # which removes empty folders only
            elif all(path.name in (*FILES, MARK, f"{MANIFEST}.previous") for path in part.iterdir()):
                lock = hold(part / MARK, wait=False)
                if lock is not None:
                    shutil.rmtree(part, ignore_errors=True)
                    os.close(lock)
