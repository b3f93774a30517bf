"""Data: the commands below ``data_prep/``."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from ropewalk.config.groups import PathsConfig


@dataclass
class SourceConfig:
    """A source of documents of one domain."""

    domain: str = MISSING
    path: str = MISSING  # file or directory; kind=dataset: a saved dataset, or a hub id
    kind: str = "files"  # files (text, code, jsonl, parquet), repositories (one document each), dataset (Hugging Face)
    chat: bool = False  # rows are lists of messages; only what the assistant says is trained
    column: str | None = None  # of the rows; null: text, or messages where chat
    suffixes: list[str] = field(default_factory=list)  # of files that are text too, as [.yaml, .g4]
    subset: str | None = None  # of a hub dataset
    split: str = "train"  # of a hub dataset
    revision: str | None = None  # commit of a hub dataset; must be given


@dataclass
class DomainConfig:
    """How the documents of one domain become sequences.

    ``long`` puts a stretch of one document into each sequence; ``short`` packs by best fit and cuts no document that
    fits; ``concat`` puts documents one after the other and cuts where a sequence is full.
    """

    packing: str = "short"  # long, short or concat
    remainder: str = "drop"  # packing=long: domain that takes what fills no sequence, or drop


@dataclass
class CorpusConfig:
    """Raw documents and how they become tokens."""

    name: str = MISSING
    stdlib: bool = False  # the running interpreter's standard library, one document per top-level package
    paths: list[str] = field(default_factory=list)  # files and directories; with stdlib: split into long and short
    sources: list[SourceConfig] = field(default_factory=list)  # documents that name their own domain
    domains: dict[str, DomainConfig] = field(default_factory=dict)  # of sources; a domain without an entry is short
    column: str | None = None  # of the rows of `paths`; null: text
    bad_rows: str = "skip"  # that cannot be used: skip (left out and counted, the first of each kind named) or error
    tokenizer: str | None = None  # Hugging Face tokenizer directory or hub id; null: train a BPE on the corpus
    engine: str = "auto"  # tokenizers, tiktoken, gigatoken (checked); auto: tiktoken for Llama 3's, else tokenizers
    bos: str = "auto"  # begin each document with BOS: auto (where the tokenizer's own encode does), always, never
    eos: bool = True  # end each document with EOS, where the tokenizer has one
    chat_template: str | None = None  # Jinja file; null: the tokenizer's own
    chat_date: str | None = None  # YYYY-MM-DD that a template gets which asks for the date; must be given then
    vocab_size: int = 4096  # of the BPE that is trained
    retrieval_tokens: int = 0  # tokens of synthetic retrieval documents to add for each sequence length
    retrieval_names: bool = True  # facts with names and questions; false: one key, restated, its answers alone trained
    heldout_documents: int = 0  # long documents kept out of training, for evaluation
    heldout_length: int = 8192  # tokens that such a document has at least


@dataclass
class ExecutorConfig:
    """Executor of the tasks: processes of this machine, or datatrove's executors (extra scale), here or on SLURM."""

    kind: str = "pool"  # pool, or of datatrove: local, slurm
    tasks: int = 16  # local and slurm: shares of the work; a job of an array each
    workers: int | None = None  # local and slurm: tasks at once; null: as many as there are cores, or tasks
    partition: str | None = None  # slurm; must be given
    time: str | None = None  # slurm: limit of a task, as sbatch takes it; must be given
    mem_per_cpu_gb: int = 4  # slurm
    env_command: str | None = None  # slurm: shell that makes this package's Python the first, in each job


@dataclass
class PrepareConfig:
    """``python data_prep/prepare.py``."""

    output: str = MISSING  # directory for tokenizer, documents and one packed store per sequence length
    sequence_lengths: list[int] = MISSING  # tokens
    seed: int = 0
    shard_mb: float = 64.0  # raw megabytes that a process tokenizes at a time; changes the bytes of large stores
    workers: int | None = None  # processes; null: one for each core, or none but this one for a small corpus
    stage: str = "all"  # all, or one for an array of jobs: plan, tokenize, pack, finish
    shard: int = 0  # stage=tokenize or pack: which share of the work
    n_shards: int = 1  # stage=tokenize or pack: of how many
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)  # stage=all: what runs tokenize and pack
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class TowerConfig:
    """Sizes of the vision tower that visuals are cut for; they must be the model's."""

    patch_size: int = 14  # pixels along a patch
    merge_size: int = 2  # patches along a token
    temporal_patch_size: int = 2  # pixel frames of a position in time


