"""The pairs of an offline recipe, from files to what ranks open: checked, and encoded. Between: `offline_feedback.py`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from actors.checks import CheckAll, CheckedPairs, check_pairs
from actors.encoders import encode
from actors.loading import Cell, Picture, Text
from rlhf.data.cache import read_manifest
from rlhf.data.examples import PairIndex, Preference
from rlhf.data.fingerprint import fingerprint
from rlhf.data.offline_pairs import BLANK, FIT, PairKeys, PairsPlace, Sides, check_record, is_record, record_size
from rlhf.data.records import BadInput, Problem, parse_items
from rlhf.data.stream import held_out_visits
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.family import Family, sees_source
from rlhf.offline_config import OfflineDPOConfig
from rlhf.runs.folder import RunFolder, write_durably
from rlhf.types import Item

Say = Callable[[str], None]
ROWS_AT_ONCE = 10_000


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """One data set of a recipe."""

    place: PairsPlace
    checked: CheckedPairs | None
    """None: the record of an online run."""
    items: Mapping[str, Item]

    @property
    def index(self) -> PairIndex | None:
        return self.checked.index if self.checked else None


@dataclass(frozen=True, kw_only=True)
class PairSets:
    """What a recipe trains on and what it is measured on."""

    training: PairSet
    evaluation: PairSet | None

    @property
    def index(self) -> PairIndex | None:
        return self.training.index

    def _named(self) -> dict[str, PairSet]:
        return {"data.path": self.training} | ({"eval.path": self.evaluation} if self.evaluation else {})

    def digest(self) -> str:
        """Of what is trained on, in order."""
        return (
            self.index.digest()
            if self.index is not None
            else fingerprint(self.training.place.path.parent, [self.training.place.path.name])
        )

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


def read_pair_sets(config: OfflineDPOConfig, check_all: CheckAll) -> PairSets:
    """Check `data.path` and `eval.path`. Raises: BadInput with the problems of both, Refused for keys that do not fit."""
    family = load_family(config.model, config.trainer.mixed_precision)
    family.check()
    sides: Sides = "both" if config.objective == "dpo" else "winners"
    latent_shape = family.latent_shape(config.model.height, config.model.width)
    keys = _keys(config, family)
    items: dict[str, Item] = {}
    problems: list[Problem] = []
    if config.data.item_metadata:
        items, problems = parse_items(Path(config.data.item_metadata))
    found: list[PairSet] = []
    for key, path, split in (
        ("data.path", config.data.path, config.data.split),
        ("eval.path", config.eval.path, config.eval.split),
    ):
        if path is None:
            continue
        try:
            if is_record(Path(path)):
                found.append(_record(config, key, Path(path), keys, latent_shape))
                continue
            checked = check_pairs(
                Path(path),
                split,
                key=key,
                cache=Path(config.data.cache),
                on_bad_row=config.data.on_bad_row,
                needs_source=keys.source is not None,
                needs_loser=sides == "both",
                items=items if config.data.item_metadata else None,
                check_all=check_all,
            )
            found.append(
                PairSet(place=PairsPlace(path=checked.file, keys=keys, sides=sides), checked=checked, items=items)
            )
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    sets = PairSets(training=found[0], evaluation=found[1] if len(found) > 1 else None)
    if sets.evaluation:
        refuse_too_few(config, sets.evaluation)
    _refuse_overlap(config, sets)
    return sets


def _keys(config: OfflineDPOConfig, family: Family) -> PairKeys:
    """What names an encoded caption or picture, beside its own content."""
    kind = (config.model.family, str(family.dtype))
    return PairKeys(
        height=config.model.height,
        width=config.model.width,
        text=fingerprint(config.model.path, family.text_folders, *kind),
        target=fingerprint(config.model.path, family.target_folders, *kind),
        source=fingerprint(config.model.path, family.source_folders, *kind) if sees_source(family) else None,
    )


def refuse_too_few(config: OfflineDPOConfig, held_out: PairSet) -> None:
    """Raise Refused where the pairs held out do not fill one batch of every rank."""
    count = len(held_out.index) if held_out.index is not None else record_size(held_out.place.path)
    if not held_out_visits(config.eval, config.trainer, count):
        need = config.trainer.ranks * config.trainer.train_batch_size
        raise Refused(
            f"eval.path = {config.eval.path!r} has {count} pairs, of which eval.max_pairs = {config.eval.max_pairs} are "
            f"used, but one batch of every rank (trainer.ranks × train_batch_size) is {need}: too few"
        )


def _refuse_overlap(config: OfflineDPOConfig, sets: PairSets) -> None:
    """Raise Refused where pairs that are held out are also trained on."""
    if sets.index is None or sets.evaluation is None or sets.evaluation.index is None:
        return
    train, held_out = (
        {tuple(sorted(pair)) for pair in zip(*(index.table[f"content_{i}"].to_pylist() for i in (0, 1)), strict=True)}
        for index in (sets.index, sets.evaluation.index)
    )
    if shared := len(train & held_out):
        raise Refused(
            f"{shared} of {len(held_out)} pairs of eval.path = {config.eval.path!r} are in data.path = {config.data.path!r} "
            "too: hold out others, or set data.split and eval.split"
        )


def _record(
    config: OfflineDPOConfig, key: str, folder: Path, keys: PairKeys, latent_shape: tuple[int, int, int]
) -> PairSet:
    """The pairs/ folder of an online run. Raises: Refused for what latents cannot do, BadInput for pairs without any."""
    data = config.data
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
    check_record(folder, read_manifest(data.cache), data.cache, keys, latent_shape)
    return PairSet(place=PairsPlace(path=folder), checked=None, items={})


def say_batch(config: OfflineDPOConfig) -> None:
    """How many pairs an update takes, and at which rate."""
    trainer = config.trainer
    print(
        f"{trainer.pairs_per_step} pairs a step = {trainer.ranks} ranks × {trainer.train_batch_size} a micro-batch × "
        f"{trainer.gradient_accumulation_steps} accumulated; learning rate {trainer.scaled_learning_rate:.3g}"
        f"{f' = {trainer.learning_rate:g} × {trainer.pairs_per_step}' if trainer.scale_lr else ''}",
        flush=True,
    )


def refuse_other_pairs(pairs: PairSets, folder: RunFolder) -> None:
    """Raise Refused where a run that goes on would train on other pairs than it began with.

    What an update trains on follows from its number and the index: one row more would be another run.
    """
    file, count = folder.path / "pairs.digest", f" {len(pairs.index)}" if pairs.index is not None else ""
    mine = pairs.digest() + count
    if not folder.started:
        write_durably(file, mine)
    elif (began := file.read_text()) != mine:
        raise Refused(
            f"the pairs are not those that {folder.path} began with (digest and count were {began}, are {mine}); put the "
            'data back, or start anew with run.resume = "never"'
        )


# --- encoding ----------------------------------------------------------------------------------------------------------


def encode_missing(config: OfflineDPOConfig, pairs: PairSets, say: Say) -> None:
    """Encode every caption and, unless that is done on the fly, every picture that the cache lacks.

    Raises: PreprocessFailed, CacheError, IncompleteModel.
    """
    texts, pictures = _missing(config, pairs)
    if not texts and not pictures:
        say(f"preprocess: all captions and pictures are in {config.data.cache}")
        return
    encode(config, texts, pictures, say)


def _missing(config: OfflineDPOConfig, pairs: PairSets) -> tuple[list[Text], list[Picture]]:
    places = read_manifest(config.data.cache).places
    captions: dict[str, str] = {}
    pictures: dict[str, Picture] = {}
    for found, training in ((pairs.training, True), (pairs.evaluation, False)):
        if found is None or found.index is None:
            continue
        index, keys = found.index, found.place.keys
        assert keys is not None
        blank = [BLANK] if training and config.data.caption_dropout else []
        captions |= {keys.text_key(caption): caption for caption in (*index.captions(), *blank)}
        if training and config.data.latents == "on_the_fly":
            continue
        rows = len(index) if training else len(held_out_visits(config.eval, config.trainer, len(index)))
        mirrored = (False, True) if training and config.data.hflip else (False,)
        for pair in _pairs(index, rows):
            for way in mirrored:
                for picture in _pictures(index, found.place, pair, way):
                    if picture.key not in places:
                        pictures.setdefault(picture.key, picture)
    texts = [Text(key=key, instruction=caption) for key, caption in captions.items() if key not in places]
    return texts, list(pictures.values())


def _pairs(index: PairIndex, rows: int) -> Iterable[Preference]:
    for start in range(0, rows, ROWS_AT_ONCE):
        for values in index.table.slice(start, min(ROWS_AT_ONCE, rows - start)).to_pylist():
            yield Preference(**values)


def _pictures(index: PairIndex, place: PairsPlace, pair: Preference, mirrored: bool) -> Iterable[Picture]:
    """What is needed of a pair's two pictures and, for an edit family, its source."""
    keys = place.keys
    assert keys is not None
    size = {"height": keys.height, "width": keys.width}
    files, targets = ((pair.path_0, pair.content_0), (pair.path_1, pair.content_1)), keys.target_keys(pair, mirrored)
    for side in (0, 1) if place.sides == "both" else (pair.winner,):
        path, content = files[side]
        where = path or Cell(block=index.blocks[pair.block], row=pair.row, side=side)
        yield Picture(
            key=targets[side], role="target", place=where, content=content, fit=FIT, mirrored=mirrored, **size
        )
    if keys.source is not None:
        assert pair.source is not None and pair.source_content is not None
        key = keys.source_key(pair, mirrored)
        yield Picture(
            key=key, role="source", place=pair.source, content=pair.source_content, fit=FIT, mirrored=mirrored, **size
        )
