"""How often each kind of example is trained: by the data set that it is of, and by how many sources it has.

A batch's kind is drawn with the probability

    P(task) · P(sources | task) · P(bucket | task, sources)

where the first two follow from weights and the last from how many examples there are. A factor without weights follows from the
examples too.
"""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rlhf.errors import Refused


def task_folders(root: Path, weights: Mapping[str, float]) -> dict[str, Path]:
    """The folders of the data sets that `data.task_weights` gives a weight. Raises Refused."""
    if not root.is_dir():
        raise Refused(
            f"data.path = {str(root)!r}: with data.task_weights it is the folder that holds those of the data sets"
        )
    there = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name in weights:
        if name not in there:
            near = difflib.get_close_matches(name, [one for one in there if one not in weights], n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"it holds {', '.join(there) or 'no folder'}"
            raise Refused(f"data.task_weights names {name!r}, which is no folder of data.path = {str(root)!r}: {hint}")
    return {name: root / name for name, weight in weights.items() if weight}


def shares(
    kinds: np.ndarray,
    tasks: Sequence[str],
    counts: Sequence[int],
    task_weights: Mapping[str, float],
    count_weights: Mapping[int, float],
) -> np.ndarray:
    """The probability of each kind, which sum to 1: fp64 (kinds,).

    kinds: (examples,) numbers of kinds, each of one task and one number of sources; tasks, counts: of every example. An empty
    mapping: the factor follows from the examples. Raises Refused for a weight that no example can answer.
    """
    task_weights = task_weights or Counter(tasks)
    known = Counter(zip(tasks, counts, strict=True))
    found = np.zeros(kinds.max() + 1)
    if absent := [n for n, weight in count_weights.items() if weight and not any(count == n for _, count in known)]:
        raise Refused(
            f"data.source_count_weights gives {absent[0]} sources a weight, but no example has so many "
            f"({_told(Counter(counts))}): leave it out"
        )
    of_kind = {int(kind): (task, count) for kind, task, count in zip(kinds, tasks, counts, strict=True)}
    sizes = np.bincount(kinds)
    for task, weight in task_weights.items():
        of_task = {count: amount for (name, count), amount in known.items() if name == task}
        by_count = {n: count_weights.get(n, 0.0) for n in of_task} if count_weights else dict(of_task)
        if weight and not sum(by_count.values()):
            raise Refused(
                f"data.task_weights gives {task!r} a weight, but data.source_count_weights none to its examples "
                f"({_told(of_task)}): change one of the weights"
            )
        for kind, (name, count) in of_kind.items():
            if name == task and weight:
                within = by_count[count] / sum(by_count.values())
                found[kind] = weight / sum(task_weights.values()) * within * sizes[kind] / of_task[count]
    return found


def _told(counts: Mapping[int, int]) -> str:
    """How many examples there are of each number of sources."""
    return ", ".join(f"{amount} with {n}" for n, amount in sorted(counts.items())) or "there are none"
