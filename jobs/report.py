"""A run on one page: `python -m jobs.report runs/NAME/v0` writes report.html and report.json into it.

Also for a run still in progress. runs/NAME means its newest vN.
"""

import argparse
import re
from pathlib import Path

from jobs.cli import run_main, say
from rlhf.runs.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, runs/NAME/vN or runs/NAME")
    say(str(write_report(newest(parser.parse_args().run.absolute()))))


def newest(folder: Path) -> Path:
    """The newest vN in runs/NAME; any other folder itself."""
    versions = [path for path in folder.glob("v*") if re.fullmatch(r"v\d+", path.name)]
    return max(versions, key=lambda path: int(path.name[1:]), default=folder)


if __name__ == "__main__":
    run_main(main)
