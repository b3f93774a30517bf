"""Measures of how simple the code base is: its size, its import circles, and how far one value travels.

python benchmarks/house.py [--against OTHER_CHECKOUT] [--json FILE] [--static]

The first part reads the source and imports nothing. The second runs it on the CPU (some minutes): in one process a raw
file is prepared, and a small model trains on it for two steps. Every expression in a function of src is evaluated as
written, and then looked at. A file counts for a value if a function in it receives, reads or hands on that value:

* a number: a name, an attribute, an item or what a call returned is that int, or has it among its items. Such a
  collection is a dict, list or tuple of up to 12 items, or a list of such dicts, as a chain is written. The file of a
  dataclass counts for its fields. Who holds settings or a long record counts only by reading the number from it.
* a token: the same for the text, for three ids in a row in a list, array, tensor or bytes, or for the path of a file
  with one of these. Here an object with it in a field counts as well (document, unit, batch). It ends at the loss:
  hidden states are not the token, and an index that the order draws is not.

There are two runs with different values. An expression counts if it had the run's own value, and never the other run's,
in both: a loop counter or a size that is equal by chance does not count. Stored sequences are shorter than
data.sequence_length, so no array has that length by itself. But a sequence ends there, so code that takes the ends of
documents as ints does count. YAML files count if the run opened them and they name the key.

The last row counts calls of a position method's function from the command's start to the first optimizer step.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.machinery import FileFinder, SourceFileLoader
from pathlib import Path, PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parents[1]
SHORT, FULL, FEW = 60, 12, 12  # lines of a file, files of a folder, items of a collection
KEYS = ("rope.chain[].clip", "data.sequence_length", "trainer.global_batch_size")
NAMES = {key: key.rpartition(".")[2] for key in KEYS}
TOKEN = "a token, raw file to loss"
METHOD = "cope"
# Of the two runs: unlike each other and what else a run has; the model's heads have 32 pairs.
NUMBERS = (
    {"clip": 13, "sequence_length": 93, "global_batch_size": 14},
    {"clip": 19, "sequence_length": 111, "global_batch_size": 22},
)
WORDS, ROWS = ("zqxjkvbwzqjx", "wvkqzjxqvzwk"), 3  # rows of the store make a sequence
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
OPENING = re.compile(r"(What|Where|Whether|Which)\b")


class Row(NamedTuple):
    """One line of the table, and what is listed for it."""

    label: str
    value: Any
    items: tuple[str, ...] = ()


def static_rows(src: Path) -> list[Row]:
    """Measures of the source alone."""
    texts = {path.relative_to(src).as_posix(): path.read_text(encoding="utf-8") for path in sorted(src.rglob("*.py"))}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    plain = [name for name in texts if not name.endswith("__init__.py")]
    short = tuple(name for name in plain if lines[name] < SHORT)
    longest = max(lines, key=lambda name: lines[name])
    folder, base = (Counter(name.rpartition("/")[part] for name in plain) for part in (0, 2))
    twice = tuple(f"{b}: {', '.join(n for n in plain if n.endswith('/' + b))}" for b in sorted(base) if base[b] > 1)
    full = tuple(f"{name}: {count}" for name, count in folder.items() if count > FULL)
    nodes = [(name, node) for name, tree in trees.items() for node in ast.walk(tree)]
    sizes = [(n.end_lineno - n.lineno + 1, f"{file}: {n.name}") for file, n in nodes if isinstance(n, FUNCTIONS)]
    docs = [(file, n) for file, n in nodes if isinstance(n, (*FUNCTIONS, ast.ClassDef, ast.Module))]
    opened = [(file, n) for file, n in docs if OPENING.match(ast.get_docstring(n) or "")]
    modules = tuple(file for file, n in opened if isinstance(n, ast.Module))
    return [
        Row("files", len(texts)),
        Row("lines", sum(lines.values())),
        Row("lines of code", sum(_code_lines(text, trees[name]) for name, text in texts.items())),
        Row(f"files under {SHORT} lines", sum(count < SHORT for count in lines.values())),
        Row(f"files under {SHORT} lines, without __init__", len(short), short),
        Row("longest file (lines)", lines[longest], (longest,)),
        Row("longest function (lines)", max(sizes)[0], (max(sizes)[1],)),
        Row("basenames that occur twice", len(twice), twice),
        *_import_rows(trees),
        Row("module docstrings that open with What, Where, Whether, Which", len(modules), modules),
        Row("all docstrings that do", len(opened)),
        Row(f"folders with more than {FULL} files, without __init__", len(full), full),
    ]


def _code_lines(text: str, tree: ast.Module) -> int:
    """Lines that are not blank, a comment or part of a docstring."""
    documented: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    stripped = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(line) and line[0] != "#" and number not in documented for number, line in stripped)


def _import_rows(trees: Mapping[str, ast.Module]) -> list[Row]:
    """Circles of modules that import each other, and imports that do not stand at the top."""
    dotted = {name: name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in trees}
    modules, found, rows = set(dotted.values()), {}, []
    for name, tree in trees.items():
        package = dotted[name] if name.endswith("/__init__.py") else dotted[name].rpartition(".")[0]
        found[dotted[name]] = set(_imports(tree, package, modules, "top"))
    for label, kinds in (("", {"top", "function", "typing"}), (" of imports at the top alone", {"top"})):
        circles = _circles({m: {target for target, kind in found[m] if kind in kinds} for m in found})
        rows.append(Row(f"import circles{label}", len(circles), tuple(map(" - ".join, circles))))
    for kind, place in (("function", "in functions"), ("typing", "under TYPE_CHECKING")):
        late = tuple(f"{m}: {target}" for m in found for target, of in sorted(found[m]) if of == kind)
        rows.append(Row(f"imports of its own modules {place}", len(late), late))
    return rows


def _imports(node: ast.AST, package: str, modules: set[str], kind: str) -> Iterator[tuple[str, str]]:
    """Modules of ``modules`` that are imported below a node, and where: top, function or typing."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, kind) for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *filter(None, [node.module])])
        submodules = {f"{base}.{alias.name}" for alias in node.names}
        yield from ((m, kind) for m in {s if s in modules else base for s in submodules} & modules)
    else:
        typing = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for name, children in ast.iter_fields(node):
            inner = "typing" if typing and name == "body" else "function" if isinstance(node, FUNCTIONS) else kind
            for child in children if isinstance(children, list) else [children]:
                if isinstance(child, ast.AST):
                    yield from _imports(child, package, modules, inner)


