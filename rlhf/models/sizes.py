"""Picture sizes that models were trained on."""

KONTEXT_SIZES = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)
"""(width, height) that Kontext was trained on: diffusers' PREFERRED_KONTEXT_RESOLUTIONS, copied as its import takes
seconds; a test compares the two."""


def kontext_size(height: int, width: int) -> tuple[int, int]:
    """(H, W) of Kontext's own sizes that is nearest to a picture's aspect, chosen as `FluxKontextPipeline` does."""
    aspect = width / height
    _, nearest_width, nearest_height = min((abs(aspect - w / h), w, h) for w, h in KONTEXT_SIZES)
    return nearest_height, nearest_width
