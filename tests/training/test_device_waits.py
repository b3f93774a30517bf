"""Where a step waits for the GPU: nowhere but where docs/training.md says."""

import warnings
from pathlib import Path

import pytest
import torch
from helpers import one_step, tiny_run

from ropewalk.config.groups import RopeConfig
from ropewalk.model.load import training_config
from ropewalk.training.distributed import start_processes
from ropewalk.training.engine import start_engine
from ropewalk.training.guards import Guard
from ropewalk.training.inputs import micro_batches, open_data
from ropewalk.training.meter import Meter

LISTED = {"loss.py", "modeling_rope_utils.py", "meter.py", "trainer.py"}  # trainer.py: the gradient norm


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_waits_where_the_page_says(store_64, tmp_path):
    config = tiny_run(store_64, tmp_path, "trainer.device=cuda", "trainer.dtype=bfloat16")
    config.rope.chain = [{"method": "abf", "theta": 1e5}, {"method": "cope", "clip": 4}]
    ranks = start_processes("cuda")
    _, mixture = open_data(config)
    engine = start_engine(config, training_config(config.model, RopeConfig("cope4", config.rope.chain), 64), ranks)
    guard, meter = Guard(config.guards), Meter(ranks.device, sorted(mixture.store.domains), 64)
    for step in range(2):  # the first step warms up
        torch.cuda.set_sync_debug_mode("warn" if step else "default")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batches = micro_batches(mixture, step, ranks, config)
            one_step(engine, batches, mixture.trained_tokens(step), ranks, guard, meter=meter)
        torch.cuda.set_sync_debug_mode("default")
    waits = {Path(w.filename) for w in caught if "synchronizing CUDA operation" in str(w.message)}
    ours = {path.name for path in waits if "deepspeed" not in path.parts}
    assert ours <= LISTED
    engine.destroy()
