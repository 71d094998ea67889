"""Wan with references against diffusers' `WanPipeline` on the same tiny weights, whose solver is Euler's at our times."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rlhf.data.batches import condition_of, unguided_of
from rlhf.data.encoding import encode_media
from rlhf.data.media import fit_image
from rlhf.diffusion.objectives import SFT
from rlhf.errors import Refused
from rlhf.models.family import sample_batch
from rlhf.models.tiny import TEXT_TOKENS
from rlhf.models.tiny_wan import write_wan_subject
from rlhf.models.trainable import load_trainable
from rlhf.models.wan_network import is_new, patches
from rlhf.models.wan_subject import cleaned
from rlhf.shards.files import SafetensorsFolder
from rlhf.tables import SamplingTable
from rlhf.training.trainer import Trainer
from rlhf.training_tables import TrainableTable, TrainerConfig
from rlhf.types import Batch, Encoding, Geometry, Prompt, Source, noise_from
from tests import worlds
from tests.encoded import tensors_of

SIZES = (Geometry(height=32, width=48, frames=9), Geometry(height=64, width=32, frames=5))
REFERENCES = ((40, 100), (90, 50), (64, 64))
"""(H, W)."""
NEGATIVE, STEPS, SCALE = "blurred", 4, 5.0
PATTERNS = ("clip_proj", "vae_proj", "*.k_vae", "*.v_vae", "*.norm_k_vae")
FUSED = ("*.k_fused", "*.v_fused", "*.norm_k_fused")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan")
    return {fused: write_wan_subject(root / str(fused), fused=fused) for fused in (False, True)}


def family(path):
    return worlds.family(path, torch.float32, "wan_subject")


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (*REFERENCES[i], 3), dtype=np.uint8)


def prompt_of(text: str, geometry: Geometry, *numbers: int) -> Prompt:
    sources = (Source(path="", content=str(i), height=REFERENCES[i][0], width=REFERENCES[i][1]) for i in numbers)
    return Prompt(key="a", instruction=text, sources=tuple(sources), geometry=geometry)


def shown(encoding: Encoding) -> list[torch.Tensor]:
    sizes = zip(encoding.sources, encoding.geometries, strict=True)
    return [torch.from_numpy(fit_image(picture(int(s.content)), g.height, g.width, s.fit))[None] for s, g in sizes]


def rows_of(ours, codec, prompts):
    wanted = [encoding for prompt in prompts for encoding in ours.encodings(prompt)]
    return tensors_of(encode_media(codec, {encoding: shown(encoding) for encoding in wanted}, 2))


def sampled(ours, denoiser, prompt, noise):
    row = rows_of(
        ours, ours.load_codec("cpu"), [prompt, prompt_of(NEGATIVE, prompt.geometry, *range(len(prompt.sources)))]
    )
    sampling = SamplingTable(steps=STEPS, guidance_scale=SCALE, negative_prompt=NEGATIVE)
    condition, unguided = condition_of(ours, row, [prompt]), unguided_of(ours, row, [prompt], sampling)
    return sample_batch(ours, denoiser, condition, unguided, noise, sampling)


class EulerAt(diffusers.FlowMatchEulerDiscreteScheduler):
    """At given times, whatever number of steps is asked for."""

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(sigmas=self.times, device=device)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("geometry", SIZES)
@pytest.mark.parametrize("count", [1, 3])
def test_at_their_start_the_new_layers_change_nothing(folders, fused, geometry, count):
    """`WanPipeline` opens the same folder without them. At 1e-4, what four steps of guidance by 5 make of START."""
    ours, noise = family(folders[fused]), noise_from(1, (1, *family(folders[fused]).latent_shape(geometry)))
    pipeline = diffusers.WanPipeline.from_pretrained(folders[fused])
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.transformer) is diffusers.WanTransformer3DModel
    pipeline.scheduler = EulerAt(shift=1.0)
    pipeline.scheduler.times = ours.process.sigmas(STEPS, ours.tokens(noise))[:-1].tolist()
    theirs = pipeline(
        prompt="make it warm",
        negative_prompt=NEGATIVE,
        guidance_scale=SCALE,
        height=geometry.height,
        width=geometry.width,
        num_frames=geometry.frames,
        max_sequence_length=TEXT_TOKENS,
        num_inference_steps=STEPS,
        latents=noise,
        output_type="latent",
    ).frames
    found = sampled(ours, ours.load_denoiser("cpu"), prompt_of("make it warm", geometry, *range(count)), noise)
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-4)
    video = ours.load_codec("cpu").decode(found)
    z = theirs * torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)
    z = z + torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        frames = pipeline.video_processor.postprocess_video(
            pipeline.vae.decode(z, return_dict=False)[0], output_type="np"
        )
    assert video.shape == (1, geometry.frames, geometry.height, geometry.width, 3)
    assert np.abs(video.numpy() - 255 * frames).max() < 1, "rounded, where the pipeline gives fractions"


def test_trained_layers_show_other_references_in_other_videos(folders):
    ours, geometry = family(folders[True]), SIZES[0]
    denoiser, noise = ours.load_denoiser("cpu"), noise_from(1, (1, *ours.latent_shape(SIZES[0])))
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if is_new(name) and ".v_" in name:
                parameter.copy_(noise_from(len(name), parameter.shape))
    found = [sampled(ours, denoiser, prompt_of("warm", geometry, *some), noise) for some in ((0,), (1,), (0, 1), (0,))]
    assert torch.equal(found[0], found[3])
    assert min((found[i] - found[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01


def one_update(mesh, path, fused: bool):
    """Parameters before and after an update of the new layers, by name; and the timesteps that the network was told."""
    ours = family(path)
    table = TrainableTable(kind="modules", patterns=PATTERNS + (FUSED if fused else ()))
    trainer = Trainer(
        family=ours,
        config=TrainerConfig(learning_rate=1e-3, max_grad_norm=1.0, weight_decay=0.0),
        trainable=load_trainable(table, ours),
        objective=SFT(),
        mesh=mesh,
        seed=1,
    )
    told = []
    trainer.policy.register_forward_pre_hook(lambda _, given, named: told.append(named["timestep"]), with_kwargs=True)
    geometry, t = SIZES[0], torch.tensor([0.2, 0.7])
    prompts = [prompt_of("warm", geometry, 0), prompt_of("make it warm", geometry, 1)]
    condition = condition_of(ours, rows_of(ours, ours.load_codec("cpu"), prompts), prompts)
    shape = (2, *ours.latent_shape(geometry))
    before = {name: p.full_tensor().clone() for name, p in trainer.policy.named_parameters()}
    batch = Batch(
        x0={"target": noise_from(1, shape)},
        condition=condition,
        t=t,
        noise=noise_from(2, shape),
        weight={"target": torch.ones(2)},
    )
    trainer.step([batch])
    after = {name: p.full_tensor() for name, p in trainer.policy.named_parameters()}
    return before, after, [list(map(float, one)) for one in told]


@pytest.mark.parametrize("fused", [False, True])
def test_one_update_moves_every_tensor_that_is_trained_and_no_other(one_rank, folders, fused):
    """And the network is told the time of each example, 1000 t, at which its latents are mixed."""
    ((before, after, told),) = one_rank.run(one_update, folders[fused], fused)
    assert told == [[pytest.approx(200.0), pytest.approx(700.0)]]
    for name, value in after.items():
        new = is_new(name.replace(".sided.policy", ""))
        assert torch.equal(value, before[name]) != new, name
    assert any("fused" in name for name in after) == fused


def test_texts_are_read_as_by_the_pipeline(folders):
    ours, pipeline = family(folders[False]), diffusers.WanPipeline.from_pretrained(folders[False])
    texts = ["make it warm", "", "a  bowl &amp; a\nspoon ", "long words and more of them " * 9]
    theirs, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)
    encodings = [Encoding(kind="text", text=text) for text in texts]
    rows = ours.load_codec("cpu").encode(encodings, [[]] * len(texts))
    for row, expected in zip(rows, theirs, strict=True):
        atol = EPS * 64 * expected.abs().max().item()
        torch.testing.assert_close(row.tensors["prompt_embeds"], expected, rtol=0, atol=atol)
    assert rows[0].tensors["prompt_embeds"][-1].abs().max() == 0, "after a text there are zeros"
    assert rows[3].cut > 0 and rows[0].cut == 0 and cleaned(texts[2]) == "a bowl & a spoon"


def test_a_reference_is_seen_as_clip_is_told_of_pictures(folders):
    ours = family(folders[False])
    _, seen, latents = ours.encodings(prompt_of("warm", SIZES[0], 0))
    (row,) = ours.load_codec("cpu").encode([seen], [shown(seen)])
    square = Image.fromarray(shown(seen)[0][0].numpy())
    assert square.size == (512, 512) and square.getpixel((0, 0)) == (255, 255, 255), "on white"
    processor, encoder = ours.load_codec("cpu")._seer
    with torch.no_grad():
        given = processor(images=square, return_tensors="pt").pixel_values
        theirs = encoder(given, output_hidden_states=True).hidden_states[-2][0]
    torch.testing.assert_close(row.tensors["clip"], theirs, rtol=0, atol=EPS * 64 * theirs.abs().max().item())
    assert latents.geometries == (Geometry(height=32, width=48),) and latents.sources[0].fit == "pad"


def test_patches_of_references_are_those_of_the_networks_own_convolution():
    latents = torch.arange(2 * 3 * 4 * 4 * 6).reshape(2, 3, 4, 4, 6).float()
    cut = patches(latents)
    whole = nn.functional.unfold(latents.flatten(0, 1), 2, stride=2).mT.reshape(2, 3 * 6, 16)
    assert torch.equal(cut, whole)


def test_frames_and_sides_that_do_not_fit_are_refused_with_what_does(folders):
    ours = family(folders[False])
    assert ours.latent_shape(Geometry(height=480, width=832, frames=21)) == (4, 6, 60, 104)
    with pytest.raises(Refused, match=r"20 frames \(model\.frames\): this model makes 4n \+ 1, so take 17 or 21"):
        ours.latent_shape(Geometry(height=480, width=832, frames=20))
    with pytest.raises(Refused, match=r"40×48 pixels .* multiples of 16"):
        ours.latent_shape(Geometry(height=40, width=48, frames=5))
    for count in (0, 4):
        with pytest.raises(Refused, match=rf"prompt 'a' has {count} references; this model takes 1 to 3"):
            ours.bucket(prompt_of("warm", SIZES[0], *[0] * count))


def test_times_are_shifted_as_the_scheduler_says(folders, tmp_path):
    process = family(folders[False]).process
    assert process.sigmas(2, 100).tolist() == pytest.approx([1.0, 3 * 0.5 / (1 + 2 * 0.5), 0.0])
    assert process.sigmas(2, 9).tolist() == process.sigmas(2, 100).tolist()
    for config, says in (
        ('{"_class_name": "DDIMScheduler"}', "DDIMScheduler with a shift of None"),
        ('{"_class_name": "UniPCMultistepScheduler", "flow_shift": 0}', "a shift of 0, but this family takes"),
    ):
        (tmp_path / "scheduler").mkdir(exist_ok=True)
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(config)
        with pytest.raises(Refused, match=says):
            _ = family(tmp_path).process


def test_a_folder_has_the_new_layers_beside_those_of_its_base(folders):
    """Two projections of four layers with two tensors each; in both blocks two paths of two such layers and a norm."""
    saved = SafetensorsFolder(folders[True] / "transformer").where
    assert sum(map(is_new, saved)) == 2 * 4 * 2 + 2 * 2 * (2 * 2 + 1)
    with torch.device("meta"):
        base = diffusers.WanTransformer3DModel.from_config(folders[True] / "transformer")
    assert {name for name in saved if not is_new(name)} == {name for name, _ in base.named_parameters()}
