"""A stage that starts from another run: its committed checkpoint, its chain, its Adam moments or none."""

import json
import shutil

import pytest
import torch
from helpers import composed, tiny_run
from ranks import run_ranks, tiny_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer

from ropewalk.config.data import CorpusConfig, PrepareConfig, SourceConfig
from ropewalk.data import PackedStore
from ropewalk.data.prepare.chat import ChatEncoder
from ropewalk.data.prepare.pipeline import prepare
from ropewalk.data.prepare.tokenizer import load_tokenizer
from ropewalk.export import resolve_checkpoint, verify_export
from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training import find_checkpoint, train, trainer
from ropewalk.training.checkpoint.start import StartCheckpoint, first_order_step

COPE = [{"method": "abf", "theta": 1e5}, {"method": "cope", "clip": 4}]


@pytest.fixture(scope="module")
def first(store_64, tmp_path_factory):
    """Four steps at 64 tokens, saved after 2 and 4."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    config = tiny_run(store_64, run_dir)
    config.rope.chain = COPE
    train(config)
    return run_dir


def stage(store, run_dir, first, *overrides, chain=()):
    config = tiny_run(store, run_dir, f"start_from.run={first}", "trainer.global_batch_size=2",
                      "trainer.micro_batch_size=1", *overrides)  # fmt: skip
    config.rope.chain = list(chain)
    return config


def optimizer(checkpoint):
    """fp32 weights, first and second moments, and the step count, as the one rank saved them."""
    saved = torch.load(next(checkpoint.rglob("*optim_states.pt")), weights_only=False)["optimizer_state_dict"]
    states = saved["optimizer_state_dict"]["state"]
    moments = {name: torch.cat([s[name].flatten() for s in states.values()]) for name in ("exp_avg", "exp_avg_sq")}
    weights = torch.cat([group.flatten() for group in saved["fp32_flat_groups"]])
    return weights, moments, {float(s["step"]) for s in states.values()}


@pytest.mark.parametrize("kept", ["keep", "drop"])
def test_weights_come_along_and_moments_as_told(store_64, store_256, first, tmp_path, kept, monkeypatch):
    """At four times the length. What the engine holds before its first step is what the first run saved."""
    seen = []

    def look(engine):
        states = engine.optimizer.optimizer.state.values()
        moments = {
            name: torch.cat([s[name].flatten() for s in states]).clone() for name in ("exp_avg", "exp_avg_sq") if states
        }
        weights = torch.cat([group.flatten() for group in engine.optimizer.fp32_partitioned_groups_flat])
        seen.append((weights.detach().clone(), moments, {float(s["step"]) for s in states}))

    monkeypatch.setattr(trainer, "watch_gradients", look)
    train(stage(store_256, tmp_path, first, f"start_from.optimizer={kept}"))
    (weights, moments, steps), (saved, saved_moments, saved_steps) = seen[0], optimizer(find_checkpoint(first))
    assert torch.equal(weights, saved)
    assert saved_steps == {4.0}
    assert (set(moments), steps) == ((set(saved_moments), saved_steps) if kept == "keep" else (set(), set()))
    for name, moment in moments.items():
        assert saved_moments[name].abs().sum() > 0
        assert torch.equal(moment, saved_moments[name])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert read_metrics(tmp_path)[0]["learning_rate"] == 3e-3  # a schedule of its own
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["chain"] == "abf(theta=1e5) > cope(clip=4)"
    assert (record["pretrained_length"], record["trained_length"]) == (64, 256)


def test_the_first_loss_is_that_of_the_checkpoint(store_64, first, tmp_path):
    """Against the export of the same checkpoint, loaded by path."""
    train(stage(store_64, tmp_path / "stage", first, "trainer.stop_after=1"))
    exported = resolve_checkpoint(first)
    config = stage(store_64, tmp_path / "path", first, "trainer.stop_after=1")
    config.start_from.run, config.model.path = None, str(exported)
    config.model.theta = 1e4
    train(config)
    ours, theirs = (read_metrics(tmp_path / name)[0]["loss"] for name in ("stage", "path"))
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_rotation_is_dropped_at_the_old_length_and_the_run_extended(store_64, store_256, first, tmp_path, capsys):
    """DroPE's order (arXiv 2512.12167): with rotation, without it at the same length, then longer; a stock entry."""
    drope = composed("train", "+experiment=drope/recalibrate").rope.chain
    train(stage(store_64, tmp_path / "drope", first, chain=drope))
    assert "warning: no pair rotates" in capsys.readouterr().out
    train(stage(store_256, tmp_path / "longer", tmp_path / "drope", "trainer.max_steps=2"))
    record = json.loads((tmp_path / "longer" / "run.json").read_text())
    assert record["chain"] == "abf(theta=1e5) > cope(clip=4) > p_rope(fraction=0)"
    assert (record["pretrained_length"], record["trained_length"]) == (64, 256)
    exported = resolve_checkpoint(tmp_path / "longer")
    assert verify_export(find_checkpoint(tmp_path / "longer"), exported).passed  # in a process without ropewalk
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert (model.config.model_type, model.config.rope_parameters["rope_type"]) == ("llama", "longrope")
    assert not model.model.rotary_emb.inv_freq.any()
    rotary = model.model.rotary_emb  # whatever the position, no pair turns
    cos, sin = rotary(torch.zeros(1), torch.tensor([[0, 1, 255, 100000]]))
    assert torch.equal(cos, torch.ones_like(cos))
    assert torch.equal(sin, torch.zeros_like(sin))


