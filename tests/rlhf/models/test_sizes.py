"""Sizes that models were trained on."""

from rlhf.models.sizes import KONTEXT_SIZES, kontext_size


def test_kontext_sizes_are_those_of_diffusers():
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    assert list(KONTEXT_SIZES) == PREFERRED_KONTEXT_RESOLUTIONS and len(KONTEXT_SIZES) == 17


def test_auto_size_follows_the_aspect():
    assert kontext_size(1312, 784) == (1328, 800)  # what the pipeline's _auto_resize does to this picture
    assert kontext_size(500, 500) == (1024, 1024)
    assert kontext_size(600, 900) == (832, 1248)
    assert kontext_size(10, 1000) == (672, 1568) and kontext_size(1000, 10) == (1568, 672)
    assert all(h % 16 == 0 and w % 16 == 0 for w, h in KONTEXT_SIZES)
