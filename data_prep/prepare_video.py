"""A packed store of videos and images: ``python data_prep/prepare_video.py scenes.count=4000 output=data/scenes ...``.

``python data_prep/prepare_video.py vniah output=data/vniah ...`` writes the haystack and the needles of V-NIAH.
"""

from ropewalk.cli import entry, run_command
from ropewalk.config.data import PrepareVideoConfig, PrepareVniahConfig


@entry("prepare_video")
def main(config: PrepareVideoConfig) -> None:
    """Prepare one store."""
    from ropewalk.data.prepare.video.visual_pipeline import prepare_video

    prepare_video(config)


@entry("prepare_vniah")
def vniah(config: PrepareVniahConfig) -> None:
    """Prepare a haystack with its needles."""
    from ropewalk.data.prepare.video.haystack import prepare_vniah

    prepare_vniah(config)


if __name__ == "__main__":
    run_command({"prepare_video": main, "vniah": vniah}, default="prepare_video")
