"""A run's folder: who may write to it, which checkpoints count, and what a resume sets aside.

    <root>/<name>/v0/  config.toml  epoch  lock  metrics.jsonl  pairs/  samples/  discarded/
                       checkpoint_000100/{..., COMMITTED}  exports/step_000100/  final/

Three things keep two drivers from spoiling one folder. A lock (flock, freed by the kernel when its driver dies)
refuses a second driver at once. A fenced epoch, raised at every claim and compared at commit, publish and audit
append, stops a driver that slept while another took over. And a checkpoint counts only with its COMMITTED file,
written after everything else is on disk. Nothing is ever overwritten: a new run takes the next vN, rows of undone
steps move to discarded/.

A step in a file name or metric row is the number of optimizer updates done when it was written; the first is 1.
Left out: what is inside a checkpoint (`trainer.py`), and copying to remote storage.
"""

import fcntl
import json
import math
import os
import re
import shutil
import socket
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import Refused

MAY_DIFFER = ("run.", "cluster.", "serve.", "preprocess.", "trainer.num_", "trainer.timeout_s")
"""What a resume may change of the configuration: where and how to run, not what."""
SPLIT = ("trainer.ranks", "trainer.train_batch_size", "trainer.gradient_accumulation_steps")
"""How the pairs of an update are split may change too, if their product stays: a cluster may have lost a node."""
MUST_AGREE = ("run.seed",)
"""But for these: with another seed the resumed half would not continue the first."""


class RunInUse(Refused):
    """Another live driver holds the folder."""


class Fenced(Refused):
    """Another driver has taken the folder over since this one claimed it: nothing more may be written."""


