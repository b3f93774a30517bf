"""The names of a run directory's files are spelled in ropewalk.runs.directory and nowhere else."""

import ast
import re
from pathlib import Path

import pytest

import ropewalk
from ropewalk.runs import JobRecord, RunDirectory

SOURCES = Path(ropewalk.__file__).parent
NAMES = {
    part
    for directory in (RunDirectory, JobRecord)
    for entry in vars(directory).values()
    if type(entry).__name__ == "_Entry"
    for part in Path(entry.name).parts
}
FILES = {name for name in NAMES if "." in name}
COUNTED = re.compile(r"(damaged-)?step-.*|rank[_-].*")  # names with a step or a rank in them
# Folders and files of the same name that are not a run's.
OTHERS = {
    ("data", "tokenizer"): "of a corpus or a store",
    ("requirements.py", "tokenizer"): "of a prepared corpus",
    ("requirements.py", "exports"): "of models without a run, below paths.output_dir",
    ("command.py", "exports"): "the same, as scripts/export.py makes them",
    ("job.py", "jobs"): "of commands without a run, below paths.output_dir",
}


def names_in(source: str) -> set[str]:
    """Names of run files in string constants: a file's anywhere, a folder's where a path is joined or globbed."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in FILES:
            found.add(node.value)
        joined = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            joined = [node.left, node.right]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            joined = node.args if node.func.attr in ("glob", "rglob", "joinpath", "with_name", "join") else []
        elif isinstance(node, ast.JoinedStr) and "/" in ast.unparse(node):
            joined = [node]
        for part in joined:
            text = "".join(
                piece.value if isinstance(piece, ast.Constant) and isinstance(piece.value, str) else "X"
                for piece in (part.values if isinstance(part, ast.JoinedStr) else [part])
            )
            if " " not in text:  # else a sentence
                found |= {word for word in text.split("/") if word in NAMES or COUNTED.fullmatch(word)}
    return found


def test_no_other_module_spells_them():
    spelled = {}
    for path in SOURCES.rglob("*.py"):
        module = path.relative_to(SOURCES)
        if module.parts[0] == "runs":
            continue
        names = {n for n in names_in(path.read_text()) if not {(module.parts[0], n), (module.name, n)} & set(OTHERS)}
        if names:
            spelled[str(module)] = names
    assert spelled == {}


@pytest.mark.parametrize(("source", "names"), [
    ('run / "metrics.jsonl"', {"metrics.jsonl"}), ('RECORD = "run.json"', {"run.json"}),
    ('run / "stuck" / f"step-{n:08d}"', {"stuck", "step-X"}), ('run.glob("checkpoints/*")', {"checkpoints"}),
    ('os.path.join(run, "export")', {"export"}), ('f"{run}/evaluation"', {"evaluation"}),
    ('phase = "evaluation"', set()), ('f"{run} holds no checkpoints/step-N"', set()),
    ('"""run.json: see metrics.jsonl"""', set()), ('path.glob("evaluation*/**/table.parquet")', set()),
])  # fmt: skip
def test_a_name_is_seen_where_a_path_is_made(source, names):
    assert names_in(source) == names