def test_the_base_may_change(store_64, first, tmp_path):
    chain = [{"method": "abf", "theta": 1e6}]
    train(stage(store_64, tmp_path, first, "trainer.stop_after=1", chain=chain))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["chain"] == "abf(theta=1e6)"
    assert json.loads((find_checkpoint(tmp_path) / "config.json").read_text())["rope_parameters"]["rope_theta"] == 1e6


def test_a_stage_goes_on_by_itself(store_64, first, tmp_path):
    """The other run goes on, prunes, is gone: this one has chosen, and is bit for bit the uninterrupted one."""
    source = shutil.copytree(first, tmp_path / "source")
    train(stage(store_64, tmp_path / "straight", source))
    config = stage(store_64, tmp_path / "stopped", source, "trainer.stop_after=2")
    train(config)
    shutil.rmtree(source)
    train(stage(store_64, tmp_path / "stopped", source))
    straight, stopped = (read_metrics(tmp_path / name) for name in ("straight", "stopped"))
    assert [row["loss"] for row in straight] == [row["loss"] for row in stopped]


def test_what_was_chosen_stays_chosen(store_64, first, tmp_path):
    """Killed before its first save, the stage starts again from the same checkpoint, though a newer one is there."""
    source = shutil.copytree(first, tmp_path / "source")
    newest = shutil.move(RunDirectory(source).checkpoint(4), tmp_path / "aside")
    train(stage(store_64, tmp_path / "stage", source, "trainer.stop_after=1", "trainer.checkpoint_every=null"))
    shutil.move(newest, RunDirectory(source).checkpoint(4))
    train(stage(store_64, tmp_path / "stage", source, "trainer.stop_after=1", "trainer.checkpoint_every=null"))
    assert json.loads((tmp_path / "stage" / "start" / "start.json").read_text())["step"] == 2


def test_another_start_is_another_run(store_64, first, tmp_path):
    train(stage(store_64, tmp_path / "stage", first, "trainer.stop_after=2"))
    earlier = RunDirectory(first).checkpoint(2)
    with pytest.raises(ValueError, match=r"start_from.step was 4, is 2"):
        train(stage(store_64, tmp_path / "stage", earlier))
    with pytest.raises(ValueError, match=r"start_from.optimizer was 'keep', is 'drop'"):
        train(stage(store_64, tmp_path / "stage", first, "start_from.optimizer=drop"))
    with pytest.raises(ValueError, match="is this run itself"):
        train(stage(store_64, tmp_path / "stage", tmp_path / "stage"))
    train(stage(store_64, tmp_path / "stage", first))  # refused starts have changed nothing


