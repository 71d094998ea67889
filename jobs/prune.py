"""Remove runs that never trained: python -m jobs.prune runs/NAME [--dry-run]

A start that was refused or failed before its first update leaves a folder vN, which the next start takes over; with
run.resume = "never" such folders gather. Runs with an update, a checkpoint or a live driver stay, and so does what is no run's
folder.
"""

import argparse
import fcntl
import os
import re
import shutil
from pathlib import Path

from jobs.cli import run_main, say
from rlhf.errors import Refused
from rlhf.runs.folder import RunInUse, has_started, is_run, locked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="runs/NAME, whose vN are looked at")
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed")
    given = parser.parse_args()
    removed = prune(given.runs.absolute(), given.dry_run)
    if not removed:
        say(f"{given.runs}: every run has trained, or is in use")


def prune(folder: Path, is_dry: bool) -> list[Path]:
    """What was, or would be, removed. Raises Refused for a folder without runs."""
    versions = [path for path in sorted(folder.glob("v*")) if re.fullmatch(r"v\d+", path.name)]
    runs = list(filter(is_run, versions))
    if not runs:
        raise Refused(f"{folder} holds no run v0, v1, …: give runs/NAME")
    for path in versions:
        if path not in runs:
            say(f"{path} is no run's folder, and stays")
    removed = []
    with (folder / "claim.lock").open("a") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)  # no start takes one of them meanwhile
        for path in runs:
            if has_started(path):
                continue
            try:
                held = locked(path)
            except RunInUse as error:
                say(str(error))
                continue
            say(f"{'would remove' if is_dry else 'removing'} {path}")
            if not is_dry:
                shutil.rmtree(path)
            os.close(held)
            removed.append(path)
    return removed


if __name__ == "__main__":
    run_main(main)
