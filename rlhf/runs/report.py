"""A run on one page: whether it got better, its curves, where the time went, and its last pictures.

Everything is read from the run's folder, also while the run is in progress, and the page opens from the disk. Means are over
held-out prompts, or over updates, without an interval: whether a difference is more than chance is what `jobs.evaluate` measures.
Left out: several runs side by side, which TensorBoard shows.
"""

import io
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf.errors import Refused
from rlhf.runs.durable import write_durably
from rlhf.runs.folder import flat
from rlhf.runs.style import STYLE

Rows = Sequence[Mapping[str, float]]
BASE, SIDES = "eval/base_", ("eval/policy_", "eval/ema_")
TOLD = re.compile(r"reward/.*|train/(loss|implicit_acc|target_error)|filter/pass_rate")
"""Scalars of updates of which the page says how they changed."""
DRAWN = re.compile(r"reward/.*|train/(loss|implicit_acc|target_error|grad_norm)|filter/pass_rate|rollout/staleness")
SETTINGS = (
    *("model.path", "objective", "data.path", "trainable.", "reward.type", "reward.weights.", "judges.filter.enabled"),
    *("dpo.", "trainer.learning_rate", "trainer.ranks", "trainer.train_batch_size", "trainer.gradient_acc", "run.seed"),
)
"""How the keys begin that the page shows."""
HELD_OUT_SHEETS = {
    "eval_base_": "base",
    "eval_policy_": "policy beside base",
    "eval_ema_": "average of the policy beside base",
}
PARTS = {"time/rollout": "waiting for rated edits", "time/train": "training", "time/publish": "publishing weights"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A scalar at the beginning and at the end."""

    name: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page says; report.json is this."""

    run: str
    steps: int
    planned: int
    finished: bool
    settings: Mapping[str, Any]
    held_out: Sequence[Change]
    """Each of the last evaluation against the base, or, where no base was measured, against the first evaluation."""
    evaluated: int
    """The step of the last evaluation; 0: there was none after the first."""
    training: Sequence[Change]
    """Means over the first and over the last tenth of the updates."""
    seconds: Mapping[str, float]
    """Of all updates, by what they were spent on."""
    held_out_sheets: Mapping[str, str]
    """The newest contact sheets, relative to the run, by what they show. The base's own only where there is no other."""
    pair_sheet: str | None
    """The newest one of pairs."""


def write_report(
    folder: Path,
    headline: str = "",
    facts: Mapping[str, float] | None = None,
    nulls: Mapping[str, float] | None = None,
) -> Path:
    """Write report.html and report.json into a run's folder; returns the page. Raises Refused where no run is.

    headline, facts: a sentence that the page begins with, and numbers for report.json beside the run's own.
    nulls: by held-out measure, the largest relative change of runs on shuffled rewards, drawn as a band around the base.
    """
    found, rows = report(folder)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = "{:.4g}".format
    page = environment.from_string(TEMPLATE).render(
        report=found, headline=headline, style=Markup(STYLE), curves=Markup(curves(rows, nulls or {}))
    )
    document = asdict(found) | ({"headline": headline} if headline else {}) | dict(facts or {})
    write_durably(folder / "report.json", json.dumps(document, indent=1, allow_nan=False))
    write_durably(folder / "report.html", page)
    return folder / "report.html"


def report(folder: Path) -> tuple[Report, Rows]:
    """What a run's folder says, and its metric rows. Raises Refused where there is none, or no update was done yet."""
    metrics, recipe = folder / "metrics.jsonl", folder / "config.toml"
    if not (metrics.is_file() and recipe.is_file()):
        raise Refused(f"{folder} is no run: it holds no metrics.jsonl and config.toml; give e.g. runs/NAME/v0")
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
    updates = [row for row in rows if "train/lr" in row]
    if not updates:
        raise Refused(f"{folder}: no update was done yet; ask again when its log shows steps")
    config = dict(flat(tomllib.loads(recipe.read_text(encoding="utf-8"))))
    if "trainer.max_train_steps" not in config:
        raise Refused(f"{recipe} names no trainer.max_train_steps: only runs that a job wrote have a page")
    total = sum(row["time/step"] for row in updates)
    seconds = {what: sum(row.get(name, 0.0) for row in updates) for name, what in PARTS.items()}
    seconds = {what: value for what, value in seconds.items() if value} | {"all": total}
    sheets = _newest_sheets(folder)
    held_out_sheets = {what: sheets[kind] for kind, what in HELD_OUT_SHEETS.items() if kind in sheets}
    if len(held_out_sheets) > 1:
        held_out_sheets.pop("base", None)
    measured = [int(row["step"]) for row in rows if row["step"] and any(name.startswith("eval/") for name in row)]
    return Report(
        run=str(folder),
        steps=int(updates[-1]["step"]),
        planned=config["trainer.max_train_steps"],
        finished=(folder / "final").is_dir(),
        settings={key: value for key, value in config.items() if key.startswith(SETTINGS)},
        held_out=[*_held_out(rows)],
        evaluated=max(measured, default=0),
        training=[*_training(updates)],
        seconds=seconds,
        held_out_sheets=held_out_sheets,
        pair_sheet=sheets.get(""),
    ), rows


def _held_out(rows: Rows) -> Iterator[Change]:
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("eval/"):
                first.setdefault(name, value)
                last[name] = value
    for name, value in last.items():
        side = next((side for side in SIDES if name.startswith(side)), None)
        before = f"{BASE}{name.removeprefix(side)}" if side else name
        if before in first and not name.startswith(BASE):
            yield Change(name=name.removeprefix("eval/"), before=first[before], after=value)


def _training(updates: Rows) -> Iterator[Change]:
    tenth = max(1, len(updates) // 10)
    for name in dict.fromkeys(name for row in updates for name in row if TOLD.fullmatch(name)):
        values = [row[name] for row in updates if name in row]
        if len(values) >= 2 * tenth:
            before, after = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
            yield Change(name=name, before=before, after=after)


def _newest_sheets(folder: Path) -> dict[str, str]:
    """By what stands before the step in their names."""
    files = sorted((folder / "samples").glob("*.png"))
    return {file.stem.rpartition("step_")[0]: str(file.relative_to(folder)) for file in files}


def curves(rows: Rows, nulls: Mapping[str, float]) -> str:
    """Small multiples as SVG: each measure that was evaluated, by side, and what updates log. nulls: see `write_report`."""
    plots: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for name, value in row.items():
            side = next((side for side in (BASE, *SIDES) if name.startswith(side)), None)
            if side:
                title, label = f"held-out {name.removeprefix(side)}", side.removeprefix("eval/").rstrip("_")
            elif name.startswith("eval/") or DRAWN.fullmatch(name):
                title, label = name, ""
            else:
                continue
            plots.setdefault(title, {}).setdefault(label, []).append((row["step"], value))
    columns, count = 3, len(plots)
    lines = -(-count // columns)
    figure = Figure(figsize=(12, 2.4 * lines), layout="constrained")
    for place, (title, series) in enumerate(sorted(plots.items(), key=lambda plot: not plot[0].startswith("held-out"))):
        axes = figure.add_subplot(lines, columns, place + 1)
        axes.set_title(title, fontsize=10, loc="left")
        for label, points in series.items():
            steps, values = zip(*points, strict=True)
            if label == "base":
                axes.axhline(values[0], color="#8a919c", linestyle="--", linewidth=1, label=label)
                if null := nulls.get(title.removeprefix("held-out ")):
                    band = (values[0] * (1 - null), values[0] * (1 + null))
                    axes.axhspan(*band, color="#8a919c", alpha=0.3, linewidth=0, label="shuffled rewards")
            else:
                axes.plot(steps, values, marker="o" if len(points) < 30 else None, markersize=3, label=label or None)
        if any(series):
            axes.legend(fontsize=8, frameon=False)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return "<svg" + stream.getvalue().partition("<svg")[2]


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.run }}</title>
<style>
{{ style }}
svg { max-width: 100%; height: auto; }
img.sheet { width: auto; max-width: 100%; }
</style>
</head>
<body>
<h1>{{ report.run }}</h1>
<p>{{ report.steps }} of {{ report.planned }} updates{{ ", finished" if report.finished else "; it is not finished" }}.
<a href="metrics.jsonl">metrics.jsonl</a>, <a href="config.toml">config.toml</a>, <a href="run.log">run.log</a>,
<a href="report.json">report.json</a>{% if report.finished %}, <a href="final">final</a>{% endif %}</p>

{% if headline %}
<p><b>{{ headline }}</b></p>
{% endif %}

{% macro table(changes, before, after) %}
<div class="scroll"><table>
<tr><th></th><th>{{ before }}</th><th>{{ after }}</th><th>change</th></tr>
{% for change in changes %}
<tr><td><b>{{ change.name }}</b></td><td>{{ change.before | number }}</td><td>{{ change.after | number }}</td>
<td>{{ "{:+.4g}".format(change.after - change.before) }}</td></tr>
{% endfor %}
</table></div>
{% endmacro %}

{% if report.held_out and report.evaluated %}
<h2>Did it get better? Held-out prompts, at noise that never changes</h2>
{{ table(report.held_out, "before training", "after " ~ report.evaluated ~ " updates") }}
<p><small>Means over the pictures that passed. judged is the share of all pictures that could be judged, pass_rate the share of
those that passed. They have no interval here: to see whether a difference is more than chance, and picture by picture, run
jobs.evaluate on prompts of its own.</small></p>
{% endif %}
{% if report.training %}
<h2>While it trained</h2>
{{ table(report.training, "first tenth of updates", "last tenth") }}
{% endif %}

<h2>Curves</h2>
{{ curves }}

<h2>Where the time went</h2>
<div class="scroll"><table>
{% for what, seconds in report.seconds.items() %}
<tr><td>{{ what }}</td><td>{{ "{:.0f}".format(seconds) }} s</td>
<td>{{ "{:.0f}".format(100 * seconds / report.seconds["all"]) }} %</td></tr>
{% endfor %}
</table></div>
<p><small>Evaluations, sheets, saving and exports between updates are in “all” alone; those after the last in none.</small></p>

{% if report.held_out_sheets %}
<h2>Held-out edits, the newest</h2>
{% for what, sheet in report.held_out_sheets.items() %}
<figure><figcaption>{{ what }}</figcaption>
<a href="{{ sheet }}"><img class="sheet" src="{{ sheet }}" alt="{{ what }}" loading="lazy"></a></figure>
{% endfor %}
{% endif %}
{% if report.pair_sheet %}
<h2>Pairs that it trained on, the newest</h2>
<p><a href="{{ report.pair_sheet }}"><img class="sheet" src="{{ report.pair_sheet }}" alt="pairs" loading="lazy"></a></p>
{% endif %}

<h2>Settings</h2>
<div class="scroll"><table>
{% for key, value in report.settings.items() %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table></div>
</body>
</html>
"""