@dataclass
class FrameConfig:
    """Frames taken from a video file."""

    fps: float = 2.0  # pixel frames a second of the video
    max_frames: int = 128  # pixel frames, at most; of a longer video so many, evenly spaced
    max_pixels: int = 6_272_000  # of all pixel frames of a video together; HoPE's 8,000 tokens


@dataclass
class SceneConfig:
    """Drawn scenes: noisy backgrounds, a symbol in one frame, a question about it."""

    count: int = 0  # how many
    frames: list[int] = field(default_factory=lambda: [8, 32])  # the fewest and the most, each one position in time
    height: int = 2  # of a frame, tokens
    width: int = 2  # of a frame, tokens
    questions: list[str] = field(default_factory=lambda: ["content"])  # content: which symbol; time: in which quarter


@dataclass
class PrepareVideoConfig:
    """``python data_prep/prepare_video.py``."""

    output: str = MISSING  # directory for tokenizer and the packed store
    sequence_length: int = MISSING  # tokens
    seed: int = 0
    visuals: str | None = None  # file of JSON lines with visual (a path beside it), question and answer; null: scenes
    scenes: SceneConfig = field(default_factory=SceneConfig)
    tokenizer: str | None = None  # of the model: directory or hub id; null: a small one, for scenes
    tower: TowerConfig = field(default_factory=TowerConfig)
    frames: FrameConfig = field(default_factory=FrameConfig)
    shard_sequences: int = 64  # sequences whose pixels share a file
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class PrepareVniahConfig:
    """``python data_prep/prepare_video.py vniah``: the haystack and the needles of V-NIAH, one file for all arms."""

    output: str = MISSING  # directory; it gets vniah.safetensors
    seed: int = 0
    film: str | None = None  # video file that the haystack is taken from; null: backgrounds of drawn scenes
    needles: str | None = None  # JSON lines: visual (an image beside it), question, answer, when; null: drawn symbols
    frames: int = 512  # of the haystack, each one position in time, at most
    fps: float = 2.0  # pixel frames a second of the film
    height: int = 2  # of a frame, tokens
    width: int = 2  # of a frame, tokens
    tower: TowerConfig = field(default_factory=TowerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class GatherConfig:
    """``python data_prep/gather.py`` (extra ``scale``)."""

    output: str = MISSING  # directory
    reader: str = MISSING  # hub, warc, jsonl or parquet
    path: str = MISSING  # hub id, or directory of files (also s3://, gs://, hf://)
    glob: str | None = None  # which files of it
    column: str = "text"  # of rows
    subset: str | None = None  # of a hub dataset
    split: str | None = "train"  # of a hub dataset
    revision: str | None = None  # commit of a hub dataset; must be given
    extract_seconds: float = 1.0  # warc: time in which the text of a page must be found, else it is left out
    minhash: bool = False  # take near duplicates out
    executor: ExecutorConfig = field(default_factory=lambda: ExecutorConfig(kind="local"))
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class ConvertConfig:
    """``python data_prep/convert_mds.py``."""

    output: str = MISSING  # directory
    format: str = "packed"  # of the output: packed (from MDS directories) or mds (from a packed store)
    root: str = "."  # what the directories of `sources` are relative to
    sources: dict[str, str] = field(default_factory=dict)  # domain -> MDS directory
    sequence_length: int = 65536  # tokens; shorter samples are padded, longer ones an error
    tokenizer: str | None = None  # that the tokens are of: directory or hub id
    store: str | None = None  # packed store, for format=mds
    verify: bool = True  # compare the digests in index.json
    workers: int | None = None  # processes; null: one for each core
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class InspectStoreConfig:
    """``python data_prep/inspect_store.py``."""

    store: str = MISSING  # directory of a packed store, or of several: these are listed
    domain: str | None = None  # whose sequence is decoded; null: the first
    sequence: int = 0  # which one
    verify: bool = False  # hash every file again
    figures: str | None = None  # directory for the census of lengths, as a figure and a table
    paths: PathsConfig = field(default_factory=PathsConfig)
