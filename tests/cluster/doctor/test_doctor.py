"""The doctor tells a fit machine from an unfit one, line by line; two real ranks over gloo."""

import fcntl
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from helpers import alone_environment, composed, save_tiny, tiny_run
from ranks import tiny_arguments
from transformers import AutoModelForCausalLM, DynamicCache

from ropewalk.cluster.doctor import (
    checkup,
    examine,
    examine_comparison,
    examine_evaluation,
    examine_preparation,
    machine,
)
from ropewalk.cluster.doctor.checkup import check_evaluated, check_room_for_tokens
from ropewalk.cluster.doctor.machine import (
    SIZE,
    check_data,
    check_device,
    check_file_system,
    check_kernels,
    check_peers,
    check_space,
)
from ropewalk.cluster.doctor.screen import fail, guarded, ok, screen
from ropewalk.config import CONFIG_DIR
from ropewalk.model.attention import Kernel
from ropewalk.training import train

ROOT = CONFIG_DIR.parent
FIXTURES = ROOT / "tests" / "fixtures"


def levels(findings):
    return {finding.subject: finding.level for finding in findings}


@pytest.mark.parametrize(("gpus", "apart", "broken", "level", "said"), [
    (8, (), (), "ok", "8 GPUs reach each other's memory"),
    (4, [(0, 2), (2, 0)], (), "warn", "no direct access where GPU 0 sends 2, 2 sends 0, so all goes through the host"),
    (2, [(0, 1), (1, 0)], (), "warn", "no direct access where any GPU sends another, so"),
    (8, [(6, 7)], [(0, n) for n in range(1, 8)], "FAIL",
     "what GPU 0 sends 1, 0 sends 2, 0 sends 3, 0 sends 4 and 3 more arrives changed; switch the IOMMU"),
    (2, [(0, 1)], [(0, 1)], "warn", "GPU 0 sends 1"),  # through the host it does not take that way
])  # fmt: skip
def test_gpus_that_do_not_reach_each_other_or_change_what_they_send(gpus, apart, broken, level, said):
    """Over hardware that is made up: which pairs have peer access, and whose copies lose their last value."""

    def sent(values, *pair):
        return torch.cat([values[:-1], values.new_zeros(1)]) if pair in broken else values.clone()

    (finding,) = check_peers(gpus, lambda *pair: pair not in apart, sent)
    assert (finding.level, finding.subject) == (level, "peers")
    assert said in finding.text


def test_equal_findings_are_one_line_and_others_name_their_nodes():
    text, failed = screen("title", [
        ("n1", [ok("device", "8 GPUs"), ok("clock", "fine")]),
        ("n1", [ok("device", "8 GPUs")]),
        ("n2", [fail("device", "7 GPUs"), ok("clock", "fine")]),
    ])  # fmt: skip
    assert failed == 1
    assert text.splitlines() == [
        "title",
        "  ok   device       8 GPUs  [n1]",
        "  FAIL device       7 GPUs  [n2]",
        "  ok   clock        fine",
        "2 ok, 0 to look at, 1 to fix",
    ]


def test_a_check_that_breaks_is_a_finding():
    def broken():
        yield ok("x", "first")
        raise OSError("no such disk")

    assert guarded("x", broken) == [fail("x", "OSError: no such disk")]


def test_a_sane_file_system(tmp_path):
    assert levels(check_file_system(tmp_path)) == {"file system": "ok", "flock": "ok"}
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_leaves_two_files_is_told(tmp_path, monkeypatch):
    """As an object store under a file system would: it copies, and the old name stays."""

    def copied(path, text):
        path.write_text(text)
        path.with_name(path.name + ".partial").write_text(text)

    monkeypatch.setattr(machine, "write_atomically", copied)
    assert levels(check_file_system(tmp_path))["file system"] == "FAIL"


def test_a_lock_that_does_not_exclude_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert levels(check_file_system(tmp_path))["flock"] == "warn"


def test_a_lock_that_is_not_there_is_told(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert levels(check_file_system(tmp_path))["flock"] == "warn"


def test_a_clock_beside_the_files_is_told(tmp_path, monkeypatch):
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)
    assert levels(check_file_system(tmp_path))["clock"] == "warn"


