"""Evaluation of a checkpoint by a suite: answers, loss by position and needles by default.

``python scripts/evaluate.py checkpoint=DIR documents=DIR output=DIR``
``python scripts/evaluate.py key_tokens checkpoint=BASE documents=DIR length=65536``
``python scripts/evaluate.py runs outputs/a outputs/b documents=DIR`` evaluates several and compares them
``python scripts/evaluate.py validate model=DIR documents=DIR output=DIR rope=cope10``
"""

import sys
from pathlib import Path

from ropewalk.cli import DRY_RUN, composed, entry, hydra_arguments, run_command, user_errors
from ropewalk.config.evaluation import EvaluateConfig, KeyTokensConfig, ValidateConfig
from ropewalk.errors import UserError
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


def evaluate_runs() -> None:
    """Evaluate several runs alike, each into its evaluation/, and compare them: runs RUN RUN ... key=value ...

    Keys of the comparison begin with ``compare.``, as in compare.baseline=NAME.
    """
    release_warnings()
    words, own = sys.argv[1:], "compare."
    ledgers = [word.removeprefix(DRY_RUN) for word in words if word.startswith(DRY_RUN)]
    words = [word for word in words if not word.startswith(DRY_RUN)]
    runs = [word.rstrip("/") for word in words if "=" not in word]
    settings = [word for word in words if "=" in word and not word.startswith(own)]
    outputs = [f"{run}/evaluation" for run in runs]
    with user_errors():
        if not runs:
            raise UserError("no run is named; write: python scripts/evaluate.py runs outputs/a outputs/b documents=DIR")
        places = [[f"checkpoint={run}", f"output={output}"] for run, output in zip(runs, outputs, strict=True)]
        evaluations = [composed("evaluate", [*place, *hydra_arguments(settings, "evaluate")]) for place in places]
        of_comparison = [word.removeprefix(own) for word in words if word.startswith(own)]
        comparison = composed("compare", [f"runs=[{','.join(runs)}]", *hydra_arguments(of_comparison, "compare")])
        if ledgers:
            from ropewalk.cluster.dry_run import dry_run

            for config in evaluations:
                dry_run("evaluate", config, Path(ledgers[-1]))
            dry_run("compare", comparison, Path(ledgers[-1]))
            return
        from ropewalk.evaluation import evaluate, not_finite
        from ropewalk.report import compare

        for config in evaluations:
            evaluate(config)
        compare(comparison)
    if any(not_finite(output) for output in outputs):
        sys.exit(EXIT_NOT_FINITE)


if __name__ == "__main__":
    commands = {"evaluate": main, "validate": validate, "key_tokens": key_tokens, "runs": evaluate_runs}
    run_command(commands, default="evaluate")