def _circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        waiting, reached[start] = [start], set()
        while waiting:
            new = edges[waiting.pop()] - reached[start]
            reached[start] |= new
            waiting += new
    circles = {frozenset(m for m in reached[start] if start in reached[m]) for start in edges}
    return sorted(sorted(circle) for circle in circles if len(circle) > 1)


class Instrument(ast.NodeTransformer):
    """Puts ``__house__(site, expression)`` in place of the expressions in a module's functions."""

    def __init__(self, file: str) -> None:
        self.file, self.names, self.depth = file, [], 0

    def visit(self, node: Any) -> Any:
        """Of functions and classes the bodies alone: decorators, annotations and defaults stay as they are."""
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            self.names.append(node.name)
            self.depth += isinstance(node, FUNCTIONS)
            node.body = [self.visit(statement) for statement in node.body]
            self.depth -= isinstance(node, FUNCTIONS)
            self.names.pop()
            if any(ast.unparse(text).startswith(f"register_method('{METHOD}'") for text in node.decorator_list):
                count = ast.Expr(_call("__house_method__", ast.Constant(self.file)))
                node.body.insert(int(ast.get_docstring(node) is not None), count)
            return node
        if isinstance(node, ast.pattern):
            return node
        self.generic_visit(node)
        is_read = isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) and isinstance(node.ctx, ast.Load)
        is_path = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)  # directory / name
        if not (self.depth and (is_read or is_path or isinstance(node, ast.Call))):
            return node
        site = f"{self.file}:{'.'.join(self.names)}:{node.lineno}:{node.col_offset}-{node.end_col_offset}"
        return ast.copy_location(_call("__house__", ast.Constant(site), node), node)


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


