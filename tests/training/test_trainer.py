"""Whole small runs of the real engine, and the learning rate at the points that its definition fixes."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, composed, one_step, tiny_run
from omegaconf import OmegaConf
from ranks import run_ranks, tiny_arguments

from ropewalk.config.groups import RopeConfig
from ropewalk.data import Mixture
from ropewalk.export import resolve_checkpoint, verify_export
from ropewalk.model.load import training_config
from ropewalk.model.rotary import assert_spectrum
from ropewalk.rope.position import position_of
from ropewalk.runs.directory import MANIFEST, RunDirectory
from ropewalk.runs.launch import EXIT_REQUEUE
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.runs.record import recorded_config
from ropewalk.training import find_checkpoint, train
from ropewalk.training.checkpoint import resume
from ropewalk.training.checkpoint.restore import load_checkpoint
from ropewalk.training.distributed import start_processes
from ropewalk.training.engine import place_spectrum, start_engine
from ropewalk.training.guards import Guard
from ropewalk.training.hooks import Hook, StopRequested
from ropewalk.training.inputs import micro_batches, open_data, step_batch
from ropewalk.training.meter import Meter
from ropewalk.training.run_logger import closing_lines
from ropewalk.training.trainer import Trainer

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_losses.json"
COPE = [{"method": "abf", "theta": 1e5}, {"method": "cope", "clip": 4}]


def losses(run_dir):
    return [row["loss"] for row in read_metrics(run_dir)]


def test_golden_losses(store_64, tmp_path):
    """tests/golden/README.md says how the numbers were made; 1e-4, because kernels differ between machines."""
    config = tiny_run(store_64, tmp_path)
    config.rope.chain = COPE
    train(config)
    assert losses(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text())["losses"], abs=1e-4)


def test_first_loss_is_that_of_a_uniform_guess(store_64, tmp_path):
    train(tiny_run(store_64, tmp_path, "trainer.stop_after=1"))
    assert losses(tmp_path)[0] == pytest.approx(math.log(512), abs=0.02)


def test_the_kernel_is_recorded_and_deterministic_on_request(store_64, tmp_path):
    train(tiny_run(store_64, tmp_path, "trainer.deterministic=true", "trainer.stop_after=1"))
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["attention"] == f"sdpa (torch {torch.__version__})"


def test_overfit_one_batch(store_64, tmp_path):
    overrides = ("+debug=overfit_one_batch", "trainer.max_steps=60", "trainer.checkpoint_every=60")
    train(tiny_run(store_64, tmp_path, *overrides, "trainer.learning_rate=0.01", hidden_size=64))
    assert losses(tmp_path)[-1] < 0.5 * losses(tmp_path)[0]


@pytest.mark.parametrize("debug", ["one_step", "overfit_one_batch", "profile"])
def test_debug_configs_run_and_run_again(store_64, tmp_path, debug):
    for _ in range(2):
        config = tiny_run(store_64, tmp_path, f"+debug={debug}", "trainer.max_steps=9")
        config.trainer.checkpoint_every = None  # as the debug configs have it
        train(config)
    assert len(losses(tmp_path)) == {"one_step": 1, "overfit_one_batch": 9, "profile": 7}[debug]
    assert find_checkpoint(tmp_path) is None
    assert bool(list(tmp_path.glob("profile/*.json"))) == (debug == "profile")


ALTERNATING = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(("model_type", "fields"), [
    ("llama", {}), ("mistral", {"sliding_window": 9}), ("qwen2", {}), ("qwen3", {}),
    ("olmo", {"clip_qkv": 0.5, "eos_token_id": 1}), ("olmo3", ALTERNATING),
    ("gemma3_text", {**ALTERNATING, "query_pre_attn_scalar": 7}),
])  # fmt: skip
def test_every_architecture_trains_and_exports(store_64, tmp_path, model_type, fields):
    config = tiny_run(store_64, tmp_path, **{"model_type": model_type, "initializer_range": 0.2, **fields})
    config.rope.chain = COPE
    train(config)
    exported = resolve_checkpoint(tmp_path)
    found = verify_export(find_checkpoint(tmp_path), exported)
    assert found.passed
    assert found.numbers["spectrum_equal"]
    assert found.numbers["tokens"] == 128  # twice the trained length
    assert found.numbers["max_abs_difference"] < 1e-4 * found.numbers["logit_std"]


def test_another_architecture_is_refused_by_name(store_64, tmp_path):
    with pytest.raises(ValueError, match="model_type='gpt_neox' is not supported"):
        train(tiny_run(store_64, tmp_path, model_type="gpt_neox"))


def test_vocabulary_that_does_not_fit_is_refused(store_64, tmp_path):
    with pytest.raises(ValueError, match="tokenizer has 512 tokens and the model embeds 100"):
        train(tiny_run(store_64, tmp_path, vocab_size=100))


def test_sequence_length_that_is_not_the_stores_is_refused(store_64, tmp_path):
    with pytest.raises(ValueError, match=r"data.sequence_length=128, but .* holds sequences of 64"):
        train(replace_length(tiny_run(store_64, tmp_path), 128))


def replace_length(config, length):
    return replace(config, data=replace(config.data, sequence_length=length))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_keeps_the_spectrum_through_build_step_and_load(store_64, tmp_path, stage):
    """zero.Init and the engine cast to bf16; the buffers must be the float32 spectrum at each of three points."""
    config = tiny_run(store_64, tmp_path, "trainer.dtype=bfloat16")
    config.rope.chain = COPE
    train(replace(config, trainer=replace(config.trainer, stop_after=2)))
    config.deepspeed.stage = stage
    ranks = start_processes("cpu")
    _, mixture = open_data(config)
    model_config = training_config(config.model, RopeConfig("cope4", COPE), 64)
    engine = start_engine(config, model_config, ranks)
    lm, spectrum = engine.module.lm, position_of(model_config).spectrum()
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    assert_spectrum(lm, spectrum)
    batches = micro_batches(mixture, 0, ranks, config)
    one_step(engine, batches, mixture.trained_tokens(0), ranks)
    assert_spectrum(lm, spectrum)
    load_checkpoint(engine, find_checkpoint(tmp_path))
    place_spectrum(engine)
    assert_spectrum(lm, spectrum)
    rotary = lm.model.rotary_emb
    assert {rotary.inv_freq.dtype, rotary.original_inv_freq.dtype, rotary.long_inv_freq.dtype} == {torch.float32}
    engine.destroy()


def test_a_resumed_run_puts_its_spectrum_back(store_64, tmp_path, monkeypatch):
    """A load that casts the buffers, as DeepSpeed may, leaves no trace in the steps after it."""
    engines = []

    def casting_load(engine, checkpoint, **options):
        load_checkpoint(engine, checkpoint, **options)
        engine.module.lm.get_decoder().rotary_emb.to(torch.bfloat16)
        engines.append(engine)

    config = tiny_run(store_64, tmp_path)
    config.rope.chain = COPE
    train(replace(config, trainer=replace(config.trainer, stop_after=2)))
    monkeypatch.setattr(resume, "load_checkpoint", casting_load)
    train(config)
    lm = engines[0].module.lm
    assert_spectrum(lm, position_of(lm.config).spectrum())


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_bf16_resume_is_exact(store_64, tmp_path, stage):
    more = ["trainer.dtype=bfloat16", f"deepspeed={stage}"]
    straight, stopped = (tiny_run(store_64, tmp_path / name, *more) for name in ("a", "b"))
    train(straight)
    train(replace(stopped, trainer=replace(stopped.trainer, stop_after=2)))
    train(stopped)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("arm", ["rope", "hardclip20", "cope20", "cope29", "cope34"])
def test_every_64k_arm_takes_a_step_in_its_debug_form(store_64, tmp_path, arm):
    """The arm's own trainer settings (bf16, activation checkpointing, accumulation) on a tiny model with 64 pairs."""
    config = composed(
        "train", f"+experiment={arm}", "+debug=one_step", "data=packed", f"data.store={store_64.root}",
        "data.sequence_length=64", "trainer.device=cpu", f"run_dir={tmp_path}",
    )  # fmt: skip
    config.model.path = None
    config.model.architecture = {"model_type": "llama", **TINY, "head_dim": 128, "num_hidden_layers": 1}
    del config.model.architecture["max_position_embeddings"]  # model.pretrained_length says it
    train(config)
    assert losses(tmp_path)[0] == pytest.approx(math.log(512), abs=0.05)
    assert json.loads((tmp_path / "run.json").read_text())["method"] == arm


