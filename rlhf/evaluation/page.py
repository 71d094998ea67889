"""The page of an evaluation: one HTML file beside its pictures, without scripts or anything from the network.

The template escapes everything that it is given. Left out: sorting by clicks. The rows stay in the order of the prompts,
and links lead to each judge's largest wins and losses.
"""

from collections.abc import Sequence

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rlhf.evaluation.duels import Duel, Estimate, Evaluation, JudgeResult
from rlhf.runs.style import STYLE

number = "{:.4g}".format
"""A score, with four digits that count."""
signed = "{:+.3g}".format
"""A difference."""


def page(evaluation: Evaluation) -> str:
    """The HTML of index.html; pictures are linked as they lie in the evaluation's folder."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "signed": signed, "percent": percent, "interval": interval}
    return environment.from_string(TEMPLATE).render(
        style=Markup(STYLE),
        evaluation=evaluation,
        prompts=len({duel.prompt for duel in evaluation.duels}),
        verdict=verdict,
        extremes={name: extremes(evaluation.duels, name) for name in evaluation.judges},
    )


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def interval(estimate: Estimate, form: str) -> str:
    """[low, high] of an estimate, as the filter named `form` writes them; of a single prompt there is none."""
    if estimate.low is None or estimate.high is None:
        return "no interval: one prompt"
    write = {"signed": signed, "percent": percent}[form]
    return f"[{write(estimate.low)}, {write(estimate.high)}]"


def verdict(result: JudgeResult) -> str:
    """What the interval of the win rate says."""
    low, high = result.win_rate.low, result.win_rate.high
    if low is not None and low > 0.5:
        return "tuned is preferred"
    if high is not None and high < 0.5:
        return "base is preferred"
    return "not decided"


def extremes(duels: Sequence[Duel], judge: str) -> dict[str, list[tuple[Duel, float]]]:
    """The five largest wins and the five largest losses with their differences, the largest first."""
    scored = [(duel, difference) for duel in duels if (difference := duel.difference(judge)) is not None]
    wins = sorted((pair for pair in scored if pair[1] > 0), key=lambda pair: -pair[1])
    losses = sorted((pair for pair in scored if pair[1] < 0), key=lambda pair: pair[1])
    return {"largest wins": wins[:5], "largest losses": losses[:5]}


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Base against tuned</title>
<style>
{{ style }}
</style>
</head>
<body>
<h1>Base against tuned</h1>
<p>{{ evaluation.duels | length }} pairs of pictures for {{ prompts }} prompts, both of each pair from the same noise;
{{ evaluation.steps }} steps, seed {{ evaluation.seed }}.<br>
<span class="quiet">base: {{ evaluation.model }}<br>tuned: {{ evaluation.tuned }}</span></p>

<div class="scroll"><table>
<tr><th>judge</th><th>win rate of tuned</th><th></th><th>mean base</th><th>mean tuned</th><th>mean difference</th>
<th>pairs</th><th>won / tied / lost</th></tr>
{% for name, result in evaluation.judges.items() %}
<tr><td><b>{{ name }}</b></td>
<td>{{ result.win_rate.value | percent }}<small>{{ result.win_rate | interval("percent") }}</small></td>
<td>{{ verdict(result) }}</td>
<td>{{ result.base | number }}</td><td>{{ result.tuned | number }}</td>
<td>{{ result.difference.value | signed }}<small>{{ result.difference | interval("signed") }}</small></td>
<td>{{ result.pairs }} of {{ result.prompts }} prompts
{% if result.left_out %}<small>{{ result.left_out }} left out: not scored</small>{% endif %}</td>
<td>{{ result.wins }} / {{ result.ties }} / {{ result.losses }}</td></tr>
{% endfor %}
</table></div>
<p><small>Win rate: the share of pairs in which tuned scored higher, a tie counting half; 50 % means no difference.
In brackets: 95 % intervals (percentile bootstrap over prompts). “Not decided”: the interval holds 50 %. Where every prompt
says the same, the interval has no width; it then only says that these prompts agree.</small></p>

{% if evaluation.source %}
<h2>How much of the source was kept</h2>
<div class="scroll"><table>
<tr><th></th><th>mean base</th><th>mean tuned</th><th>mean difference</th><th>pairs</th></tr>
<tr><td><b>source distance</b></td>
<td>{{ evaluation.source.base | number }}</td><td>{{ evaluation.source.tuned | number }}</td>
<td>{{ evaluation.source.difference.value | signed }}<small>{{ evaluation.source.difference | interval("signed") }}</small></td>
<td>{{ evaluation.source.pairs }} of {{ evaluation.source.prompts }} prompts</td></tr>
</table></div>
<p><small>Source distance: how far the edit is from its source, as the mean of |edit − source| / 255 over the half of the
pixels that changed least, so mostly outside of what was to change. 0: that half is untouched. Lower keeps more; a
difference below 0 means that tuned keeps more than base.</small></p>
{% endif %}

{% for name, groups in extremes.items() %}
{% for title, found in groups.items() if found %}
<p>{{ name }}, {{ title }}:
{% for duel, difference in found %}
<a href="#p{{ duel.prompt }}-{{ duel.variant }}">{{ duel.key }} ({{ difference | signed }})</a>
{% endfor %}</p>
{% endfor %}
{% endfor %}

{% if evaluation.failed %}
<details><summary>{{ evaluation.failed | length }} scores are missing: a judge failed</summary><ul>
{% for score in evaluation.failed %}
<li>{{ score.judge }}, <a href="{{ score.file }}">{{ score.file }}</a>: {{ score.reason }}</li>
{% endfor %}
</ul></details>
{% endif %}
{% if evaluation.left_out %}
<details><summary>{{ evaluation.left_out | length }} problems of the prompt file were left out</summary><ul>
{% for problem in evaluation.left_out %}
<li>{{ problem }}</li>
{% endfor %}
</ul></details>
{% endif %}

<h2>Pictures</h2>
{% for duel in evaluation.duels %}
<section id="p{{ duel.prompt }}-{{ duel.variant }}">
<p>{{ duel.instruction or "(empty instruction)" }} <small>{{ duel.key }}, picture {{ duel.variant + 1 }}</small></p>
<div class="row">
{% if duel.source %}
<figure><a href="{{ duel.source }}"><img src="{{ duel.source }}" alt="source" loading="lazy"
width="{{ duel.width }}" height="{{ duel.height }}"></a><figcaption>source</figcaption></figure>
{% endif %}
{% for side, picture in (("base", duel.base), ("tuned", duel.tuned)) %}
<figure><a href="{{ picture.file }}"><img src="{{ picture.file }}" alt="{{ side }}" loading="lazy"
width="{{ duel.width }}" height="{{ duel.height }}"></a>
<figcaption>{{ side }}</figcaption>
<dl>
{% for name in evaluation.judges %}
{% set difference = duel.difference(name) %}
<dt>{{ name }}</dt>
{% if name not in picture.scores %}
<dd>failed</dd>
{% elif difference and (difference > 0) == (side == "tuned") %}
<dd class="won">{{ picture.scores[name] | number }} ✓</dd>
{% else %}
<dd>{{ picture.scores[name] | number }}{{ " =" if difference == 0 }}</dd>
{% endif %}
{% endfor %}
{% if picture.source_distance is not none %}
<dt class="quiet">source distance</dt><dd>{{ picture.source_distance | number }}</dd>
{% endif %}
</dl></figure>
{% endfor %}
</div>
</section>
{% endfor %}
<p><small>✓ the higher score of the pair, = a tie. All numbers: <a href="results.json">results.json</a>; the recipe:
<a href="config.toml">config.toml</a>.</small></p>
</body>
</html>
"""