class Tracer:
    """The sites of instrumented code that had this run's own values, or the other run's numbers."""

    def __init__(
        self, src: Path, own: Mapping[str, int], other: Mapping[str, int], word: str, ids: list[int], folder: str
    ) -> None:
        self.src, self.folder = f"{src}{os.sep}", folder
        self.numbers = {n: (kind, key) for kind, of in (("own", own), ("other", other)) for key, n in of.items()}
        self.needles = [word.encode(), *(b"".join(i.to_bytes(size, "little") for i in ids) for size in (2, 4, 8))]
        self.sites = {kind: {key: set[str]() for key in (*own, TOKEN)} for kind in ("own", "other")}
        self.with_numbers, self.with_calls, self.calls = True, True, Counter[str]()
        vars(builtins).update({"__house__": self.look, "__house_method__": self._count})

    def install(self) -> None:
        """Instrument what is imported from src from now on."""

        class Loader(SourceFileLoader):
            def get_code(self, fullname: str) -> Any:
                return tracer.compiled(self.get_data(self.path), self.path)

        def hook(path: str) -> FileFinder:
            if not f"{path}{os.sep}".startswith(tracer.src):
                raise ImportError
            return FileFinder(path, (Loader, [".py"]))

        tracer = self
        sys.path.insert(0, str(Path(self.src)))
        sys.path_hooks.insert(0, hook)
        sys.path_importer_cache.clear()

    def compiled(self, text: bytes | str, path: str) -> Any:
        """Instrumented code of a module."""
        tree = Instrument(path.removeprefix(self.src)).visit(ast.parse(text))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def look(self, site: str, value: Any) -> Any:
        """Write down what a value is or has, and give it back."""
        if value is None or isinstance(value, OPAQUE):
            return value
        parts, fields = _parts(value), [] if isinstance(value, PLAIN) else getattr(value, "__dict__", {}).values()
        parts_of_fields = [part for field in fields for part in _parts(field)]
        self._write_numbers(site, parts)
        file = getattr(sys.modules.get(type(value).__module__), "__file__", None) or ""
        if dataclasses.is_dataclass(value) and file.startswith(self.src):
            self._write_numbers(f"{file.removeprefix(self.src)}:{type(value).__name__}:", parts_of_fields)
        if any(map(self._is_token, (*parts, *parts_of_fields))):
            self.sites["own"][TOKEN].add(site)
        return value

    def _write_numbers(self, site: str, parts: list[Any]) -> None:
        if self.with_numbers:
            for kind, key in (self.numbers[part] for part in parts if type(part) is int and part in self.numbers):
                self.sites[kind][key].add(site)

    def _is_token(self, part: Any) -> bool:
        if isinstance(part, (str, PurePath)):
            path = str(part)
            is_file = path.startswith(self.folder) and os.path.isfile(path)
            return self._is_token(path.encode()) or (is_file and self._is_token(Path(path).read_bytes()))
        if hasattr(part, "is_leaf"):  # a tensor
            part = None if part.is_floating_point() or part.device.type != "cpu" else part.detach().numpy()
        elif isinstance(part, (list, tuple)) and len(part) > 2 and all(type(i) is int for i in part):
            part = array("q", part) if max(map(abs, part)) < 2**63 else None
        if not isinstance(part, OPAQUE) and getattr(getattr(part, "dtype", None), "kind", "f") in "iu":
            part = part.tobytes()
        is_bytes = isinstance(part, (bytes, bytearray, memoryview, array))
        return is_bytes and any(needle in bytes(part) for needle in self.needles)

    def _count(self, method_file: str) -> None:
        """Count a call of the method for the first caller outside its package."""
        package = self.src + os.sep.join(method_file.split("/")[:2])
        if self.with_calls:
            codes = (frame.f_code for frame, _ in traceback.walk_stack(None))
            ours = (code for code in codes if code.co_filename.startswith(self.src))
            caller = next((code for code in ours if not code.co_filename.startswith(package)), None)
            name = f"{caller.co_filename.removeprefix(self.src)}: {caller.co_qualname}" if caller else "an entry"
            self.calls[name] += 1


