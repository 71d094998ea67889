"""The examples of `jobs.train`, from files to what ranks open: checked, and what of them is encoded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress, islice, product
from pathlib import Path

import numpy as np

from actors.checks import CheckAll, check_pairs
from jobs.recipes import TrainRecipe
from rlhf.data import mixture
from rlhf.data.batches import buckets_of
from rlhf.data.cache import EncodingCache
from rlhf.data.clips import Asked
from rlhf.data.examples import PairIndex, read_index
from rlhf.data.fingerprint import fingerprint, fingerprints
from rlhf.data.formats import FOLDER
from rlhf.data.mixture import task_folders
from rlhf.data.prompts import read_items
from rlhf.data.records import BadInput, Problem
from rlhf.data.sizes import sizes_of
from rlhf.data.stream import Visit, held_out_visits
from rlhf.data.work import ExamplesPlace, IndexedExamples, check_record, is_record, record_size, recorded_prompts
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.family import Family
from rlhf.runs.durable import write_durably
from rlhf.runs.folder import RunFolder, made
from rlhf.tables import PairDataConfig
from rlhf.types import Encoding, Item, Prompt


@dataclass(frozen=True, kw_only=True)
class ExampleSet:
    """One data set of a recipe."""

    place: ExamplesPlace
    index: PairIndex | None = None
    """What lies there; None: the record of an online run."""
    items: Mapping[str, Item] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many examples there are, at every area."""
        if self.index is None:
            return record_size(self.place.path)
        return len(self.index.table) * len(self.place.sizes)

    def blanked(self, data: PairDataConfig) -> np.ndarray:
        """bool (examples,): which are trained with the empty caption too."""
        place = self.place
        if place.caption_dropout is None or place.buckets is None:
            return np.full(self.count, data.caption_dropout > 0)
        return place.caption_dropout[place.buckets] > 0

    def prompts(self) -> Iterator[Prompt]:
        """Every prompt, in order, at every area."""
        if self.index is None:
            return recorded_prompts(self.place.path)
        rows = range(len(self.index.table))
        return (example.prompt for sized in self.place.sizes for example in self.index.examples(rows, sized))


@dataclass(frozen=True, kw_only=True)
class ExampleSets:
    """What a recipe trains on and what it is measured on."""

    training: ExampleSet
    evaluation: ExampleSet | None
    cache: EncodingCache

    def named(self) -> dict[str, ExampleSet]:
        """By the keys of the recipe that say where they are."""
        return {"data.path": self.training} | ({"eval.path": self.evaluation} if self.evaluation else {})

    def bucketed(self, family: Family, data: PairDataConfig) -> "ExampleSets":
        """The same, with what may share a batch worked out, and how often each kind of batch comes in a mixture.

        Raises BadInput for rows whose prompt the family does not take, Refused for weights that no example answers.
        """
        alone = data.source_dropout > 0

        def worked_out(found: ExampleSet, alone: bool) -> ExampleSet:
            try:
                buckets = buckets_of(family, found.prompts(), alone=alone)
            except Refused as error:
                problems = [*refused_rows(found, family)]
                raise BadInput(problems, skippable=False) if problems else error from error
            return replace(found, place=replace(found.place, buckets=buckets))

        evaluation = self.evaluation and worked_out(self.evaluation, False)
        training = worked_out(self.training, alone)
        if data.task_weights or data.source_count_weights:
            training = mixed(training, data)
        return replace(self, training=training, evaluation=evaluation)

    def report(self) -> str:
        """What there is, and what was left out."""
        other = "the record of an online run"
        reports = {key: found.index.report() if found.index else other for key, found in self.named().items()}
        return "\n".join(f"{key}: {report}" for key, report in reports.items())

    def left_out(self) -> str:
        """The bad rows that `data.on_bad_row = "skip"` went on without; empty if there are none."""
        indexes = [found.index for found in self.named().values() if found.index]
        return "\n".join(index.report() for index in indexes if index.problems)


