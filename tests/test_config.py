"""Shipped configs compose; arms differ in one group; wrong input is one line that names value, rule and mend."""

import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from helpers import composed, tiny_run

from ropewalk.config import CONFIG_DIR
from ropewalk.config.rules import validate_train
from ropewalk.config.train import TrainConfig
from ropewalk.rope import RopeChain

EXPERIMENTS = sorted(
    str(path.relative_to(CONFIG_DIR / "experiment").with_suffix(""))
    for path in (CONFIG_DIR / "experiment").rglob("*.yaml")
)
BASES = {"llama3_8b_64k", "demo/extend"}
MANDATORY = {"sft_64k": ["start_from.run=outputs/cope20"]}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_resolves(experiment):
    config = composed("train", f"+experiment={experiment}", *MANDATORY.get(experiment, []))
    inputs = {key: getattr(config.model, key) for key in ("head_dim", "theta", "pretrained_length")}
    RopeChain(config.rope.chain).spectrum(**inputs, trained_length=config.data.sequence_length)


@pytest.mark.parametrize("debug", sorted(p.stem for p in (CONFIG_DIR / "debug").glob("*.yaml")))
def test_every_debug_config_composes(debug):
    assert composed("train", "+experiment=demo/cope", f"+debug={debug}").tracker.name == "none"


@pytest.mark.parametrize("group", ["rope", "model", "data", "trainer", "deepspeed", "tracker", "cluster"])
def test_every_training_group_option_composes(group):
    for path in (CONFIG_DIR / group).glob("*.yaml"):
        mandatory = ["data.store=x", "data.sequence_length=64"] if (group, path.stem) == ("data", "packed") else []
        assert isinstance(composed("train", f"{group}={path.stem}", *mandatory), TrainConfig)


@pytest.mark.parametrize("corpus", sorted(p.stem for p in (CONFIG_DIR / "corpus").glob("*.yaml")))
def test_every_corpus_composes(corpus):
    config = composed("prepare", f"corpus={corpus}", "corpus.paths=[x]", "sequence_lengths=[64]")
    assert config.corpus.name == corpus


@pytest.mark.parametrize("test_time", sorted(p.stem for p in (CONFIG_DIR / "test_time").glob("*.yaml")))
def test_every_test_time_composes(test_time):
    config = composed("evaluate", f"test_time={test_time}", "checkpoint=x", "output=x", "documents=x")
    yarn = [{"method": "yarn", "factor": 4.0, "original_max_position_embeddings": "trained_length"}]
    follow = {"factor": "length_over_trained"}
    expected = {
        "none": ([], []), "auto": ([], yarn), "yarn4": (yarn, yarn), "yarn_follow": ([], [{**yarn[0], **follow}]),
        "pi_follow": ([], [{"method": "pi", **follow}]), "ntk_follow": ([], [{"method": "ntk", **follow}]),
        "no_temperature": ([{"method": "temperature", "exponent": 0.0}],) * 2,
    }[test_time]  # fmt: skip
    assert (config.test_time.within, config.test_time.beyond) == expected


