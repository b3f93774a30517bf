"""The proof of an export on a real model, SmolLM2-135M: trained for a step, exported, read by both engines."""

import pytest
from helpers import composed, torchrun

from ropewalk.config.data import CorpusConfig, PrepareConfig
from ropewalk.data.prepare.pipeline import prepare
from ropewalk.export import export
from ropewalk.export.output import findings_of

ROPES = {"rope": "native", "cope": "cope10", "hardclip": "hardclip10", "cope_yarn": "cope10"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fetched(pytestconfig):
    directory = pytestconfig.getoption("--smollm2")
    if directory is None:
        pytest.skip(
            "no SmolLM2-135M; fetch it: python recipes/smollm2_135m_cpu/fetch.py data/smollm2_135m, "
            "then add --smollm2 data/smollm2_135m"
        )
    return pytestconfig.invocation_params.dir / directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory, fixture_corpus, fetched):
    """``trained(rope)``: a run of one step at 512 tokens in the ZeRO-3 engine."""
    root, runs = tmp_path_factory.mktemp("smollm2"), {}
    corpus = CorpusConfig(name="fixture", paths=[str(fixture_corpus)], tokenizer=str(fetched / "model"))
    prepared = PrepareConfig(output=str(root / "prepared"), sequence_lengths=[512], corpus=corpus)
    store = prepare(prepared, report=lambda line: None) / "packed-512"

    def run(rope):
        if rope not in runs:
            run_dir = root / rope
            torchrun(1, "train.py", "+experiment=smollm2/extend", f"rope={rope}", "data=packed", f"data.store={store}",
                     "data.sequence_length=512", "trainer.max_steps=1", "trainer.checkpoint_every=1",
                     "trainer.warmup_ratio=0.0", f"model.path={fetched / 'model'}", f"run_dir={run_dir}",
                     f"run_name={rope}")  # fmt: skip
            runs[rope] = run_dir
        return runs[rope]

    return run


@pytest.mark.parametrize("arm", ROPES)
def test_engines_agree_on_smollm2(trained, tmp_path, arm):
    scaled = ["test_time=yarn4"] if arm == "cope_yarn" else []
    run = trained(ROPES[arm])
    output = export(
        composed("export", f"checkpoint={run}", "to=all", "gguf=f32", f"output={tmp_path / 'export'}", *scaled)
    )
    findings = findings_of(output)
    stock = findings["transformers"]
    assert stock["passed"] is True
    assert (stock["tokens"], stock["beyond_original"]) == (9216, True)
    (path,) = output.glob("*.gguf")
    llama = findings[f"llama.cpp {path.name}"]
    assert llama["passed"] is True
    assert llama["tokens_equal"] is True
    assert llama["control"] > 10 * max(llama["difference"], llama["baseline"])
    print(f"{arm}: {stock['said']}\n{llama['said']}")
