"""An answer of a run or export to a prompt: ``python scripts/generate.py checkpoint=outputs/my_run prompt=TEXT``."""

from ropewalk.cli import entry
from ropewalk.config.evaluation import GenerateConfig


@entry("generate")
def main(config: GenerateConfig) -> None:
    """Answer one prompt."""
    from ropewalk.evaluation import generate

    generate(config)


if __name__ == "__main__":
    main()
