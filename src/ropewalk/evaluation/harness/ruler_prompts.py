"""Prompts of RULER's tasks and of json_kv that fill a length and never pass it; RULER's texts are lm-eval's.

lm-eval's own sizing is not used. It makes 500 samples in any case, and never ends if a length is too short for vt or
cwe. It lets fwe run past its length by the answer, and leaves cwe's worked example out of the prompt. Once all of
SQuAD's paragraphs are used, it shuffles them in place, and questions and paragraphs no longer belong together.
"""

from __future__ import annotations

import json
import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.errors import UserError
from ropewalk.evaluation.harness.json_kv import COUNTS, key_value_prompt
from ropewalk.evaluation.harness.ruler_tasks import SEARCHED, RulerTask

Written = tuple[str, list[str]]  # prompt and references
STRETCH = 10_000  # words
WORDS_SUFFICE = 65_536  # tokens; to about here lm-eval's own words fill cwe's list


class Text(ABC):
    """A task's text. Its size is in units of its own: words, sentences, documents.

    Attributes:
        fewest: units that a sample needs at least.
        most: units that there are, None for no end.
        samples: different samples that there are, None for no end.
    """

    fewest: int = 1
    most: int | None = None
    samples: int | None = None

    @abstractmethod
    def write(self, units: int, index: int) -> Written:
        """Prompt and references of sample ``index``, from the random state as it is."""

    def fewest_for(self, index: int) -> int:
        """Units that sample ``index`` needs at least."""
        return self.fewest


