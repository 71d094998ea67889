"""Judges and rewards in a recipe: which models judge, where they run, and how their scores are mixed."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from string import Formatter
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import urlsplit

import httpx
from pydantic import AfterValidator, Field

from rlhf.section import LocalPath, Section


def _judge_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
        raise ValueError("a judge's name is 1 to 40 of the letters a-z, digits and '_', and begins with a letter")
    return name


def check_address(url: str) -> str:
    """`url`. Raises: ValueError where it is no address of an HTTP service."""
    try:
        found, parts = httpx.URL(url), urlsplit(url)
        found.host.encode("idna")  # refuses empty and overlong parts of a name
        port = parts.port
    except (httpx.InvalidURL, ValueError) as error:
        raise ValueError(f"is no address: {error}; write http://host:port/path") from error
    if found.scheme not in ("http", "https") or not found.host or port == 0 or parts.fragment or len(url.split()) != 1:
        raise ValueError("is no address: write http://host:port/path")
    return url


Address = Annotated[str, AfterValidator(check_address)]
"""Of an HTTP service."""
JudgeName = Annotated[str, AfterValidator(_judge_name)]
"""It becomes part of a URL, of names of metrics and of Serve's tags."""
SCALARS = ("mean", "judged", "pass_rate")
"""What a run logs beside its judges' scores: reward/mean, eval/policy_judged, …"""

SHORTHANDS = {"hps": ("hps",), "hpsv2": ("hps",), "ctr": ("ctr",), "hps_ctr": ("hps", "ctr")}
"""`--reward_type` of FEAST's train_dpo_flux_kontext.py as judges of weight 1."""


