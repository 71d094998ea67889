"""A run's folder: who may write to it, which checkpoints count, and what a resume sets aside.

    <root>/<name>/v0/  config.toml  epoch  lock  metrics.jsonl  pairs/  samples/  discarded/
                       checkpoint_000100/{..., COMMITTED}  exports/step_000100/  final/

Three things keep two drivers from spoiling one folder. A lock (flock, freed by the kernel when its driver dies) refuses a
second driver at once. A fenced epoch, raised at every claim and compared at commit, publish and audit append, stops a driver
that slept while another took over. And a checkpoint counts only with its COMMITTED file, written after everything else is on
disk. Nothing that was trained is ever overwritten: a new run takes the next vN, rows of undone steps move to discarded/.

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import Refused
from rlhf.names import name_fault
from rlhf.runs.durable import sync, write_durably

MAY_DIFFER, MUST_AGREE = (
    ("run.", "tracking.", "cluster.", "serve.", "preprocess.", "trainer.num_", "trainer.timeout_s", "trainer.offload"),
    ("run.seed",),
)
"""A resume may change where and how to run, not what; with another seed it would not continue the first half."""
BEGUN_FROM = "begun_from"
"""Holds the path of the checkpoint of another run that this one went on from."""
SPLIT = ("trainer.ranks", "trainer.train_batch_size", "trainer.gradient_accumulation_steps")
"""How the pairs of an update are split may change too, if their product stays: a cluster may have lost a node."""


class RunInUse(Refused):
    """Another live driver holds the folder."""


class Fenced(Refused):
    """Another driver has taken the folder over since this one claimed it: nothing more may be written."""


def made(folder: Path, key: str) -> Path:
    """`folder`, which the recipe's `key` asks for. Raises: Refused where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{key}: the folder {folder} cannot be made: {error.strerror}; choose another") from error
    return folder


