"""Streamed rows: an order that is a pure function of the position, what is told on the way, and exact resumes."""

from __future__ import annotations

import copy
import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import TrainerCallback

from fastalign.config import DataSource, TaskConfig, config_from_dict
from fastalign.data import streaming
from fastalign.data.feed import Feed
from fastalign.data.files import Row
from fastalign.data.parallel import PairBlocks
from fastalign.data.sampling import Sampler
from fastalign.data.streaming import StreamedRows
from fastalign.data.tally import Tally
from fastalign.data.templates import TaskReader
from fastalign.errors import ConfigError, DataError
from fastalign.streams.alignment import AlignmentStream
from fastalign.streams.base import MicroBatch
from fastalign.streams.task import TaskStream
from fastalign.training import inputs as run_inputs
from fastalign.training import trainer as run_trainer
from fastalign.training.run import train

BLOCK = 10
WORDS = {
    "en": ["set", "alarm", "play", "music", "light", "off", "on", "rain"],
    "de": ["stelle", "wecker", "spiele", "musik", "licht", "aus", "an", "regen"],
    "fr": ["mets", "réveil", "joue", "musique", "lampe", "éteins", "allume", "pluie"],
}
TASK = [{"prompt": f"is it {i}?", "response": f"yes {i}", "lang": "de" if i % 10 < 8 else "fr"} for i in range(47)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", BLOCK)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of all rows that are read from now on."""
    places: list[str] = []
    take = Feed.take

    def counted(self: Feed, count: int) -> list[tuple[str, Row]]:
        rows = take(self, count)
        places.extend(where.rpartition(", ")[2] for where, _ in rows)
        return rows

    monkeypatch.setattr(Feed, "take", counted)
    return places


def sentence(language: str, number: int) -> str:
    return " ".join(WORDS[language][number // 8**place % 8] for place in range(4))


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def of_task(path: str | Path, heat: Any = 1.0, tally: Tally | None = None, **options: Any) -> StreamedRows:
    config = options.pop("config", TaskConfig())
    source = DataSource(path=str(path), streaming=True, **options)
    reader = TaskReader(config)
    return StreamedRows(source, reader, TaskStream.language, heat, "task.data", "task", tally or Tally())


def begun(rows: StreamedRows, seed: int = 0, place: Any = None, kept: int = 0) -> StreamedRows:
    rows.begin(seed, kept, place)
    return rows


def items(rows: StreamedRows, start: int, stop: int) -> list[str]:
    """The questions at these positions, asked for a few at a time as a run does."""
    found = []
    for first in range(start, stop, 4):
        for position in rows.rows(first, min(first + 4, stop)):
            found.append(rows[position].messages[0]["content"])
    return found


def refusal(path: str | Path | list[str], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        source = DataSource(path=path if isinstance(path, list) else str(path), streaming=True, **options)
        rows = StreamedRows(source, TaskReader(TaskConfig()), TaskStream.language, 1.0, "task.data", "task", Tally())
        items(begun(rows), 0, 60)
    return str(caught.value)


@pytest.fixture(params=["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "folder", "two files"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The rows of TASK in every shape that can be streamed."""
    path = tmp_path / f"a.{request.param}"
    text = "".join(json.dumps(row) + "\n" for row in TASK).encode()
    if request.param == "jsonl":
        path.write_bytes(text)
    elif request.param == "jsonl.gz":
        path.write_bytes(gzip.compress(text))
    elif request.param == "jsonl.zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(text)
    elif request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(TASK), path, row_group_size=7)
    elif request.param == "folder":
        path.mkdir()
        for i, part in enumerate((TASK[:20], TASK[20:])):
            pq.write_table(pa.Table.from_pylist(part), path / f"train-{i}.parquet", row_group_size=6)
    else:
        for name, part in (("b-1.jsonl", TASK[:20]), ("b-2.jsonl", TASK[20:])):
            jsonl(tmp_path / name, part)
        return str(tmp_path / "b-*.jsonl")
    return str(path)


def test_the_order_is_a_pure_function_of_seed_content_and_position(source: str) -> None:
    whole = items(begun(of_task(source)), 0, 120)
    questions = [row["prompt"] for row in TASK]
    for number in range(4):
        block = whole[number * BLOCK : (number + 1) * BLOCK]
        assert sorted(block) == sorted(questions[number * BLOCK : (number + 1) * BLOCK]), "a block is so many rows"
    assert sorted(whole[:47]) == sorted(questions) and whole[:10] != questions[:10]
    assert sorted(whole[47:94]) == sorted(questions) and whole[47:94] != whole[:47], "then it begins anew, mixed again"
    assert items(begun(of_task(source)), 0, 120) == whole
    rows = begun(of_task(source))
    assert items(rows, 60, 80) == whole[60:80] and items(rows, 3, 9) == whole[3:9], "also backwards"
    assert items(begun(of_task(source), seed=1), 0, 47) != whole[:47]


def test_a_saved_place_is_gone_to_and_nothing_before_it_is_read(
    source: str, taken: list[str], request: pytest.FixtureRequest
) -> None:
    first = begun(of_task(source))
    whole = items(first, 0, 100)
    for position in (0, 9, 10, 33, 46, 47, 61, 90):
        rows = begun(of_task(source))
        items(rows, 0, position)
        place = json.loads(json.dumps(rows.place(position)))
        del taken[:]
        again = begun(of_task(source), place=place)
        assert items(again, position, 100) == whole[position:], position
        row = place["row"] % 47  # at the end of a pass, the first one of the next
        files = "two files" in request.node.name and row >= 20
        assert taken[0].split()[-1] == str(row + 1 - 20 * files), "the first row that is read"
        assert len(taken) <= 100 - place["start"] + BLOCK


def test_a_source_whose_end_is_that_of_a_block(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.parquet"):
        pq.write_table(pa.Table.from_pylist(TASK[:20]), tmp_path / "x.parquet")
        path = jsonl(tmp_path / "x.jsonl", TASK[:20]).replace("x.jsonl", name)
        whole = items(begun(of_task(path)), 0, 60)
        assert sorted(whole[:20]) == sorted(whole[20:40]) == sorted(row["prompt"] for row in TASK[:20])
        place = begun(of_task(path)).place(20)
        assert place["pass"] == 1 and items(begun(of_task(path), place=place), 20, 60) == whole[20:]


def test_a_place_that_cannot_be_used_is_told_and_read_up_to(source: str) -> None:
    whole = items(begun(of_task(source)), 0, 60)
    place = begun(of_task(source)).place(25)
    for broken in (
        {**place, "feed": {"part": 7, "place": None}},
        {**place, "start": "x"},
        {"identity": place["identity"]},
    ):
        tally = Tally()
        rows = begun(of_task(source, tally=tally), place=broken)
        assert items(rows, 25, 60) == whole[25:]
        assert "the saved place cannot be used (" in " ".join(tally.lines())
    other = begun(of_task(source), place={**place, "identity": "another"})
    assert items(other, 25, 60) == whole[25:]


def test_languages_keep_their_shares_within_a_block(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TASK)
    rows = begun(of_task(path, heat="uniform"))
    for number in range(4):
        drawn = Counter(rows[p].language for p in rows.rows(number * BLOCK, (number + 1) * BLOCK))
        assert drawn == {"de": 5, "fr": 5}
    rows = begun(of_task(path))
    assert Counter(rows[p].language for p in rows.rows(0, BLOCK)) == {"de": 8, "fr": 2}


def test_two_ranks_take_the_batches_of_one(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TASK)

    def stream(size: int) -> TaskStream:
        rows = begun(of_task(path))
        tokenizer: Any = SimpleNamespace(max_length=1)
        settings: dict[str, Any] = {"accumulation": 1, "eval_batch_size": 1, "logits_memory": None}
        found = TaskStream(rows, [], tokenizer, rows, micro_batch_size=size, **settings)
        found._collate = lambda batch: MicroBatch({}, 0, len(batch))  # type: ignore[method-assign]
        return found

    one, two = stream(8), [stream(4), stream(4)]
    for step in range(9):
        [whole] = one.micro_batches(step, 0, 1)
        halves = [two[rank].micro_batches(step, rank, 2)[0] for rank in (0, 1)]
        assert [*whole.rows] == [*halves[0].rows, *halves[1].rows]
        places = [[s.where(row) for row in batch.rows] for s, batch in zip([one, *two], [whole, *halves], strict=True)]
        assert places[0] == places[1] + places[2]


def test_the_rows_of_the_last_steps_can_be_named_and_older_ones_are_forgotten(tmp_path: Path) -> None:
    rows = begun(of_task(jsonl(tmp_path / "a.jsonl", TASK)), kept=24)
    items(rows, 0, 100)
    for position in range(100 - 4 - 24, 100):
        assert rows.where(position) == rows[position].where and ", line " in rows.where(position)
    assert rows.where(17) == "row 18 of the stream"
    with pytest.raises(IndexError):
        rows[17]
    assert run_inputs.REMEMBERED > run_trainer.SETTLE_EVERY


def test_meanings_are_found_in_a_block_and_differ_between_blocks(tmp_path: Path) -> None:
    pairs = [{"en": f"one {i // 2}", "de": f"eins {i}", "fr": f"un {i}"} for i in range(25)]
    rows = StreamedRows(
        DataSource(path=jsonl(tmp_path / "p.jsonl", pairs), streaming=True), PairBlocks("to_english"),
        AlignmentStream.language, 1.0, "alignment.data", "alignment", Tally(),
    )  # fmt: skip
    rows.begin(0, 1000, None)
    found = [rows[position] for position in rows.rows(0, 100)]
    for first, second in ((0, 50), (50, 100)):
        meanings: dict[int, set[str]] = {}
        for pair in found[first:second]:
            meanings.setdefault(pair.meaning, set()).add(pair.target)
        assert all(len(targets) == 1 for targets in meanings.values()), "one English sentence each"
        assert len(meanings) == 13, "also that of the rows 20 to 24, each pair of rows in one block"
    assert {p.source: p.meaning for p in found[:50]} == {p.source: p.meaning for p in found[50:]}, "in every pass"


def test_label_types_are_those_of_the_first_block_also_after_a_resume(tmp_path: Path) -> None:
    rows = [{"lang": "en", "tokens": [f"w{i}"], "tags": ["B-PER" if i < 10 else "B-LOC"]} for i in range(30)]
    path, ner = jsonl(tmp_path / "n.jsonl", rows), TaskConfig(template="ner")
    first = begun(of_task(path, config=ner))
    first.rows(0, 30)
    place = first.place(25)
    again = begun(of_task(path, config=ner), place=place)
    assert place["block"] == 2 and again[25].messages == first[25].messages
    assert "of the types PER in" in again[25].messages[0]["content"]


def test_skipped_rows_are_counted_as_they_come_once(tmp_path: Path) -> None:
    rows = [{**row, "lang": "xx" if i in (3, 12, 13, 40) else "de"} for i, row in enumerate(TASK)]
    path, tally = jsonl(tmp_path / "a.jsonl", rows), Tally()
    config = TaskConfig(languages=["de"])
    streamed = begun(of_task(path, tally=tally, config=config))
    assert "task.data: 1 of 10 rows left out: task.languages does not name their language" in tally.lines()[0]
    items(streamed, 0, 25)
    assert "3 of 30 rows left out" in tally.lines()[0] and "line 4; line 13; line 14)" in tally.lines()[0]
    place = streamed.place(22)
    items(streamed, 25, 120)
    assert "task.data: 4 of 47 rows left out" in tally.lines()[0], "and not again in the next pass"
    assert tally.as_dict()["files"]["task.data"][0]["rows"] == 47
    items(streamed, 0, 10)
    assert "4 of 47 rows left out" in tally.lines()[0], "nor where it is read once more"
    resumed = Tally()
    items(begun(of_task(path, tally=resumed, config=config), place=place), 22, 100)
    assert "4 of 47 rows left out" in resumed.lines()[0], "what a checkpoint has counted is kept"
    assert resumed.as_dict()["files"]["task.data"][0]["rows"] == 47


def test_blocks_without_a_usable_row_are_passed_over(tmp_path: Path) -> None:
    rows = [{"de": f"de {i}", "en": "" if 10 <= i < 30 else f"en {i}"} for i in range(40)]
    tally = Tally()
    streamed = StreamedRows(
        DataSource(path=jsonl(tmp_path / "p.jsonl", rows), streaming=True), PairBlocks("to_english"),
        AlignmentStream.language, 1.0, "alignment.data", "alignment", tally,
    )  # fmt: skip
    streamed.begin(0, 100, None)
    found = {streamed[position].where.rpartition(", ")[2] for position in streamed.rows(0, 20)}
    assert found == {f"line {i}" for i in (*range(1, 11), *range(31, 41))}
    assert "alignment.data: 20 of 40 pairs skipped: a side is empty" in tally.lines()[0]


def test_a_damaged_row_is_named_when_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(path, TASK) and path.read_text() + '{"prompt": \n' + path.read_text())
    rows = begun(of_task(path))
    items(rows, 0, 36)
    assert f"{path}, line 48: not JSON" in refusal(path)
    jsonl(path, [*TASK[:25], {"question": "a"}])
    assert f"{path}, line 26: found keys question ('a')" in refusal(path)
    pq.write_table(pa.Table.from_pylist(TASK), tmp_path / "a.parquet", row_group_size=10)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:1200] + b"\0" * 200 + whole[1400:])
    assert "b.parquet, row " in refusal(tmp_path / "b.parquet")


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    for name in ("c.de", "c.en"):
        (tmp_path / name).write_text("x\n")
    assert "cannot be streamed; known endings: .jsonl" in refusal([str(tmp_path / "c.de"), str(tmp_path / "c.en")])
    assert "holds no rows" in refusal(jsonl(tmp_path / "empty.jsonl", []))
    assert "does not exist" in refusal(tmp_path / "none.jsonl")
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "train.jsonl", TASK)
    assert "has no split 'dev'; there are: train" in refusal(tmp_path / "set", split="dev")
    assert "HF_HUB_OFFLINE forbids to ask the hub" in refusal("some/thing")
    message = refusal(jsonl(tmp_path / "a.jsonl", TASK), columns={"prompt": "qrompt", "response": "response"})
    assert "no column 'qrompt' (did you mean 'prompt'?)" in message


def test_a_column_may_be_rare_further_on(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": "y", "l": "de"}] * 15 + [{"a": "x", "b": "y"}] * 20
    columns = {"prompt": "a", "response": "b", "lang": "l"}
    streamed = begun(of_task(jsonl(tmp_path / "a.jsonl", rows), columns=columns))
    assert {streamed[p].language for p in streamed.rows(20, 30)} == {"und"}


@pytest.mark.parametrize(
    ("section", "training", "said"),
    [
        ({"data": {"path": "a", "streaming": True}}, {}, "task.data.streaming: nobody knows how long a stream is; set"),
        ({"data": {"path": "a", "streaming": True}}, {"max_steps": 0}, "set training.max_steps"),
        (
            {"data": ["b", {"path": "a", "streaming": True}]},
            {"max_steps": 5},
            "task.data.streaming: a stream is one source",
        ),
        (
            {"eval_data": {"path": "a", "streaming": True}},
            {"max_steps": 5},
            "task.eval_data.streaming: held-out rows are",
        ),
        ({"data": {"path": "a", "streaming": True, "split": "train[:9]"}}, {"max_steps": 5}, "cannot be streamed"),
        (
            {"data": {"path": "a", "streaming": True}, "eval_share": 0.1},
            {"max_steps": 5},
            "task.eval_share: nothing can",
        ),
        ({"data": {"path": "a", "streaming": 1}}, {"max_steps": 5}, "streaming must be true or false"),
    ],
)
def test_what_a_stream_asks_of_the_configuration(section: dict, training: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"task": section, "training": training})
    assert said in str(caught.value)


# Whole runs.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    jsonl(folder / "task.jsonl", [
        {"prompt": sentence("en", 5 * i), "response": ("yes", "no")[i % 2], "lang": "en"} for i in range(47)
    ])  # fmt: skip
    (folder / "pairs").mkdir()
    pairs = [{"translation": {language: sentence(language, 7 * i) for language in WORDS}} for i in range(33)]
    for number, part in enumerate((pairs[:20], pairs[20:])):
        pq.write_table(pa.Table.from_pylist(part), folder / "pairs" / f"train-{number}.parquet", row_group_size=6)
    jsonl(folder / "held.jsonl", [{"prompt": "light on", "response": "yes", "lang": "en"}] * 3)
    jsonl(folder / "held-pairs.jsonl", [{lang: sentence(lang, 900 + i) for lang in WORDS} for i in range(4)])
    return folder


