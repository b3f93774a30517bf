"""Loss by position and the needle grid of a checkpoint.

``python scripts/evaluate.py checkpoint=DIR documents=DIR output=DIR``
``python scripts/evaluate.py key_tokens checkpoint=BASE documents=DIR length=65536``
``python scripts/evaluate.py validate model=DIR documents=DIR output=DIR rope=cope10``
"""

from ropewalk.cli import entry, run_command
from ropewalk.config.evaluation import EvaluateConfig, KeyTokensConfig, ValidateConfig
from ropewalk.runs.launch import release_warnings


@entry("evaluate")
def main(config: EvaluateConfig) -> None:
    """Evaluate one checkpoint."""
    release_warnings()  # nothing is to be saved: finished parts are on the disk, so a job's warning may end it
    from ropewalk.evaluation import evaluate

    evaluate(config)


@entry("validate")
def validate(config: ValidateConfig) -> None:
    """Compare a model with itself under a changed spectrum, without training."""
    from ropewalk.evaluation import validate as run

    run(config)


@entry("key_tokens")
def key_tokens(config: KeyTokensConfig) -> None:
    """Choose the tokens that LongPPL is over, once for all arms, under one reference model."""
    release_warnings()
    from ropewalk.evaluation.harness.key_tokens import write_key_tokens

    write_key_tokens(config)


if __name__ == "__main__":
    run_command({"evaluate": main, "validate": validate, "key_tokens": key_tokens}, default="evaluate")
