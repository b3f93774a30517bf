"""Loss by position and the needle grid of a checkpoint.

``python scripts/evaluate.py checkpoint=DIR documents=DIR output=DIR``
``python scripts/evaluate.py key_tokens checkpoint=BASE documents=DIR length=65536``
``python scripts/evaluate.py validate model=DIR documents=DIR output=DIR rope=cope10``
"""

import sys

from ropewalk.cli import entry, run_command
from ropewalk.config.evaluation import EvaluateConfig, KeyTokensConfig, ValidateConfig
from ropewalk.runs.launch import EXIT_NOT_FINITE, release_warnings


@entry("evaluate")
def main(config: EvaluateConfig) -> None:
    """Evaluate one checkpoint."""
    release_warnings()  # nothing is to be saved: finished parts are on the disk, so a job's warning may end it
    from ropewalk.evaluation import evaluate, not_finite

    evaluate(config)
    if not_finite(config.output):
        sys.exit(EXIT_NOT_FINITE)  # all of it is written; what waits for it goes on


@entry("validate")
def validate(config: ValidateConfig) -> None:
    """Compare a model with itself under a changed spectrum, without training."""
    from ropewalk.evaluation import validate as run

    table = run(config)
    if (table["verdict"] == "not finite").any():
        sys.exit(EXIT_NOT_FINITE)


@entry("key_tokens")
def key_tokens(config: KeyTokensConfig) -> None:
    """Choose the tokens that LongPPL is over, once for all arms, under one reference model."""
    release_warnings()
    from ropewalk.evaluation.harness.key_tokens import write_key_tokens

    write_key_tokens(config)


if __name__ == "__main__":
    run_command({"evaluate": main, "validate": validate, "key_tokens": key_tokens}, default="evaluate")