@pytest.mark.parametrize(("free", "there", "level"), [
    (100e9, 0, "FAIL"), (250e9, 0, "warn"), (400e9, 0, "ok"),
    (100e9, 1, "warn"), (200e9, 1, "ok"), (100e9, 2, "ok"), (95e9, 2, "FAIL"), (95e9, 3, "FAIL"),
])  # fmt: skip
def test_space_is_counted_in_checkpoints(tmp_path, monkeypatch, free, there, level):
    """Of 96 GB each. Two kept and one under way need 288, less what is there."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1e12, 0, free))
    commit(tmp_path, *range(10, 10 * (there + 1), 10))
    (finding,) = check_space(tmp_path, 96e9, 2, steps=100)
    assert finding.level == level
    need = {0: 288, 1: 192, 2: 96, 3: 96}[there]
    assert f"96.0 GB a checkpoint, 2 kept, {there} there: {need}.0 GB" in finding.text


def test_a_finished_run_needs_no_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1e12, 0, 1e9))
    commit(tmp_path, 90, 100)
    assert levels(check_space(tmp_path, 96e9, 2, steps=100)) == {"space": "ok"}
    assert levels(check_space(tmp_path, 96e9, 2, steps=110)) == {"space": "FAIL"}


def commit(run_dir, *steps):
    for step in steps:
        manifest = run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}")


def test_kernels_and_data(store_64, tmp_path):
    assert levels(check_kernels(torch.device("cpu"), torch.float32, 64)) == {"attention": "ok", "loss": "ok"}
    assert levels(check_data(tiny_run(store_64, tmp_path))) == {"tokenizer": "ok", "data": "ok"}


def test_attention_that_leaks_is_told(monkeypatch):
    def leaking(module, query, key, value, mask, documents, choice):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2), None

    monkeypatch.setattr(machine, "document_attention", leaking)
    assert levels(check_kernels(torch.device("cpu"), torch.float32, 64))["attention"] == "FAIL"


@pytest.mark.parametrize(("name", "major", "level"), [
    ("fa2", 9, "warn"), ("torch", 9, "warn"), ("fa3", 9, "ok"), ("fa4", 9, "ok"), ("torch", 8, "ok"), ("sdpa", 0, "ok"),
])  # fmt: skip
def test_kernels_of_an_older_generation_are_told(name, major, level):
    """With the reasons why no better one was taken, whatever the kernel can do."""
    kernel = Kernel(name, "package", "1.2", print, passed_over=("fa3: No module named 'flash_attn_interface'",))
    finding = machine.check_generation(kernel, major)
    assert (finding.level, finding.subject) == (level, "attention")
    assert f"{name} (package 1.2)" in finding.text
    assert ("No module named 'flash_attn_interface'" in finding.text) == (level == "warn")


def test_a_loss_that_is_off_is_told(monkeypatch):
    right = machine.tiled_linear_cross_entropy
    monkeypatch.setattr(machine, "tiled_linear_cross_entropy", lambda *words: right(*words) * 1.1)
    assert levels(check_kernels(torch.device("cpu"), torch.float32, 64))["loss"] == "FAIL"


def test_a_missing_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert levels(check_device("cuda", 1, 0)) == {"device": "FAIL"}
    assert levels(check_device("cpu", 1, 0)) == {"device": "ok"}


def test_cudas_own_words_are_told(monkeypatch):
    def too_old():
        raise RuntimeError("The NVIDIA driver on your system\n is too old (found version 12040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    (finding,) = check_device("cuda", 1, 0)
    assert "(The NVIDIA driver on your system is too old (found version 12040); driver " in finding.text


@pytest.mark.parametrize(("limit", "levels_"), [(65536, ["warn"]), (resource.RLIM_INFINITY, [])])
def test_memory_that_cannot_be_locked_is_told_where_there_is_infiniband(tmp_path, monkeypatch, limit, levels_):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert list(machine.check_locked_memory()) == []
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path)
    assert [finding.level for finding in machine.check_locked_memory()] == levels_


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpus_of_this_machine():
    assert levels(check_device("cuda", torch.cuda.device_count(), 0))["device"] in ("ok", "warn")
    device = torch.device("cuda", 0)
    assert levels(check_kernels(device, torch.bfloat16, 64)) == {"attention": "ok", "loss": "ok"}


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/doctor.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=alone_environment())


def test_by_hand_on_a_fit_machine(store_64, tmp_path):
    done = doctor(*tiny_arguments(store_64, tmp_path / "run"), "cluster=laptop")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].endswith("1 ranks on 1 nodes")
    assert done.stdout.splitlines()[-1].endswith("0 to look at, 0 to fix")
    assert len(done.stdout.splitlines()) <= 24


def test_by_hand_on_an_unfit_one(tmp_path):
    done = doctor("+experiment=demo/rope", f"run_dir={tmp_path / 'run'}", f"data.store={tmp_path / 'none'}")
    assert done.returncode == 1
    assert "FAIL data" in done.stdout
    assert "FAIL model" in done.stdout  # the base is not exported
    assert "2 to fix" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.fixture
def evaluated(tmp_path):
    """The words of an evaluation that could be run."""
    save_tiny(tmp_path / "model")
    shutil.copytree(FIXTURES / "corpus", tmp_path / "texts")
    return {
        "checkpoint": str(tmp_path / "model"), "output": str(tmp_path / "out"), "documents": str(tmp_path / "texts"),
        "lengths": "[64,128]", "device": "cpu", "dtype": "float32", "paths.output_dir": str(tmp_path),
    }  # fmt: skip


def findings_of(examined, config, capsys):
    """How many things are to be fixed, and the level of each subject on the screen."""
    failed = examined(config)
    lines = capsys.readouterr().out.splitlines()[1:-1]
    return failed, {line.split()[1]: line.split()[0] for line in lines}


@pytest.mark.parametrize(("change", "subject"), [
    ({}, None),
    ({"checkpoint": "nowhere"}, "model"),
    ({"documents": "nowhere"}, "suite"),
    ({"lengths": "[64,1000000000000]"}, "memory"),
    ({"backend": "vllm"}, "vllm"),
    ({"suite": "short_offline", "suite.data": "nowhere"}, "suite"),
], ids=lambda value: str(value or "fit"))  # fmt: skip
def test_an_evaluation_is_looked_at(evaluated, change, subject, capsys):
    words = [f"{key}={value}" for key, value in {**evaluated, **change}.items()]
    failed, found = findings_of(examine_evaluation, composed("evaluate", *words), capsys)
    assert failed == (subject is not None)
    assert [name for name, level in found.items() if level == "FAIL"] == ([subject] if subject else [])
    assert found["device"] == "ok"


def test_the_memory_of_an_evaluation_is_weights_and_cache(evaluated):
    """A cache of 128 tokens, as transformers keeps it, is the 128 millionth part of one of 2^34."""
    config = composed(
        "evaluate", *(f"{key}={value}" for key, value in (evaluated | {"lengths": "[17179869184]"}).items())
    )
    loaded = AutoModelForCausalLM.from_pretrained(config.checkpoint)
    cached = DynamicCache(config=loaded.config)
    loaded(torch.zeros(1, 128, dtype=torch.long), past_key_values=cached)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cached.layers) * 2**27
    held += sum(parameter.nbytes for parameter in loaded.parameters())
    (memory,) = [finding for finding in check_evaluated(config) if finding.subject == "memory"]
    assert memory.text.startswith(f"{held / 1e9:,.1f} GB for weights and the cache of 17,179,869,184 tokens")


def test_layers_with_a_window_are_counted_with_their_window(evaluated, tmp_path):
    """Every layer of this Mistral keeps 32 tokens, so a context of any length fits."""
    save_tiny(tmp_path / "mistral", "mistral", sliding_window=32)
    words = evaluated | {"lengths": "[64,1000000000000]", "checkpoint": str(tmp_path / "mistral")}
    config = composed("evaluate", *(f"{key}={value}" for key, value in words.items()))
    (memory,) = [finding for finding in check_evaluated(config) if finding.subject == "memory"]
    assert memory.level == "ok"


@pytest.mark.parametrize(("change", "subject"), [
    ({}, None),
    ({"corpus.paths": "[nowhere]"}, "sources"),
    ({"corpus.paths": "[]"}, "sources"),
    ({"corpus.tokenizer": "no/such/tokenizer"}, "sources"),
    ({"stage": "tokenize"}, "sources"),
], ids=lambda value: str(value or "fit"))  # fmt: skip
def test_a_preparation_is_looked_at(tmp_path, change, subject, capsys):
    words = {
        "corpus": "files", "corpus.paths": f"[{FIXTURES / 'corpus'}]", "corpus.tokenizer": str(FIXTURES / "tokenizer"),
        "sequence_lengths": "[64]", "output": str(tmp_path / "out"),
    }  # fmt: skip
    config = composed("prepare", *(f"{key}={value}" for key, value in {**words, **change}.items()))
    failed, found = findings_of(examine_preparation, config, capsys)
    assert failed == (subject is not None)
    assert [name for name, level in found.items() if level == "FAIL"] == ([subject] if subject else [])


def test_room_for_tokens_is_four_bytes_for_four(tmp_path, monkeypatch):
    """3 MB of text: token files and two stores of as much are 9 MB."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(b"x" * 3_000_000)
    usage = namedtuple("usage", "total used free")
    words = ["corpus=files", f"corpus.paths=[{tmp_path / 'texts'}]", "sequence_lengths=[64,128]",
             f"output={tmp_path / 'out'}"]  # fmt: skip
    for free, level in ((8_999_999, "warn"), (9_000_000, "ok")):
        monkeypatch.setattr(checkup, "disk_usage", lambda _, free=free: usage(1e12, 0, free))
        (finding,) = check_room_for_tokens(composed("prepare", *words))
        assert finding.level == level


