"""What jobs do about encodings that the cache lacks: find them, have them made, and warn of what encoders do not read."""

from collections.abc import Iterable

from actors.encoders import encode
from jobs.cli import Say
from rlhf.data.cache import EncodingCache, Manifest, read_manifest
from rlhf.data.instructions import Unread, unread, unread_report
from rlhf.models.family import Family
from rlhf.tables import ModelTable, PreprocessConfig
from rlhf.types import Encoding, Prompt


def missing(cache: EncodingCache, encodings: Iterable[Encoding], manifest: Manifest) -> dict[str, Encoding]:
    """What the cache lacks, by key, each once."""
    wanted = {cache.key(encoding): encoding for encoding in encodings}
    return {key: encoding for key, encoding in wanted.items() if key not in manifest.places}


def encode_missing(
    model: ModelTable, table: PreprocessConfig, cache: EncodingCache, wanted: Iterable[Encoding], what: str, log: Say
) -> Manifest:
    """Encode what the cache lacks, and say so where that is nothing; returns what is in it.

    what: the name of all that is wanted. Raises: PreprocessFailed, StreamBroken, CacheError.
    """
    manifest = read_manifest(cache.folder)
    if todo := missing(cache, wanted, manifest):
        encode(model, table, str(cache.folder), todo, log)
        return read_manifest(cache.folder)
    log(f"preprocess: all {what} are in {cache.folder}")
    return manifest


def warn_of_unread(
    family: Family, cache: EncodingCache, manifest: Manifest, prompts: Iterable[Prompt], log: Say
) -> None:
    """Say what the encoders do not read of instructions whose encodings are in the cache."""
    found, total = Unread(), 0
    for prompt in prompts:
        places = [manifest.places.get(cache.key(encoding)) for encoding in family.encodings(prompt)]
        found |= unread(prompt, filter(None, places))
        total += 1
    for warning in unread_report(found, total):
        log(warning)
