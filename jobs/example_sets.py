"""The examples of `jobs.train`, from files to what ranks open: checked, and encoded. Between the two: `feedback.py`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from actors.checks import CheckAll, CheckedPairs, check_pairs
from actors.encoders import encode
from jobs.preprocess import missing
from jobs.recipes.train import TrainRecipe
from rlhf.data.batches import CachePlace, check_buckets
from rlhf.data.cache import read_manifest
from rlhf.data.examples import PairIndex
from rlhf.data.fingerprint import fingerprint, fingerprints
from rlhf.data.items import parse_items
from rlhf.data.records import BadInput, Problem
from rlhf.data.stream import Visit, held_out_visits
from rlhf.data.work import ExamplesPlace, IndexedExamples, check_record, is_record, record_size, recorded_prompts
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.family import Family
from rlhf.runs.folder import RunFolder, write_durably
from rlhf.types import CENTRE, Encoding, Geometry, Item, Prompt

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExampleSet:
    """One data set of a recipe."""

    place: ExamplesPlace
    checked: CheckedPairs | None
    """None: the record of an online run."""
    items: Mapping[str, Item]

    @property
    def index(self) -> PairIndex | None:
        return self.checked.index if self.checked else None


@dataclass(frozen=True, kw_only=True)
class ExampleSets:
    """What a recipe trains on and what it is measured on."""

    training: ExampleSet
    evaluation: ExampleSet | None
    cache: CachePlace

    def _named(self) -> dict[str, ExampleSet]:
        return {"data.path": self.training} | ({"eval.path": self.evaluation} if self.evaluation else {})

    def digest(self) -> str:
        """Of what is trained on, in order."""
        if self.training.index is not None:
            return self.training.index.digest()
        return fingerprint(self.training.place.path.parent, [self.training.place.path.name])

    def report(self) -> str:
        """What there is, and what was left out, a line per problem."""
        reports = (
            f"{key}: {found.checked.report() if found.checked else 'the record of an online run'}"
            for key, found in self._named().items()
        )
        return "\n".join(reports)

    def left_out(self) -> str:
        """The bad rows that `data.on_bad_row = "skip"` went on without; empty if there are none."""
        return "\n".join(
            found.checked.report() for found in self._named().values() if found.checked and found.checked.problems
        )


def read_example_sets(recipe: TrainRecipe, roles: Sequence[str], check_all: CheckAll) -> ExampleSets:
    """Check `data.path` and `eval.path`. Raises: BadInput with the problems of both, Refused for keys that do not fit."""
    family = load_family(recipe.model)
    family.check()
    geometry = Geometry(height=recipe.model.height, width=recipe.model.width, frames=recipe.model.frames)
    family.latent_shape(geometry)  # refuses a size that the network cannot take
    cache = CachePlace(folder=recipe.data.cache, fingerprints=fingerprints(family))
    items: dict[str, Item] = {}
    problems: list[Problem] = []
    if recipe.data.item_metadata:
        items, problems = parse_items(Path(recipe.data.item_metadata))
    found: list[ExampleSet] = []
    for key, path, split in (
        ("data.path", recipe.data.path, recipe.data.split),
        ("eval.path", recipe.eval.path, recipe.eval.split),
    ):
        if path is None:
            continue
        try:
            if is_record(Path(path)):
                found.append(_record(recipe, key, Path(path), family, cache, geometry))
                continue
            checked = check_pairs(
                Path(path),
                split,
                key=key,
                cache=Path(recipe.data.cache),
                on_bad_row=recipe.data.on_bad_row,
                needs_source=family.sees_source,
                needs_loser="loser" in roles,
                items=items if recipe.data.item_metadata else None,
                check_all=check_all,
            )
            place = ExamplesPlace(path=checked.file, geometry=geometry)
            found.append(ExampleSet(place=place, checked=checked, items=items))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    sets = ExampleSets(training=found[0], evaluation=found[1] if len(found) > 1 else None, cache=cache)
    _check_prompts(recipe, family, sets)
    if sets.evaluation:
        refuse_too_few(recipe, sets.evaluation)
    _refuse_overlap(recipe, sets)
    return sets


def _check_prompts(recipe: TrainRecipe, family: Family, sets: ExampleSets) -> None:
    """Raise Refused where the family cannot take the prompts, in the batches of the trainer and without their captions."""
    for found in filter(None, (sets.training, sets.evaluation)):
        check_buckets(family, _prompts(family, found), recipe.trainer.train_batch_size)
    if recipe.data.caption_dropout and family.unguided(next(_prompts(family, sets.training))) is None:
        raise Refused(
            f"data.caption_dropout = {recipe.data.caption_dropout:g}, but {recipe.model.family} knows no prompt without a "
            "caption: set it to 0"
        )


def _prompts(family: Family, found: ExampleSet) -> Iterator[Prompt]:
    if found.index is None:
        return recorded_prompts(found.place.path)
    indexed = IndexedExamples(family, found.index, found.place.geometry, ())
    pairs = enumerate(found.index.preferences(len(found.index)))
    return (
        indexed.example(Visit(row=row, mirrored=False, blank=False, crop=CENTRE), pair).prompt for row, pair in pairs
    )


def refuse_too_few(recipe: TrainRecipe, held_out: ExampleSet) -> None:
    """Raise Refused where what is held out does not fill one batch of every rank."""
    count = len(held_out.index) if held_out.index is not None else record_size(held_out.place.path)
    if not held_out_visits(recipe.eval, recipe.trainer, count):
        need = recipe.trainer.ranks * recipe.trainer.train_batch_size
        raise Refused(
            f"eval.path = {recipe.eval.path!r} has {count} pairs, of which eval.max_pairs = {recipe.eval.max_pairs} are "
            f"used, but one batch of every rank (trainer.ranks × train_batch_size) is {need}: too few"
        )


def _refuse_overlap(recipe: TrainRecipe, sets: ExampleSets) -> None:
    """Raise Refused where pairs that are held out are also trained on."""
    if sets.training.index is None or sets.evaluation is None or sets.evaluation.index is None:
        return
    train, held_out = (
        {
            tuple(sorted(filter(None, pair)))
            for pair in zip(*(index.table[f"content_{i}"].to_pylist() for i in (0, 1)), strict=True)
        }
        for index in (sets.training.index, sets.evaluation.index)
    )
    if shared := len(train & held_out):
        raise Refused(
            f"{shared} of {len(held_out)} pairs of eval.path = {recipe.eval.path!r} are in data.path = {recipe.data.path!r} "
            "too: hold out others, or set data.split and eval.split"
        )


def _record(
    recipe: TrainRecipe, key: str, folder: Path, family: Family, cache: CachePlace, geometry: Geometry
) -> ExampleSet:
    """The pairs/ folder of an online run. Raises: Refused for what latents cannot do, BadInput for pairs without any."""
    data = recipe.data
    wanted = {
        "data.choice_model": data.choice_model,
        "data.hflip": data.hflip and key == "data.path",
        "data.caption_dropout": data.caption_dropout if key == "data.path" else 0,
        "data.crop": data.crop == "random" and data.crop,
        "data.latents": data.latents == "on_the_fly" and data.latents,
    }
    if impossible := [f"{name} = {value!r}" for name, value in wanted.items() if value]:
        raise Refused(
            f"{key} = {str(folder)!r} is an online run's record: it holds finished latents and encoded captions, for which "
            f"{', '.join(impossible)} cannot be; set hflip = false, caption_dropout = 0 and leave the others out"
        )
    check_record(folder, family, cache.open(), read_manifest(cache.folder).places, cache.folder, geometry)
    place = ExamplesPlace(path=folder, geometry=geometry, recorded=True)
    return ExampleSet(place=place, checked=None, items={})


def refuse_other_examples(examples: ExampleSets, folder: RunFolder) -> None:
    """Raise Refused where a run that goes on would train on other examples than it began with.

    What an update trains on follows from its number and the index: one row more would be another run.
    """
    index = examples.training.index
    file, count = folder.path / "pairs.digest", f" {len(index)}" if index is not None else ""
    mine = examples.digest() + count
    if not folder.started:
        write_durably(file, mine)
    elif (began := file.read_text()) != mine:
        raise Refused(
            f"the pairs are not those that {folder.path} began with (digest and count were {began}, are {mine}); put the "
            'data back, or start anew with run.resume = "never"'
        )


# --- encoding ----------------------------------------------------------------------------------------------------------


def encode_missing(recipe: TrainRecipe, roles: Sequence[str], examples: ExampleSets, say: Say) -> None:
    """Encode every text and, unless that is done on the fly, every picture that the cache lacks.

    Raises: PreprocessFailed, StreamBroken, CacheError, IncompleteModel.
    """
    folder = examples.cache.folder
    todo = missing(examples.cache, _wanted(recipe, roles, examples), read_manifest(folder))
    if todo:
        encode(recipe.model, recipe.preprocess, folder, todo, say)
    else:
        say(f"preprocess: all captions and pictures are in {folder}")


def _wanted(recipe: TrainRecipe, roles: Sequence[str], examples: ExampleSets) -> Iterator[Encoding]:
    family = load_family(recipe.model)
    for found, training in ((examples.training, True), (examples.evaluation, False)):
        if found is None or found.index is None:
            continue
        indexed = IndexedExamples(family, found.index, found.place.geometry, roles)
        on_the_fly = training and recipe.data.latents == "on_the_fly"
        ways = [False, True] if training and recipe.data.hflip and not on_the_fly else [False]
        blanks = [False, True] if training and recipe.data.caption_dropout else [False]
        rows = len(found.index) if training else len(held_out_visits(recipe.eval, recipe.trainer, len(found.index)))
        for row, pair in enumerate(found.index.preferences(rows)):
            for mirrored, blank in product(ways, blanks):
                visit = Visit(row=row, mirrored=mirrored, blank=blank, crop=CENTRE)
                encodings = indexed.encodings(visit, pair)
                yield from (e for e in encodings if not (on_the_fly and e.sources))