class RewardConfig(Section):
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    """Judge → weight of its reward, e.g. {hps = 1, ctr = 1}; with 0 it is asked and shown, and decides nothing. Unset: those
    of `type`."""
    type: Literal["hps", "hpsv2", "ctr", "hps_ctr"] | None = None
    """Shorthand for `weights`; with neither: hps_ctr."""
    scaling: Literal["running", "fixed"] = "running"
    """`running`: each reward over its pooled within-group deviation.
    `fixed`: clip((hps−0.15)/0.2, 0, 1) with ctr, averaged by weight, as in FEAST's train_dpo_flux_kontext.py; or one
    reward as it is."""
    empty_prompt: str = "{food_name}"
    """Text that rewards read in place of an empty instruction; {food_name}, or any other column of the item, is filled in."""

    @property
    def mix(self) -> dict[str, float]:
        """Judge → weight, of those that decide."""
        return {name: weight for name, weight in self._all.items() if weight}

    @property
    def names(self) -> tuple[str, ...]:
        """Every judge that is asked."""
        return tuple(self._all)

    @property
    def _all(self) -> dict[str, float]:
        return self.weights or dict.fromkeys(SHORTHANDS[self.type or "hps_ctr"], 1.0)

    def conflicts(self) -> Iterator[str]:
        if self.weights is not None and self.type is not None:
            yield f'weights = {self.weights} and type = "{self.type}" say the same thing: unset one of them'
        if self.weights == {}:
            yield "weights = {} names no reward; give at least one, e.g. {hps = 1}"
        elif not self.mix:
            yield f"weights = {self.weights} are all 0, so nothing would decide; give one reward a weight above 0"
        if self.scaling == "fixed" and len(self.mix) > 1 and set(self.mix) != {"hps", "ctr"}:
            formula = "a formula for hps with ctr (FEAST's train_dpo_flux_kontext.py)"
            yield f'scaling = "fixed" is {formula}, but weights = {self.mix}; use "running"'
        template_parts(self.empty_prompt)

    def unfilled(self, items: str | None) -> Iterator[str]:
        """A line where empty_prompt names columns, and there are no `items` (data.item_metadata) that have any."""
        columns = [column for _, column in template_parts(self.empty_prompt) if column]
        if items is None and columns and self.empty_prompt != type(self).model_fields["empty_prompt"].default:
            names = f"reward.empty_prompt = {self.empty_prompt!r} names {', '.join(columns)}"
            yield f"{names}, but no data.item_metadata is given that has such a column: give one, or a fixed text"


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: it is empty, or all blanks and characters without a width."""
    return not any(one.isprintable() and not one.isspace() for one in text)


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """(text, the item column after it or None) of a reward.empty_prompt, in order; `{{` and `}}` are braces.

    Raises: ValueError where it is blank, or a brace is not closed, or holds anything but the name of a column.
    """
    if is_blank(template):
        raise ValueError(f"empty_prompt = {template!r} is blank: give a text, or the name of a column in braces")
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"empty_prompt = {template!r}: {error}; write {{{{ and }}}} for braces") from error
    for _, column, spec, conversion in parts:
        if column is not None and (
            is_blank(column) or column.isdigit() or set(column) & set(".[]") or spec or conversion
        ):
            raise ValueError(
                f"empty_prompt = {template!r}: write the name of a column in braces, like {{food_name}}, and nothing else; "
                "{{ and }} are braces"
            )
    return [(text, column) for text, column, _, _ in parts]


class JudgeConfig(Section):
    """One judge: a Serve deployment of ours."""

    reads_prompt: ClassVar[bool] = True
    reads_sources: ClassVar[bool] = False
    """Whether it is sent what the media were made from."""
    frames: ClassVar[int] = 1
    """Frames of a medium that it reads, at most."""
    item_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of the item without which it cannot answer."""
    source: ClassVar[str]
    """The key that says what judges."""

    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    """Above `replicas`: Serve adds and removes replicas between the two by load."""
    target_ongoing_requests: float | None = Field(None, gt=0)
    """Requests per replica that autoscaling aims at; default: two full batches."""
    num_cpus: float = Field(0.2, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    max_batch_size: int = Field(16, ge=1)
    batch_wait_s: float = Field(0.02, ge=0)
    max_ongoing_requests: int = Field(64, ge=1)
    max_queued_requests: int = Field(256, ge=-1)

    @property
    def external(self) -> str | None:
        """Address of a service elsewhere that is asked directly; None where a deployment of ours asks it, or judges."""
        return None if self.source == "url" else getattr(self, "url", None)

    @property
    def address(self) -> str | None:
        """Of the service elsewhere that is asked, directly or by a deployment of ours."""
        return getattr(self, "url", None)

    @property
    def deployable(self) -> bool:
        """Whether there is something to deploy."""
        return self.external is None and getattr(self, self.source) is not None

    def conflicts(self) -> Iterator[str]:
        if self.max_ongoing_requests < self.max_batch_size:
            yield (
                f"max_ongoing_requests = {self.max_ongoing_requests} is below max_batch_size = {self.max_batch_size}: "
                "batches would never fill"
            )
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            yield f"max_replicas = {self.max_replicas} is below replicas = {self.replicas}"


class ModelJudgeConfig(JudgeConfig):
    """A judge with a checkpoint, or an external HTTP service that has it, at `url`."""

    source: ClassVar[str] = "path"

    path: LocalPath | None = None
    url: str | None = None
    """Address of a service elsewhere that speaks this judge's HTTP contract, without the last path segment."""
    token: str | None = Field(None, exclude=True)
    """Bearer token that the service at `url` asks for. Never written to a file."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    pad_batches: bool = False
    """Pad every forward to max_batch_size rows: no bit of a score then depends on its neighbours, only on its place.
    With max_batch_size = 1 there is one place, so that equal questions get equal bits."""

    @property
    def padded_rows(self) -> int | None:
        """Rows of every forward; None: as many as there are."""
        return self.max_batch_size if self.pad_batches else None


class HPSJudgeConfig(ModelJudgeConfig):
    version: Literal["v2.0", "v2.1"] = "v2.1"


class CTRJudgeConfig(ModelJudgeConfig):
    reads_prompt: ClassVar[bool] = False
    item_columns: ClassVar[tuple[str, ...]] = ("food_name", "food_type", "city_name", "shop_name")


class CLIPJudgeConfig(ModelJudgeConfig):
    """PickScore and CLIP score. `path`: a CLIPModel folder of transformers."""

    processor: LocalPath | None = None
    """Folder of the CLIP processor where `path` holds none."""


class AestheticJudgeConfig(ModelJudgeConfig):
    """LAION aesthetic. `path`: a CLIP ViT-L/14 folder of transformers."""

    reads_prompt: ClassVar[bool] = False
    head: LocalPath | None = None
    """The predictor's weights: sac+logos+ava1-l14-linearMSE.pth or a .safetensors of it."""
    processor: LocalPath | None = None
    """Folder of the CLIP processor where `path` holds none."""

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if (self.path is None) != (self.head is None) and self.url is None:
            yield f"path = {self.path!r} and head = {self.head!r}: the aesthetic score needs both"


class PythonJudgeConfig(JudgeConfig):
    """A function of yours: `(images, prompts, sources, items) -> scores`, called with batches in a Serve replica.

    One of three arguments, `(images, prompts, items)`, is not sent sources.
    """

    source: ClassVar[str] = "function"
    function: str | None = Field(None, pattern=r"^[\w.]+:[\w.]+$")
    """Import path "package.module:function", importable on every node."""


class HTTPJudgeConfig(JudgeConfig):
    """Any service that answers POST {"items": [{"image_base64", "prompt", "item"}]} with {"scores": [one number each]}.

    It is asked in batches, from a Serve replica.
    """

    source: ClassVar[str] = "url"
    url: Address | None = None
    """The full address that batches are posted to."""
    token: str | None = Field(None, exclude=True)
    """Bearer token that the service asks for. Never written to a file."""
    send_source: bool = False
    """Send the source photo too, as "source_base64" (a list where there are several)."""
    timeout_s: float = Field(60.0, gt=0)
    """One batch."""


class FilterJudgeConfig(ModelJudgeConfig):
    enabled: bool = True
    api_base: Address | None = None
    """An OpenAI-compatible server instead of the built-in engine (also QWEN_API_BASE, QWEN_API_KEY, QWEN_MODEL_NAME)."""
    api_timeout_s: float = Field(120.0, gt=0)
    """One request to the server at `api_base`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    model_name: str = "Qwen/Qwen3-VL-32B-Instruct"
    min_pass_probability: float = Field(0.5, ge=0, le=1)
    system_prompt: str | None = None
    """The model's instructions. Default: check text and logos, structure, artefacts and, with the source, whether the subject
    was kept."""
    reason_prompt: str | None = None
    """What asks for the reason after FAIL; default: one short sentence."""
    send_source: bool = False
    """Give the model the source photo beside the edit, which the check of the subject needs."""
    tensor_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float = Field(0.3, gt=0, le=1)
    max_model_len: int = Field(4096, ge=256)
    max_reason_tokens: int = Field(64, ge=0)

    @property
    def address(self) -> str | None:
        return self.url or self.api_base

    @property
    def deployable(self) -> bool:
        return self.url is None and bool(self.path or self.api_base)

    def from_environment(self) -> Self:
        """Itself; if it names no path, url or api_base: with QWEN_API_BASE and QWEN_MODEL_NAME, where these are set."""
        base = os.environ.get("QWEN_API_BASE")
        if not base or self.path or self.url or self.api_base:
            return self
        model_name = os.environ.get("QWEN_MODEL_NAME") or self.model_name
        return self.model_copy(update={"api_base": base, "model_name": model_name})

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.tensor_parallel_size > 1 and self.num_gpus not in (0, self.tensor_parallel_size):
            sizes = f"tensor_parallel_size = {self.tensor_parallel_size}, but num_gpus = {self.num_gpus:g}"
            yield f"{sizes}: a replica needs one whole GPU for each part"
        for key in ("system_prompt", "reason_prompt"):
            if (text := getattr(self, key)) is not None and is_blank(text):
                yield f"{key} = {text!r} is blank: write it, or leave the key out for the built-in one"


class JudgesConfig(Section):
    hps: HPSJudgeConfig = HPSJudgeConfig()
    ctr: CTRJudgeConfig = CTRJudgeConfig()
    pickscore: CLIPJudgeConfig = CLIPJudgeConfig()
    clip: CLIPJudgeConfig = CLIPJudgeConfig()
    aesthetic: AestheticJudgeConfig = AestheticJudgeConfig()
    python: dict[JudgeName, PythonJudgeConfig] = Field(default_factory=dict)
    """Functions of yours as judges, by the name that reward.weights uses: [judges.python.NAME]."""
    http: dict[JudgeName, HTTPJudgeConfig] = Field(default_factory=dict)
    """Services elsewhere as judges, by the name that reward.weights uses: [judges.http.NAME]."""
    filter: FilterJudgeConfig = FilterJudgeConfig()
    max_failure_rate: float = Field(0.5, ge=0, le=1)
    """Share of failed calls of one judge, over its last 50, above which the run stops."""
    retries: int = Field(2, ge=0)
    timeout_s: float = Field(120.0, gt=0)
    deploy_timeout_s: float = Field(1800.0, gt=0)

    @property
    def rewards(self) -> dict[str, JudgeConfig]:
        """Every reward judge by the name that reward.weights uses."""
        return {**self._built_in, **self.python, **self.http}

    def to_deploy(self, names: Iterable[str]) -> dict[str, JudgeConfig]:
        """Those of `names` that are ours to deploy, the filter first: its engine loads longest."""
        ordered = sorted(names, key=lambda name: name != "filter")
        return {name: self[name] for name in ordered if self[name].deployable}

    def __getitem__(self, name: str) -> JudgeConfig:
        return self.filter.from_environment() if name == "filter" else self.rewards[name]

    def key(self, name: str) -> str:
        """The dotted key of a judge's table, for messages."""
        table = next((table for table in ("python", "http") if name in getattr(self, table)), None)
        return f"judges.{table}.{name}" if table else f"judges.{name}"

    @property
    def _built_in(self) -> dict[str, JudgeConfig]:
        return {name: value for name, value in self if isinstance(value, JudgeConfig) and name != "filter"}

    def unusable(self, names: Iterable[str], asked_by: str) -> Iterator[str]:
        """Those reward judges of `names`, which the key `asked_by` asks for, that cannot answer; a line each."""
        for name in names:
            if name not in self.rewards:
                near = difflib.get_close_matches(name, self.rewards, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self.rewards)}"
                yield f"{asked_by} names {name!r}, which is no judge; {hint}"
            elif not self[name].external and not self[name].deployable:
                key = self.key(name)
                yield f"the reward {name!r} needs {key}.{self[name].source} (what to deploy) or {key}.url"

    def conflicts(self) -> Iterator[str]:
        taken = {*self._built_in, "filter", "hpsv2", *SCALARS}
        for table in ("python", "http"):
            for name, judge in getattr(self, table).items():
                if name in taken:
                    yield f"{table}.{name}: the name {name!r} belongs to another judge or metric; choose another"
                taken.add(name)
                if getattr(judge, judge.source) is None:
                    yield f"{table}.{name} has no {judge.source}"

    def problems(self, reward: RewardConfig) -> Iterator[str]:
        """What keeps these judges from giving `reward` its scores, a line each."""
        yield from self.unusable(reward.names, "reward.weights")
        if self.filter.enabled and not (self.filter.url or self["filter"].deployable):
            remedy = "path (a Qwen3-VL folder), url or api_base; or set judges.filter.enabled = false"
            yield f"judges.filter needs {remedy}"


class ServeConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    route_prefix: str = Field("", pattern=r"^(/[A-Za-z0-9_-]+)*$")
    """Put before /hpsv2, /ctr, /filter, …: a second run on the same cluster needs its own, like /second."""
    token: str | None = Field(None, exclude=True)
    """Bearer token asked of every HTTP request; also RLHF_SERVE_TOKEN. Never written to a file."""
