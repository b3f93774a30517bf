"""A packed store of visuals: ``python data_prep/prepare_video.py scenes.count=4000 output=data/scenes ...``."""

from ropewalk.cli import entry
from ropewalk.config.data import PrepareVideoConfig


@entry("prepare_video")
def main(config: PrepareVideoConfig) -> None:
    """Prepare one store."""
    from ropewalk.data.prepare.video.visual_pipeline import prepare_video

    prepare_video(config)


if __name__ == "__main__":
    main()
