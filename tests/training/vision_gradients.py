"""Run by torchrun from test_vision.py: loss and gradients of one step of a model of images and videos.

vision_gradients.py STORE OUTPUT MODEL ARM
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
from helpers import GradientProbe, one_step
from training.engine_gradients import gradients
from visual_stores import video_run

from ropewalk.data import PackedStore
from ropewalk.training.engine import start_engine
from ropewalk.training.inputs import micro_batches, open_inputs


def main(store: str, output: str, model: str, arm: str) -> None:
    """Write one npz of gradients and loss."""
    overrides = (f"model.path={model}", "trainer.micro_batch_size=1", "deepspeed.param_persistence_threshold=0")
    config = video_run(PackedStore(store), Path(output) / "run", arm, *overrides)
    inputs = open_inputs(config)
    engine = start_engine(config, inputs.model_config, inputs.ranks)
    probe = GradientProbe(partial(gradients, engine))
    batches = micro_batches(inputs.mixture, 0, inputs.ranks, config, inputs.visuals)
    step = one_step(engine, batches, inputs.mixture.trained_tokens(0), inputs.ranks, probe)
    if inputs.ranks.is_main:
        np.savez(Path(output) / "gradients.npz", loss=step.loss, **probe.seen)


if __name__ == "__main__":
    main(*sys.argv[1:])
