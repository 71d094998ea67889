"""The command line: overrides, one message for all problems, absolute paths, the submitted-job rule."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from jobs import schema_keys
from jobs.cli import OLD_FLAGS, RENAMED, SUBMITTED_JOB, ConfigError, parse, resolved_toml
from jobs.recipes import EditRecipe, EvaluateRecipe, ExtractRecipe, OnlineDPORecipe, ServeRecipe
from rlhf.training_tables import TrainableTable

RECIPE = """
[model]
path = "kontext"
[data]
path = "photos/train_metadata.jsonl"
[reward]
type = "hps"
[judges]
hps.path = "hps.pt"
filter.enabled = false
"""
LORA = ["--trainable.kind", "lora"]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> str:
    monkeypatch.delenv(SUBMITTED_JOB, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return "recipe.toml"


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(OnlineDPORecipe, list(argv))
    head, *lines = str(caught.value).splitlines()
    assert head == f"the configuration has {len(lines)} problem{'s' if len(lines) > 1 else ''}:"
    return [line.strip() for line in lines]


def test_a_recipe_alone(recipe):
    arguments = parse(OnlineDPORecipe, ["--config", recipe])
    assert not arguments.dry_run
    assert arguments.config.sampling.steps == 16 and arguments.config.reward.type == "hps"


@pytest.mark.parametrize(
    ("argv", "get", "value"),
    [
        (["--trainer.learning_rate", "3e-6"], lambda c: c.trainer.learning_rate, 3e-6),
        (["--trainer.learning_rate=3e-6"], lambda c: c.trainer.learning_rate, 3e-6),
        (["--rollout.lookahead", "2"], lambda c: c.rollout.lookahead, 2),
        (["--model.guidance_scale", "-1"], lambda c: c.model.guidance_scale, -1.0),
        (["--run.save_latents", "false"], lambda c: c.run.save_latents, False),
        (["--run.save_latents", "False"], lambda c: c.run.save_latents, False),
        (["--trainer.scale_lr"], lambda c: c.trainer.scale_lr, True),
        (["--run.name", "5"], lambda c: c.run.name, "5"),
        (["--run.name", "true"], lambda c: c.run.name, "true"),
        (["--run.name", '"quoted = x"'], lambda c: c.run.name, "quoted = x"),
        (["--run.name=a=b"], lambda c: c.run.name, "a=b"),
        (["--trainer.ema_decay", "0.9", "--trainer.ema_decay", "none"], lambda c: c.trainer.ema_decay, None),
        ([*LORA, "--trainable.rank", "3"], lambda c: c.trainable, TrainableTable(kind="lora", rank=3)),
        ([*LORA, "--trainable.rank", "3", "--trainable.rank", "none"], lambda c: c.trainable.rank, 16),
        (LORA, lambda c: c.trainable, TrainableTable(kind="lora", rank=16, alpha=16.0)),
        ([*LORA, "--trainable.targets", '["to_q", "to_k"]'], lambda c: c.trainable.targets, ("to_q", "to_k")),
        ([*LORA, "--trainable.patterns", '["a.*"]'], lambda c: c.trainable.patterns, ("a.*",)),
    ],
)
def test_override_values(recipe, argv, get, value):
    got = get(parse(OnlineDPORecipe, ["--config", recipe, *argv]).config)
    assert got == value and type(got) is type(value)


def test_a_valueless_boolean_turns_a_false_in_the_recipe_to_true(recipe):
    Path(recipe).write_text(RECIPE + "[run]\nsave_latents = false\n")
    assert not parse(OnlineDPORecipe, ["--config", recipe]).config.run.save_latents
    assert parse(OnlineDPORecipe, ["--config", recipe, "--run.save_latents", "--dry-run"]).config.run.save_latents


def test_overrides_beat_the_recipe_and_leave_the_rest_of_its_table(recipe):
    config = parse(OnlineDPORecipe, ["--config", recipe, "--model.width", "96", "--dry-run"])
    assert config.dry_run and config.config.model.width == 96
    assert config.config.model.path.endswith("kontext")


def test_every_problem_in_one_message_with_file_section_key_value_and_remedy(recipe):
    Path(recipe).write_text(
        RECIPE.replace("[reward]", "[sampling]\nsteps = 0\nsteps_per = 3\n[rewards]\na = 1\n[reward]")
    )
    found = problems("--config", recipe, "--data.fit", "crp", "--trainer.rnks", "2", "--h", "64", "stray")
    assert found == [
        "recipe.toml: [sampling] steps_per = 3: unknown key; did you mean sampling.steps?",
        "recipe.toml: rewards = {'a': 1}: unknown key; did you mean reward?",
        "command line: [trainer] rnks = '2': unknown key; did you mean trainer.ranks?",
        "command line: h = '64': unknown key; did you mean model.height?",
        "command line: stray: is no option; write --section.key VALUE",
        "command line: [data] fit = 'crp': should be 'crop', 'pad' or 'stretch'; did you mean 'crop'?",
        "recipe.toml: [sampling] steps = 0: should be greater than or equal to 1",
    ]


def test_two_recipes_are_refused(recipe):
    with pytest.raises(ConfigError, match=r"command line: --config is given 2 times; give one recipe"):
        parse(OnlineDPORecipe, ["--config", recipe, "--config", recipe])


def test_an_argument_that_is_not_utf_8_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"command line: 'a\\udcff' is not UTF-8"):
        parse(OnlineDPORecipe, ["--config", recipe, "--run.name", "a\udcff"])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("cluster.num_cpus", "0", "should be greater than or equal to 1"),
        ("cluster.num_cpus", "1.5", "should be a valid integer"),
        ("trainer.adam_beta1", "1", "should be less than 1"),
        ("trainer.adam_beta2", "-0.1", "should be greater than or equal to 0"),
        ("trainer.weight_decay", "-1", "should be greater than or equal to 0"),
        ("data.cache", '""', "is empty: give a path"),
        ("trainable.targets", "to_q,to_k", """is a list: write '["to_q", "to_k"]'"""),
        ("trainer.lr_step_rules", "1:10,0.1", 'belongs to lr_scheduler = "piecewise_constant"'),
    ],
)
def test_what_would_fail_later_is_refused_at_once(recipe, key, value, said):
    [problem] = problems("--config", recipe, f"--{key}", value)
    assert said in problem


def test_a_section_that_is_misspelt_or_no_table_is_told(recipe):
    Path(recipe).write_text(f"{RECIPE}[trainr]\nranks = 2\n")
    assert problems("--config", recipe, "--samplers", "4") == [
        "recipe.toml: trainr = {'ranks': 2}: unknown key; did you mean trainer?",
        "command line: samplers = 4: is a table: give its keys, like --samplers.KEY VALUE or [samplers] in a recipe",
    ]


@pytest.mark.parametrize(
    ("flag", "key"),
    [("beta", "dpo.beta"), ("reward_type", "reward.type"), ("max_train_steps", "trainer.max_train_steps")],
)
def test_flags_of_the_old_script_lead_to_their_keys(recipe, flag, key):
    assert problems("--config", recipe, f"--{flag}", "1") == [
        f"command line: {flag} = '1': unknown key; did you mean {key}?"
    ]


def test_a_key_that_was_renamed_is_named_as_it_is_now(recipe):
    Path(recipe).write_text(f'{RECIPE}[reward.hps]\nempty_prompt = "a dish"\n')
    found = problems("--config", recipe, "--reward.hps.empty_prompt", "food")
    assert found == [
        "recipe.toml: [reward] hps = {'empty_prompt': 'a dish'}: unknown key; reward.hps.empty_prompt is now reward.empty_prompt",
        "command line: [reward.hps] empty_prompt = 'food': unknown key; it is now reward.empty_prompt",
    ]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("trainer.learning_rate", "true", "give a number"),
        ("trainer.ranks", "true", "give a number"),
        ("trainer.learning_rate", "inf", "finite number"),
        ("model.guidance_scale", "nan", "finite number"),
        ("cluster.card", "80 GB", 'write the memory of a card like "80GB"'),
        ("trainer.gradient_checkpointing", "false", "should be 'all', 'half' or 'none'"),
    ],
)
def test_values_that_are_no_such_value_are_refused(recipe, key, value, said):
    [problem] = problems("--config", recipe, f"--{key}", value)
    assert said in problem and "did you mean" not in problem


def test_a_renamed_key_is_told_by_its_new_name(recipe):
    Path(recipe).write_text(RECIPE + "[trainer.lora]\nrank = 3\n")
    assert problems("--config", recipe, "--trainer.lora.alpha", "8") == [
        "recipe.toml: [trainer] lora = {'rank': 3}: unknown key; it is now trainable; "
        "trainer.lora.rank is now trainable.rank; trainer.lora.alpha is now trainable.alpha; "
        "trainer.lora.targets is now trainable.targets",
        "command line: [trainer.lora] alpha = '8': unknown key; it is now trainable.alpha",
    ]


RECIPES = [
    schema_keys.keys(schema) for schema in (OnlineDPORecipe, ExtractRecipe, EvaluateRecipe, EditRecipe, ServeRecipe)
]


def test_every_key_that_is_named_is_one_of_some_recipe_and_no_renamed_one_is():
    for new in (*RENAMED.values(), *OLD_FLAGS.values()):
        assert any(new in fields for fields in RECIPES), new
    assert not [old for old in RENAMED if any(old in fields for fields in RECIPES)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rollout.steps", "sampling.steps"),
        ("rollout.guidance_scale", "model.guidance_scale"),
        ("rollout.timeout_s", "samplers.timeout_s"),
        ("trainer.mixed_precision", "model.dtype"),
    ],
)
def test_keys_that_moved_to_another_table_are_told(recipe, old, new):
    [problem] = problems("--config", recipe, f"--{old}", "1")
    assert problem.endswith(f"unknown key; it is now {new}")


def test_required_keys_are_named_even_where_their_table_is_missing(recipe):
    assert problems("--reward.type", "hps") == [
        "command line: [model] path: is required; add it to the recipe or pass --model.path VALUE",
        "command line: [data] path: is required; add it to the recipe or pass --data.path VALUE",
    ]


def test_rules_between_keys_say_both_values(recipe):
    [problem] = problems("--config", recipe, "--rollout.lookahead", "3", "--rollout.max_age", "1")
    both = "recipe.toml with the command line"
    assert problem.startswith(f"{both}: [rollout]: max_age = 1 is below lookahead + publish_every - 1 = 3 + 1 - 1")
    [problem] = problems("--config", recipe, "--trainable.rank", "8")
    assert problem.endswith(
        '[trainable]: rank = 8 belongs to LoRA, but kind = "full": set kind = "lora" or leave rank out'
    )
    for options, chosen in (((), '"full"'), ((*LORA, "--trainable.patterns", '["proj_out"]'), '"lora" with patterns')):
        [problem] = problems("--config", recipe, "--run.lora_layouts", '["kohya"]', *options)
        assert problem.endswith(
            f"run.lora_layouts = ['kohya'] are layouts of a LoRA alone, but trainable.kind = {chosen} trains other weights: "
            "leave them out"
        )


def test_sizes_of_their_own_and_a_size_given_do_not_fit(recipe):
    auto = ["--model.size", "auto", "--trainer.train_batch_size", "1"]
    [problem] = problems("--config", recipe, *auto, "--model.height", "64")
    assert problem.endswith('size = "auto" takes each picture\'s own size: leave out height = 64')


def test_a_key_of_several_types_is_one_problem(recipe):
    [problem] = problems("--config", recipe, "--trainer.timestep_shift", "token")
    assert problem.startswith("command line: [trainer] timestep_shift = 'token': should be a valid number")
    assert problem.endswith(" or should be 'tokens'")


def test_a_key_without_a_value(recipe):
    assert problems("--config", recipe, "--sampling.steps", "--dry-run") == [
        "command line: --sampling.steps: has no value; write --sampling.steps VALUE (int)"
    ]


def test_a_recipe_that_is_not_there_or_no_toml(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"recipes\.toml: no such file; did you mean recipe\.toml\?"):
        parse(OnlineDPORecipe, ["--config", "recipes.toml"])
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match=r"broken\.toml: cannot be read as TOML: .*line 1"):
        parse(OnlineDPORecipe, ["--config", "broken.toml"])


def test_relative_paths_become_absolute(recipe, tmp_path):
    config = parse(
        OnlineDPORecipe, ["--config", recipe, "--eval.path", "../e.jsonl", "--data.item_metadata", "/m.csv"]
    ).config
    assert config.model.path == str(tmp_path / "kontext")
    assert config.data.path == str(tmp_path / "photos/train_metadata.jsonl")
    assert config.judges.hps.path == str(tmp_path / "hps.pt")
    assert (config.run.dir, config.data.cache) == (str(tmp_path / "runs"), str(tmp_path / "cache"))
    assert config.eval.path == str(tmp_path.parent / "e.jsonl") and config.data.item_metadata == "/m.csv"


def test_relative_paths_are_errors_in_a_submitted_job(recipe, monkeypatch):
    monkeypatch.setenv(SUBMITTED_JOB, "{}")
    found = problems(
        "--config", recipe, "--run.dir", "out", "--data.item_metadata", "items.csv", "--eval.path", "e.jsonl"
    )
    named = [line.split(": is relative")[0] for line in found]
    assert named == [
        "command line: [run] dir = 'out'",
        "recipe.toml: [model] path = 'kontext'",
        "recipe.toml: [data] path = 'photos/train_metadata.jsonl'",
        "command line: [data] item_metadata = 'items.csv'",
        "default: [data] cache = 'cache'",
        "recipe.toml: [judges.hps] path = 'hps.pt'",
        "command line: [eval] path = 'e.jsonl'",
    ]
    assert all("give an absolute path that every node sees, e.g. --" in line for line in found)


def test_absolute_paths_pass_in_a_submitted_job(recipe, monkeypatch):
    monkeypatch.setenv(SUBMITTED_JOB, "{}")
    argv = [
        "--run.dir",
        "/r",
        "--model.path",
        "/m",
        "--data.path",
        "/d",
        "--data.cache",
        "/c",
        "--judges.hps.path",
        "/h",
    ]
    assert parse(OnlineDPORecipe, ["--config", recipe, *argv]).config.run.dir == "/r"


def test_resolved_toml_reads_back_to_the_same_configuration(recipe, tmp_path):
    argv = ["--config", recipe, *LORA, "--trainable.rank", "3", "--run.name", 'a"b']
    config = parse(OnlineDPORecipe, argv).config
    text = resolved_toml(config)
    (tmp_path / "resolved.toml").write_text(text)
    assert parse(OnlineDPORecipe, ["--config", "resolved.toml"]).config == config
    assert "max_age" not in text and tomllib.loads(text)["trainable"]["rank"] == 3


SCRIPT = """
from jobs.cli import parse, resolved_toml, run_main
from jobs.recipes import OnlineDPORecipe
def main():
    print(resolved_toml(parse(OnlineDPORecipe, description="Trains at 100 %.").config))
    raise KeyError("a bug")
