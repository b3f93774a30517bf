"""The model as evaluations read it: long prompts in bounded memory, losses of a window, logits of an answer.

The logits of a whole window never exist at once.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import DynamicCache

from ropewalk.data.order.batches import VisionInputs
from ropewalk.model.vision import embed

# elements of a chunk's mask against all keys before it: 64 MiB as bool, 256 MiB as the float32 that SDPA makes
MASK_ELEMENTS = 2**26
LONGEST_CHUNK = 4096  # tokens
SHORTEST_CHUNK = 64
LOGITS_CHUNK = 512  # positions whose logits exist at once: 0.26 GB at a vocabulary of 128k in float32


def chunk_for(tokens: int) -> int:
    """Tokens of one prefill chunk for a prompt of ``tokens``, so that its attention mask stays small."""
    return max(SHORTEST_CHUNK, min(LONGEST_CHUNK, MASK_ELEMENTS // max(tokens, 1)))


class ModelReader:
    """Reads prompts with a stock causal language model, batch 1, and keeps memory linear in the prompt.

    Args:
        model: in evaluation mode, with stock attention.
        chunk: tokens of one forward pass; None: chosen by :func:`chunk_for` for each prompt.
    """

    def __init__(self, model: Any, chunk: int | None = None) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.device = model.device
        self.chunk = chunk

    @torch.inference_mode()
    def read(
        self, ids: torch.Tensor, keep: int, cache: DynamicCache | None = None, vision: VisionInputs | None = None
    ) -> torch.Tensor:
        """Hidden states of the last ``keep`` of ``ids``; (keep, width) on the model's device.

        Args:
            ids: LongTensor (n,).
            keep: positions from the end, 1 to n.
            cache: keys and values of the tokens before ``ids``, to which theirs are added; None: there are none before.
            vision: of a model of images and videos, with the positions of all ``ids``.
        """
        n = ids.numel()
        before = 0 if cache is None else cache.get_seq_length()
        chunk = self.chunk or chunk_for(before + n)
        if cache is None and n > chunk:
            cache = self.new_cache()
        inputs = {"input_ids": ids[None].to(self.device)}
        if vision is not None:
            vision = vision.mapped(lambda tensor: tensor.to(self.device))
            inputs = {"inputs_embeds": embed(self.model, inputs["input_ids"], vision), "position_ids": vision.positions}
        kept = []
        for start in range(0, n, chunk):
            end = min(start + chunk, n)
            # tokens are the second dimension of ids and embeddings, the third of positions
            piece = {
                name: tensor[..., start:end] if name != "inputs_embeds" else tensor[:, start:end]
                for name, tensor in inputs.items()
            }
            states = self.decoder(**piece, past_key_values=cache, use_cache=cache is not None).last_hidden_state[0]
            wanted = keep - max(0, n - end)  # of this chunk, from its end
            if wanted > 0:
                kept.append(states[-wanted:])
        return torch.cat(kept)

    def new_cache(self) -> DynamicCache:
        """An empty cache of the model's layers (sliding windows keep only their window)."""
        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Float32 logits of hidden states, (..., width) -> (..., vocabulary)."""
        logits = self.head(states).to(self.device).float()  # with the layers spread over devices, the head is elsewhere
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.inference_mode()
    def continuations(self, context: torch.Tensor, continuations: Sequence[torch.Tensor]) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation of one context, and whether greedy decoding would write it.

        The context is read once. Its cache is copied for as many continuations at a time as fit beside it.

        Args:
            context: LongTensor (n,), n >= 1.
            continuations: LongTensors (m,), m >= 1.
        """
        cache = self.new_cache()
        first = self.logits(self.read(context, 1, cache))  # predicts the first token of every continuation
        at_once = max(1, LONGEST_CHUNK // context.numel())
        scored: list[tuple[float, bool]] = []
        for start in range(0, len(continuations), at_once):
            group = continuations[start : start + at_once]
            states = self._continue(cache, group) if max(map(len, group)) > 1 else None
            for number, ids in enumerate(group):
                rows = first if states is None else torch.cat([first, self.logits(states[number, : len(ids) - 1])])
                chosen = rows[: len(ids)].log_softmax(-1)
                wanted = ids.to(self.device)
                likelihood = float(chosen.gather(-1, wanted[:, None]).double().sum())
                scored.append((likelihood, bool((chosen.argmax(-1) == wanted).all())))
        return scored

    def _continue(self, cache: DynamicCache, group: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hidden states of right-padded continuations; the padding after a token does not change it."""
        fed = torch.nn.utils.rnn.pad_sequence([ids[:-1] for ids in group], batch_first=True).to(self.device)
        copied = copy.deepcopy(cache)
        copied.batch_repeat_interleave(len(group))
        return self.decoder(input_ids=fed, past_key_values=copied, use_cache=True).last_hidden_state

    @torch.inference_mode()
    def generate(self, prompt: torch.Tensor, max_new_tokens: int, is_done: Callable[[list[int]], bool]) -> list[int]:
        """Greedy decoding of at most ``max_new_tokens``; ``is_done`` sees the new tokens after each one.

        Args:
            prompt: LongTensor (n,).
            max_new_tokens: at least 1.
            is_done: whether the answer is complete.
        """
        cache = self.new_cache()
        states = self.read(prompt, 1, cache)
        written: list[int] = []
        while True:
            written.append(int(self.logits(states)[-1].argmax()))
            if len(written) == max_new_tokens or is_done(written):
                return written
            states = self.read(torch.tensor(written[-1:]), 1, cache)


class Scorer(Protocol):
    """A model as the losses and needles use it."""

    def token_losses(self, ids: torch.Tensor) -> NDArray[np.float32]:
        """Negative log-likelihood, nats, of ids[1:] given the tokens before each; float32 (n - 1,)."""
        ...

    def score(self, prompt_ids: torch.Tensor, answer_ids: torch.Tensor) -> torch.Tensor:
        """Logits of each answer token given all tokens before it; float32 (m, vocabulary)."""
        ...

    def logits_at(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits after the tokens of ids at ``positions``, LongTensor (m,); float32 (m, vocabulary)."""
        ...


class ModelScorer:
    """A transformers causal language model as a :class:`Scorer`.

    Losses are computed in float32; the logits come in the model's dtype, so a bfloat16 model rounds them.

    Args:
        model: in evaluation mode; its decoder gives hidden states, its output embeddings logits.
        chunk: positions whose logits exist at once.
        prefill_chunk: positions of one forward pass, the earlier ones in a cache; None: one pass for the whole window,
            as a model with other than stock attention needs it.
    """

    def __init__(self, model: Any, chunk: int = LOGITS_CHUNK, prefill_chunk: int | None = None) -> None:
        self.decoder = model.get_decoder()
        self.reader = ModelReader(model, prefill_chunk)
        self.device = model.device
        self.chunk = chunk

    @torch.inference_mode()
    def token_losses(self, ids: torch.Tensor) -> NDArray[np.float32]:
        """Negative log-likelihood of ids[1:]; float32 (n - 1,), nats. ids: LongTensor (n,)."""
        targets = ids[1:].to(self.device)
        hidden = self._hidden(ids[:-1])
        losses = [
            F.cross_entropy(self.reader.logits(states), wanted, reduction="none")
            for states, wanted in zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        ]
        return torch.cat(losses).cpu().numpy()

    @torch.inference_mode()
    def score(self, prompt_ids: torch.Tensor, answer_ids: torch.Tensor) -> torch.Tensor:
        """Teacher-forced logits of the answer; float32 (m, vocabulary) on the CPU.

        Args:
            prompt_ids: LongTensor (n,).
            answer_ids: LongTensor (m,); the last is never fed, only predicted.
        """
        positions = torch.arange(answer_ids.numel()) + prompt_ids.numel() - 1
        return self.logits_at(torch.cat([prompt_ids, answer_ids[:-1]]), positions)

    @torch.inference_mode()
    def logits_at(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits after the tokens at ``positions``, LongTensor (m,); float32 (m, vocabulary) on the CPU."""
        return self.reader.logits(self._hidden(ids)[positions.to(self.device)]).cpu()

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        if self.reader.chunk is not None and ids.numel() > self.reader.chunk:
            return self.reader.read(ids, ids.numel())
        return self.decoder(input_ids=ids[None].to(self.device), use_cache=False).last_hidden_state[0]


class Progress:
    """Share of the work done and the time left, a line for each piece.

    Args:
        command: that works.
        total: work to come, in any unit that time is proportional to, such as tokens.
    """

    def __init__(self, command: str, total: int) -> None:
        self.command, self.total, self.done = command, total, 0
        self.started = time.perf_counter()

    def advance(self, work: int, what: str) -> None:
        """Count ``work`` as done and print a line."""
        self.done += work
        left = (time.perf_counter() - self.started) * (self.total - self.done) / self.done
        line = f"{self.command} {self.done / self.total:4.0%}  ETA {timedelta(seconds=round(left))}  {what}"
        print(line, flush=True)