OPAQUE = (bool, float, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
PLAIN = (int, str, bytes, dict, list, tuple, PurePath)


def _parts(value: Any) -> list[Any]:
    """A value, its items if it is a short dict, list or tuple, and the items of short dicts in a list."""
    if not isinstance(value, (dict, list, tuple)) or len(value) > FEW:
        return [value]
    items = list(value.values() if isinstance(value, dict) else value)
    inner = [_parts(item)[1:] for item in items if isinstance(item, dict) and not isinstance(value, dict)]
    return [value, *items, *(part for parts in inner for part in parts)]


def traced_run(root: Path, run: int) -> dict[str, Any]:
    """Prepare a raw file and train on it under a tracer: its sites, calls and YAML files by key."""
    from tokenizers import Tokenizer
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    numbers, word, tokenizer = NUMBERS[run], WORDS[run], HERE / "tests/fixtures/tokenizer"
    ids = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(f" {word}").ids[2:-1]
    assert len(ids) >= 3, f"{word} has only {len(ids)} ids inside; choose another"
    length, configs, opened = numbers["sequence_length"], f"{root}{os.sep}configs{os.sep}", set[str]()

    def audit(event: str, given: Any) -> None:
        if event == "open" and str(given[0]).startswith(configs):
            opened.add(str(given[0]).removeprefix(configs))

    sys.addaudithook(audit)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("raw").mkdir()
        Path("raw/text.txt").write_text(f"the {word} of rope\n" * 800)
        tracer = Tracer(root / "src", numbers, NUMBERS[1 - run], word, ids, folder)
        tracer.install()
        tracer.with_numbers = tracer.with_calls = False  # of training's keys
        _command(
            root / "data_prep/prepare.py", "corpus=files", "corpus.name=house", "corpus.paths=[]", "output=prepared",
            f"corpus.sources=[{{domain: books, path: {folder}/raw}}]", f"corpus.tokenizer={tokenizer}",
            f"sequence_lengths=[{length // ROWS},{length}]", "workers=1",
        )  # fmt: skip
        tracer.with_numbers = tracer.with_calls = True
        opened.clear()
        register_optimizer_step_pre_hook(lambda *_: setattr(tracer, "with_calls", False))
        _command(
            root / "train.py", "+experiment=demo/pretrain", "tracker=none", "run_dir=run", "rope=demo_cope",
            f"rope.chain=[{{method: abf, theta: 1.0e5}}, {{method: {METHOD}, clip: {numbers['clip']}}}]",
            "data=packed", f"data.store=prepared/packed-{length}", f"data.sequence_length={length}",
            f"+data.stores.rows=prepared/packed-{length // ROWS}", "++data.mixture={rows/books: 1.0}",
            f"trainer.global_batch_size={numbers['global_batch_size']}", "trainer.micro_batch_size=2",
            "trainer.max_steps=2", "trainer.checkpoint_every=null", "model.architecture.num_hidden_layers=2",
            "model.architecture.head_dim=64", "model.head_dim=64",
        )  # fmt: skip
        os.chdir(root)
    yaml = {p: Path(configs + p).read_text() for p in sorted(opened)}
    named = {n: [p for p in yaml if re.search(rf"^[^#\n]*\b{n}:", yaml[p], re.M)] for n in NAMES.values()}
    return {**tracer.sites, "calls": tracer.calls, "yaml": named}


def _command(path: Path, *arguments: str) -> None:
    sys.argv = [str(path), *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def common_files(runs: list[dict[str, Any]], key: str) -> dict[str, list[str]]:
    """File -> functions with an expression that had each run's own value, and never the other's."""
    files: dict[str, set[str]] = {}
    for site in set.intersection(*(set(run["own"][key]) - set(run["other"][key]) for run in runs)):
        file, function, *_ = site.split(":")
        files.setdefault(file, set()).add(function)
    return {file: sorted(files[file]) for file in sorted(files)}


def traced_rows(root: Path) -> list[Row]:
    """Measures of two traced runs."""
    labels = {**{f"files that {key} passes": name for key, name in NAMES.items()}, f"files that {TOKEN}, passes": TOKEN}
    calls = f"calls of {METHOD} before the first step"
    fixed = {"OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{root}/src"}
    runs = []
    for run in range(2):
        with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
            command = [sys.executable, __file__, "--root", str(root), "--trace", str(run), "--json", out.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **fixed})
            if done.returncode:
                reason = f"left out: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
                return [Row(label, "-", (reason,)) for label in (*labels, calls)]
            runs.append(json.load(out))
    rows = []
    for label, key in labels.items():
        files = common_files(runs, key)
        items = [
            *(f"configs/{file}" for file in runs[0]["yaml"].get(key, [])),
            *(f"{file}: {', '.join(files[file])}" for file in files),
        ]
        rows.append(Row(label, len(items), tuple(items)))
    callers = tuple(f"{count} for {caller}" for caller, count in runs[0]["calls"].items())
    return [*rows, Row(calls, sum(runs[0]["calls"].values()), callers)]


def main() -> None:
    """Print the table and its lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE, help="the checkout that is measured; default: this one")
    parser.add_argument("--against", type=Path, help="an older checkout, measured too, as the column before")
    parser.add_argument("--json", type=Path, help="file for the numbers and lists")
    parser.add_argument("--static", action="store_true", help="leave the two runs out")
    parser.add_argument("--trace", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    root = given.root.resolve()
    if given.trace is not None:
        out = given.json.resolve()
        out.write_text(json.dumps(traced_run(root, given.trace), default=sorted))
        return
    roots = {"before": given.against.resolve()} if given.against else {}
    columns = {
        name: static_rows(root / "src") + ([] if given.static else traced_rows(root))
        for name, root in {**roots, "now": root}.items()
    }
    for rows in zip(*columns.values(), strict=True):
        print(f"{rows[0].label:<62}" + "".join(f"{row.value!s:>10}" for row in rows))
    for name, row in ((name, row) for name, column in columns.items() for row in column if row.items):
        print(f"\n{row.label}, {name}:", *row.items, sep="\n  ")
    if given.json:
        written = {name: {row.label: row._asdict() for row in column} for name, column in columns.items()}
        given.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
