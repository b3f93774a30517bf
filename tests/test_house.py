"""The measures of the code base, on small packages whose counts are known by hand."""

import builtins
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "house.py"

PACKAGE = {
    "p/__init__.py": "from p.a import first\n",
    "p/a.py": '"""What a is."""\n\nfrom p.b import second\n\n\ndef first():\n    return second\n',
    "p/b.py": '"""B."""\n\n\ndef second():\n    """Where b goes."""\n    from p.a import first\n\n    return first\n',
    "p/q/__init__.py": "",
    "p/q/a.py": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from ..q import c\n",
    "p/q/c.py": "from p.q import a\n# a comment\n" + "X = 1\n" * 60,
    "p/q/d.py": "from p import a, first\n",
}

MODULE = """
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Settings:
    batch: int
    rate: float


class Document:
    def __init__(self, text):
        self.text = text


def makes(number):
    return Settings(batch=number, rate=0.5)


def passes(settings):
    return takes(settings)


def takes(settings):
    return settings.rate


def reads(settings):
    return settings.batch // 2


def short(settings):
    return carries({"batch": settings.batch})


def carries(entry):
    return chained([entry])


def chained(chain):
    return len(chain)


def long(settings):
    return records([0, *range(1000, 1012), settings.batch])


def records(row):
    return len(row)


def loops():
    return [number for number in range(100)]


def writes(folder, text, ids):
    (folder / "raw.txt").write_text(text)
    (folder / "packed.bin").write_bytes(b"".join(i.to_bytes(4, "little") for i in ids))


def hands(path, document):
    return opens(path), measures(document), counts([document])


def opens(path):
    return Path(path).suffix


def measures(document):
    return len(document.text)


def counts(documents):  # two levels down
    return len(documents)


def elsewhere(folder):
    return folder / "other.txt"
"""


@pytest.fixture(name="house")
def _house(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("house", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "house", module)
    for name in ("__house__", "__house_method__"):
        monkeypatch.setattr(builtins, name, None, raising=False)
    spec.loader.exec_module(module)
    return module


def test_counts_of_a_small_package(house: Any, tmp_path: Path) -> None:
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    rows = {row.label: row for row in house.static_rows(tmp_path)}
    assert {label: row.value for label, row in rows.items()} == {
        "files": 7,
        "lines": 1 + 7 + 8 + 0 + 4 + 62 + 1,
        "lines of code": 1 + 3 + 3 + 0 + 3 + 61 + 1,
        "files under 60 lines": 6,
        "files under 60 lines, without __init__": 4,
        "longest file (lines)": 62,
        "longest function (lines)": 5,
        "basenames that occur twice": 1,
        "import circles": 2,
        "import circles of imports at the top alone": 0,
        "imports of its own modules in functions": 1,
        "imports of its own modules under TYPE_CHECKING": 1,
        "module docstrings that open with What, Where, Whether, Which": 1,
        "all docstrings that do": 2,
        "folders with more than 12 files, without __init__": 0,
    }
    assert rows["basenames that occur twice"].items == ("a.py: p/a.py, p/q/a.py",)
    assert rows["import circles"].items == ("p.a - p.b", "p.q.a - p.q.c")
    assert rows["longest function (lines)"].items == ("p/b.py: second",)


def test_a_name_from_a_package_is_an_import_of_its_init(house: Any, tmp_path: Path) -> None:
    for name, text in {"p/__init__.py": "from p.a import x\n", "p/a.py": "from p import x\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n\ndef x():\n    pass\n")
    rows = {row.label: row for row in house.static_rows(tmp_path)}
    assert rows["import circles"].items == ("p - p.a",)


def run(house: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, which: int) -> dict[str, Any]:
    """Sites of the small module in one of two runs, which differ in the number and in the token."""
    numbers, word, ids = ({"batch": 13}, {"batch": 19}), ("zqxjk", "wvkqz")[which], ([7, 300, 9], [8, 301, 5])[which]
    tracer = house.Tracer(folder, numbers[which], numbers[1 - which], word, ids, str(folder))
    module = ModuleType("small")
    module.__file__ = str(folder / "small.py")
    monkeypatch.setitem(sys.modules, "small", module)
    exec(tracer.compiled(MODULE, module.__file__), vars(module))
    settings = module.makes(numbers[which]["batch"])
    for name in ("passes", "reads", "short", "long"):
        getattr(module, name)(settings)
    module.loops()
    module.writes(folder, f"the {word} of rope", [1, *ids, 2])
    module.hands(str(folder / "packed.bin"), module.Document(f"a {word}"))
    module.elsewhere(folder)
    return tracer.sites


def test_files_that_a_value_passes(house: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = [run(house, monkeypatch, tmp_path, which) for which in range(2)]
    number = ["Settings", "carries", "chained", "long", "makes", "reads", "short"]
    assert house.common_files(runs, "batch") == {"small.py": number}
    token = ["Document.__init__", "hands", "measures", "opens", "writes"]
    assert house.common_files(runs, house.TOKEN) == {"small.py": token}
