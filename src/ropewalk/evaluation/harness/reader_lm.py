"""The checkpoint as a model of lm-eval's: long prompts in bounded memory, and no prompt cut in silence."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from ropewalk.data.store.tokenizer_files import adds_bos, encode
from ropewalk.errors import UserError
from ropewalk.evaluation.model_reader import ModelReader
from ropewalk.training.distributed import Ranks, gather

Item = TypeVar("Item")
LOG_EVERY = 30.0  # seconds


class ReaderLM(TemplateLM):
    """lm-eval's language model over a :class:`ModelReader`.

    Texts are tokenized as the checkpoint's tokenizer does by itself, with a beginning-of-sequence token if it adds
    one. Greedy decoding only. A prompt that does not fit ``max_length`` with its answer is an error, or, with
    ``overflow="middle"``, loses its middle, as InfiniteBench and LongBench themselves do, and is counted.

    Attributes:
        cut: for each task, how many prompts lost their middle.

    Args:
        reader: the model.
        tokenizer: of the checkpoint.
        max_length: tokens of prompt and answer together.
        overflow: ``error`` or ``middle``.
        ranks: the processes that share the samples.
    """

    def __init__(self, reader: ModelReader, tokenizer: Any, max_length: int, overflow: str, ranks: Ranks) -> None:
        super().__init__()
        self.reader = reader
        self.tokenizer = tokenizer
        self._adds_bos = adds_bos(tokenizer)
        self.max_length = max_length
        self.overflow = overflow
        self.cut: Counter[str] = Counter()
        self._rank, self._world_size, self._device = ranks.rank, ranks.world_size, torch.device("cpu")

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-sequence token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a continuation that has no context: beginning of sequence, else end of sequence."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of ``string``; no second beginning-of-sequence token if the text starts with one."""
        bos = self.tokenizer.bos_token
        starts = bos is not None and string.startswith(bos)
        special = not starts if add_special_tokens is None else add_special_tokens
        return encode(self.tokenizer, string, bos=special and self._adds_bos)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of each continuation; neighbours of one context share its pass."""
        results: list[tuple[float, bool]] = []
        groups = groupby(requests, key=lambda request: request[1])
        contexts = [(context, [continuation for _, _, continuation in group]) for context, group in groups]
        for context, continuations in self._logged(contexts, "contexts"):
            room = self.max_length - max(map(len, continuations))
            fitted = self._fit(context, room, "likelihood")
            results += self.reader.continuations(torch.tensor(fitted), [torch.tensor(c) for c in continuations])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Summed log-likelihood of whole texts, each in windows of ``max_length`` that share no context."""
        results = []
        for request in self._logged(requests, "texts"):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            total = 0.0
            for start in range(0, len(ids), self.max_length - 1):
                window = torch.tensor(ids[start : start + self.max_length - 1])
                total += self.reader.continuations(torch.tensor([self.prefix_token_id]), [window])[0][0]
            results.append(total)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to each request's stop strings, the end of sequence or its number of tokens."""
        return [self._generate(request) for request in self._logged(requests, "prompts")]

    def _logged(self, items: Sequence[Item], what: str) -> Iterable[Item]:
        """The items; the first process logs how far it is."""
        return logged(items, what) if self.rank == 0 else items

    def _generate(self, request: Instance) -> str:
        text, options = request.args
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise UserError(f"{request.task_name} asks for sampling; answers here are greedy: choose another task")
        stops = [options["until"]] if isinstance(options.get("until"), str) else options.get("until") or []
        stops = [stop for stop in stops if stop]
        most = int(options.get("max_gen_toks", 256))
        prompt = self._fit(self.tok_encode(text), self.max_length - most, str(request.task_name))

        def is_done(written: list[int]) -> bool:
            if written[-1] == self.eot_token_id:
                return True
            return bool(stops) and any(stop in self.tokenizer.decode(written) for stop in stops)

        written = self.reader.generate(torch.tensor(prompt), most, is_done)
        answer = self.tokenizer.decode(written, skip_special_tokens=True)
        return before_first(answer, stops)

    def _fit(self, ids: list[int], room: int, task: str) -> list[int]:
        """``ids`` in ``room`` tokens: as they are, without their middle, or an error."""
        if len(ids) <= room:
            return ids
        if self.overflow == "error" or room < 2:
            raise UserError(
                f"{task}: a prompt of {len(ids)} tokens does not fit the {room} that length {self.max_length} leaves "
                "beside its answer; evaluate at a greater length, or cut it with suite.overflow=middle"
            )
        self.cut[task] += 1
        return ids[: room - room // 2] + ids[-(room // 2) :]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A number of each rank, in order."""
        return torch.tensor(gather(int(tensor)))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
        """An object of each rank, in order."""
        return gather(obj)

    def barrier(self) -> None:
        """Wait for every rank."""
        gather(None)


def before_first(text: str, stops: Iterable[str]) -> str:
    """``text`` up to the first of the stop strings."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def logged(items: Sequence[Item], what: str, every: float = LOG_EVERY) -> Iterator[Item]:
    """The items one by one; a line after ``every`` seconds at the earliest has the items done and the time left.

    Args:
        items: pieces of work of about one size.
        what: they are, e.g. "prompts".
        every: seconds between two lines.
    """
    started = logged_at = time.perf_counter()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if now - logged_at >= every and done < len(items):
            logged_at, left = now, timedelta(seconds=round((now - started) * (len(items) - done) / done))
            print(f"  {done:,} of {len(items):,} {what}, ETA {left}", flush=True)