@pytest.mark.parametrize(("checkpoint", "subjects"), [(None, []), ("nowhere", ["model"])])
def test_another_process_of_an_evaluation_shows_its_screen_where_it_finds_a_fault(
    evaluated, checkpoint, subjects, capsys, monkeypatch
):
    monkeypatch.setenv("RANK", "1")
    words = [
        f"{key}={value}" for key, value in {**evaluated, "checkpoint": checkpoint or evaluated["checkpoint"]}.items()
    ]
    failed, found = findings_of(examine_evaluation, composed("evaluate", *words), capsys)
    assert (failed, [name for name, level in found.items() if level == "FAIL"]) == (len(subjects), subjects)


def test_a_comparison_is_looked_at(store_64, tmp_path, capsys):
    config = tiny_run(store_64, tmp_path / "run", "trainer.max_steps=1")
    train(config)
    output = f"output={tmp_path / 'report.html'}"
    assert findings_of(examine_comparison, composed("compare", f"runs=[{tmp_path}/run]", output), capsys)[0] == 0
    failed, found = findings_of(examine_comparison, composed("compare", f"runs=[{tmp_path}/none]", output), capsys)
    assert (failed, found["runs"]) == (1, "FAIL")


@pytest.mark.slow
def test_two_ranks_measure_what_is_between_them(store_64, tmp_path):
    arguments = [*tiny_arguments(store_64, tmp_path / "run"), "cluster=laptop"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "scripts/doctor.py"]
    done = subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, check=False,
                          env=alone_environment())  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gloo, 2 ranks: " in done.stdout
    assert f"bus bandwidth for {SIZE['cpu'] >> 20} MiB" in done.stdout
    assert "the nodes agree" in done.stdout
    assert "what one rank writes, all see" in done.stdout
    assert not (tmp_path / "run" / ".doctor-shared").exists()
    assert os.listdir(tmp_path / "run") == []


