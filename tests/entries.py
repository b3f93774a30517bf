"""The commands of the repository: which configuration each file, or a word after it, composes."""

ENTRIES = {
    "train.py": "train",
    "data_prep/prepare.py": "prepare",
    "data_prep/prepare_video.py": "prepare_video",
    "data_prep/convert_mds.py": "convert_mds",
    "data_prep/gather.py": "gather",
    "data_prep/inspect_store.py": "inspect_store",
    "scripts/evaluate.py": "evaluate",
    "scripts/generate.py": "generate",
    "scripts/export.py": "export",
    "scripts/compare.py": "compare",
    "scripts/dashboard.py": "dashboard",
    "scripts/noise.py": "noise",
    "scripts/study.py": "study",
    "scripts/plan.py": "plan",
}
FIGURES = (
    "spectra", "kernel", "leakage", "coverage", "semantic", "phases", "textbook", "clips", "decay", "axes", "factors",
    "figures", "ablations",
)  # fmt: skip
COMMANDS_OF = {
    "data_prep/prepare_video.py": {"prepare_video": "prepare_video", "vniah": "prepare_vniah"},
    "scripts/analyze.py": {
        "advise": "advise",
        "inspect": "inspect",
        "geometry": "geometry",
        **dict.fromkeys(FIGURES, "figures"),
    },
    "scripts/evaluate.py": {"evaluate": "evaluate", "validate": "validate", "key_tokens": "key_tokens"},
    "scripts/export.py": {"export": "export", "check": "check_export", "repair": "repair"},
}