@pytest.fixture
def raw(model_dir: Path, data: Path, tmp_path: Path) -> dict:
    return {
        "model": {"name_or_path": str(model_dir)},
        "adapter": {"r": 4, "dropout": 0.1},
        "task": {"data": {"path": str(data / "task.jsonl"), "streaming": True}, "eval_data": str(data / "held.jsonl")},
        "alignment": {
            "data": {"path": str(data / "pairs"), "streaming": True},
            "eval_data": str(data / "held-pairs.jsonl"),
            "batch_size": 8,
        },
        "training": {
            "output_dir": str(tmp_path / "out"), "max_steps": 20, "save_steps": 10, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 20, "use_cpu": True,
        },
    }  # fmt: skip


class Stop(TrainerCallback):
    """After step 10, as by a kill: without the final results."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 10


def test_a_resumed_run_ends_as_the_one_that_was_not_stopped(raw: dict, tmp_path: Path, taken: list[str]) -> None:
    expected = train(config_from_dict(raw))
    assert expected["plan"]["task"]["rows"] is None and expected["plan"]["task"]["languages"] == {"en": 10}
    read = len(taken)
    results = {}
    for name in ("halves", "no place"):
        halved = copy.deepcopy(raw)
        halved["training"]["output_dir"] = str(tmp_path / name)
        train(config_from_dict(halved), callbacks=[Stop()])
        checkpoint = tmp_path / name / "checkpoint-10"
        assert {*json.loads((checkpoint / "streamed.json").read_text())} == {"task", "alignment"}
        if name == "no place":
            (checkpoint / "streamed.json").unlink()
        halved["training"]["resume_from_checkpoint"] = True
        del taken[:]
        found = train(config_from_dict(halved))
        results[name] = len(taken)
        assert found["resumed_at"] == [10] and found["steps"] == 20
        for stream in ("task", "alignment"):
            assert found["streams"][stream]["loss_last"] == expected["streams"][stream]["loss_last"]
        files = [Path(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("out", name)]
        assert files[0] == files[1], name
    assert results["halves"] < read <= results["no place"], "the place is gone to, or all is read once more"


def test_the_run_says_what_it_streams(raw: dict, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copy(data / "task.jsonl", tmp_path / "task.jsonl")
    with (tmp_path / "task.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "set alarm " * 25, "response": "yes", "lang": "en"}) + "\n")
    raw["task"] |= {"data": {"path": str(tmp_path / "task.jsonl"), "streaming": True}, "max_length": 32}
    raw["training"] |= {"max_steps": 26, "eval_strategy": "no", "save_strategy": "no"}
    summary = train(config_from_dict(raw))
    said = capsys.readouterr().err
    assert "task: rows are streamed (the first 1,000 rows have en 10), 3 held out; 13 steps of 4 rows" in said
    assert "alignment: pairs are streamed" in said and "task.data: streamed, so that nothing is held out of it" in said
    assert "task.data: 1 of 48 rows cut: longer than 32 tokens" in said, "at the end: it came after the start"
    assert summary["data"]["rows"]["task.data"] == {"rows cut: longer than 32 tokens": 1}
    assert summary["data"]["files"]["task.data"][0]["sha256"].startswith("streamed ")


def test_other_data_are_refused_at_a_resume(raw: dict, tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    raw = json.loads(json.dumps(raw).replace(str(data), str(tmp_path / "data")))
    train(config_from_dict(raw), callbacks=[Stop()])
    raw["training"]["resume_from_checkpoint"] = True
    path = tmp_path / "data" / "task.jsonl"
    path.write_text(path.read_text().replace("alarm", "alert", 1))
    with pytest.raises(ConfigError, match=r"content of task\.data"):
        train(config_from_dict(raw))


def test_a_run_ends_where_a_damaged_row_comes(raw: dict, tmp_path: Path, data: Path) -> None:
    path = tmp_path / "task.jsonl"
    lines = (data / "task.jsonl").read_text().splitlines()
    path.write_text("\n".join([*lines[:33], "{"]))
    raw["task"]["data"]["path"] = str(path)
    raw["training"] |= {"save_steps": 2, "eval_strategy": "no"}
    with pytest.raises(DataError, match=r"task\.jsonl, line 34: the JSON goes on"):
        train(config_from_dict(raw))
    assert list((tmp_path / "out").glob("checkpoint-*"))


def test_only_one_rank_reads_ahead_to_save(tmp_path: Path) -> None:
    """The place of a position that no step has asked for yet."""
    rows = begun(of_task(jsonl(tmp_path / "a.jsonl", TASK)))
    whole = items(begun(of_task(tmp_path / "a.jsonl")), 0, 60)
    items(rows, 0, 8)
    place = rows.place(32)
    assert place["start"] == 30 and items(rows, 8, 16) == whole[8:16]


def test_a_block_has_its_own_sampler(tmp_path: Path) -> None:
    rows = begun(of_task(jsonl(tmp_path / "a.jsonl", TASK)), seed=5)
    order = Sampler(["de" if i < 8 else "fr" for i in range(10)], 1.0, 5, "task 2").rows(0, 10)
    assert items(rows, 20, 30) == [f"is it {20 + row}?" for row in order]


def test_a_checkpoint_needs_no_row_that_the_run_does_not(
    raw_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends where a block ends, and the row behind it is damaged."""
    monkeypatch.setattr(streaming, "BLOCK", 8)
    rows = [json.dumps({"prompt": f"set {i}", "response": "yes"}) for i in range(16)]
    (tmp_path / "task.jsonl").write_text("\n".join([*rows, "{broken"]), encoding="utf-8")
    raw = copy.deepcopy(raw_config)
    raw["task"] = {"data": {"path": str(tmp_path / "task.jsonl"), "streaming": True}}
    raw["schedule"] = {"mode": "task_only"}
    raw["training"] |= {"save_strategy": "steps", "save_steps": 4}
    assert train(config_from_dict(raw))["steps"] == 4
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    raw["training"] |= {"max_steps": 5, "resume_from_checkpoint": True}
    with pytest.raises(DataError, match=r"task.jsonl, line 17"):
        train(config_from_dict(raw))


def test_a_length_of_the_wrong_type_is_told_as_such(raw_config: dict, data_dir: Path) -> None:
    raw = copy.deepcopy(raw_config)
    raw["task"] = {"data": {"path": str(data_dir / "task.jsonl"), "streaming": True}}
    raw["training"]["max_steps"] = "100"
    with pytest.raises(ConfigError, match=r"training.max_steps must be an integer, not '100'"):
        train(config_from_dict(raw))