def read_example_sets(recipe: TrainRecipe, roles: Sequence[str], check_all: CheckAll) -> ExampleSets:
    """Check `data.path` and `eval.path`. Raises: BadInput with the problems of both, Refused for keys that do not fit."""
    family = load_family(recipe.model)
    made(Path(recipe.data.cache), "data.cache")
    sizes = sizes_of(recipe.model, recipe.data.buckets)
    for geometry in (geometry for some in sizes for geometry in some.sizes):
        family.latent_shape(geometry)  # refuses a size that the network cannot take
    cache = EncodingCache(recipe.data.cache, fingerprints(family))
    items, problems = read_items(recipe.data.item_metadata)
    if recipe.data.source_dropout and 0 not in family.source_counts:
        raise Refused(
            f"data.source_dropout = {recipe.data.source_dropout:g}, but {recipe.model.family} takes no prompt without a source: "
            "leave it out"
        )
    root = Path(recipe.data.root) if recipe.data.root is not None else None
    if root is not None and not root.is_dir():
        raise Refused(f"data.root = {str(root)!r} is no folder: give the one that the paths in the rows start from")
    found: list[ExampleSet] = []
    named = ("data.path", recipe.data.path, recipe.data.split), ("eval.path", recipe.eval.path, recipe.eval.split)
    for key, path, split in ((key, Path(path), split) for key, path, split in named if path is not None):
        mixes = key == "data.path" and bool(recipe.data.task_weights)
        try:
            if is_record(path) and not mixes:
                found.append(_record(recipe, key, path, family, cache))
                continue
            file = check_pairs(
                [*task_folders(path, recipe.data.task_weights).values()] if mixes else [path],
                split,
                key=key,
                cache=Path(recipe.data.cache),
                on_bad_row=recipe.data.on_bad_row,
                source_counts=family.source_counts,
                needs_loser="loser" in roles,
                items=items,
                check_all=check_all,
                root=root,
                asked=Asked(frames=recipe.model.frames, stride=recipe.data.frame_stride),
            )
            place = ExamplesPlace(path=file, sizes=sizes if key == "data.path" else sizes[:1])
            found.append(ExampleSet(place=place, index=read_index(file), items=items or {}))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    sets = ExampleSets(training=found[0], evaluation=found[1] if len(found) > 1 else None, cache=cache)
    sets = sets.bucketed(family, recipe.data)
    size, buckets = recipe.trainer.train_batch_size, sets.training.place.buckets
    sorted_out = sets.training.place.shares is not None
    if recipe.data.latents == "on_the_fly" and size > 1 and buckets is not None and not sorted_out:
        raise Refused(
            f"the examples are of {buckets.max() + 1} kinds that cannot share a batch, as their sizes or sources differ, and "
            f'with data.latents = "on_the_fly" they are not sorted: set data.latents = "cached", or trainer.train_batch_size = '
            f"1 in place of {size} and raise trainer.gradient_accumulation_steps"
        )
    rates = {"caption_dropout": recipe.data.caption_dropout} | {
        f"task_caption_dropout.{task}": rate for task, rate in recipe.data.task_caption_dropout.items()
    }
    if any(rates.values()) and family.unguided(next(sets.training.prompts())) is None:
        name = next(name for name, rate in rates.items() if rate)
        raise Refused(
            f"data.{name} = {rates[name]:g}, but {recipe.model.family} knows no prompt without a caption: set it to 0"
        )
    if sets.evaluation:
        refuse_too_few(recipe, sets.evaluation)
        _refuse_overlap(recipe, sets.training.index, sets.evaluation.index)
    return sets


def refused_rows(found: ExampleSet, family: Family) -> Iterator[Problem]:
    """The rows of an index whose prompt the family does not take."""
    if found.index is None:
        return
    table = found.index.table
    for row, prompt in enumerate(islice(found.prompts(), len(table))):
        try:
            family.bucket(prompt)
        except Refused as error:
            what, _, remedy = str(error).removeprefix(f"prompt {prompt.key!r}: ").rpartition("; ")
            block = found.index.blocks[table["block"][row].as_py()]
            if block.format == FOLDER:
                file, line = table["picture_0"][row].as_py()["path"], 0
            else:
                file, line = block.file, table["number"][row].as_py()
            yield Problem(file=file, line=line, field="prompt", what=what, remedy=remedy)


def tasks_of(found: ExampleSet, root: Path) -> list[str]:
    """The folder below `root` that each example of a mixture is of, at every area."""
    assert found.index is not None
    names = [Path(block.file).relative_to(root).parts[0] for block in found.index.blocks]
    return [names[block] for block in found.index.table["block"].to_pylist()] * len(found.place.sizes)


def mixed(found: ExampleSet, data: PairDataConfig) -> ExampleSet:
    """The same, with the kinds of `rlhf.data.mixture` in place of buckets. Raises Refused."""
    if found.index is None:
        raise Refused("data.source_count_weights mixes pictures, not an online run's record: leave it out")
    tasks = tasks_of(found, Path(data.path)) if data.task_weights else [""] * found.count
    counts = [len(sources) for sources in found.index.table["sources"].to_pylist()] * len(found.place.sizes)
    buckets = np.zeros(len(tasks), np.int32) if found.place.buckets is None else found.place.buckets
    numbers = dict[tuple[str, int, int], int]()
    whole = zip(tasks, counts, buckets.tolist(), strict=True)
    kinds = np.array([numbers.setdefault(kind, len(numbers)) for kind in whole], np.int32)
    shares = mixture.shares(kinds, tasks, counts, data.task_weights, data.source_count_weights)
    dropout = np.array([data.task_caption_dropout.get(task, data.caption_dropout) for task, *_ in numbers])
    return replace(found, place=replace(found.place, buckets=kinds, shares=shares, caption_dropout=dropout))