def test_lone_slurm_tasks_are_refused(store_64, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(ValueError, match=r"SLURM_NTASKS=8 but MASTER_ADDR is not set"):
        train(tiny_run(store_64, tmp_path))


def test_arms_see_identical_batches(store_64, tmp_path):
    ranks = start_processes("cpu")
    seen = []
    for arm in ("rope", "hardclip", "cope"):
        config = composed("train", f"+experiment=demo/{arm}", f"data.store={store_64.root}", "data.sequence_length=64",
                          "~data.mixture.retrieval")  # fmt: skip
        _, mixture = open_data(config)
        batches = [b for step in range(3) for b in micro_batches(mixture, step, ranks, config)]
        seen.append([(b.input_ids, b.labels, b.cu_seqlens) for b in batches])
    for other in seen[1:]:
        for ours, theirs in zip(seen[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_order_does_not_depend_on_the_ranks(store_64):
    mixture = Mixture(0, {}, store_64, 8)
    from ropewalk.data.order.batches import rank_micro_batches

    for step in range(3):
        for world_size in (1, 2, 4):
            joined = [
                r
                for rank in range(world_size)
                for m in rank_micro_batches(mixture, step, rank, world_size, 1)
                for r in m
            ]
            assert Counter(joined) == Counter(mixture.global_batch(step))


def test_records_what_ran(store_64, tmp_path):
    config = tiny_run(store_64, tmp_path, "tracker=wandb")
    config.rope.chain = COPE
    train(config)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["chain"] == "abf(theta=1e5) > cope(clip=4)"
    assert record["versions"]["torch"].startswith("2.13")
    assert record["special_tokens"] == {"bos": True, "eos": True, "eos_left_off": 0}
    base = 1e5 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(record["inv_freq"][:5], base[:5], rtol=1e-12)
    assert record["inv_freq"][-1] == 0.0
    # embedding + 2 x (q, o: 32 x 64; k, v: 32 x 32; mlp 3 x 32 x 64; 2 norms) + final norm + untied head
    assert record["parameters"] == 2 * 512 * 32 + 2 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 64 + 64) + 32
    assert (tmp_path / "config.yaml").is_file()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


class Recorder(Hook):
    """Notes every moment; asks to leave before a micro batch of the step after ``leave_after`` steps."""

    def __init__(self, name, moments, leave_after=None):
        self.name, self.moments, self.leave_after, self.steps = name, moments, leave_after, 0

    def note(self, *moment):
        self.moments.append((self.name, *moment))

    def __enter__(self):
        self.note("enter")
        return self

    def __exit__(self, kind, error, trace):
        self.note("exit", kind)

    def before_step(self, number):
        self.note("before step", number)

    def before_micro_batch(self):
        if self.leave_after == self.steps:
            raise StopRequested("SIGUSR1")
        self.note("before micro batch")

    def after_step(self, step):
        self.steps += 1
        self.note("after step", step.number, step.order_step)

    def before_exit(self, steps, reason):
        self.note("before exit", steps, reason)


@pytest.mark.parametrize("leave_after", [None, 1])
def test_hooks_are_called_in_one_order_at_every_moment(store_64, tmp_path, leave_after):
    """Two steps of two micro batches after ten others, or one step and a request to leave in the second."""
    ranks = start_processes("cpu")
    config = tiny_run(store_64, tmp_path)
    _, mixture = open_data(config)
    engine = start_engine(config, training_config(config.model, RopeConfig("rope"), 64), ranks)
    moments, meter = [], Meter(ranks.device)
    first, second = Recorder("first", moments, leave_after), Recorder("second", moments)
    trainer = Trainer(
        engine, ranks, (step_batch(mixture, step, ranks, config) for step in (4, 7)), lambda step: 1e-3 * step,
        Guard(config.guards), meter, (first, second), step=10, last_step=12,
    )  # fmt: skip

    def both(*moment):
        return [("first", *moment), ("second", *moment)]

    def whole_step(number, order_step):
        return [
            *both("before step", number), *both("before micro batch"), *both("before micro batch"),
            *both("after step", number, order_step),
        ]  # fmt: skip

    if leave_after is None:
        trainer.run()
        rest, kind = whole_step(12, 7), None
    else:
        with pytest.raises(SystemExit) as left:
            trainer.run()
        assert left.value.code == EXIT_REQUEUE
        rest, kind = [*both("before step", 12), *both("before exit", 11, "SIGUSR1")], SystemExit
    assert moments == [*both("enter"), *whole_step(11, 4), *rest, *reversed(both("exit", kind))]
    assert engine.optimizer.param_groups[0]["lr"] == 1e-3 * 11  # of the last step that was begun
    row = meter.row(1)
    assert all(row[f"seconds/{phase}"] > 0 for phase in ("data", "forward", "backward", "optimizer"))
    engine.destroy()


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(store_64, tmp_path):
    runs = []
    for ranks in (1, 2):
        run_dir = tmp_path / f"ranks{ranks}"
        arguments = tiny_arguments(store_64, run_dir, "trainer.max_steps=4", "trainer.micro_batch_size=2")
        run_ranks(ranks, run_dir / "logs", arguments)
        runs.append(losses(run_dir))
    assert len(runs[0]) == 4
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


def test_the_first_lines_say_what_is_trained_and_the_last_what_comes_next(store_256, tmp_path, capsys):
    """Shares of weights 3 and 1; the clip and the learning rate differ from the baseline's record."""
    more = [
        "trainer.max_steps=2",
        "data.mixture={long: 3, short: 1}",
        "rope=cope10",
        "rope.chain=[{method: cope, clip: 2}]",
    ]
    baseline, run_dir = tmp_path / "base", tmp_path / "run"
    other = "rope.chain=[{method: cope, clip: 3}]"
    train(tiny_run(store_256, baseline, *more, other, "trainer.stop_after=1", f"baseline={run_dir}"))
    first = capsys.readouterr().out.splitlines()
    assert f"  baseline  {run_dir}: has no record yet" in first
    assert first[-1] == f"{baseline} is at step 1 of 2; the same command goes on"
    train(tiny_run(store_256, run_dir, *more, f"baseline={baseline}", "trainer.learning_rate=1e-3", "tracker.group=x"))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("  ")] == [
        "  chain     cope(clip=2)", "  base      random weights", f"  data      store {store_256.root}",
        "  shares    long 75.0%, short 25.0%",
        f"  baseline  {baseline}: rope.chain cope(clip=3) -> cope(clip=2); trainer.learning_rate 0.003 -> 0.001",
        "  tracker   none",
    ]  # fmt: skip
    assert lines[-3:] == [
        f"finished: {run_dir}, step-00000002",
        f"next: python scripts/evaluate.py checkpoint={run_dir} output={run_dir}/evaluation "
        "documents=DIRECTORY_OF_TEXTS 'lengths=[256]' device=cpu dtype=float32",
        "DIRECTORY_OF_TEXTS: text files that were not trained on; no preparation of this run's data has kept any "
        "(corpus.heldout_documents)",
    ]
    train(tiny_run(store_256, run_dir, *more, f"baseline={baseline}", "trainer.learning_rate=1e-3", "tracker.group=x"))
    assert capsys.readouterr().out.splitlines()[-3:] == lines[-3:]


def test_the_last_line_names_held_out_text_of_the_run_or_of_the_run_before(store_256, tmp_path):
    """SFT on a store without held-out text, after a run on one whose preparation has kept some."""
    first, second = tmp_path / "first", tmp_path / "second"
    store = tmp_path / "data" / "256"
    config = tiny_run(store_256, first, "trainer.max_steps=1", f"data.store={store}")
    for run in (first, second):
        manifest = RunDirectory(run).checkpoint(1) / MANIFEST
        manifest.parent.mkdir(parents=True)
        manifest.touch()
    OmegaConf.save(OmegaConf.create(recorded_config(config)), RunDirectory(first).config)
    after = tiny_run(store_256, second, "trainer.max_steps=1", f"start_from.run={first}")
    assert "documents=DIRECTORY_OF_TEXTS " in closing_lines(after, 1)[1]
    (store.parent / "heldout").mkdir(parents=True)
    for run in (config, after):
        lines = closing_lines(run, 1)
        assert len(lines) == 2
        assert f" documents={store.parent / 'heldout'} " in lines[1]


def test_the_record_of_a_cpu_run_names_no_gpu_cluster(store_64, tmp_path):
    config = tiny_run(store_64, tmp_path, "cluster=h100_8")
    assert recorded_config(config)["cluster"]["name"] == "cpu"
    assert recorded_config(composed("train", "+experiment=cope20"))["cluster"]["name"] == "h100_8"
