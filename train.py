"""Continue the pretraining of a RoPE model: ``python train.py +experiment=cope20``."""

from ropewalk.cli import entry
from ropewalk.config.train import TrainConfig


@entry("train")
def main(config: TrainConfig) -> None:
    """Train one arm."""
    from ropewalk.evaluation import TrainingEvaluation
    from ropewalk.training import train

    train(config, TrainingEvaluation)


if __name__ == "__main__":
    main()