def test_cope20_is_the_published_recipe():
    config = composed("train", "+experiment=cope20")
    trainer, data = config.trainer, config.data
    assert trainer.global_batch_size * data.sequence_length == 4_194_304  # 64 x 65,536
    assert trainer.max_steps * trainer.global_batch_size * data.sequence_length == 20_971_520_000
    assert (trainer.learning_rate, trainer.min_lr_ratio, trainer.warmup_ratio) == (1e-5, 0.1, 0.1)
    assert (trainer.adam_beta1, trainer.adam_beta2, trainer.weight_decay, trainer.gradient_clipping) == (
        0.9,
        0.95,
        0.1,
        1.0,
    )
    assert (trainer.dtype, trainer.activation_checkpointing) == ("bfloat16", True)
    assert str(RopeChain(config.rope.chain)) == "abf(theta=1e7) > cope(clip=20)"
    assert sum(data.mixture.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(("experiment", "tokens", "steps", "rate", "warmup", "start"), [
    ("prolong_64k", 4_194_304, 5000, 1e-5, 0.1, (None, "keep")),
    ("prolong_512k", 8_388_608, 2500, 5e-6, 0.1, ("outputs/prolong_64k", "keep")),
    ("sft_64k", 4_194_304, 250, 2e-5, 0.05, ("outputs/cope20", "drop")),
])  # fmt: skip
def test_stages_are_the_published_schedules(experiment, tokens, steps, rate, warmup, start):
    """ProLong's scripts: 64 x 65,536; 128 x 524,288 / 8 ranks a sequence; SFT 64 x 65,536."""
    config = composed("train", f"+experiment={experiment}", *MANDATORY.get(experiment, []))
    trainer = config.trainer
    assert trainer.global_batch_size * config.data.sequence_length == tokens
    assert (trainer.max_steps, trainer.learning_rate, trainer.warmup_ratio) == (steps, rate, warmup)
    assert (trainer.min_lr_ratio, trainer.adam_beta2, trainer.weight_decay, trainer.gradient_clipping) == (
        0.1, 0.95, 0.1, 1.0,
    )  # fmt: skip
    assert (config.start_from.run, config.start_from.optimizer) == start
    assert config.parallel.sequence == (8 if experiment == "prolong_512k" else 1)


@pytest.mark.parametrize("arms", [
    ["rope", "hardclip20", "cope20", "cope29", "cope34"], ["demo/rope", "demo/hardclip", "demo/cope"]
])  # fmt: skip
def test_arms_differ_in_the_rope_group_and_nothing_else(arms):
    configs = [composed("train", f"+experiment={arm}") for arm in arms]
    assert len({str(asdict(config)["rope"]) for config in configs}) == len(arms)
    for config in configs:
        assert config.run_name.endswith(config.rope.name)  # derived from the group, not a choice of its own
        assert config.tracker.group == config.rope.name
        derived = {"run_name": "", "run_dir": "", "tracker": configs[0].tracker}
        assert replace(config, rope=configs[0].rope, **derived) == replace(configs[0], **derived)
        assert replace(config.tracker, group=None) == replace(configs[0].tracker, group=None)


def test_demo_clip_follows_the_papers_rule():
    config = composed("train", "+experiment=demo/cope")
    base = RopeChain(config.rope.chain[:1]).spectrum(head_dim=32, theta=1e4, pretrained_length=128, trained_length=512)
    hard = composed("train", "+experiment=demo/hardclip").rope.chain
    clipped = RopeChain(hard).spectrum(head_dim=32, theta=1e4, pretrained_length=128, trained_length=512)
    assert (clipped.inv_freq == 0).sum() == int(0.75 * (base.periods > 512).sum()) == 6
    assert [step["clip"] for step in (config.rope.chain[1], hard[1])] == ["auto", "auto"]


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_mapping_on_the_command_line_replaces(prefix):
    """With or without Hydra's signs; an entry by itself still changes that entry alone."""
    mixture = {"long": 0.6, "short": 0.4}
    given = ["+experiment=cope20", f"{prefix}data.mixture={{long: 0.6, short: 0.4}}"]
    assert composed("train", *given).data.mixture == mixture
    assert composed("train", *given, "data.mixture.short=0.1").data.mixture == {**mixture, "short": 0.1}
    changed = composed(
        "train", *given, f"{prefix}data.curriculum={{7: {{long: 1.0}}}}", "data.curriculum={9: {short: 1}}",
        f"{prefix}data.length_weights={{0: 1, 4096: 2}}", "data.length_weights={0: 1, 8192: 0.5}",
    )  # fmt: skip
    assert changed.data.curriculum == {9: {"short": 1.0}}
    assert changed.data.length_weights == {0: 1.0, 8192: 0.5}
    corpus = composed("prepare", "corpus=mixture_64k", f"{prefix}corpus.domains={{books: {{packing: long}}}}",
                      "sequence_lengths=[64]", "output=x").corpus  # fmt: skip
    assert {name: asdict(domain) for name, domain in corpus.domains.items()} == {
        "books": {"packing": "long", "remainder": "drop"}
    }


def test_a_mapping_in_an_experiment_replaces(tmp_path):
    """The last file that sets one; a file that sets none leaves it as it was."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [cope20]\ndata: {mixture: {books: 1.0}}\n"
    )
    (tmp_path / "experiment" / "heir.yaml").write_text("# @package _global_\ndefaults: [mine]\ntrainer: {seed: 1}\n")
    for name in ("mine", "heir"):
        given = [f"hydra.searchpath=[file://{tmp_path}]", f"+experiment={name}"]
        assert composed("train", *given).data.mixture == {"books": 1.0}
        assert composed("train", *given, "data.mixture={a: 1}").data.mixture == {"a": 1.0}


@pytest.mark.parametrize(("overrides", "message"), [
    (["run_name="], "run_name='' names no directory below outputs"),
    (["run_name=./"], "run_name='./' names no directory"),
    (["run_name=a/../../b"], r"run_name='a/\.\./\.\./b' names no directory below outputs"),
    (["tracker=wandb", f"tracker.tags=[{'x' * 65}]"], "of 65 letters; W&B takes 1 to 64"),
    (["tracker=wandb", "tracker.project=a/b"], "tracker.project='a/b' is not a name that W&B takes"),
    (["tracker=wandb", f"tracker.project={'x' * 129}"], "1 to 128 letters"),
])  # fmt: skip
def test_names_that_no_directory_or_tracker_takes_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        validate_train(composed("train", "+experiment=cope20", *overrides), world_size=8)


@pytest.mark.parametrize(("script", "arguments", "message"), [
    ("train.py", ["trainer.bogus=1"], "Key 'bogus' not in 'TrainerConfig'"),
    ("train.py", ["trainer.max_steps=many"], "Value 'many' of type 'str' could not be converted to Integer"),
    ("train.py", ["rope=nope"], "Could not find 'rope/nope'"),
    ("train.py", ["+experiment=demo/cope", "data.store=nowhere"], "data.store=nowhere is not a directory"),
    ("train.py", ["+experiment=cope20", "data=packed", "data.store=STORE", "data.sequence_length=64"],
     "trainer.device=cuda, but torch"),
    ("train.py", ["+experiment=demo/rope", "data=packed", "data.store=STORE", "data.sequence_length=128"],
     "holds sequences of 64 tokens"),
    ("train.py", ["+experiment=demo/rope", "data.store=configs"], "is not a directory; make one with"),
    ("train.py", ["+experiment=demo/rope", "data=packed", "data.store=STORE", "data.sequence_length=64"],
     "model.path=outputs/demo/base/export is neither a Hugging Face directory nor a hub model"),
    ("scripts/export.py", [], "checkpoint is not set; give it on the command line"),
    ("scripts/export.py", ["checkpoint=nowhere"], "nowhere is neither a run directory"),
])  # fmt: skip
def test_a_mistake_is_one_line_on_stderr(store_64, tmp_path, script, arguments, message):
    given = [argument.replace("STORE", str(store_64.root)) for argument in arguments]
    if any("experiment=demo" in argument for argument in given):
        given += [f"paths.output_dir={tmp_path}"]
        message = message.replace("outputs/", f"{tmp_path}/")
    done = run(script, *given)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(("changes", "message"), [
    ({"global_batch_size": 6}, r"global_batch_size=6 is not a multiple of .*=2 x world size 2 = 4; set it to 8"),
    ({"device": "tpu"}, "trainer.device=tpu is not known; use one of: cuda, cpu"),
    ({"dtype": "float16"}, "trainer.dtype=float16 is not known"),
    ({"max_steps": 0}, "trainer.max_steps=0 must be positive"),
    ({"stop_after": 0}, "trainer.stop_after=0 must be positive"),
    ({"learning_rate": -1.0}, r"trainer.learning_rate=-1\.0 must be positive"),
    ({"warmup_ratio": 10.0}, r"trainer.warmup_ratio=10\.0 is a share; set it between 0 and 1"),
    ({"device": "cuda", "dtype": "float32"}, "trainer.dtype=float32 with trainer.device=cuda"),
    ({"attention": "fa5"}, "trainer.attention=fa5 is not known; use one of: auto, fa4, fa3, fa2, torch"),
    ({"attention": "fa3"}, "trainer.attention=fa3 with trainer.device=cpu: it is a kernel for GPUs"),
])  # fmt: skip
def test_trainer_values_are_validated(store_64, tmp_path, changes, message):
    config = tiny_run(store_64, tmp_path)
    config.trainer = replace(config.trainer, **changes)
    with pytest.raises(ValueError, match=message):
        validate_train(config, world_size=2)


def test_clip_larger_than_the_pairs_is_refused_before_a_model(store_64, tmp_path):
    config = tiny_run(store_64, tmp_path)
    config.rope.chain = [{"method": "cope", "clip": 9}]
    with pytest.raises(ValueError, match=r"clip=9 is not within the 8 pairs of head_dim=16 that rotate; use 0\.\.8"):
        validate_train(config, world_size=1)


def test_composing_is_quick():
    """The rule is 1.5 s; modules, not seconds, are counted here, so that a busy machine cannot fail it."""
    probe = (
        "import sys; sys.argv = ['train.py', '+experiment=cope20', '--cfg', 'job']; import runpy\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "finally: print('HEAVY', sorted({'torch', 'transformers', 'deepspeed', 'numpy', 'wandb'} & set(sys.modules)))"
    )
    done = run("-c", probe)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr
