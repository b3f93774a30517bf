"""A geometry run writes a table that other libraries reproduce, its figures, and refuses what does not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import composed, save_tiny
from sklearn.metrics.pairwise import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

from ropewalk.analysis import geometry as geometry_module
from ropewalk.analysis.capture import LayerHeads, observe
from ropewalk.analysis.geometry import geometry
from ropewalk.analysis.measure import COLUMNS, STATISTICS, is_of_keys
from ropewalk.config.analysis import GeometryConfig
from ropewalk.config.rules import validate_numbers
from ropewalk.evaluation.documents import make_windows
from ropewalk.figures.key_clouds import GEOMETRY_FIGURES
from ropewalk.model.load import load_for_evaluation, read_position

LAYERS, HEADS, KEY_HEADS = 2, 4, 2
LENGTHS = [64, 96]
YARN = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"method": "dynamic_ntk", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, fixture_tokenizer) -> dict[str, Path]:
    """A tiny model; the same with its four slowest pairs stopped, with a length-dependent spectrum, with YaRN."""
    root = tmp_path_factory.mktemp("models")
    plain = save_tiny(root / "plain")
    shutil.copytree(fixture_tokenizer, plain, dirs_exist_ok=True)
    return {
        "plain": plain,
        "clipped": with_chain(plain, root / "clipped", {"method": "hardclip", "clip": 4}),
        "dynamic": with_chain(plain, root / "dynamic", DYNAMIC),
        "scaled": with_chain(plain, root / "scaled", YARN),
    }


def with_chain(source: Path, target: Path, step: dict[str, Any]) -> Path:
    shutil.copytree(source, target)
    position = read_position(source)
    position = replace(position, chain=position.chain.extended([step]))
    config = json.loads((source / "config.json").read_text())
    config |= {"rope_parameters": position.rope_parameters(64, length=64), "ropewalk": position.metadata()}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture
def config(checkpoints, fixture_corpus, tmp_path) -> GeometryConfig:
    return composed(
        "geometry",
        f"models=[{checkpoints['plain']}]",
        f"documents={fixture_corpus}",
        f"output={tmp_path / 'geometry'}",
        f"lengths={LENGTHS}",
        "device=cpu",
        "dtype=float32",
        "formats=[]",
        "max_documents=2",
        "attention_heads=['1.3']",
    )


@pytest.fixture(scope="module")
def measured(checkpoints, fixture_corpus, tmp_path_factory) -> pd.DataFrame:
    """Two checkpoints side by side over one document."""
    output = tmp_path_factory.mktemp("measured") / "geometry"
    models = f"models=[{checkpoints['plain']},{checkpoints['clipped']}]"
    options = ["device=cpu", "dtype=float32", "formats=[png]", "pca_heads=2", "attention_heads=['0.1','1.3']"]
    config = composed(
        "geometry", models, f"documents={fixture_corpus}", f"output={output}", f"lengths={LENGTHS}", *options
    )
    table = geometry(config)
    table.attrs["output"] = output
    return table


def documents(checkpoint: Path, corpus: Path, count: int) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return list(make_windows(corpus, tokenizer, LENGTHS[-1], count).tokens.values())


def values(table: pd.DataFrame, **where: Any) -> np.ndarray:
    for name, value in where.items():
        table = table[table[name] == value]
    return table["value"].to_numpy()


def test_the_table_has_a_row_for_every_head_length_and_side(measured) -> None:
    assert list(measured.columns) == list(COLUMNS)
    of_keys = [name for name in STATISTICS if is_of_keys(name)]
    both = len(STATISTICS) - 2  # the two ratios under RoPE have no side before it
    keys, ratios = KEY_HEADS * (2 * (len(of_keys) - 1) + 1), HEADS
    assert len(of_keys) == 8
    queries = HEADS * 2 * (both - (len(of_keys) - 1))
    assert len(measured) == 2 * LAYERS * len(LENGTHS) * (keys + queries + ratios)
    assert set(measured["statistic"]) == set(STATISTICS)
    assert measured["head"].isna().equals(measured["statistic"].map(is_of_keys))
    assert np.isfinite(measured["value"]).all()
    of_query = measured.dropna(subset=["head"])
    assert (of_query["kv_head"] == of_query["head"] // (HEADS // KEY_HEADS)).all()
    assert list(measured["chain"].unique()) == ["rope", "hardclip(clip=4)"]


def test_what_is_written_is_what_is_returned(measured) -> None:
    output = measured.attrs["output"]
    pd.testing.assert_frame_equal(
        pd.read_parquet(output / "geometry.parquet").astype(COLUMNS), measured, check_like=True
    )
    csv = pd.read_csv(output / "geometry.csv")
    np.testing.assert_allclose(csv["value"], measured["value"])
    record = json.loads((output / "geometry.json").read_text())
    assert [entry["model"] for entry in record["models"]] == ["plain", "clipped"]
    assert record["config"]["lengths"] == LENGTHS
    assert record["models"][1]["passes"][0]["inv_freq"][-4:] == [0.0] * 4
    for name in GEOMETRY_FIGURES:
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_sink_weights_are_transformers_eager_attention(measured, checkpoints, fixture_corpus) -> None:
    (ids,) = documents(checkpoints["plain"], fixture_corpus, 1)
    scores = pd.read_parquet(measured.attrs["output"] / "key_scores.parquet")
    for name in ("plain", "clipped"):
        model = AutoModelForCausalLM.from_pretrained(checkpoints[name], attn_implementation="eager")
        with torch.no_grad():
            attentions = model(ids[None], output_attentions=True, use_cache=False).attentions
        for layer in range(LAYERS):
            for length in LENGTHS:
                weights = attentions[layer][0, :, :length, :length].double()
                where = {"model": name, "layer": layer, "length": length, "rope": "after"}
                sink = values(measured, statistic="sink_weight", **where)
                np.testing.assert_allclose(sink, weights[:, 1:, 0].mean(-1), rtol=1e-4)
                by_key = weights.sum(1).mean(0) / np.arange(length, 0, -1)
                np.testing.assert_allclose(values(scores, **where), by_key, rtol=1e-4)


def test_only_a_rotation_lies_between_before_and_after(measured) -> None:
    for side in ("queries", "keys"):
        norms = [values(measured, statistic=f"frobenius_{side}", rope=rope) for rope in ("before", "after")]
        np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
        shares = [values(measured, statistic=f"fsv_share_{side}", rope=rope) for rope in ("before", "after")]
        ratios = values(measured, statistic=f"fsv_ratio_{side}", rope="after")
        np.testing.assert_allclose(ratios, shares[1] / shares[0], rtol=1e-12)


def test_statistics_are_means_over_documents_of_each_prefix(config, checkpoints, fixture_corpus) -> None:
    table = geometry(config)
    model = load_for_evaluation(checkpoints["plain"])
    cosines: dict[int, list[list[float]]] = {length: [] for length in LENGTHS}

    def keep(heads: LayerHeads) -> None:
        keys = heads.keys["after"].double().numpy()
        length = keys.shape[1]
        cosines[length].append([cosine_similarity(of)[np.triu_indices(length, 1)].mean() for of in keys])

    for ids in documents(checkpoints["plain"], fixture_corpus, 2):
        for length in LENGTHS:  # each in a pass of its own
            observe(model, ids[:length], [1], keep)
    for length in LENGTHS:
        found = values(table, statistic="intra_cosine_keys", layer=1, length=length, rope="after")
        np.testing.assert_allclose(found, np.mean(cosines[length], axis=0), atol=1e-5)


def test_a_chain_that_follows_the_length_gets_a_pass_for_each(config, checkpoints) -> None:
    config.models = [str(checkpoints["dynamic"])]
    together = geometry(config)
    record = json.loads((Path(config.output) / "geometry.json").read_text())
    assert [entry["lengths"] for entry in record["models"][0]["passes"]] == [[64], [96]]
    for length in LENGTHS:
        config.lengths, config.overwrite = [length], True
        alone = geometry(config)
        for statistic in ("fsv_share_keys", "sink_weight", "intra_cosine_queries"):
            where = {"statistic": statistic, "length": length}
            np.testing.assert_allclose(values(together, **where), values(alone, **where), rtol=1e-6)


def test_before_rope_attention_differs_by_the_rotation_alone(config, checkpoints, fixture_corpus) -> None:
    """Without rotation, but with the attention scaling that YaRN brings with it: (0.1 ln 4 + 1)^2 on the logits."""
    config.models, config.max_documents = [str(checkpoints["scaled"])], 1
    table = geometry(config)
    found: list[LayerHeads] = []
    (ids,) = documents(checkpoints["scaled"], fixture_corpus, 1)
    observe(load_for_evaluation(checkpoints["scaled"]), ids, [1], found.append)
    query, key = (side["before"].double().numpy() for side in (found[0].queries, found[0].keys))
    logits = query @ np.repeat(key, HEADS // KEY_HEADS, axis=0).swapaxes(1, 2) * 16**-0.5 * (0.1 * np.log(4) + 1) ** 2
    weights = np.exp(logits - logits.max()) * np.tril(np.ones(logits.shape[1:]))
    weights /= weights.sum(-1, keepdims=True)
    where = {"layer": 1, "length": LENGTHS[-1], "rope": "before"}
    np.testing.assert_allclose(values(table, statistic="sink_weight", **where), weights[:, 1:, 0].mean(1), rtol=1e-4)
    norms = [values(table, statistic="frobenius_keys", layer=1, rope=rope) for rope in ("before", "after")]
    np.testing.assert_allclose(norms[1] / norms[0], 0.1 * np.log(4) + 1, rtol=1e-5)


def test_snapshots_and_maps_may_be_left_out(config) -> None:
    config.pca_heads, config.attention_heads, config.formats = 0, [], ["svg"]
    validate_numbers(config)  # as the command does first
    geometry(config)
    drawn = {path.stem for path in Path(config.output).glob("*.svg")}
    assert drawn == set(GEOMETRY_FIGURES) - {"geometry_pca", "geometry_attention", "geometry_cosine_maps"}
    assert pd.read_parquet(Path(config.output) / "pca.parquet").empty


def test_snapshots_share_one_basis(config, checkpoints) -> None:
    """Layer 0 is not reached by any rotation before its own, so both checkpoints have the same points before RoPE."""
    config.models, config.layers, config.attention_heads = [str(checkpoints[n]) for n in ("plain", "clipped")], [0], []
    geometry(config)
    clouds = pd.read_parquet(Path(config.output) / "pca.parquet")
    plain, clipped = (clouds[(clouds["model"] == name)].reset_index() for name in ("plain", "clipped"))
    before = plain["rope"] == "before"
    points = ["pc1", "pc2"]
    np.testing.assert_allclose(plain[before][points], clipped[before][points], atol=1e-6)
    assert np.abs(plain[~before][points].to_numpy() - clipped[~before][points].to_numpy()).max() > 0.1
    assert set(clouds["kv_head"]) == {0, 1}
    per_head = clouds.groupby(["model", "kv_head", "rope", "length", "head_of_group"])["position"]
    assert (per_head.min() == 0).all()
    early = plain[before & (plain["length"] == LENGTHS[0])]
    centers = early.groupby("kv_head")[points].mean()  # every position is sampled, so these are the basis's own points
    np.testing.assert_allclose(centers, 0, atol=1e-5)


def test_an_existing_output_stays_unless_it_may_be_replaced(config, monkeypatch) -> None:
    geometry(config)
    monkeypatch.setattr(geometry_module, "load_for_evaluation", None)  # refused before a model is loaded
    with pytest.raises(ValueError, match="overwrite=true"):
        geometry(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lengths", [96, 64], r"must ascend without repeats; write \[64, 96\]"),
        ("lengths", [32], "64 tokens or more"),
        ("lengths", [64, 10**7], "longer than every document"),
        ("layers", [2], r"within 0..1"),
        ("layers", [], "name some, or null"),
        ("attention_heads", ["1"], "LAYER.HEAD"),
        ("attention_heads", ["1.4"], r"within 0..3"),
        ("attention_heads", ["7.0"], r"one of the measured \[0, 1\]"),
        ("formats", ["bmp"], "png, pdf, svg"),
        ("cluster_samples", 1, "2 or more"),
        ("max_documents", 0, "1 or more"),
        ("models", [], "names no checkpoint"),
        ("models", ["nowhere"], "neither a run directory"),
        ("dtype", "float64", "bfloat16, float32"),
        ("documents", "nowhere", "is not a directory"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(config, field, value, message, monkeypatch) -> None:
    monkeypatch.setattr(geometry_module, "load_for_evaluation", None)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        geometry(config)


def test_checkpoints_that_cannot_stand_side_by_side_are_refused(config, tmp_path, fixture_tokenizer) -> None:
    plain = config.models[0]
    config.models = [plain, plain]
    with pytest.raises(ValueError, match="symbolic link"):
        geometry(config)
    other = save_tiny(tmp_path / "other", num_hidden_layers=3)
    config.models = [plain, str(other)]
    with pytest.raises(ValueError, match="head by head"):
        geometry(config)
    config.models = [str(save_tiny(tmp_path / "phi3", "phi3", pad_token_id=0))]
    with pytest.raises(ValueError, match=r"model_type of .*phi3 is not known; use one of: llama, mistral"):
        geometry(config)


def test_layers_that_see_a_window_are_measured_within_it(config, tmp_path, fixture_tokenizer) -> None:
    """Gemma 3, its first layer with a window of 40 of the 96 tokens: against transformers' eager attention."""
    gemma = save_tiny(
        tmp_path / "gemma", "gemma3_text", sliding_window=40, layer_types=["sliding_attention", "full_attention"]
    )
    shutil.copytree(fixture_tokenizer, gemma, dirs_exist_ok=True)
    config.models, config.max_documents = [str(gemma)], 1
    config.attention_heads = ["0.3"]
    table = geometry(config)
    (ids,) = documents(gemma, Path(config.documents), 1)
    model = AutoModelForCausalLM.from_pretrained(gemma, attn_implementation="eager")
    with torch.no_grad():
        attentions = model(ids[None], output_attentions=True, use_cache=False).attentions
    scores = pd.read_parquet(Path(config.output) / "key_scores.parquet")
    for layer, window in ((0, 40), (1, LENGTHS[-1])):
        weights = attentions[layer][0].double()
        where = {"layer": layer, "length": LENGTHS[-1], "rope": "after"}
        sink = values(table, statistic="sink_weight", **where)
        np.testing.assert_allclose(sink, weights[:, 1:window, 0].mean(-1), rtol=1e-4)
        by_key = weights.sum(1).mean(0) / np.minimum(np.arange(LENGTHS[-1], 0, -1), window)
        np.testing.assert_allclose(values(scores, **where), by_key, rtol=1e-4)


def test_norms_and_cosines_by_position_are_those_of_the_vectors(measured, checkpoints, fixture_corpus) -> None:
    (ids,) = documents(checkpoints["clipped"], fixture_corpus, 1)
    found: list[LayerHeads] = []
    observe(load_for_evaluation(checkpoints["clipped"]), ids, [1], found.append)
    scores = pd.read_parquet(measured.attrs["output"] / "key_scores.parquet")
    for rope in ("before", "after"):
        query, key = (side[rope].double().numpy() for side in (found[0].queries, found[0].keys))
        rows = scores[(scores["model"] == "clipped") & (scores["layer"] == 1) & (scores["rope"] == rope)]
        for length in LENGTHS:
            of_length = rows[rows["length"] == length]
            norms = np.linalg.norm(key[:, :length], axis=-1).mean(0)
            np.testing.assert_allclose(of_length["key_norm"], norms, rtol=1e-5)
            cosines = [
                np.tril(cosine_similarity(query[head, :length], key[head // 2, :length])).sum(0)
                / np.arange(length, 0, -1)
                for head in range(HEADS)
            ]
            np.testing.assert_allclose(of_length["cosine"], np.mean(cosines, axis=0), atol=1e-5)
