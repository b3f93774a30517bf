from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ropewalk.evaluation.harness.json_kv import json_kv
from ropewalk.evaluation.harness.ruler_prompts import Sample, Text, _filling, build_samples, largest
from ropewalk.evaluation.harness.ruler_tasks import ALL_TASKS, TASKS, RulerTask

pytest.importorskip("lm_eval")
LENGTH = 3000  # bytes, with the tokenizer below


def count(text: str) -> int:
    return len(text.encode()) + 1  # the byte-level tokenizer of these tests, with its bos


def build(name: str, samples: int = 3, length: int = LENGTH, seed: int = 42, data=None):
    return build_samples(TASKS[name], count, length, samples, seed, data)


@pytest.fixture
def data(tmp_path):
    """Questions in SQuAD's and HotpotQA's form."""
    paragraphs = [
        {
            "context": f"Paragraph {i}: the capital of land {i} is city-{i}, and {'so on, ' * 10}the end.",
            "qas": [
                {
                    "question": f"What is the capital of land {i}?",
                    "answers": [{"text": f"city-{i}"}, {"text": f"city-{i}, and"}],
                    "is_impossible": i % 7 == 6,
                }
            ],
        }
        for i in range(40)
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    hotpot = [
        {
            "question": f"Who is {i}?",
            "answer": f"person-{i}",
            "context": [[f"T{i}", [f"person-{i}."]], ["X", ["y"]]],
        }
        for i in range(30)
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpot))
    return tmp_path


@pytest.mark.parametrize("name", ["vt", "cwe", "fwe"])
def test_prompts_fill_the_length_and_leave_room_for_the_answer(name: str) -> None:
    task = TASKS[name]
    for sample in build(name):
        assert sample.tokens == count(sample.prompt)
        assert 0.8 * LENGTH <= sample.tokens + task.new_tokens <= LENGTH


@pytest.mark.parametrize("name", ["vt", "cwe", "fwe"])
def test_a_sample_depends_on_seed_length_and_index_alone(name: str) -> None:
    three, one = build(name, 3), build(name, 1)
    assert one[0] == three[0]
    assert len({sample.prompt for sample in three}) == 3
    assert build(name, 1, seed=43)[0].prompt != one[0].prompt


def test_the_chain_of_variables_is_in_the_prompt_and_the_example_is_another() -> None:
    for sample in build("vt"):
        example, text = sample.prompt.split("\n\nMemorize and track", 1)
        assert len(sample.references) == 5
        first = re.search(rf"VAR {sample.references[0]} = (\d+)", text)
        assert first is not None
        assert f"assigned the value {first[1]} in the text" in text
        for before, after in zip(sample.references, sample.references[1:], strict=False):
            assert f"VAR {after} = VAR {before} " in text
            assert after not in example
        assert example.count("VAR ") >= 5  # the worked example


def test_common_words_are_the_most_frequent_and_an_example_comes_first() -> None:
    for sample in build("cwe", length=12_000):
        example, text = sample.prompt.rsplit("Below is a numbered list", 1)
        assert "10 most common words" in example  # which lm-eval leaves out
        listed = Counter(re.findall(r"\d+\. (\S+)", text.split("Question:")[0]))
        assert {word for word, _ in listed.most_common(10)} == set(sample.references)
        assert min(listed[word] for word in sample.references) == 30


def test_frequent_words_are_the_most_frequent() -> None:
    for sample in build("fwe"):
        coded = re.search(r"coded words\. (.*)\nQuestion", sample.prompt)
        listed = Counter(coded[1].split())
        del listed["..."]
        assert [word for word, _ in listed.most_common(3)] == sample.references


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_the_paragraph_with_the_answer_is_always_there(name: str, data) -> None:
    """Also where every paragraph is used, after which lm-eval's own list of them is shuffled in place."""
    for length in (LENGTH, 20_000):
        for sample in build(name, 20, length, data=data):
            assert sample.references[0] in sample.prompt
            assert sample.tokens + 32 <= length
    assert sample.tokens < 20_000 / 2  # there are no more paragraphs


def test_impossible_questions_are_left_out_and_too_many_are_refused(data) -> None:
    prompts = [sample.prompt for sample in build("qa_1", 35, data=data)]
    assert not any("capital of land 6?" in prompt for prompt in prompts)
    with pytest.raises(ValueError, match=r"qa_1 has 35 questions; set suite.samples to that or less, not 36"):
        build("qa_1", 36, data=data)


def test_missing_data_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"squad.json is missing; scripts/fetch_eval_data.sh ruler writes it"):
        build("qa_1", data=tmp_path)


