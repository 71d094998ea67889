"""What text encoders do not read of instructions: words that they do not know, and words beyond their limit."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from rlhf.types import Prompt

UNKNOWN_SHARE = 0.1
"""Share of unknown tokens from which an instruction is warned about."""
SHOWN, LONGEST = 20, 120
"""Instructions of a warning, and characters of each."""


class TextRow(Protocol):
    """What `Encoded` and a cache's `Place` say of a text."""

    @property
    def unknown(self) -> float | None: ...
    @property
    def cut(self) -> float | None: ...


Unread = dict[tuple[str, str], tuple[float, float]]
"""By a prompt's key and instruction: the shares of its tokens that are unknown and that are cut off."""


def unread(prompt: Prompt, rows: Iterable[TextRow]) -> Unread:
    """The largest shares in anything that is encoded of a prompt, since families add words of their own; empty: it is read."""
    shares = [(row.unknown or 0.0, row.cut or 0.0) for row in rows]
    unknown, cut = (max(kind, default=0.0) for kind in zip(*shares, strict=True)) if shares else (0.0, 0.0)
    return {(prompt.key, prompt.instruction): (unknown, cut)} if unknown or cut else {}


def unread_report(found: Unread, total: int) -> list[str]:
    """A warning for either of the two kinds that there is, with counts (`total`: of all prompts) and the worst instructions."""
    return [
        *_warning(
            {prompt: unknown for prompt, (unknown, _) in found.items() if unknown >= UNKNOWN_SHARE},
            total,
            f"the text encoder does not know {UNKNOWN_SHARE:.0%} or more of the tokens of",
            "and edits will ignore them; T5 has no Chinese: translate the instructions",
            "unknown",
        ),
        *_warning(
            {prompt: cut for prompt, (_, cut) in found.items() if cut},
            total,
            "the text encoder cuts off the end of",
            "that are longer than it reads: the model never sees it; shorten them, or begin with what matters",
            "cut off",
        ),
    ]


def _warning(bad: Mapping[tuple[str, str], float], total: int, before: str, after: str, word: str) -> list[str]:
    """Of the instructions with a share, by prompt; no line where there are none."""
    if not bad:
        return []
    texts = {text: (share, key) for (key, text), share in reversed([*bad.items()])}  # the first key of each
    lines = [f"WARNING: {before} {len(texts)} instructions ({len(bad)} of {total} prompts) {after}"]
    for share, text in sorted(((share, text) for text, (share, _) in texts.items()), reverse=True)[:SHOWN]:
        shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
        lines.append(f"  {share:4.0%} {word}: {shown} (prompt {texts[text][1]!r})")
    if len(texts) > SHOWN:
        lines.append(f"  and {len(texts) - SHOWN} more")
    return ["\n".join(lines)]
