"""dataset_info.json, files of every kind and hubs."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuselora.engine.data_formats import (
    check_stage,
)
from fuselora.engine.data_info import dataset_info
from fuselora.engine.data_rows import SUFFIXES, BadRow, read_rows
from fuselora.engine.data_source import Source
from fuselora.engine.errors import UserError

GOOD = '{"instruction": "I", "output": "O"}'


@pytest.mark.parametrize(
    ("stage", "entry", "words"),
    [
        ("dpo", {}, "ranking: true"),
        ("sft", {"ranking": True}, "no ranking"),
        ("kto", {}, "kto_tag"),
        ("pt", {"formatting": "sharegpt"}, "alpaca"),
    ],
)
def test_set_of_another_stage(tmp_path, stage, entry, words):
    (tmp_path / "d.json").write_text("[]")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.json"} | entry}))
    with pytest.raises(UserError, match=f"dataset d: .*{words}"):
        check_stage(dataset_info("d", tmp_path), stage)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"file_name": "absent.json"}, ["file_name", "absent.json"]),
        ({"file_name": "d.xml"}, ["file_name", "d.xml"]),
        ({"script_url": "a.py"}, ["script_url", "programs"]),
        ({"cloud_file_name": "s3://a"}, ["cloud_file_name", "download"]),
        ({"file_name": "d.json", "num_samples": 0}, ["num_samples"]),
        ({"file_name": "d.json", "numsamples": 3}, ["numsamples"]),
        ({"file_name": "d.json", "formatting": "xml"}, ["formatting", "'xml'"]),
        ({"file_name": "d.json", "columns": {"promt": "a"}}, ["columns", "'promt'", "did you mean 'prompt'"]),
    ],
)
def test_bad_entry(tmp_path, entry, words):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
    (tmp_path / "d.json").write_text(f"[{GOOD}]")
    (tmp_path / "d.xml").write_text("a,b")
    with pytest.raises(UserError) as caught:
        dataset_info("d", tmp_path)
    assert all(word in str(caught.value) for word in [*words, "dataset_info.json"]), str(caught.value)


def test_unknown_name_suggests_one(dataset_dir):
    with pytest.raises(UserError, match="did you mean 'rows'"):
        dataset_info("row", dataset_dir)


def test_rows_of_a_pretty_list_know_their_lines(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"a": 1}, {"b": [1, 2]}, {"c": 3}], indent=2))
    assert [place for place, _ in read_rows(path)] == [f"{path}:{line}" for line in (2, 5, 11)]


def test_folder_of_files(tmp_path):
    (tmp_path / "parts").mkdir()
    for name in ("b.jsonl", "a.json"):
        (tmp_path / "parts" / name).write_text(json.dumps({"instruction": name, "output": "O"}))
    (tmp_path / "parts" / "README.md").write_text("not data")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "parts"}}))
    samples = [sample for _, sample in Source.of("d", str(tmp_path), "sft").samples("sft", None)]
    assert [sample.messages[0]["content"] for sample in samples] == ["a.json", "b.jsonl"]


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "csv", "parquet", "arrow", "arrow stream"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"instruction": 'one,\n"two"', "output": "é"}, {"instruction": "three", "output": "four"}]
    path = tmp_path / f"d.{kind.split()[0]}"
    lines = "\n".join(map(json.dumps, rows)).encode()
    table = pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        parquet.write_table(table, path)
    elif kind.startswith("arrow"):
        opened = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
        with opened(path, table.schema) as writer:
            writer.write_table(table)
    elif kind == "csv":
        path.write_text('instruction,output\n"one,\n""two""",é\nthree,four\n')
    else:
        path.write_bytes({"json": json.dumps(rows).encode(), "jsonl": lines, "jsonl.gz": gzip.compress(lines)}[kind])
    assert [row for _, row in read_rows(path)] == rows
    places = {"csv": [2, 4], "json": [1, 1]}.get(kind, [1, 2])
    assert [place for place, _ in read_rows(path)] == [f"{path}:{line}" for line in places]


