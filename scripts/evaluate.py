"""Loss by position and the needle grid of a checkpoint.

``python scripts/evaluate.py checkpoint=DIR documents=DIR output=DIR``
"""

from ropewalk.config import EvaluateConfig
from ropewalk.entry import entry


@entry("evaluate")
def main(config: EvaluateConfig) -> None:
    """Evaluate one checkpoint."""
    from ropewalk.evaluation import evaluate

    evaluate(config)


if __name__ == "__main__":
    main()
