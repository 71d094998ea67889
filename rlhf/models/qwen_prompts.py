"""How Qwen-Image and Qwen-Image-Edit are told a prompt, as diffusers' pipelines put it."""

import re
from dataclasses import dataclass
from unicodedata import normalize

TURN = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"
END = "<|im_end|>\n<|im_start|>assistant\n"
PAINT = TURN.format(
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects and "
    "background:"
)
EDIT = TURN.format(
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how the "
    "user's text instruction should alter or modify the image. Generate a new image that meets the user's requirements while "
    "maintaining consistency with the original input where appropriate."
)
"""What the models were trained to read before an instruction, word for word, without sources and with them. It is not kept."""
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
RESERVED = re.compile(r"<\|\w+\|>")
TEXT_TOKENS = (128, 256, 512, 1024)
"""What a text is padded to: the first that cannot be too short. Tokens beyond the last are cut off."""
READ_AREA = 384**2
"""Pixels of a source as -2509 and later read it."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """How one of diffusers' pipelines puts a prompt."""

    most_sources: int
    numbered: bool = False
    """Whether "Picture 1: ", … stands before each source."""
    read_area: int | None = None
    """Most pixels of a source as it is read; None: those of what is generated."""


VERSIONS = {
    "QwenImagePipeline": Version(most_sources=0),
    "QwenImageEditPipeline": Version(most_sources=1),
    "QwenImageEditPlusPipeline": Version(most_sources=3, numbered=True, read_area=READ_AREA),
}


def put(instruction: str, sources: int, version: Version) -> tuple[str, str]:
    """What stands before an instruction with so many sources, and the whole text."""
    before = EDIT if sources else PAINT
    shown = [f"Picture {number}: {PICTURE}" if version.numbered else PICTURE for number in range(1, sources + 1)]
    return before, "".join((before, *shown, instruction, END))


def padded_text(instruction: str, sources: int) -> int:
    """Tokens that are surely enough for an instruction with what stands around it and its sources, whose own are not counted.

    A token is a byte or more, whatever the vocabulary, so that no tokenizer is asked.
    """
    around = END + f"Picture 1: {PICTURE}" * sources
    return padded(len(normalize("NFC", instruction).encode()) + len(around.encode()))


def padded(tokens: int) -> int:
    """What a text of so many tokens is padded to."""
    return next((most for most in TEXT_TOKENS if tokens <= most), TEXT_TOKENS[-1])