class Niah(Text):
    """Needles in a haystack of noise, essays or other needles. Units are sentences; of essays, words up to SEARCHED."""

    in_sentences = False  # an essay, whose units are sentences already

    def __init__(self, task: RulerTask, length: int, data: Path | None) -> None:
        _find_sentences(data)
        # builds 6 million adjective-noun pairs: 1.5 GB and tens of seconds, so only for this task
        from lm_eval.tasks.ruler import niah_utils, prepare_niah

        self.prepare, self.template = prepare_niah, niah_utils.TEMPLATE
        options = {"num_needle_k": 1, "num_needle_v": 1, "num_needle_q": 1, **task.options}
        self.options = options
        self.fewest = options["num_needle_k"] * options["num_needle_v"]
        if options["type_haystack"] == "essay":
            self.haystack: Any = _essay_words(data) if data else prepare_niah.get_haystack("essay")
            self.in_sentences = length > SEARCHED
            if self.in_sentences:
                repeats = -(-length // len(self.haystack))  # a word has a token or more
                self.haystack = self._sentences(self.haystack) * repeats  # as upstream repeats them
            self.most = len(self.haystack)
        else:
            self.haystack = prepare_niah.get_haystack(options["type_haystack"])

    def _sentences(self, words: list[str]) -> list[str]:
        """Sentences of the essays, split once and in stretches, as the splitter gives up on a text after 5 seconds."""
        stretches = (" ".join(words[start : start + STRETCH]) for start in range(0, len(words), STRETCH))
        return [sentence for stretch in stretches for sentence in self.prepare.cached_sent_tokenize(stretch)]

    def write(self, units: int, index: int) -> Written:
        """The haystack with its needles, the question, and the beginning of the answer."""
        split = self.prepare.cached_sent_tokenize
        if self.in_sentences:
            self.prepare.cached_sent_tokenize = lambda _: self.haystack[:units]
        try:
            text, answers, _ = self.prepare.generate_input_output(
                units, self.haystack, template=self.template, **self.options
            )
        finally:
            self.prepare.cached_sent_tokenize = split
        if units != getattr(self, "_last_units", None):
            self.prepare.cached_sent_tokenize.cache_clear()  # it would keep 1024 haystacks
            self._last_units = units
        question = re.search(r"What (is|are all) the (.*)\?$", text)
        if question is None:
            raise RuntimeError(f"lm-eval's needle prompt ends otherwise than expected: {text[-200:]!r}")
        return f"{text} The {question[2]} {question[1].split()[0]}", answers


class VariableTracking(Text):
    """Chains of assignments among noise, after one worked example."""

    fewest = 6  # lines of noise: more than there are links in a chain

    def __init__(self, count: Callable[[str], int]) -> None:
        from lm_eval.tasks.ruler import vt_utils

        self.vt = vt_utils
        np.random.seed(0)
        random.seed(0)
        lines = largest(lambda n: count(self._chain(n, True)[0]) <= 500 - 30, 6, 64)
        text, variables = self._chain(lines, True)
        self.example = f"{text} {' '.join(variables)}\n\n"

    def _chain(self, lines: int, is_example: bool) -> Written:
        return self.vt.generate_input_output(lines, 1, 4, is_icl=is_example)

    def write(self, units: int, index: int) -> Written:
        """The example with variables of its own, then the chain of the question."""
        text, variables = self._chain(units, False)
        return f"{self.vt.randomize_icl(self.example)}\n\n{text}".rstrip(), variables


class CommonWords(Text):
    """A numbered list of words, ten of them common, after one worked example."""

    fewest = 12  # ten are common

    def __init__(self, length: int, data: Path | None) -> None:
        from lm_eval.tasks.ruler import cwe_utils

        self.cwe, self.length = cwe_utils, length
        self.words = list(cwe_utils.WORDS)
        needs_more = data is not None and length > WORDS_SUFFICE
        self.more = _more_words(data, tuple(self.words)) if needs_more else self.words
        self.most = len(self.more)

    def write(self, units: int, index: int) -> Written:
        """The example, then the list; past lm-eval's own words, also those of the essays and of SQuAD."""
        self.cwe.RNG.seed(random.getrandbits(32))
        self.cwe.WORDS = self.words if units <= len(self.words) else self.more
        example, text, common = self.cwe.generate_input_output(units, self.length)
        return f"{example}\n{text}", common


class FrequentWords(Text):
    """Coded words whose frequencies follow a zeta distribution; the answer is the three most frequent."""

    fewest = 50

    def __init__(self, length: int, new_tokens: int) -> None:
        from lm_eval.tasks.ruler import fwe_utils

        self.fwe, self.vocabulary = fwe_utils, max((length - new_tokens) // 50, 8)

    def write(self, units: int, index: int) -> Written:
        """The coded text, never shortened by lm-eval itself."""
        text, common, _ = self.fwe.generate_input_output(
            2**62, lambda _: _NO_TOKENS, num_words=units, vocab_size=self.vocabulary
        )
        return text, common


class Questions(Text):
    """A question about one of many paragraphs."""

    def __init__(self, source: str, data: Path | None) -> None:
        from lm_eval.tasks.ruler import qa_utils

        self.qa = qa_utils
        read = {"squad": qa_utils.read_squad, "hotpotqa": qa_utils.read_hotpotqa}[source]
        self.questions, self.paragraphs = _from_file(read, data / f"{source}.json") if data else read()
        self.most, self.samples = len(self.paragraphs), len(self.questions)

    def fewest_for(self, index: int) -> int:
        """The paragraphs that the answer stands in."""
        return len(self.questions[index]["context"])

    def write(self, units: int, index: int) -> Written:
        """The paragraphs and question ``index``."""
        paragraphs = list(self.paragraphs)  # a list of all of them is shuffled in place
        text, answers = self.qa.generate_input_output(index, units, qas=self.questions, docs=paragraphs)
        return f"{text} Answer:", answers


class _NoTokens:
    input_ids: tuple[int, ...] = ()


_NO_TOKENS = _NoTokens()


def make_text(task: RulerTask, length: int, count: Callable[[str], int], data: Path | None) -> Text:
    """The text of ``task`` for prompts of ``length`` tokens.

    Args:
        task: which.
        length: tokens of prompt and answer together.
        count: tokens of a text.
        data: directory with PaulGrahamEssays.json, squad.json, hotpotqa.json and nltk_data; None: the hub.

    Raises:
        UserError: a file is missing there.
    """
    if task.kind == "niah":
        return Niah(task, length, data)
    if task.kind == "vt":
        return VariableTracking(count)
    if task.kind == "cwe":
        return CommonWords(length, data)
    if task.kind == "fwe":
        return FrequentWords(length, task.new_tokens)
    return Questions(task.options["data"], data)


def largest(fits: Callable[[int], bool], low: int, high: int | None) -> int:
    """The largest size that fits, or ``low`` if none does: doubled from ``low``, then halved in between.

    Args:
        fits: true up to some size and false after it, or nearly so.
        low: the smallest.
        high: the largest, None for no end.
    """
    step = low
    while (high is None or step * 2 <= high) and fits(step * 2):
        step *= 2
    if high is not None and step * 2 > high and fits(high):
        return high
    above = step * 2 if high is None else min(step * 2, high)
    while above - step > max(1, step // 256):
        middle = (step + above) // 2
        step, above = (middle, above) if fits(middle) else (step, middle)
    return step


def _find_sentences(data: Path | None) -> None:
    """Let nltk find its sentence splitter in the offline data, before lm-eval looks for it and would download it."""
    if data is not None and str(data / "nltk_data") not in (paths := _nltk_paths()):
        paths.insert(0, str(data / "nltk_data"))


def _nltk_paths() -> list[str]:
    import nltk

    return nltk.data.path


def _essay_words(data: Path) -> list[str]:
    return re.sub(r"\s+", " ", _read_json(data / "PaulGrahamEssays.json")["text"]).split(" ")


@cache
def _more_words(data: Path, known: tuple[str, ...]) -> list[str]:
    """``known``, then every other lower-case word of the essays and of SQuAD, in their order."""
    words = dict.fromkeys(known)
    for name in ("PaulGrahamEssays.json", "squad.json"):
        text = json.dumps(_read_json(data / name), ensure_ascii=False)
        words |= dict.fromkeys(re.findall(r"(?<![\w\\])[a-z]{4,14}(?!\w)", text))
    return list(words)


def _from_file(read: Callable[..., Any], path: Path) -> Any:
    """lm-eval's reader of a question set, given a file in place of what it would download."""
    from lm_eval.tasks.ruler import qa_utils

    content, download = _read_json(path), qa_utils.download_json
    qa_utils.download_json = lambda url: content
    try:
        return read(str(path))
    finally:
        qa_utils.download_json = download


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise UserError(
            f"{path} is missing; scripts/fetch_eval_data.sh ruler writes it, or set suite.data=null for the hub"
        )
    return json.loads(path.read_text(encoding="utf-8"))


SHORTEST = 512  # tokens; below it the worked examples of vt and cwe leave no room


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        index: of the sample; the same index, length and seed give the same prompt, however many samples there are.
        prompt: text, up to where the answer begins.
        references: what the answer is searched for.
        tokens: of the prompt, with the answer's at most the length.
    """

    index: int
    prompt: str
    references: list[str]
    tokens: int

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def check_length(length: int, task: RulerTask) -> None:
    """Raise UserError for a length that ``task`` has no prompts of."""
    if not SHORTEST <= length <= task.longest:
        raise UserError(
            f"lengths={length}: {task.name} has prompts of {SHORTEST} to {task.longest} tokens; choose within, or "
            "other tasks (suite.tasks)"
        )


def build_samples(
    task: RulerTask,
    count: Callable[[str], int],
    length: int,
    samples: int,
    seed: int,
    data: Path | None,
    *,
    logs: bool = False,
) -> list[Sample]:
    """``samples`` prompts of ``task``, each as long as fits ``length`` with its answer.

    Those of json_kv have the length itself, see key_value_prompt. RULER's have units less that are one part in 256 of
    the text, and above 524,288 tokens at most one unit less: there a few counts of each text are enough, as its tokens
    grow evenly.

    Args:
        task: which.
        count: tokens of a text, a beginning-of-sequence token included if the model gets one.
        length: tokens of prompt and answer together.
        samples: how many.
        seed: of all of them.
        data: offline data, None for the hub.
        logs: print how far it is, now and then.

    Raises:
        UserError: the data has fewer samples, or the smallest does not fit.
    """
    check_length(length, task)
    room = length - task.new_tokens
    indices: Iterable[int] = range(samples)
    if logs:
        from ropewalk.evaluation.harness.reader_lm import logged  # imports lm-eval, an extra

        indices = logged(range(samples), f"prompts of {task.name} written")
    if task.kind == "json_kv":
        made = ((i, *key_value_prompt(count, room, i, f"{seed}/{task.name}/{length}/{i}")) for i in indices)
        return [_checked(Sample(*parts), task, room) for parts in made]
    text = make_text(task, length, count, data)
    if text.samples is not None and samples > text.samples:
        raise UserError(f"{task.name} has {text.samples} questions; set suite.samples to that or less, not {samples}")

    def written(units: int, index: int) -> Sample:
        random.seed(f"{seed}/{task.name}/{length}/{index}")
        np.random.seed(random.getrandbits(32))
        prompt, references = text.write(units, index)
        return Sample(index, prompt, references, count(prompt))

    fewest = text.fewest_for(0)
    if length > SEARCHED:
        return [_checked(_filling(written, text, index, room), task, room) for index in indices]
    units = largest(lambda n: written(n, 0).tokens <= room, fewest, text.most)
    return [_checked(_fitting(written, text, units, index, room), task, room) for index in indices]


def _checked(sample: Sample, task: RulerTask, room: int) -> Sample:
    """``sample``; UserError where its text does not fit, which was then made as small as there is one."""
    if sample.tokens > room:
        raise UserError(
            f"{task.name}: sample {sample.index} takes {sample.tokens + task.new_tokens} tokens at its smallest, "
            f"answer included, and lengths={room + task.new_tokens} is less; evaluate at a greater length"
        )
    return sample


def _fitting(written: Callable[[int, int], Sample], text: Text, units: int, index: int, room: int) -> Sample:
    """Sample ``index`` at ``units``, or at as few less as it takes to fit ``room`` tokens; at its smallest anyway."""
    fewest = text.fewest_for(index)
    units = max(units, fewest)
    while True:
        sample = written(units, index)
        if sample.tokens <= room or units == fewest:
            return sample
        units = max(fewest, units - max(1, units * (sample.tokens - room) // sample.tokens + units // 256))


def _filling(written: Callable[[int, int], Sample], text: Text, index: int, room: int) -> Sample:
    """Sample ``index`` at most a unit short of ``room`` tokens, or as near as the text's units come to it.

    Follows the straight line through two sizes: first the smallest text with 64 units more, and with 1,088; then the
    two that were counted last.
    """
    units, start = text.fewest_for(index) + 64, written(text.fewest_for(index) + 64, index).tokens
    best = last = written(units + 1024, index)
    at, per_unit = units + 1024, (last.tokens - start) / 1024
    counted = {at}
    for _ in range(COUNTS):
        step = math.floor((room - last.tokens) / per_unit)
        units = min(max(at + step, text.fewest_for(index)), text.most or at + step)
        if units in counted:  # no size is nearer
            break
        counted.add(units)
        sample = written(units, index)
        if best.tokens < sample.tokens <= room:
            best = sample
        if abs(units - at) >= 64:  # of fewer, the tokens of single units would decide
            per_unit = (sample.tokens - last.tokens) / (units - at)
        last, at = sample, units
    return best