def test_what_is_not_committed_and_whole_is_refused(store_64, first, tmp_path):
    source = shutil.copytree(first, tmp_path / "source")
    victim = next(find_checkpoint(source).rglob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    before = sorted(source.rglob("*"))
    with pytest.raises(ValueError, match=r"cannot be started from: .*optim_states.pt is not the file that was saved"):
        train(stage(store_64, tmp_path / "stage", source))
    assert sorted(source.rglob("*")) == before
    for manifest in source.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(ValueError, match=r"start_from.run=.*source holds no committed checkpoint"):
        train(stage(store_64, tmp_path / "other", source))


def test_another_tokenizer_is_refused(store_64, first, tmp_path):
    """A chat template may be added; tokens may not change."""
    source = shutil.copytree(first, tmp_path / "source")
    (source / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    train(stage(store_64, tmp_path / "stage", source, "trainer.stop_after=1"))
    path = source / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the tokenizer of the data .* is not the model's .*source/tokenizer"):
        train(stage(store_64, tmp_path / "other", source, "trainer.stop_after=1"))


STABLE = ["trainer.warmup_ratio=0", "trainer.schedule=linear", "trainer.min_lr_ratio=0"]


@pytest.fixture(scope="module")
def plateau(store_64, tmp_path_factory):
    """Three steps at the peak."""
    run_dir = tmp_path_factory.mktemp("plateau") / "run"
    train(tiny_run(store_64, run_dir, *STABLE, "trainer.decay_ratio=0", "trainer.max_steps=3"))
    return run_dir


def test_plateau_and_branch_are_the_whole_run(store_64, plateau, tmp_path):
    """With the optimizer's state and the data order of the plateau, bit for bit."""
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    train(tiny_run(store_64, whole, *STABLE, "trainer.decay_ratio=0.5", "trainer.max_steps=6"))
    branched = [*STABLE, f"start_from.run={plateau}", "trainer.max_steps=3"]
    train(tiny_run(store_64, branch, *branched, "start_from.order=continue"))
    rows = [*read_metrics(plateau), *read_metrics(branch)]
    for name in ("loss", "grad_norm", "learning_rate", "trained_tokens"):
        assert [row[name] for row in rows] == [row[name] for row in read_metrics(whole)]
    with pytest.raises(ValueError, match=r"start_from.order_step was 3, is 0"):
        train(tiny_run(store_64, branch, *branched, "start_from.order=restart"))


@pytest.mark.parametrize(("changed", "message"), [
    ("trainer.seed=7", r"seed differ from .*run's \(seed 0, here 7\)"),
    ("trainer.global_batch_size=2", r"global_batch_size differ from .*\(global_batch_size 4, here 2\)"),
])  # fmt: skip
def test_another_order_is_not_continued(store_64, plateau, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_run(store_64, tmp_path / "run", f"start_from.run={plateau}", "start_from.order=continue", changed))


def test_a_branch_of_a_branch_goes_on_where_that_one_was():
    """The first branch began at step 3 of the order and took 2; and a checkpoint from before there were branches."""
    branched = {"seed": 0, "start_from": {"order_step": 3}}
    assert first_order_step(start(2, branched), "continue", {"seed": 0}) == 5
    assert first_order_step(start(2, branched), "restart", {"seed": 0}) == 0
    for old in ({"seed": 0, "start_from": None}, {"seed": 0}, {"seed": 0, "start_from": {"step": 9}}):
        assert first_order_step(start(2, old), "continue", {"seed": 0}) == 2


def start(step, contract):
    return StartCheckpoint("run", "run/checkpoints/step-2", "", step, 1, 3, {}, contract)


TALK = [
    {"role": "user", "content": "Is the hacker ethic a joke?"},
    {"role": "assistant", "content": "Mostly it is not."},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}\n{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}"
)


def test_sft_trains_what_the_assistant_says(first, tmp_path, fixture_tokenizer):
    """Conversations to a store with masks to a stage from the run: the first loss is that of the answers' tokens
    under the checkpoint, conversation by conversation in stock transformers.
    """
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": TALK}) + "\n") * 40)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    corpus = CorpusConfig(
        name="chat", tokenizer=str(fixture_tokenizer), chat_template=str(tmp_path / "template.jinja"), eos=False,
        sources=[SourceConfig("chat", str(tmp_path / "chat.jsonl"), chat=True)],
    )  # fmt: skip
    store = PackedStore(
        prepare(PrepareConfig(str(tmp_path / "data"), [256], corpus=corpus), lambda line: None) / "packed-256"
    )
    run_dir = tmp_path / "sft"
    train(
        stage(store, run_dir, first, "start_from.optimizer=drop", "trainer.warmup_ratio=0.05", "trainer.stop_after=1")
    )
    served = AutoTokenizer.from_pretrained(run_dir / "tokenizer")
    assert served.chat_template == TEMPLATE
    row = read_metrics(run_dir)[0]
    model = AutoModelForCausalLM.from_pretrained(resolve_checkpoint(first), attn_implementation="eager")
    tokens, mask = ChatEncoder(load_tokenizer(str(fixture_tokenizer)).tokenizer, TEMPLATE).encode(TALK)
    ids = torch.from_numpy(tokens.astype("int64"))[None]
    labels = ids.masked_fill(~torch.from_numpy(mask)[None], -100)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels, use_cache=False).loss.item()  # a mean over the masked tokens
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["trained_tokens"] % int(mask.sum()) == 0
    assert 0 < row["trained_tokens"] < 2 * 256 * mask.mean() + 1


@pytest.mark.slow
def test_two_ranks_start_from_what_one_has_saved(store_64, first, tmp_path):
    """From ZeRO-3 into ZeRO-1, too; the loss is that of a single rank that starts from it."""
    more = ["trainer.max_steps=2", f"start_from.run={first}"]
    before = sorted(first.rglob("*"))
    for world_size, stage in ((1, 3), (2, 1)):
        run_dir = tmp_path / str(world_size)
        arguments = tiny_arguments(store_64, run_dir, *more, f"deepspeed=zero{stage}")
        run_ranks(world_size, run_dir / "logs", arguments)
    assert sorted(first.rglob("*")) == before
    assert "was saved by 1 rank with ZeRO-3; 2 read it with ZeRO-1" in (tmp_path / "2/logs/rank0.log").read_text()
    one, two = (read_metrics(tmp_path / name) for name in "12")
    for ours, theirs in zip(one, two, strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
