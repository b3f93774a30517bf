"""verification.json: what the report and the model card read of it."""

import json

from ropewalk.export.output import STOCK, Finding, Unverifiable, findings_of, judged, record


def unverifiable():
    raise Unverifiable("not verified: it is not installed")


def broken():
    raise RuntimeError("it could not run")


def test_numbers_of_transformers_stand_at_the_top_and_all_that_ran_must_pass(tmp_path):
    record(tmp_path, "vllm", unverifiable)
    report = json.loads((tmp_path / "verification.json").read_text())
    assert report["passed"] is False  # nothing ran
    assert record(tmp_path, STOCK, lambda: judged(True, "alike", [], logit_std=1.5)).text == "verified: alike"
    report = json.loads((tmp_path / "verification.json").read_text())
    assert (report["passed"], report["logit_std"]) == (True, 1.5)
    assert record(tmp_path, "llama.cpp x.gguf", broken).passed is False
    report = json.loads((tmp_path / "verification.json").read_text())
    assert (report["passed"], report["logit_std"]) == (False, 1.5)
    assert findings_of(tmp_path) == {
        "vllm": {"passed": None, "reason": "not verified: it is not installed",
                 "said": "not verified: it is not installed"},
        STOCK: {"passed": True, "logit_std": 1.5, "faults": [], "said": "verified: alike"},
        "llama.cpp x.gguf": {"passed": False, "error": "it could not run", "said": "NOT VERIFIED: it could not run"},
    }  # fmt: skip


def test_a_static_fault_fails_what_an_engine_passed():
    assert judged(None, "alike", ["no file"]) == Finding(False, "NOT VERIFIED: alike; no file", {"faults": ["no file"]})