class _Hub:
    """Stands for ``datasets`` or ``modelscope``: rows of the id it was asked for."""

    def __init__(self):
        self.asked = []

    def load_dataset(self, path, name=None, **options):
        self.asked.append((path, name, options["split"], options["data_dir"]))
        return [{"instruction": path, "output": "O"}]

    def load(self, name, **options):
        self.asked.append((name, options["subset_name"], options["split"], options["data_dir"]))
        return [{"instruction": name, "output": "O"}]


def test_hubs(tmp_path, monkeypatch):
    hf, ms = _Hub(), _Hub()
    ms.MsDataset = ms
    monkeypatch.setitem(__import__("sys").modules, "datasets", hf)
    monkeypatch.setitem(__import__("sys").modules, "modelscope", ms)
    monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)
    entry = {"hf_hub_url": "h/f", "ms_hub_url": "m/s", "subset": "en", "split": "test", "folder": "sub"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry, "m": {"ms_hub_url": "m/s"}}))

    def first(name, folder=str(tmp_path)):
        ((place, sample),) = Source.of(name, folder, "sft").samples("sft", None)
        return place, sample.messages[0]["content"]

    assert first("d") == ("h/f:1", "h/f") and hf.asked == [("h/f", "en", "test", "sub")]
    assert first("m") == ("m/s:1", "m/s") and ms.asked == [("m/s", "default", "train", None)]
    assert first("some/id", "ONLINE") == ("some/id:1", "some/id")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert first("d") == ("m/s:1", "m/s") and first("some/id", "ONLINE")[1] == "some/id" and len(hf.asked) == 2


def test_a_hub_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"m": {"ms_hub_url": "m/s"}}))
    with pytest.raises(UserError, match="pip install 'modelscope'"):
        list(Source.of("m", str(tmp_path), "sft").samples("sft", None))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_repository_by_the_real_library(tmp_path, monkeypatch, streaming):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "train.jsonl").write_text("\n".join([GOOD, GOOD.replace('"I"', '"second"')]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"hf_hub_url": str(repository)}}))
    source = Source.of("d", str(tmp_path), "sft", streaming=streaming, cache_dir=str(tmp_path / "cache"))
    samples = [sample for _, sample in source.samples("sft", None, start=1)]
    assert [sample.messages[0]["content"] for sample in samples] == ["second"]
    if not streaming:
        (repository / "train.jsonl").write_text(GOOD)
        changed = Source.of("d", str(tmp_path), "sft", cache_dir=str(tmp_path / "cache"))
        assert changed.digest() != source.digest()


LINES = st.lists(
    st.sampled_from([GOOD, "{", "[", "]", "[1", "3", '"', "\x00", "é,", '{"a":' + "9" * 5000 + "}", "[" * 9999])
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=60), LINES.map(lambda lines: "\n".join(lines).encode())), data=st.data())
def test_any_bytes_are_rows_or_one_sentence(tmp_path, content, data):
    suffix = data.draw(st.sampled_from((*SUFFIXES, ".jsonl.gz")))
    path = tmp_path / f"d{suffix}"
    path.write_bytes(gzip.compress(content)[: data.draw(st.integers(1, 99))] if suffix.endswith(".gz") else content)
    try:
        rows = [row for _, row in read_rows(path)]
    except UserError as error:
        assert f"{path}" in str(error)
    else:
        assert all(isinstance(row, (dict, BadRow)) for row in rows)


def test_a_remote_index_names_repositories_not_files_here(tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text("[]")
    entries = {"far": {"hf_hub_url": "some/set"}, "near": {"file_name": str(tmp_path / "mine.json")}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **keys: str(tmp_path / "dataset_info.json"))
    assert dataset_info("far", "REMOTE:some/index").hub_id == "some/set"
    with pytest.raises(UserError, match="near: expected hf_hub_url or ms_hub_url in a remote index, got 'file_name'"):
        dataset_info("near", "REMOTE:some/index")
