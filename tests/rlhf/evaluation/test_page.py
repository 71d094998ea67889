"""The page: well-formed, self-contained, escaped, and with the numbers of the evaluation."""

import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rlhf.evaluation.duels import Duel, Estimate, Evaluation, FailedScore, Picture, judge_result, source_result
from rlhf.evaluation.page import extremes, interval, number, page, percent, signed, verdict

NASTY = '"><script>alert("x")</script><img src=http://elsewhere/x.png> & \'单引号\''
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags, attributes and texts; says where tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.words, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def pictures_of(index, side, scores, distance):
    return Picture(file=f"pictures/{index:05d}_0_{side}.png", scores=scores, source_distance=distance)


@pytest.fixture
def evaluation():
    scores = [(0.1, 0.3), (0.2, 0.25), (0.4, 0.1234567), (0.5, 0.5)]
    duels = [
        Duel(
            prompt=index,
            variant=0,
            key=f"id-{index}<i>",
            instruction=NASTY if index == 0 else "" if index == 1 else "Make it warm",
            height=64,
            width=48,
            source=f"pictures/{index:05d}_source.png",
            base=pictures_of(index, "base", {"a": base} | ({} if index == 3 else {"b": 1.0}), 0.125),
            tuned=pictures_of(index, "tuned", {"a": tuned, "b": 2.0}, 0.0625),
        )
        for index, (base, tuned) in enumerate(scores)
    ]
    return Evaluation(
        model="/models/<base>",
        tuned="/runs/tuned & true",
        steps=8,
        seed=1,
        judges={name: judge_result(name, duels, seed=0) for name in ("a", "b")},
        source=source_result(duels, seed=0),
        duels=duels,
        failed=[FailedScore(judge="b", file=duels[3].base.file, reason="<b>JudgeError</b>: it broke")],
        left_out=["data.jsonl:7: is not JSON <oops>"],
    )


def test_well_formed_and_from_the_folder_alone(evaluation):
    found = Page(page(evaluation))
    assert "script" not in found.tags and "link" not in found.tags and "iframe" not in found.tags
    files = {link for link in found.links if not link.startswith("#")}
    expected = {file for duel in evaluation.duels for file in (duel.source, duel.base.file, duel.tuned.file)}
    assert files == expected | {"results.json", "config.toml"}
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert len(set(found.ids)) == len(found.ids) == len(evaluation.duels)


def test_text_of_users_is_text(evaluation):
    html = page(evaluation)
    assert "<script" not in html and "<oops>" not in html and "<b>JudgeError" not in html and "<i>" not in html
    assert not any(":" in link for link in Page(html).links)  # no address of any scheme
    text = Page(html).text
    assert " ".join(NASTY.split()) in text and "单引号" in text
    assert "<b>JudgeError</b>: it broke" in text and "is not JSON <oops>" in text and "/models/<base>" in text
    assert "(empty instruction)" in text


def test_every_number_is_there(evaluation):
    text = Page(page(evaluation)).text
    for result in evaluation.judges.values():
        values = asdict(result)
        rate, difference = values.pop("win_rate"), values.pop("difference")
        assert {percent(value) for value in rate.values()} <= {f"{v} %" for v in re.findall(r"[\d.]+(?= %)", text)}
        assert f"[{percent(rate['low'])}, {percent(rate['high'])}]" in text
        assert f"[{signed(difference['low'])}, {signed(difference['high'])}]" in text
        assert signed(difference["value"]) in text
        assert f"{result.wins} / {result.ties} / {result.losses}" in text
        assert number(result.base) in text and number(result.tuned) in text
    for picture in (picture for duel in evaluation.duels for picture in (duel.base, duel.tuned)):
        assert all(number(score) in text for score in picture.scores.values())
    assert "1 left out: not scored" in text and "1 scores are missing" in text
    assert number(evaluation.source.base) in text and signed(evaluation.source.difference.value) in text


def test_the_winner_of_each_pair_is_marked(evaluation):
    html = page(evaluation)
    sections = re.findall(r"<section.*?</section>", html, re.S)
    won = [re.findall(r'<dd class="won">([\d.]+) ✓', section) for section in sections]
    assert won == [["0.3", "2"], ["0.25", "2"], ["0.4", "2"], []]
    assert sections[3].count("0.5 =") == 2 and sections[3].count("failed") == 1


def test_links_lead_to_the_largest_wins_and_losses(evaluation):
    found = extremes(evaluation.duels, "a")
    assert [duel.prompt for duel, _ in found["largest wins"]] == [0, 1]
    assert [duel.prompt for duel, _ in found["largest losses"]] == [2]
    assert 'href="#p2-0">id-2&lt;i&gt; (-0.277)' in page(evaluation)


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.51, 0.9, "tuned is preferred"),
        (0.1, 0.49, "base is preferred"),
        (0.5, 0.9, "not decided"),
        (None, None, "not d"),
    ],
)
def test_the_verdict_needs_an_interval_on_one_side_of_half(evaluation, low, high, says):
    estimate = Estimate(value=0.9, low=low, high=high)
    assert verdict(replace(evaluation.judges["a"], win_rate=estimate)).startswith(says)
    assert ("no interval" in interval(estimate, "percent")) == (low is None)


def test_without_sources_nothing_is_said_about_them(evaluation):
    duels = [
        replace(
            duel,
            source=None,
            base=replace(duel.base, source_distance=None),
            tuned=replace(duel.tuned, source_distance=None),
        )
        for duel in evaluation.duels
    ]
    assert "source" not in Page(page(replace(evaluation, duels=duels, source=None))).text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_it_from_the_disk(evaluation, tmp_path):
    (tmp_path / "pictures").mkdir()
    for duel in evaluation.duels:
        for file, colour in ((duel.source, "gray"), (duel.base.file, "red"), (duel.tuned.file, "green")):
            Image.new("RGB", (48, 64), colour).save(tmp_path / file)
    (tmp_path / "index.html").write_text(page(evaluation), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=420,4000"]
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", f"file://{tmp_path}/index.html"], check=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 20
    for colour in ((255, 0, 0), (0, 128, 0)):  # the pictures themselves
        assert (pixels == colour).all(axis=1).sum() > 1000