run_main(main)
"""


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *argv], capture_output=True, text=True, env={"PYTHONPATH": root}
    )


def test_a_job_prints_user_errors_without_a_traceback_and_bugs_with_one(recipe):
    bad = run("--config", recipe, "--trainer.ranks", "0")
    assert bad.returncode == 2 and "[trainer] ranks = '0'" not in bad.stderr and "Traceback" not in bad.stderr
    assert "command line: [trainer] ranks = 0: should be greater than or equal to 1" in bad.stderr
    bug = run("--config", recipe)
    assert bug.returncode == 1 and "KeyError: 'a bug'" in bug.stderr


def test_help_lists_every_key_with_type_default_and_meaning(recipe):
    text = run("--help").stdout
    assert "Trains at 100 %." in text
    assert "--model.path  str  (required)\n      Folder in the diffusers layout." in text
    assert "--data.fit  'crop' | 'pad' | 'stretch'  ('crop')" in text
    assert "--trainable.targets  list of str | none  (none)" in text


HPS = ["--reward.type", "hps", "--judges.hps.path", "/h"]
BASE = ["--model.path", "/m", "--data.path", "/d", "--judges.filter.enabled", "false"]


def test_judges_that_the_user_names(tmp_path):
    named = ["--judges.python.warm.function", "my.module:warm", "--judges.http.fresh.url", "https://host/score_batch"]
    config = parse(OnlineDPORecipe, [*BASE, *named, "--reward.weights", "{warm = 2, fresh = 0.5}"]).config
    assert config.reward.mix == {"warm": 2.0, "fresh": 0.5}
    assert config.judges["warm"].function == "my.module:warm"
    assert config.judges.key("fresh") == "judges.http.fresh"
    assert list(config.judges.to_deploy(config.judge_names)) == ["warm", "fresh"]
    (tmp_path / "again.toml").write_text(resolved_toml(config))
    assert parse(OnlineDPORecipe, ["--config", str(tmp_path / "again.toml")]).config == config


WRONG_JUDGES = {
    "unknown_key": (["--judges.python.warm.functio", "a:b"], "did you mean judges.python.NAME.function?"),
    "no_function": (["--judges.python.warm.num_cpus", "1"], "python.warm has no function"),
    "no_import_path": (["--judges.python.warm.function", "warm"], "[judges.python.warm] function = 'warm'"),
    "taken_name": (["--judges.http.hps.url", "http://x"], "the name 'hps' belongs to another judge"),
    "a_metrics_name": (["--judges.http.mean.url", "http://x"], "the name 'mean' belongs to another judge or metric"),
    "another_script": (["--judges.python.清晰 度.function", "a:b"], "清晰 度 = '清晰 度': a judge's name is 1 to 40"),
    "a_path": (["--judges.http.a/x.url", "http://x"], "a/x = 'a/x': a judge's name is 1 to 40"),
    "capitals": (["--judges.python.Warm.function", "a:b"], "Warm = 'Warm': a judge's name is 1 to 40"),
    "too_long": ([f"--judges.python.{'x' * 41}.function", "a:b"], "a judge's name is 1 to 40"),
    "no_address": (["--judges.http.x.url", "judges:8000/score"], "is no address: write http://host:port/path"),
    "no_host": (["--judges.http.x.url", "http://"], "is no address: write http://host:port/path"),
    "no_port": (["--judges.filter.api_base", "http://x:port/v1"], "is no address: Invalid port: 'port'"),
    "a_route_in_another_script": (["--serve.route_prefix", "/产品"], "route_prefix = '/产品'"),
    "unknown_reward": (["--reward.weights", "{pikscore = 1}"], "did you mean 'pickscore'?"),
    "no_source": (["--reward.weights", "{pickscore = 1}"], "judges.pickscore.path"),
    "half_a_judge": (["--judges.aesthetic.path", "/x"], "the aesthetic score needs both"),
    "no_weight": (["--reward.weights", "{hps = 0}"], "are all 0, so nothing would decide"),
    "below_0": (["--reward.weights", "{hps = -1}"], "should be greater than or equal to 0"),
    "no_rewards": (["--reward.weights", "{}"], "names no reward"),
    "twice": (["--reward.weights", "{hps = 1}", "--reward.type", "hps"], "unset one of them"),
    "fixed_mix": (
        ["--reward.weights", "{hps = 1, clip = 1}", "--reward.scaling", "fixed"],
        "is a formula for hps with ctr",
    ),
    "replicas": (
        ["--judges.hps.replicas", "3", "--judges.hps.max_replicas", "2"],
        "max_replicas = 2 is below replicas = 3",
    ),
    "tensor_parallel": (
        ["--judges.filter.tensor_parallel_size", "2", "--judges.filter.num_gpus", "1"],
        "tensor_parallel_size = 2, but num_gpus = 1",
    ),
}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\\b", "x" * 200, " x", "a\nb"])
def test_a_run_is_named_like_a_folder(name):
    with pytest.raises(ConfigError, match=r"\[run\]:? ?name = .* cannot name a folder"):
        parse(OnlineDPORecipe, [*BASE, "--run.name", name])
    assert parse(OnlineDPORecipe, [*BASE, "--run.name", "春 卷 🥟", *HPS]).config.run.name == "春 卷 🥟"


@pytest.mark.parametrize("path", ['"a\\u0000b"', "x" * 256, f"fine/{'汉' * 86}/x"])
@pytest.mark.parametrize("key", ["run.dir", "data.path", "judges.hps.path"])
def test_what_can_be_no_path_is_told(key, path):
    with pytest.raises(ConfigError, match="no path can be this"):
        parse(OnlineDPORecipe, [*BASE, *HPS, f"--{key}", path])


def test_a_picture_is_no_instruction():
    for name in ("image", "image_id"):
        with pytest.raises(ConfigError, match=f"prompt_column = '{name}': holds no instruction"):
            parse(OnlineDPORecipe, [*BASE, *HPS, "--data.prompt_column", name])


TEMPLATES = {
    "a photo of {dish": "braces",
    "} {": "braces",
    "{}": "name of a column",
    "{ }": "name of a column",
    "{0}": "name of a column",
    "{food_name.__class__}": "name of a column",
    "{food_name[0]}": "name of a column",
    "{food_name!r}": "name of a column",
    "{food_name:>10}": "name of a column",
    "{food_name:{width}}": "name of a column",
    "{food_name!z}": "empty_prompt",
    "": "is blank",
    " \u200b": "is blank",
    "a photo of {dish}": "names dish, but no data.item_metadata is given",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_checked_with_the_recipe(template, tmp_path):
    more = tmp_path / "more.toml"
    more.write_text(tomli_w.dumps({"reward": {"empty_prompt": template, "type": "hps"}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="empty_prompt") as caught:
        parse(OnlineDPORecipe, [*BASE, "--judges.hps.path", "/h", "--config", str(more)])
    assert TEMPLATES[template] in str(caught.value)


def test_a_blank_prompt_of_the_filter_is_no_prompt():
    for key in ("system_prompt", "reason_prompt"):
        with pytest.raises(ConfigError, match=f"{key} = ' ' is blank"):
            parse(OnlineDPORecipe, [*BASE, *HPS, f"--judges.filter.{key}", " "])


@pytest.mark.parametrize(("arguments", "message"), WRONG_JUDGES.values(), ids=WRONG_JUDGES)
def test_what_is_wrong_with_judges_is_said(arguments, message):
    with pytest.raises(ConfigError) as caught:
        parse(OnlineDPORecipe, [*BASE, *arguments])
    assert message in str(caught.value)