def two_ranks(tmp_path, on_rank_1, *arguments):
    """The doctor on two ranks, each on a node of its own by name; ``on_rank_1`` is what the second does before."""
    script = tmp_path / "doctor.py"
    script.write_text(
        "import os, sys, runpy\n"
        "os.environ.update(LOCAL_RANK='0', SLURMD_NODENAME='n' + os.environ['RANK'])\n"
        "from datetime import timedelta\n"
        "from ropewalk.cluster.doctor import checkup, machine\n"
        "machine.PATIENCE = timedelta(seconds=5)\n"
        f"if os.environ['RANK'] == '1':\n    {on_rank_1}\n"
        "sys.argv[0] = 'scripts/doctor.py'\n"
        "runpy.run_path('scripts/doctor.py', run_name='__main__')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, *arguments, "cluster=laptop"], capture_output=True, text=True,
                          check=False, env=alone_environment(), timeout=150)  # fmt: skip
    assert done.returncode != 0
    assert "to fix" in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_rank_that_has_found_a_fault_keeps_no_other_waiting(store_64, tmp_path):
    """On one node the run directory cannot be made; the screen comes, and says where and what was left out."""
    (tmp_path / "file").touch()
    said = two_ranks(
        tmp_path, f"sys.argv.append('run_dir={tmp_path}/file/run')", *tiny_arguments(store_64, tmp_path / "run")
    )
    assert re.search(r"FAIL file system .*  \[n1\]", said)
    assert re.search(r"warn all-reduce +not looked at", said)
    assert "the nodes agree" not in said


@pytest.mark.slow
def test_a_link_that_fails_is_on_the_screen(store_64, tmp_path):
    """One rank's all-reduce raises, the other's runs out of patience; neither goes on to the next check."""
    broken = "checkup.check_all_reduce = lambda *words: (_ for _ in ()).throw(RuntimeError('no link'))"
    said = two_ranks(tmp_path, broken, *tiny_arguments(store_64, tmp_path / "run"))
    assert re.search(r"FAIL all-reduce +RuntimeError: no link  \[n1\]", said)
    assert re.search(r"FAIL all-reduce .*  \[n0\]", said)
    assert re.search(r"warn clock +not looked at", said)


def test_gpus_are_counted_by_the_tasks_of_a_node(store_64, tmp_path, monkeypatch):
    """As --ntasks-per-node says, whatever the cluster's file does."""
    asked = []
    monkeypatch.setattr(checkup, "check_device", lambda device, gpus, rank: asked.append(gpus) or [ok("device", "x")])
    for tasks, gpus in (("4", 4), (None, 1)):
        monkeypatch.setenv("SLURM_NTASKS_PER_NODE", tasks) if tasks else monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
        examine(tiny_run(store_64, tmp_path / "run", "cluster=laptop"))
        assert asked.pop() == gpus


def test_ranks_that_cannot_share_the_heads_are_found(store_64, tmp_path, capsys):
    """4 query and 2 key/value heads, by three; the configuration alone does not know them."""
    config = tiny_run(store_64, tmp_path / "run", "cluster=laptop", "parallel.sequence=3")
    failed, found = findings_of(examine, config, capsys)
    assert (failed, found["model"]) == (1, "FAIL")