def check_place(folder: Path, key: str) -> None:
    """Raise Refused where `made` would, as far as can be seen without making anything."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise Refused(f"{key}: the folder {folder} cannot be made: {nearest} is a file; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise Refused(f"{key}: the folder {folder} cannot be made: nothing may be written to {nearest}; choose another")


@dataclass(frozen=True, kw_only=True)
class Fence:
    """The right to write into a claimed folder; goes to other processes, which cannot hold the lock."""

    path: Path
    epoch: int

    def check(self) -> None:
        """Raise Fenced unless the folder is still ours. Call before every commit, publish and audit append."""
        now = int((self.path / "epoch").read_text())
        if now != self.epoch:
            raise Fenced(
                f"{self.path} was taken over by another driver (epoch {now}, ours {self.epoch}); this one stops"
            )


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A claimed folder. `release`, or the end of the process, lets others in."""

    path: Path
    epoch: int
    resumed: bool
    """Whether the folder had been claimed before."""
    started: bool
    """Whether a step was done in it: what it began with holds from there."""
    lock: int
    """File descriptor that holds the lock: a plain number, so that no garbage collection frees it."""

    @classmethod
    def claim(cls, root: Path | str, name: str, config_toml: str, resume: str = "auto") -> "RunFolder":
        """Take the folder to write to, creating it if need be.

        The newest vN is resumed if it is unfinished; else, and with resume = "never", it is vN+1. With a checkpoint's path it is
        vN+1 too, which goes on from there, and is resumed when the same is asked for again. Raises RunInUse, and Refused naming
        every key by which `config_toml`, the resolved configuration, may not differ from a resumed run's.
        """
        if fault := name_fault(name):
            raise Refused(f"run.name = {name!r} {fault}")
        parent = made(Path(root) / name, "run.dir")
        with (parent / "claim.lock").open("a") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)  # one claim at a time; held for milliseconds
            path, source = _decide(parent, resume, config_toml)
            path.mkdir(exist_ok=True)
            lock = locked(path)
            try:
                return cls._take(path, config_toml, lock, source)
            except BaseException:
                os.close(lock)
                raise

    @classmethod
    def foreseen(cls, root: Path | str, name: str, config_toml: str, resume: str = "auto") -> str:
        """What `claim` would do, in words. Raises Refused where it would, but for a live driver."""
        check_place(Path(root) / name, "run.dir")
        path, source = _decide(Path(root) / name, resume, config_toml)
        if not has_started(path):
            return f"would begin in {path}{f' from {source}' if source else ''}"
        _refuse_changes(path, config_toml)
        return f"would go on in {path} from step {max(_checkpoints(path, committed=True), default=0)}"

    @classmethod
    def _take(cls, path: Path, config_toml: str, lock: int, source: Path | None) -> "RunFolder":
        config = path / "config.toml"
        started = has_started(path)
        if config.exists() and not started:
            config.unlink()  # that start was refused or failed before it did anything: its remedy may be another config
        if config.exists():
            _refuse_changes(path, config_toml)
        else:
            write_durably(config, config_toml)
        if source and not any(_checkpoints(path, committed=True)):
            _begin_from(path, source)
            started = True
        number = path / "epoch"
        resumed = number.exists()
        epoch = int(number.read_text()) + 1 if resumed else 1
        if resumed and config.read_text(encoding="utf-8") != config_toml:
            write_durably(path / f"config.epoch_{epoch}.toml", config_toml)
        write_durably(number, f"{epoch}\n")
        return cls(path=path, epoch=epoch, resumed=resumed, started=started, lock=lock)

    @property
    def fence(self) -> Fence:
        return Fence(path=self.path, epoch=self.epoch)

    def release(self) -> None:
        """Let other drivers in. The epoch stays: this object must not write any more."""
        fcntl.flock(self.lock, fcntl.LOCK_UN)

    def checkpoint_path(self, step: int) -> Path:
        return self.path / f"checkpoint_{step:06d}"

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """An empty folder for the checkpoint of `step`, which counts from the end of the block on.

        Ranks on other nodes must have fsynced their own files: this process can only flush its own node's. Raises
        FileExistsError where the step is committed already, and FileNotFoundError where the block wrote nothing.
        """
        self.fence.check()
        path = self.checkpoint_path(step)
        if (path / "COMMITTED").exists():
            raise FileExistsError(f"{path} is committed already and is never overwritten")
        yield _empty_folder(path)
        self.fence.check()
        if not any(path.glob("*")):
            raise FileNotFoundError(f"{path} is missing or empty: nothing to commit")
        _sync_tree(path)
        self.fence.check()
        write_durably(path / "COMMITTED", json.dumps({"step": step, "epoch": self.epoch}) + "\n")
        sync(self.path)

    @contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """An empty folder that becomes `name`, final or exports/step_N, at the end of the block. With final/ a run is over.

        Raises FileExistsError where `name` is there already.
        """
        self.fence.check()
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        partial = _empty_folder(path.with_name(f"{path.name}.partial"))
        yield partial
        self.fence.check()
        if path.exists():
            raise FileExistsError(f"{path} exists already and is never overwritten")
        _sync_tree(partial)
        os.rename(partial, path)
        sync(path.parent)

    def last_committed(self) -> int | None:
        """The newest step with a committed checkpoint; None: there is none yet."""
        return max(_checkpoints(self.path, committed=True), default=None)

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` committed checkpoints, and leftovers of saves before the newest one, if any."""
        if keep < 1:
            raise ValueError(f"run.keep_checkpoints = {keep}: at least 1, the newest checkpoint is never removed")
        self.fence.check()
        committed = sorted(_checkpoints(self.path, committed=True))
        leftovers = [step for step in _checkpoints(self.path, committed=False) if committed and step < committed[-1]]
        for step in committed[:-keep] + leftovers:
            path = self.checkpoint_path(step)
            (path / "COMMITTED").unlink(missing_ok=True)  # first, so that a half-removed checkpoint never counts
            sync(path)
            shutil.rmtree(path)

    def move_uncommitted_to_discarded(self, step: int | None) -> int:
        """Set aside metric rows, pair files, samples and exports of steps above `step`, the last that was committed.

        None sets everything aside. Each epoch has its own folder discarded/epoch_N. Rows are on disk there before they leave
        metrics.jsonl, so a crash in between can repeat a row but not lose one. A torn last row goes too. Returns the number of
        rows and files moved.
        """
        self.fence.check()
        target = self.path / "discarded" / f"epoch_{self.epoch}"
        last = -1 if step is None else step
        rows = _rows(self.path)
        undone = [line for line, row in rows if row is None or row > last]
        if undone:
            target.mkdir(parents=True, exist_ok=True)
            write_durably(target / "metrics.jsonl", "".join(undone))
            kept = [line for line, row in rows if row is not None and row <= last]
            write_durably(self.path / "metrics.jsonl", "".join(kept))
        moved = len(undone)
        for folder in ("pairs", "samples", "exports"):
            for file in sorted((self.path / folder).glob("*")):
                number = re.search(r"(\d+)(\.\w+)*$", file.name)
                if number and int(number[1]) > last:
                    (target / folder).mkdir(parents=True, exist_ok=True)
                    os.replace(file, target / folder / file.name)
                    moved += 1
            if (target / folder).exists():
                sync(target / folder)
                sync(self.path / folder)
        return moved


def _named(resume: str) -> Path | None:
    """The checkpoint that run.resume names; None: none. Raises Refused."""
    if resume in ("auto", "never"):
        return None
    path = Path(resume).expanduser().absolute()
    if not (path / "COMMITTED").is_file() or not re.fullmatch(r"checkpoint_\d+", path.name):
        there = sorted(str(path.parent / one) for one in _names(path.parent)) or sorted(
            str(path / one) for one in _names(path)
        )
        found = f"there are {', '.join(there)}" if there else "give the path of one, RUN/vN/checkpoint_000100"
        raise Refused(f'run.resume = {resume!r} is no committed checkpoint; {found}; or give "auto" or "never"')
    if not (path.parent / "config.toml").is_file():
        raise Refused(f"run.resume = {resume!r}: its run's config.toml is not beside it; give it where it was written")
    return path


def _names(run: Path) -> list[str]:
    """Of a run's committed checkpoints."""
    return [f"checkpoint_{step:06d}" for step in _checkpoints(run, committed=True)]


def _begin_from(path: Path, source: Path) -> None:
    """Give a new run's folder a checkpoint of another, linked where that can be, and the rows up to it."""
    write_durably(path / BEGUN_FROM, str(source))
    step, target = int(source.name.removeprefix("checkpoint_")), path / source.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_linked, ignore=shutil.ignore_patterns("COMMITTED"))
    if (digest := source.parent / "pairs.digest").exists():
        write_durably(path / digest.name, digest.read_text())
    if (base := source.parent / "samples" / "base").is_dir():  # which is sampled once, at the start of a run
        shutil.copytree(base, path / "samples" / "base", dirs_exist_ok=True)
    rows = [line for line, row in _rows(source.parent) if row is not None and row <= step]
    write_durably(path / "metrics.jsonl", "".join(rows))
    _sync_tree(target)
    write_durably(target / "COMMITTED", (source / "COMMITTED").read_text())


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _decide(parent: Path, resume: str, config_toml: str) -> tuple[Path, Path | None]:
    """The folder that a run writes to, and the checkpoint that it begins with where it is new; None: with none.

    The newest vN if it is unfinished and may be resumed, else the one after it. Raises Refused.
    """
    if source := _named(resume):
        _refuse_changes(source.parent, config_toml)
    there = parent.iterdir() if parent.exists() else ()
    newest = max((int(path.name[1:]) for path in there if re.fullmatch(r"v\d+", path.name)), default=0)
    path = parent / f"v{newest}"
    begun = path / BEGUN_FROM
    other = source is not None and not (begun.exists() and begun.read_text() == str(source))
    over = path.exists() and (resume == "never" or other or (path / "final").exists())
    return parent / f"v{newest + 1}" if over else path, source


def is_run(path: Path) -> bool:
    """Whether a folder was claimed for a run."""
    return all((path / name).is_file() for name in ("config.toml", "epoch", "lock"))


def has_started(path: Path) -> bool:
    """Whether a step was done in a run's folder."""
    return any(step != 0 for _, step in _rows(path)) or any(path.glob("checkpoint_*/COMMITTED"))


def _refuse_changes(path: Path, config_toml: str) -> None:
    """Raise Refused, naming every key, where a resolved configuration is not what a run may go on with."""
    began = (path / "config.toml").read_text(encoding="utf-8")
    if differ := _differences(tomllib.loads(began), tomllib.loads(config_toml)):
        raise Refused(
            "\n  ".join([f"{path} was started with another configuration:", *differ]) + "\n"
            'Put the old values back to resume it, or start anew with run.resume = "never" or another run.name.'
        )


def _checkpoints(path: Path, *, committed: bool) -> Iterator[int]:
    for checkpoint in path.glob("checkpoint_*"):
        step = checkpoint.name.removeprefix("checkpoint_")
        if step.isdigit() and (checkpoint / "COMMITTED").exists() == committed:
            yield int(step)


def _sync_tree(path: Path) -> None:
    for inner in (*sorted(path.rglob("*"), reverse=True), path):  # leaves first
        sync(inner)


def _empty_folder(path: Path) -> Path:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()
    return path


def locked(path: Path) -> int:
    """A file descriptor that holds a run's folder until it is closed. Raises RunInUse."""
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


def _rows(path: Path) -> list[tuple[str, int | None]]:
    """The lines of a run's metrics with their steps; None for a torn one."""
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [(line, _step(line)) for line in lines]


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = _compared(old), _compared(new)
    return [
        f"{key}: was {before.get(key, '(unset)')!r}, now {after.get(key, '(unset)')!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a resume must leave as it was, by dotted key: the product of SPLIT in place of its factors."""
    found = dict(flat(config))
    if found.keys() >= set(SPLIT):
        found[" × ".join(SPLIT)] = math.prod([found.pop(key) for key in SPLIT])
    return {key: value for key, value in found.items() if key in MUST_AGREE or not key.startswith(MAY_DIFFER)}


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
