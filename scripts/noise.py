"""Noise between runs, and the seeds that a difference takes: ``python scripts/noise.py runs=[outputs/a,outputs/b]``."""

from hydra.core.hydra_config import HydraConfig

from ropewalk.cli import entry
from ropewalk.config.train import NoiseConfig
from ropewalk.runs.launch import release_warnings


@entry("noise")
def main(config: NoiseConfig) -> None:
    """Measure the noise of runs, start replicates and measure theirs, or plan seeds."""
    release_warnings()  # nothing is to be saved, so a job's warning may end it
    from ropewalk.cluster.replicate_branches import noise

    noise(config, list(HydraConfig.get().overrides.task))


if __name__ == "__main__":
    main()