@pytest.mark.parametrize(("length", "message"), [(100, "cwe has prompts of 512 to 524288"), (600, "at its smallest")])
def test_a_length_that_holds_no_prompt_is_refused(length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("cwe", length=length)


def test_the_tasks_are_those_of_the_paper() -> None:
    assert len(TASKS) == 13
    assert {name for name, task in TASKS.items() if task.metric == "string_match_part"} == {"qa_1", "qa_2"}
    answers = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    assert all(isinstance(task, RulerTask) and task.new_tokens == answers[task.kind] for task in TASKS.values())


@pytest.fixture(scope="module")
def uuid_tokenizer() -> Tokenizer:
    """A BPE of UUIDs and JSON, with GPT-2's split of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((row["context"] for row in json_kv(100, 5, 1)), trainer)
    return tokenizer


@pytest.mark.parametrize("length", [1024, 4096, 30_000])
def test_json_kv_has_the_length_itself(length: int, uuid_tokenizer) -> None:
    counted = []

    def count(text: str) -> int:
        counted.append(len(text))
        return len(uuid_tokenizer.encode(text).ids) + 1

    samples = build_samples(ALL_TASKS["json_kv"], count, length, 7, 42, None)
    assert sum(counted) < 4 * sum(len(sample.prompt) for sample in samples) + 7 * 30_000  # each text, not many times
    for sample in samples:
        assert len(uuid_tokenizer.encode(sample.prompt).ids) + 1 + 100 == sample.tokens + 100 == length
        data, question = sample.prompt.removeprefix("JSON data:\n").split("\n\nExtract the value")
        pairs, keys = json.loads(data), re.findall(r"Key: (\S+)\nCorresponding value:(?: (\S+))?", question)
        assert len(pairs) == data.count("\n") + 1
        assert [pairs[key] for key, _ in keys] == [*(value for _, value in keys[:2]), *sample.references]
        assert list(pairs).index(keys[2][0]) == round(sample.index % 6 / 5 * (len(pairs) - 1))
    assert len({sample.prompt for sample in samples}) == 7
    assert build_samples(ALL_TASKS["json_kv"], count, length, 1, 42, None) == samples[:1]


def test_json_kv_where_every_pair_has_the_same_tokens_is_less_than_a_pair_short() -> None:
    for sample in build_samples(ALL_TASKS["json_kv"], count, LENGTH, 6, 42, None):
        assert 0 <= LENGTH - 100 - sample.tokens < len(' "": "",\n') + 2 * 36
    with pytest.raises(ValueError, match=r"json_kv: sample 0 takes \d+ tokens at its smallest, answer included"):
        build_samples(ALL_TASKS["json_kv"], count, 600, 6, 42, None)


class Even(Text):
    """Sentences of 15 to 30 tokens; what is written is the number of them."""

    def write(self, units: int, index: int) -> tuple[str, list[str]]:
        raise NotImplementedError


@pytest.mark.parametrize("room", [524_289, 999_872, 2_097_024])
def test_a_long_text_is_filled_to_a_sentence_in_a_few_counts(room: int) -> None:
    for index in range(3):
        ends = 41 + np.cumsum(np.random.default_rng([room, index]).integers(15, 31, 200_000))
        sizes = []

        def written(units: int, index: int, ends: np.ndarray = ends, sizes: list[int] = sizes) -> Sample:
            sizes.append(units)
            return Sample(index, "", [], int(ends[units - 1]))

        sample = _filling(written, Even(), index, room)
        assert 0 <= room - sample.tokens <= 30
        assert sum(size > 2000 for size in sizes) <= 5


@pytest.mark.parametrize("top", [1, 2, 3, 99, 100, 101, 1000])
@pytest.mark.parametrize("high", [None, 50, 2000])
def test_the_largest_size_is_found_to_one_in_256(top: int, high: int | None) -> None:
    found = largest(lambda n: n <= top, 1, high)
    bound = top if high is None else min(top, high)
    assert bound - max(0, bound // 256 * 2) <= found <= bound


@pytest.mark.slow  # lm-eval's needle module takes seconds and 1.4 GB, so it is imported in a process of its own
def test_needles_are_in_their_haystacks(tmp_path) -> None:
    (tmp_path / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True)  # looked for on import, else downloaded
    program = """
import json, sys
from pathlib import Path
from ropewalk.evaluation.harness.ruler_prompts import build_samples
from ropewalk.evaluation.harness.ruler_tasks import TASKS
names = ("niah_single_1", "niah_multikey_2", "niah_multikey_3")
count = lambda text: len(text.encode()) + 1
made = {n: [s.record() for s in build_samples(TASKS[n], count, 4096, 4, 42, Path(sys.argv[1]))] for n in names}
(long,) = build_samples(TASKS["niah_multikey_2"], count, 600_000, 1, 42, Path(sys.argv[1]))
made["long"] = [long.tokens, count(long.prompt), long.prompt.count(long.references[0])]
print(json.dumps(made))
"""
    ended = subprocess.run([sys.executable, "-c", program, tmp_path], check=True, capture_output=True, text=True)
    made = json.loads(ended.stdout.splitlines()[-1])
    tokens, counted, held = made.pop("long")
    assert (tokens, held) == (counted, 1)
    assert 0 <= 600_000 - 128 - tokens < 120  # a needle has less
    for name, samples in made.items():
        assert len({sample["prompt"] for sample in samples}) == 4
        for sample in samples:
            (reference,) = sample["references"]
            text, _, question = sample["prompt"].rpartition("\nWhat is the special magic ")
            kind, key = re.match(r"(\w+) for (.*?) mentioned in", question).groups()
            assert f"One of the special magic {kind}s for {key} is: {reference}." in text
            assert sample["prompt"].endswith(f"The special magic {kind} for {key} mentioned in the provided text is")
            assert 0.9 * 4096 <= sample["tokens"] + 128 <= 4096
            needles = text.count("One of the special magic")
            assert needles == 1 if name == "niah_single_1" else needles > 10