@dataclass(frozen=True, kw_only=True)
class Fence:
    """The right to write into a claimed folder; goes to other processes, which cannot hold the lock."""

    path: Path
    epoch: int

    def check(self) -> None:
        """Raise Fenced unless the folder is still ours."""
        now = _read_epoch(self.path)
        if now != self.epoch:
            raise Fenced(
                f"{self.path} was taken over by another driver (epoch {now}, ours {self.epoch}); this one stops"
            )


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A claimed folder. `release`, or the end of the process, lets others in."""

    path: Path
    epoch: int
    """Raised by every claim of this folder; ours as long as the file says so."""
    resumed: bool
    """Whether the folder had been claimed before."""
    started: bool
    """Whether a step was done in it: what it began with holds from there."""
    lock: int
    """File descriptor that holds the lock: a plain number, so that no garbage collection frees it."""

    @classmethod
    def claim(
        cls, root: Path | str, name: str, config_toml: str, resume: Literal["auto", "never"] = "auto"
    ) -> "RunFolder":
        """Take the folder to write to, creating it if need be.

        The newest vN is resumed if it is unfinished and `config_toml` (the resolved configuration) agrees with its
        own but for the keys in MAY_DIFFER. A finished one, or resume = "never", leads to vN+1. Raises RunInUse if a
        live driver holds it, Refused naming every key that differs.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise Refused(f"run.name = {name!r}: use letters, digits, '.', '_', '-'; start with a letter or digit")
        parent = Path(root) / name
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(
                f"run.dir = {str(root)!r}: {parent} cannot be made: {error.strerror}; choose another"
            ) from error
        with (parent / "claim.lock").open("a") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)  # one claim at a time; held for milliseconds
            newest = max((int(p.name[1:]) for p in parent.iterdir() if re.fullmatch(r"v\d+", p.name)), default=-1)
            path = parent / f"v{max(newest, 0)}"
            if newest >= 0 and (resume == "never" or (path / "final").exists()):
                path = parent / f"v{newest + 1}"
            path.mkdir(exist_ok=True)
            lock = _lock(path)
            try:
                return cls._take(path, config_toml, lock)
            except BaseException:
                os.close(lock)
                raise

    @classmethod
    def _take(cls, path: Path, config_toml: str, lock: int) -> "RunFolder":
        config = path / "config.toml"
        metrics = path / "metrics.jsonl"
        rows = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        started = any(_row_step(row) != 0 for row in rows) or any(path.glob("checkpoint_*/COMMITTED"))
        if config.exists() and not started:
            config.unlink()  # that start was refused or failed before it did anything: its remedy may be another config
        if config.exists():
            differ = _differences(tomllib.loads(config.read_text()), tomllib.loads(config_toml))
            if differ:
                raise Refused(
                    f"{path} was started with another configuration:\n  " + "\n  ".join(differ) + "\n"
                    'Put the old values back to resume it, or start anew with run.resume = "never" or another run.name.'
                )
        else:
            write_durably(config, config_toml)
        resumed = (path / "epoch").exists()
        epoch = _read_epoch(path) + 1 if resumed else 1
        if resumed and config.read_text() != config_toml:
            write_durably(path / f"config.epoch_{epoch}.toml", config_toml)
        write_durably(path / "epoch", f"{epoch}\n")
        return cls(path=path, epoch=epoch, resumed=resumed, started=started, lock=lock)

    def check(self) -> None:
        """Raise Fenced unless the folder is still ours. Call before every commit, publish and audit append."""
        self.fence.check()

    @property
    def fence(self) -> Fence:
        return Fence(path=self.path, epoch=self.epoch)

    def release(self) -> None:
        """Let other drivers in. The epoch stays: this object must not write any more."""
        fcntl.flock(self.lock, fcntl.LOCK_UN)

    def checkpoint_path(self, step: int) -> Path:
        return self.path / f"checkpoint_{step:06d}"

    def begin_checkpoint(self, step: int) -> Path:
        """An empty folder for the checkpoint of `step`; what an interrupted save left there is removed."""
        self.check()
        path = self.checkpoint_path(step)
        if (path / "COMMITTED").exists():
            raise FileExistsError(f"{path} is committed already and is never overwritten")
        return _empty_folder(path)

    def begin_final(self) -> Path:
        """An empty folder for the final export, which `finish` turns into final/."""
        self.check()
        return _empty_folder(self.path / "final.partial")

    def begin_export(self, step: int) -> Path:
        """An empty folder for the weights of `step`, which `finish_export` turns into exports/step_N: never pruned."""
        self.check()
        (self.path / "exports").mkdir(exist_ok=True)
        return _empty_folder(self.path / "exports" / f"step_{step:06d}.partial")

    def finish_export(self, step: int) -> Path:
        """Raises FileExistsError where that step has been exported: a resume sets aside what it will do again."""
        self.check()
        return self._rename_partial(self.path / "exports" / f"step_{step:06d}")

    def commit(self, step: int) -> None:
        """Make the checkpoint of `step` count: its files and folders reach the disk first, COMMITTED last.

        On several nodes each rank must have fsynced its own files; this process can only flush its own node's.
        Raises Fenced, and FileNotFoundError if the checkpoint is missing or empty.
        """
        self.check()
        path = self.checkpoint_path(step)
        if not any(path.glob("*")):
            raise FileNotFoundError(f"{path} is missing or empty: nothing to commit")
        sync_tree(path)
        self.check()
        write_durably(path / "COMMITTED", json.dumps({"step": step, "epoch": self.epoch}) + "\n")
        _sync(self.path)

    def last_committed(self) -> int | None:
        """The newest step with a committed checkpoint; None: there is none yet."""
        return max(self._checkpoints(committed=True), default=None)

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` committed checkpoints, and leftovers of saves that are older than the
        newest.

        The newest committed checkpoint always stays; without one nothing is removed. Raises ValueError for keep < 1.
        """
        if keep < 1:
            raise ValueError(f"run.keep_checkpoints = {keep}: at least 1, the newest checkpoint is never removed")
        self.check()
        committed = sorted(self._checkpoints(committed=True))
        leftovers = [step for step in self._checkpoints(committed=False) if committed and step < committed[-1]]
        for step in committed[:-keep] + leftovers:
            path = self.checkpoint_path(step)
            (path / "COMMITTED").unlink(missing_ok=True)  # first, so that a half-removed checkpoint never counts
            _sync(path)
            shutil.rmtree(path)

    def move_uncommitted_to_discarded(self, step: int | None) -> int:
        """Set aside what was written after the last commit: metric rows, pair files, samples and exports of steps
        above `step`.

        `step` is `last_committed()`; None sets everything aside. Each epoch has its own folder discarded/epoch_N.
        Rows are on disk there before they leave metrics.jsonl, so a crash in between can repeat a row but not lose
        one. A torn last row goes too. Returns the number of rows and files moved.
        """
        self.check()
        target = self.path / "discarded" / f"epoch_{self.epoch}"
        last = -1 if step is None else step
        moved = self._discard_rows(target / "metrics.jsonl", last)
        for folder in ("pairs", "samples", "exports"):
            for file in sorted((self.path / folder).glob("*")):
                number = re.search(r"(\d+)(\.\w+)*$", file.name)
                if number and int(number[1]) > last:
                    (target / folder).mkdir(parents=True, exist_ok=True)
                    os.replace(file, target / folder / file.name)
                    moved += 1
            if (target / folder).exists():
                _sync(target / folder)
                _sync(self.path / folder)
        return moved

    def _discard_rows(self, target: Path, last: int) -> int:
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        undone = [line for line in lines if (row := _row_step(line)) is None or row > last]
        if undone:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_durably(target, "".join(undone))
            kept = [line for line in lines if (row := _row_step(line)) is not None and row <= last]
            write_durably(metrics, "".join(kept))
        return len(undone)

    def finish(self) -> Path:
        """Turn the folder of `begin_final` into final/: the run is finished and is never resumed again."""
        self.check()
        return self._rename_partial(self.path / "final")

    def _rename_partial(self, path: Path) -> Path:
        if path.exists():
            raise FileExistsError(f"{path} exists already and is never overwritten")
        partial = path.with_name(f"{path.name}.partial")
        sync_tree(partial)
        os.rename(partial, path)
        _sync(path.parent)
        return path

    def _checkpoints(self, *, committed: bool) -> Iterator[int]:
        for path in self.path.glob("checkpoint_*"):
            step = path.name.removeprefix("checkpoint_")
            if step.isdigit() and (path / "COMMITTED").exists() == committed:
                yield int(step)


def write_durably(path: Path, text: str) -> None:
    """Replace a small file in one step: readers see the old text or the new, also after a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def sync_tree(path: Path) -> None:
    """fsync every file and folder below `path`, leaves first."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _empty_folder(path: Path) -> Path:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()
    return path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(path: Path) -> int:
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 1000).decode() or "unknown"
        os.close(lock)
        raise RunInUse(f"{path} is in use by a live driver ({holder}); stop it, or choose another run.name") from None
    os.ftruncate(lock, 0)
    os.write(lock, f"pid {os.getpid()} on {socket.gethostname()}".encode())
    return lock


def _read_epoch(path: Path) -> int:
    return int((path / "epoch").read_text())


def _row_step(line: str) -> int | None:
    """The step of a metrics row; None for a torn one."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = _with_whole_batch(dict(_flat(old))), _with_whole_batch(dict(_flat(new)))
    every = sorted(before.keys() | after.keys())
    keys = [key for key in every if key in MUST_AGREE or not key.startswith(MAY_DIFFER)]
    return [
        f"{key}: was {before.get(key, '(unset)')!r}, now {after.get(key, '(unset)')!r}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def _with_whole_batch(flat: dict[str, Any]) -> dict[str, Any]:
    """The product of SPLIT in place of its factors."""
    if not flat.keys() >= set(SPLIT):
        return flat
    kept = {key: value for key, value in flat.items() if key not in SPLIT}
    return kept | {" × ".join(SPLIT): math.prod(flat[key] for key in SPLIT)}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
