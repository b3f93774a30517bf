"""Key tokens of LongPPL on a model whose losses are known, and what they give in a table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ropewalk.evaluation.documents import Windows
from ropewalk.evaluation.harness.key_tokens import FILE, choose_key_tokens, longppl_rows, read_key_tokens
from ropewalk.files import sha256_of_json


class Repeats:
    """Knows a token that it has read before (0.5 nats), and any other not (6); token 9 always costs 3."""

    def token_losses(self, ids: torch.Tensor) -> np.ndarray:
        read = ids.tolist()
        return np.array(
            [3.0 if token == 9 else 0.5 if token in read[:place] else 6.0 for place, token in enumerate(read)][1:],
            np.float32,
        )


def test_key_tokens_are_those_that_need_the_long_context() -> None:
    """Token 5 at 2 comes again at 40, 38 tokens later, and then at 44; nothing else repeats over so far."""
    ids = torch.arange(100, 160)
    ids[2] = ids[40] = ids[44] = 5
    ids[3] = ids[41] = 9
    assert choose_key_tokens(Repeats(), ids, 16) == [40]
    assert choose_key_tokens(Repeats(), ids, 44) == []  # 5 at 2 is within the short context of 40


@pytest.mark.parametrize("short", [4, 8, 12, 16, 20])
def test_every_position_is_looked_at_once_with_about_the_short_context(short: int) -> None:
    contexts: dict[int, int] = {}

    class Counts:
        def token_losses(self, ids: torch.Tensor) -> np.ndarray:
            first = int(ids[0])
            if first:  # a short pass
                step = max(1, short // 4)
                for place in range(len(ids) - 1, 0, -1):
                    if place >= short - step:
                        assert contexts.setdefault(first + place, place) == place
            return np.zeros(len(ids) - 1, np.float32)

    choose_key_tokens(Counts(), torch.arange(100), short)
    assert sorted(contexts) == list(range(short, 100))
    assert {short - max(1, short // 4) <= context < short for context in contexts.values()} == {True}


def written(directory: Path, windows: Windows, positions: dict[str, list[int]]) -> None:
    documents = {
        name: {"sha256": sha256_of_json(ids.tolist()), "positions": positions[name]}
        for name, ids in windows.tokens.items()
    }
    (directory / FILE).write_text(json.dumps({"length": windows.length, "documents": documents}))


def test_rows_are_the_losses_of_the_key_tokens_below_each_length(tmp_path: Path) -> None:
    windows = Windows(1024, {"a": torch.arange(1024), "b": torch.arange(1024)}, {}, 0)
    written(tmp_path, windows, {"a": list(range(256, 512)), "b": list(range(400, 1000, 2))})
    key = read_key_tokens(tmp_path, windows)
    losses = {"a": np.full(1023, 2.0, np.float32), "b": np.arange(1, 1024, dtype=np.float32) / 100}
    sums = [entry for name in "ab" for entry in key.sums(name, losses[name], [256, 512, 1024])]
    few, half, whole = longppl_rows(sums, SimpleNamespace(lengths=[256, 512, 1024]), 0)
    assert (few["metric"], few["n"], math.isnan(few["value"])) == ("too_few_key_tokens", 0, True)
    b = np.arange(400, 1000, 2) / 100  # the loss at position p is p / 100
    assert (half["n"], whole["n"]) == (256 + 56, 256 + 300)
    assert half["value"] == pytest.approx((512 + b[:56].sum()) / 312)
    assert whole["value"] == pytest.approx((512 + b.sum()) / 556)


def test_other_tokens_have_no_longppl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    windows = Windows(128, {"a": torch.arange(128)}, {}, 0)
    assert read_key_tokens(tmp_path, windows) is None
    written(tmp_path, windows, {"a": [3]})
    assert read_key_tokens(tmp_path, Windows(128, {"a": torch.arange(1, 129)}, {}, 0)) is None
    assert f"no LongPPL: {tmp_path / FILE} was chosen for 128 tokens of other documents" in capsys.readouterr().out
    (tmp_path / FILE).write_text('{"length": 4}')
    with pytest.raises(ValueError, match="is damaged"):
        read_key_tokens(tmp_path, windows)
