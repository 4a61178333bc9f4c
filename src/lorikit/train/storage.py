"""Every write of a run goes through here: staged beside its place, fsynced, renamed; a failing disk is a DiskError."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lorikit.errors import DiskError

STAGING = ".staging-"
"""Prefix of what is not complete yet, or no longer wanted; whoever holds the run's lock may delete it."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a write to `path` into a DiskError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
    except SafetensorError as error:  # its Rust side keeps the errno to itself
        reason = str(error)
    else:
        return
    raise DiskError(
        f"{path} cannot be written: {reason}; nothing written before is lost. Make room (or make the disk writable) and "
        "give the same command again"
    )


def write_file(path: Path, data: bytes) -> None:
    """Write or replace a file, as a whole or not at all; DiskError leaves the old one as it was."""
    staged = path.with_name(STAGING + path.name)
    with disk_errors(path):
        try:
            staged.write_bytes(data)
            _sync(staged)
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
        _sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; at the end of the block it stands at `path` complete and on the disk, or not at all.

    What stood at `path` before is replaced. After DiskError, or any other error in the block, no trace is left.
    """
    staged = path.with_name(STAGING + path.name)
    with disk_errors(path):
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            yield staged
            for file in staged.iterdir():
                file.chmod(staged.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
                _sync(file)
            _sync(staged)
            if path.exists():
                remove_folder(path)
            staged.rename(path)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        _sync(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill in the middle leaves no half of it under its name."""
    doomed = path.with_name(f"{STAGING}removed-{path.name}")
    with disk_errors(path):
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def remove_staged(run: Path) -> None:
    """Delete what a killed process left half-written in the run folder."""
    for path in run.glob(f"{STAGING}*"):
        with disk_errors(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