def refuse_too_few(recipe: TrainRecipe, held_out: ExampleSet) -> None:
    """Raise Refused where what is held out does not fill one batch of every rank."""
    count = held_out.count
    if not held_out_visits(recipe.eval, recipe.trainer, count):
        need = recipe.trainer.ranks * recipe.trainer.train_batch_size
        raise Refused(
            f"eval.path = {recipe.eval.path!r} has {count} pairs, of which eval.max_pairs = {recipe.eval.max_pairs} are "
            f"used, but one batch of every rank (trainer.ranks × train_batch_size) is {need}: hold out "
            "more, or lower trainer.train_batch_size"
        )


def _refuse_overlap(recipe: TrainRecipe, training: PairIndex | None, evaluation: PairIndex | None) -> None:
    """Raise Refused where pairs that are held out are also trained on."""
    if training is None or evaluation is None:
        return

    def pictures(index: PairIndex) -> set[tuple[str, ...]]:
        first, second = (index.contents(name).to_pylist() for name in ("picture_0", "picture_1"))
        return {tuple(sorted(filter(None, pair))) for pair in zip(first, second, strict=True)}

    train, held_out = pictures(training), pictures(evaluation)
    if shared := len(train & held_out):
        raise Refused(
            f"{shared} of {len(held_out)} pairs of eval.path = {recipe.eval.path!r} are in data.path = {recipe.data.path!r} "
            "too: hold out others, or set data.split and eval.split"
        )


def _record(recipe: TrainRecipe, key: str, folder: Path, family: Family, cache: EncodingCache) -> ExampleSet:
    """The pairs/ folder of an online run. Raises: Refused for what latents cannot do, BadInput for pairs without any."""
    data = recipe.data
    wanted = {
        "data.choice_model": data.choice_model,
        "data.hflip": data.hflip and key == "data.path",
        "data.caption_dropout": data.caption_dropout if key == "data.path" else 0,
        "data.source_dropout": data.source_dropout if key == "data.path" else 0,
        "data.crop": data.crop == "random" and data.crop,
        "data.latents": data.latents == "on_the_fly" and data.latents,
        "data.buckets": data.buckets is not None,
    }
    if impossible := [f"{name} = {value!r}" for name, value in wanted.items() if value]:
        raise Refused(
            f"{key} = {str(folder)!r} is an online run's record: it holds finished latents and encoded captions, for which "
            f"{', '.join(impossible)} cannot be; set hflip = false, caption_dropout = 0 and leave the others out"
        )
    ((geometry,),) = (some.sizes for some in sizes_of(recipe.model, None))
    check_record(folder, family, cache, geometry)
    return ExampleSet(place=ExamplesPlace(path=folder, recorded=True))


def refuse_other_examples(examples: ExampleSets, folder: RunFolder, batch_size: int) -> None:
    """Raise Refused where a run that goes on would train on other examples than it began with.

    What an update trains on follows from its number and the index: one row more would be another run.
    """
    index, path, file = examples.training.index, examples.training.place.path, folder.path / "pairs.digest"
    mine = fingerprint(path.parent, [path.name]) if index is None else f"{index.digest()} {len(index.table)}"
    if examples.training.place.buckets is not None and batch_size > 1:  # which batches there are depends on it
        mine += f" in batches of {batch_size}"
    if examples.training.place.shares is not None:
        mine += " mixed"
    if not folder.started:
        write_durably(file, mine)
    elif (began := file.read_text()) != mine:
        raise Refused(
            f"the pairs are not those that {folder.path} began with (digest and count were {began}, are {mine}); put the "
            'data back, or start anew with run.resume = "never"'
        )


def wanted(recipe: TrainRecipe, roles: Sequence[str], examples: ExampleSets) -> Iterator[Encoding]:
    """Every text and, unless that is done on the fly, every picture that is encoded before training."""
    family = load_family(recipe.model)
    for found, training in ((examples.training, True), (examples.evaluation, False)):
        if found is None or found.index is None:
            continue
        indexed = IndexedExamples(family, found.place.path, found.place.sizes, roles)
        on_the_fly = training and recipe.data.latents == "on_the_fly"
        ways = [False, True] if training and recipe.data.hflip and not on_the_fly else [False]
        blanked = found.blanked(recipe.data) if training else np.zeros(found.count, bool)
        alone = [False, True] if training and recipe.data.source_dropout else [False]
        count = len(found.index.table)
        rows = range(count if training else len(held_out_visits(recipe.eval, recipe.trainer, count)))
        drawn = np.ones(found.count, bool) if found.place.shares is None else found.place.drawn()
        examples_of_all = chain.from_iterable(found.index.examples(rows, sized) for sized in found.place.sizes)
        for example, blank_too in compress(zip(examples_of_all, blanked, strict=False), drawn):
            for mirrored, blank, without in product(ways, [False, True] if blank_too else [False], alone):
                visit = Visit(row=0, mirrored=mirrored, blank=blank, alone=without)
                encodings = indexed.encodings(visit, example)
                yield from (e for e in encodings if not (on_the_fly and e.sources))
