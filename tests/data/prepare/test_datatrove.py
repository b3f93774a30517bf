"""datatrove's executors give the bytes of ours, and its readers and deduplication leave what a source reads.

It is no part of the pinned environment (it brings spaCy, NLTK and older pins with it); run these where
``pip install 'ropewalk[scale]'`` was made.
"""

import hashlib
import json
import random
import sys
from importlib.util import find_spec
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import documents_of

from ropewalk.config.data import CorpusConfig, ExecutorConfig, GatherConfig, PrepareConfig, SourceConfig
from ropewalk.data.prepare.datatrove import executor, gather
from ropewalk.data.prepare.pipeline import prepare

WORDS = (
    "tide",
    "harbour",
    "rope",
    "walk",
    "hemp",
    "strand",
    "twist",
    "sailor",
    "knot",
    "long",
    "short",
    "token",
    "text",
)
installed = pytest.mark.skipif(find_spec("datatrove") is None, reason="datatrove is not installed; extra scale")


def test_datatrove_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(ValueError, match=r"datatrove is not installed; pip install 'ropewalk\[scale\]'"):
        gather(GatherConfig(str(tmp_path / "o"), "warc", str(tmp_path)))


def paragraphs(seed: int) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=120)).capitalize() + "." for _ in range(5)]


def contents(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@installed
def test_stages_under_its_executor_give_the_same_bytes(fixture_corpus, fixture_tokenizer, tmp_path):
    def made(name, **settings):
        corpus = CorpusConfig(name="c", paths=[str(fixture_corpus)], tokenizer=str(fixture_tokenizer))
        config = PrepareConfig(str(tmp_path / name), [64], shard_mb=0.02, corpus=corpus, **settings)
        return contents(prepare(config, lambda line: None))

    ours = made("pool", workers=1)
    theirs = ExecutorConfig(kind="local", tasks=3, workers=2)
    assert made("local", executor=theirs) == ours
    assert made("local", executor=theirs) == ours


@installed
def test_pages_of_warc_become_documents_without_near_duplicates(tmp_path):
    """Six pages, one of them copied, one copied but for two words."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    pages = [paragraphs(seed) for seed in range(6)]
    near = [*pages[1][:-1], pages[1][-1] + " And more."]
    (tmp_path / "warc").mkdir()
    for number, listed in enumerate(([*pages[:3], pages[0]], [*pages[3:], near])):
        with (tmp_path / f"warc/{number}.warc.gz").open("wb") as file:
            writer = WARCWriter(file, gzip=True)
            for place, page in enumerate(listed):
                html = f"<html><body><article>{''.join(f'<p>{p}</p>' for p in page)}</article></body></html>"
                headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.0")
                writer.write_record(writer.create_warc_record(
                    f"https://example.org/{number}/{place}", "response", payload=BytesIO(html.encode()),
                    http_headers=headers, warc_headers_dict={"WARC-Identified-Payload-Type": "text/html"},
                ))  # fmt: skip
    config = GatherConfig(str(tmp_path / "out"), "warc", str(tmp_path / "warc"), minhash=True, extract_seconds=20.0,
                          executor=ExecutorConfig("local", tasks=2))  # fmt: skip
    directory = gather(config)
    found, skipped = documents_of(CorpusConfig(sources=[SourceConfig("web", str(directory))]))
    texts = [document.text for document in found]
    assert len(texts) == 6
    assert not skipped
    first_words = {page[0][:60] for page in pages}
    assert {text[:60] for text in texts} == first_words
    counted = json.loads((tmp_path / "out/gathered.json").read_text())
    (filtered,) = (step for name, step in counted["filter"].items() if "MinHash" in name)
    assert (filtered["total"], filtered["dropped"]) == (8, 2)


@installed
def test_rows_of_a_dataset_are_shared_out(tmp_path):
    (tmp_path / "set").mkdir()
    rows = [f"row {i}" for i in range(20)]
    for part in range(2):
        pq.write_table(pa.table({"body": rows[part * 10 : part * 10 + 10]}), tmp_path / f"set/{part}.parquet")
    for reader in ("hub", "parquet"):
        config = GatherConfig(str(tmp_path / reader), reader, str(tmp_path / "set"), column="body",
                              executor=ExecutorConfig("local", tasks=2))  # fmt: skip
        found, _ = documents_of(CorpusConfig(sources=[SourceConfig("web", str(gather(config)))]))
        assert sorted(document.text for document in found) == sorted(rows)


@installed
@pytest.mark.parametrize(("changes", "message"), [
    ({"reader": "zip"}, "reader=zip is not known; use one of: hub, warc"),
    ({"reader": "hub", "path": "a/b"}, "a hub dataset without a revision"),
    ({"reader": "warc", "path": "nowhere"}, "path=nowhere does not exist"),
])  # fmt: skip
def test_what_cannot_be_gathered_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        gather(GatherConfig(**{"output": str(tmp_path / "o"), "reader": "warc", "path": str(tmp_path), **changes}))
    with pytest.raises(ValueError, match=r"executor.kind=slurm needs executor.partition and executor.time"):
        executor(ExecutorConfig("slurm"), [], 1, tmp_path)
