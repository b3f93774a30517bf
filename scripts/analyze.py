"""What a position method does, without training: advice, inspection, figures, and the geometry of a checkpoint.

``python scripts/analyze.py COMMAND key=value ...``
"""

from collections.abc import Callable

from ropewalk.cli import entry, run_command
from ropewalk.config.analysis import AdviseConfig, FiguresConfig, GeometryConfig, InspectConfig


@entry("advise")
def advise(config: AdviseConfig) -> None:
    """Which pairs a model has never seen turn, and which clip follows."""
    from ropewalk.analysis import print_advice

    print_advice(config)


@entry("inspect")
def inspect(config: InspectConfig) -> None:
    """What a checkpoint really rotates with in stock transformers."""
    from ropewalk.analysis.inspection import print_inspection

    print_inspection(config)


@entry("geometry")
def geometry(config: GeometryConfig) -> None:
    """Queries and keys of real checkpoints before and after RoPE."""
    from ropewalk.analysis.geometry import geometry as run

    run(config)


FIGURES = {
    "spectra": "Frequency of every pair, with the training length and the onset of each change.",
    "kernel": "The attention kernel against distance.",
    "leakage": "The ringing of a hard cut against a soft one.",
    "coverage": "Which phases of each pair a target length reaches that training has not seen.",
    "semantic": "How far a similar key still outscores a random one.",
    "phases": "Phases and kernels to a million tokens.",
    "textbook": "Original, scaled and Llama-3.1 frequencies of a 256-wide head at base 10,000.",
    "clips": "What the number of clipped pairs and the window do.",
    "decay": "Decay of the first singular value under four spectra.",
    "axes": "Axis and period of every pair, for methods of images and videos.",
    "factors": "The factor on every pair's frequency over RoPE's: what a run learned, what a clip leaves.",
    "figures": "All figures above.",
    "ablations": "RULER against each argument of RoPE-ID, from evaluated runs (results=[...]).",
}


def figure(name: str) -> Callable[[], None]:
    """The command that draws one figure."""

    def main(config: FiguresConfig) -> None:
        from ropewalk.analysis.spectrum_figures import draw

        draw(name, config)

    main.__doc__ = FIGURES[name]
    return entry("figures")(main)


if __name__ == "__main__":
    run_command(
        {"advise": advise, "inspect": inspect, "geometry": geometry, **{name: figure(name) for name in FIGURES}}
    )
