"""Selection, metrics, flags, files and bad input: against hand-counted cases and brute force."""

import doctest
import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import toy
from conftest import ROOT, stage

import common

SCRIPTS = ["common", *(path.stem for path in sorted(ROOT.glob("0?_*.py")))]
HELPERS = [name for name in ("toy", "study") if (ROOT / f"tests/{name}.py").exists()]


@pytest.mark.parametrize("name", SCRIPTS + HELPERS)
def test_every_worked_example_in_a_docstring_is_true(name):
    failed, tried = doctest.testmod(stage(name))
    assert tried > 0
    assert failed == 0


# ---- selection and metrics


def test_top_k_takes_the_largest_and_the_earlier_of_equals():
    assert common.top_k([0.1, 0.7, 0.7, 0.9, 0.7], 3) == [3, 1, 2]
    assert common.top_k([0.5], 2) == [0]
    assert common.top_k([], 2) == []


def test_reward_pass_ranks_all_samples_not_only_right_ones():
    rewards, correct = [0.9, 0.8, 0.7, 0.1], [False, False, True, True]
    passed = [common.reward_pass_at_k(rewards, correct, k) for k in (1, 2, 3, 4)]
    assert passed == [False, False, True, True]


@pytest.mark.parametrize(
    "how, reward", [("min", 0.25), ("mean", 0.5), ("last", 0.75), ("product", 0.09375)]
)
def test_every_aggregate_by_hand_and_no_step_is_below_every_score(how, reward):
    assert common.response_reward([0.5, 0.25, 0.75], how) == reward
    assert common.response_reward([], how) < 0.0
    assert common.response_reward([0.0], how) == 0.0


def test_min_step_is_the_weakest_step():
    assert common.response_reward([0.9, 0.0, 1.0]) == 0.0


def test_votes_count_by_hand():
    assert common.vote(["7", "8", "8", None, None, None], [1] * 6) == "8"
    assert common.vote(["7", "8"], [1, 1]) == "7"
    assert common.vote([None, None], [1, 1]) is None
    assert common.vote(["7", "8", "8"], [0.9, 0.3, 0.3]) == "7"
    assert common.vote(["7", "8", "8"], [0.5, 0.3, 0.3]) == "8"


def test_distinct_keeps_the_first_of_identical_responses_to_one_prompt():
    made = (("a", [1]), ("a", [2]), ("a", [1]), ("b", [1]), ("b", [1, 2]))
    rows = [{"id": p, "token_ids": t, "sample": k} for k, (p, t) in enumerate(made)]
    assert [row["sample"] for row in common.distinct(rows)] == [0, 1, 3, 4]


# ---- batches and the rate


def test_batches_cover_every_item_once_per_epoch_and_keep_the_remainder():
    batches = common.epoch_batches(10, 4, 6, 0, "x")
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(sum(epoch, [])) == list(range(10))
    assert batches[:3] != batches[3:]
    assert batches == common.epoch_batches(10, 4, 6, 0, "x")
    assert batches != common.epoch_batches(10, 4, 6, 1, "x")


def test_warmup_rate_rises_once_and_stays():
    rates = [common.learning_rate(step, 4e-5, 4) for step in range(6)]
    assert rates == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5, 4e-5, 4e-5])
    assert common.learning_rate(0, 4e-5, 0) == 4e-5


def test_ranks_share_a_batch_and_take_as_many_passes_each():
    assert common.passes_of([3, 1, 4, 1, 5], 2, 0, 1) == [[3, 1], [4, 1], [5]]
    assert common.passes_of([3, 1, 4, 1, 5], 2, 0, 2) == [[3, 4], [5]]
    assert common.passes_of([3, 1, 4, 1, 5], 2, 1, 2) == [[1, 1], []]
    assert [common.passes_of([9], 4, rank, 3) for rank in range(3)] == [[[9]], [[]], [[]]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 32])
def test_every_row_of_a_batch_is_in_one_pass_of_one_rank(ranks, micro_batch):
    for size in range(1, 12):
        passes = [common.passes_of(list(range(size)), micro_batch, r, ranks) for r in range(ranks)]
        assert len({len(mine) for mine in passes}) == 1
        flat = [row for mine in passes for part in mine for row in part]
        assert sorted(flat) == list(range(size))
        assert max(len(part) for mine in passes for part in mine) <= micro_batch


# ---- step labels


def test_a_checker_is_a_function_of_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("def judge(response, example):\n    return response == 'x'\n")
    checker = common.load_checker(f"{tmp_path}/mine.py:judge")
    assert checker("x", {}) is True
    assert checker("y", {}) is False
    for spec in (f"{tmp_path}/none.py:judge", f"{tmp_path}/mine.py", "judge"):
        with pytest.raises(common.InputError, match="--chain_checker .* is not a file"):
            common.load_checker(spec)
    with pytest.raises(common.InputError, match="--chain_checker .*other"):
        common.load_checker(f"{tmp_path}/mine.py:other")


# ---- flags


def test_a_number_out_of_its_range_is_refused_by_name():
    evolve = stage("03_self_evolve")
    common.check_ranges(evolve.Args())
    common.check_ranges(evolve.Args(seed=0, warmup_steps=0, alpha=0.0, mixin=0.0, prm_refresh=0))
    for name, value in (
        ("samples", 0),
        ("steps", 10**20),
        ("steps", -1),
        ("seed", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("engine_memory", float("inf")),
        ("warmup_steps", -1),
    ):
        with pytest.raises(common.InputError, match=rf"--{name}: {value} is not above"):
            common.check_ranges(replace(evolve.Args(), **{name: value}))
    with pytest.raises(common.InputError, match="--search_grid: 0.0 is not above 0"):
        common.check_ranges(evolve.Args(search_grid=[0.5, 0.0]))


def test_flags_are_read_and_unknown_or_mistyped_ones_end_with_code_2(capsys):
    evolve = stage("03_self_evolve")
    line = "--samples 3 --temperature 0.7 --search_grid 0.5 1.0 --gradient_checkpointing --runs x"
    args, given = common.parse_flags(evolve.Args, line.split())
    names = {"samples", "temperature", "search_grid", "gradient_checkpointing", "runs"}
    assert given == names
    assert (args.samples, args.temperature, args.runs) == (3, "0.7", "x")
    assert args.search_grid == [0.5, 1.0]
    assert args.gradient_checkpointing is True
    assert common.parse_flags(evolve.Args, []) == (evolve.Args(), set())
    for wrong in (
        "--no_such_flag 3",
        "--sample 3",
        "--samples many",
        "--select best",
        "--samples 3.5",
    ):
        with pytest.raises(SystemExit) as end:
            common.parse_flags(evolve.Args, wrong.split())
        assert end.value.code == 2
        assert wrong.split()[0] in capsys.readouterr().err.splitlines()[-1]


# ---- files


def write(path, text):
    path.write_text(text)
    return path


def rows_of(chunk):
    """Two rows for an item."""
    return [{"item": item, "copy": k} for item in chunk for k in range(2)]


def chunked(size: int):
    """The flags that chunks depend on."""
    return common.CommonArgs(device="cpu", chunk=size)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("finished", range(4))
def test_a_restart_makes_only_the_chunks_that_are_missing(tmp_path, finished):
    path, asked = tmp_path / "a.jsonl", []

    def killed_after(chunk):
        if len(asked) == finished:
            raise Killed
        asked.append(list(chunk))
        return rows_of(chunk)

    def counted(chunk):
        asked.append(list(chunk))
        return rows_of(chunk)

    items = list(range(7))
    if finished < 4:
        with pytest.raises(Killed):
            common.write_chunks(path, items, killed_after, chunked(2), "t")
    assert not path.exists()
    common.write_chunks(path, items, counted, chunked(2), "t")
    assert asked == [[0, 1], [2, 3], [4, 5], [6]]
    assert common.read_jsonl(path) == rows_of(items)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "digests.json"]


def test_a_kill_while_the_chunks_are_joined_loses_no_chunk(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(common, "once", lambda *given: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            common.write_chunks(path, list(range(5)), rows_of, chunked(2), "t")
    common.write_chunks(path, list(range(5)), pytest.fail, chunked(2), "t")
    assert common.read_jsonl(path) == rows_of(range(5))


def test_chunks_of_another_size_are_not_mistaken_for_these(tmp_path):
    path, count = tmp_path / "a.jsonl", []

    def killed(chunk):
        count.append(chunk)
        if len(count) == 3:
            raise Killed
        return rows_of(chunk)

    with pytest.raises(Killed):
        common.write_chunks(path, list(range(7)), killed, chunked(2), "t")
    common.write_chunks(path, list(range(7)), rows_of, chunked(3), "t")
    assert common.read_jsonl(path) == rows_of(range(7))


def test_chunks_do_nothing_when_their_file_is_there(tmp_path):
    path = tmp_path / "a.jsonl"
    common.write_chunks(path, list(range(4)), rows_of, chunked(3), "t")
    before = path.stat().st_mtime_ns
    common.write_chunks(path, list(range(4)), pytest.fail, chunked(3), "t")
    assert path.stat().st_mtime_ns == before


def test_no_items_make_an_empty_file(tmp_path):
    common.write_chunks(tmp_path / "a.jsonl", [], pytest.fail, chunked(3), "t")
    assert (tmp_path / "a.jsonl").read_bytes() == b""


def test_lines_gives_rows_by_number_and_reads_no_more(tmp_path):
    rows = [{"id": "é" * k, "ids": [k, k + 1]} for k in range(5)]
    common.write_jsonl(tmp_path / "a.jsonl", rows)
    lines = common.Lines(tmp_path / "a.jsonl")
    assert len(lines) == 5
    assert [lines[4], lines[0], lines[2]] == [rows[4], rows[0], rows[2]]
    assert list(lines) == rows
    with pytest.raises(IndexError):
        lines[5]
    assert len(common.Lines(write(tmp_path / "b.jsonl", ""))) == 0


def test_by_prompt_groups_rows_that_stand_together():
    rows = [{"id": p, "n": n} for n, p in enumerate("aabccc")]
    groups = list(common.by_prompt(iter(rows)))
    assert [(p, [row["n"] for row in group]) for p, group in groups] == [
        ("a", [0, 1]),
        ("b", [2]),
        ("c", [3, 4, 5]),
    ]
    assert list(common.by_prompt([])) == []


def test_a_phase_of_one_rank_leaves_nothing_that_counts_until_it_is_whole(tmp_path):
    path = tmp_path / "out"

    def half(part):
        part.mkdir(exist_ok=True)
        (part / "one").write_text("1")
        raise Killed

    def whole(part):
        part.mkdir(exist_ok=True)
        (part / "one").write_text("1")
        (part / "two").write_text("2")

    with pytest.raises(Killed):
        common.once(path, half)
    assert not path.exists()
    common.once(path, whole)
    assert sorted(p.name for p in path.iterdir()) == ["one", "two"]
    common.once(path, pytest.fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digests.json", "out"]


def test_an_output_that_is_not_as_it_was_made_is_refused(tmp_path):
    path, folder = tmp_path / "a.jsonl", tmp_path / "model"
    rows = [{"n": 1}, {"n": 2}, {"n": 3}]

    def make(part):
        """A model folder."""
        part.mkdir()
        (part / "model.safetensors").write_bytes(b"weights")

    def start():
        """Both phases."""
        common.write_chunks(path, rows, list, chunked(2), "t")
        common.once(folder, make)

    start()
    start()
    whole = path.read_text()
    path.write_text("".join(reversed(whole.splitlines(keepends=True))))
    with pytest.raises(common.InputError, match="a.jsonl was changed since it was made"):
        start()
    path.write_text(whole)
    (folder / "model.safetensors").write_bytes(b"weight")
    with pytest.raises(common.InputError, match="model was changed since it was made"):
        start()
    shutil.rmtree(folder)
    with pytest.raises(common.InputError, match="model was made and is gone"):
        start()
    (tmp_path / "digests.json").write_text("{")
    with pytest.raises(common.InputError, match="digests.json is not a whole JSON object"):
        start()


@pytest.mark.parametrize("before", [None, [{"old": 1}]])
def test_a_killed_write_leaves_the_old_file(tmp_path, before):
    path = tmp_path / "a.jsonl"
    if before:
        common.write_jsonl(path, before)

    def rows():
        yield {"new": 1}
        raise Killed

    with pytest.raises(Killed):
        common.write_jsonl(path, rows())
    assert path.exists() == bool(before)
    assert not before or common.read_jsonl(path) == before


def test_a_digest_is_that_of_weights_and_configuration(tmp_path):
    digests = set()
    for config, weights in (("1", "2"), ("1", "3"), ("2", "2")):
        folder = tmp_path / f"{config}{weights}"
        folder.mkdir()
        (folder / "config.json").write_text(config)
        (folder / "model.safetensors").write_text(weights)
        digests.add(common.digest(folder))
        (folder / "README.md").write_text("x")
        digests.add(common.digest(folder))
    digests.add(common.digest(write(tmp_path / "file", "1")))
    assert len(digests) == 4
    assert all(len(text) == 16 for text in digests)


# ---- examples

GOOD = {
    "id": "a",
    "image": "images/a.png",
    "question": "q",
    "answer": "7",
    "choices": None,
    "source": "s",
}
WITHOUT_QUESTION = {name: value for name, value in GOOD.items() if name != "question"}


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": "a", ', "line 2: not JSON"),
        ("[1, 2]", "line 2: expected a JSON object, found list"),
        (GOOD | {"id": None}, 'line 2: field "id" must be a text that is not empty, found None'),
        (WITHOUT_QUESTION, 'line 2: field "question"'),
        (GOOD | {"answer": 7}, 'line 2: field "answer" must be a text that is not empty, found 7'),
        (GOOD | {"answer": "  "}, 'line 2: field "answer"'),
        (GOOD | {"choices": "A"}, 'line 2: field "choices"'),
        (GOOD | {"choices": ["7"]}, 'line 2: field "choices"'),
        (GOOD | {"choices": ["1", "2"]}, "line 2: the answer '7' is none of the choices"),
        (GOOD | {"answer_type": "number"}, 'line 2: "answer_type" must be one of integer'),
        (GOOD | {"precision": -1}, 'line 2: "precision" must be a count'),
        (GOOD | {"answer": "x", "answer_type": "integer"}, "line 2: the answer 'x' "),
        (GOOD, "line 2: id 'a' stands already in"),
        (GOOD | {"id": "b", "image": "images/none.png"}, "none.png' does not exist"),
        (GOOD | {"id": "b", "image": "images"}, "images' does not exist, or is no file"),
        (GOOD | {"choices": ["7", " "]}, 'line 2: field "choices"'),
        (GOOD | {"question": "\ud800"}, 'line 2: field "question"'),
        ("[" * 99999, "line 2: not JSON"),
        (GOOD | {"id": "b", "image": "../outside.png"}, "leaves the data folder"),
        (GOOD | {"id": "b", "image": "/etc/hostname"}, "leaves the data folder"),
    ],
)
def test_a_bad_record_is_refused_with_file_and_line(tmp_path, world, line, message):
    (tmp_path / "images").mkdir()
    image = next((world / "images").iterdir()).read_bytes()
    (tmp_path / "images/a.png").write_bytes(image)
    second = line if isinstance(line, str) else json.dumps(line)
    path = write(tmp_path / "d.jsonl", json.dumps(GOOD) + "\n" + second + "\n")
    with pytest.raises(common.InputError) as error:
        common.load_examples(path)
    assert message in str(error.value)
    assert "d.jsonl line 2" in str(error.value)


def test_an_empty_and_a_missing_data_file_are_refused(tmp_path):
    with pytest.raises(common.InputError, match="is empty"):
        common.load_examples(write(tmp_path / "d.jsonl", ""))
    with pytest.raises(common.InputError, match="does not exist"):
        common.load_examples(tmp_path / "none.jsonl")


def test_hidden_examples_carry_nothing_of_the_answer(world):
    hidden = common.load_examples(world / "unlabeled.jsonl", hidden=True)
    shown = common.load_examples(world / "unlabeled.jsonl")
    assert [example["id"] for example in hidden] == [example["id"] for example in shown]
    assert all(example["answer"] is None for example in hidden)
    assert not [name for name in ("grid", "plan") if name in hidden[0]]
    assert {"grid", "plan"} <= shown[0].keys()


# ---- the run folder


def settings(folder, **changed):
    """Flags of a run on the CPU."""
    return common.CommonArgs(runs=str(folder), device="cpu", **changed)


def opened(args, stage_name="01_warmup", **inputs):
    """A run folder, opened and let go of."""
    try:
        return common.open_run(args, stage_name, inputs)
    finally:
        common.close_runs()


def test_a_run_with_other_settings_is_refused_by_naming_them(tmp_path):
    data = write(tmp_path / "d", "1")
    out = opened(settings(tmp_path / "r"), data=data)
    assert out == tmp_path / "r/01_warmup"
    (out / "samples.jsonl").write_text("{}\n")
    (out / "model").mkdir()
    opened(settings(tmp_path / "r"), data=data)
    with pytest.raises(common.InputError, match="flag seed was 0, now 5"):
        opened(settings(tmp_path / "r", seed=5), data=data)
    data.write_text("2")
    with pytest.raises(common.InputError, match="input data was"):
        opened(settings(tmp_path / "r"), data=data)
    assert (out / "samples.jsonl").exists()


def test_a_start_that_was_refused_before_its_first_phase_binds_nothing(tmp_path):
    data = write(tmp_path / "d", "1")
    out = opened(settings(tmp_path, seed=1), data=data)
    common.write_chunks(out / "prompts/lengths.jsonl", [], list, chunked(2), "t")
    data.write_text("2")
    opened(settings(tmp_path, seed=2), data=data)
    assert sorted(p.name for p in out.iterdir()) == [".lock", "digests.json", "run.json"]
    assert json.loads((out / "run.json").read_text())["flags"]["seed"] == 2


def test_run_json_names_flags_and_inputs_as_they_were_settled(tmp_path):
    out = opened(settings(tmp_path, max_new_tokens=7), data=write(tmp_path / "d", "1"))
    run = json.loads((out / "run.json").read_text())
    assert run["flags"]["max_new_tokens"] == 7
    assert run["flags"]["dtype"] == "float32"
    assert run["flags"]["engine"] in ("vllm", "transformers")
    assert run["inputs"] == {"data": common.digest(tmp_path / "d")}


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "01_warmup").mkdir()
    (tmp_path / "01_warmup/thesis.txt").write_text("x")
    with pytest.raises(common.InputError, match="holds files but no run.json"):
        opened(settings(tmp_path))
    (tmp_path / "01_warmup/run.json").write_text("")
    with pytest.raises(common.InputError, match="run.json is not a whole JSON object"):
        opened(settings(tmp_path))


def test_a_stage_takes_what_it_is_not_given_from_the_stage_before_and_says_so(tmp_path, capsys):
    warmup, prm = stage("01_warmup"), stage("02_train_prm")
    data = write(tmp_path / "mine.jsonl", "1")
    given = {"data": str(data), "instruction": "Why?", "system": "s", "runs": str(tmp_path / "r")}
    out = opened(warmup.Args(device="cpu", **given), data=data)
    assert out.parent == tmp_path / "r"
    later = prm.Args(runs=given["runs"], instruction="How?")
    common.inherit(later, {"runs", "instruction"}, "02_train_prm")
    assert (later.data, later.instruction, later.system) == (str(data), "How?", "s")
    assert later.val == prm.Args().val
    said = capsys.readouterr().out
    assert f"--data '{data}' is taken from {out / 'run.json'}" in said
    assert "--instruction is 'How?', another than 'Why?' in" in said
    elsewhere = stage("03_self_evolve").Args(policy=str(out / "model"), runs=str(tmp_path / "q"))
    common.inherit(elsewhere, {"policy", "runs"}, "03_self_evolve")
    assert elsewhere.instruction == "Why?"
    first = warmup.Args(runs=given["runs"])
    common.inherit(first, {"runs"}, "01_warmup")
    assert first == warmup.Args(runs=given["runs"])


def test_the_base_of_a_run_in_another_folder_is_that_of_the_policy_it_began_with(tmp_path):
    given = {"device": "cpu", "runs": str(tmp_path / "r"), "model": str(tmp_path / "mine")}
    made = opened(stage("01_warmup").Args(**given))
    evolving = stage("03_self_evolve").Args(device="cpu", policy=f"{made}/model")
    evolving.runs = str(tmp_path / "q")
    common.open_run(evolving, "03_self_evolve", {})
    later = stage("04_eval").Args(runs=evolving.runs)
    common.inherit(later, {"runs"}, "04_eval")
    assert later.model == given["model"]


def test_a_second_process_on_one_run_folder_is_refused(tmp_path):
    common.open_run(settings(tmp_path), "01_warmup", {})
    # A second open file counts as another holder.
    with pytest.raises(common.InputError, match="another process is writing"):
        common.open_run(settings(tmp_path), "01_warmup", {})
    common.close_runs()
    opened(settings(tmp_path))


def test_flags_of_memory_and_speed_may_change_between_restarts_and_no_others(tmp_path):
    out = opened(settings(tmp_path))
    (out / "samples.jsonl").write_text("")
    quicker = {"rows": 64, "micro_batch": 2, "chunk": 8, "save_every": 9}
    opened(settings(tmp_path, gradient_checkpointing=True, engine_memory=0.2, **quicker))
    for name, value in (("max_new_tokens", 81), ("dtype", "bfloat16"), ("freeze_vision", True)):
        with pytest.raises(common.InputError, match=f"flag {name} was .*, now {value!r}"):
            opened(settings(tmp_path, **{name: value}))
    with pytest.raises(common.InputError, match="--micro_batch: 0 is not above 0"):
        opened(settings(tmp_path, micro_batch=0))


def test_a_missing_earlier_stage_is_named(tmp_path):
    missing = r"02_train_prm needs .*01_warmup/model.*run 01_warmup.py first"
    with pytest.raises(common.InputError, match=missing):
        opened(settings(tmp_path), "02_train_prm", policy=tmp_path / "01_warmup" / "model")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(common.InputError, match="cannot write to .*choose another --runs"):
        opened(settings(write(tmp_path / "file", "x")))


@dataclass
class Flags(common.CommonArgs):
    """Flags of a stage that only fails."""


@pytest.mark.parametrize(
    "error, sentence",
    [
        (common.InputError("mend it"), "error: mend it"),
        (
            OSError(28, "No space left on device"),
            "error: could not write or read a file .*No space",
        ),
        (KeyboardInterrupt(), "interrupted: what was written is whole"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(monkeypatch, error, sentence):
    def main(args):
        raise error

    monkeypatch.setattr("sys.argv", ["stage.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match=sentence):
        common.run_stage(Flags, main)


# ---- the toy world


def test_handwriting_pools_share_no_image():
    seen = [{image.tobytes() for image in images} for images, _ in toy.handwriting().values()]
    assert sum(map(len, seen)) == len(set.union(*seen))


def spoil(line: str) -> str:
    """A step whose last number, or letter, is another."""
    head, _, last = line.rpartition(" ")
    if last in "ABCD":
        return f"{head} {'ABCD'['ABCD'.index(last) - 1]}"
    return f"{head} {int(last) + 1}"


@pytest.mark.parametrize("seed", range(40))
def test_every_written_chain_is_right_and_every_spoiled_number_is_noticed(seed):
    rng = np.random.default_rng(seed)
    _, grid = toy.draw_grid(toy.handwriting()["val"], rng)
    question = toy.draw_question(toy.IN_DOMAIN + toy.OUT_OF_DOMAIN, grid, rng)
    chain = toy.write_chain(question, grid, rng)
    assert toy.check_chain(chain, question, grid)[1]
    assert common.is_correct(common.extract_answer(chain), question)
    lines = chain.split("\n")
    for i in range(len(lines) - 1):
        spoiled = "\n".join([*lines[:i], spoil(lines[i]), *lines[i + 1 :]])
        assert not toy.check_chain(spoiled, question, grid)[1], spoiled


def test_a_bare_answer_is_no_right_chain_and_ood_questions_are_other_questions():
    rng = np.random.default_rng(0)
    _, grid = toy.draw_grid(toy.handwriting()["val"], rng)
    question = toy.draw_question(toy.IN_DOMAIN, grid, rng)
    assert not toy.check_chain(f"Answer : {question['answer']}", question, grid)[1]
    assert not set(toy.IN_DOMAIN) & set(toy.OUT_OF_DOMAIN)


@pytest.mark.parametrize(
    "chain, scores",
    [
        ("sum of row 1 : 1 2 3 = 6\nmaximum of row 2 : 4 5 0 = 5\n6 - 5 = 1\nAnswer : 1", "1111"),
        ("sum of row 1 : 1 2 3 = 6\nmaximum of row 2 : 4 5 1 = 5\n6 - 5 = 1\nAnswer : 1", "1010"),
        ("sum of row 1 : 1 2 3 = 6\n6 - 5 = 1\nAnswer : 1", "100"),  # nobody read the 5
        ("Answer : 1", "0"),
        ("", ""),
    ],
)
def test_the_perfect_process_reward_of_a_chain_is_that_of_a_judge(chain, scores):
    plan = {"ops": ("sum", "minus", "maximum"), "lines": ("row 1", "row 2")}
    example = {
        "plan": plan,
        "answer": "1",
        "choices": None,
        "grid": [[1, 2, 3], [4, 5, 0], [2, 2, 2]],
    }
    assert toy.step_scores(chain, example) == [float(score) for score in scores]
    assert toy.judge(chain, example) is (scores == "1111")


def test_pretraining_asks_in_the_words_of_the_stages():
    example = {"question": "q ?", "choices": ["1", "2"]}
    asked = common.user_text(example, common.CommonArgs().instruction)
    assert toy.user_text("q ?", ["1", "2"]) == asked


def test_the_world_is_the_same_every_time(world, tmp_path):
    toy.write_world(tmp_path / "again", scale=1 / 75)
    for path in sorted(world.rglob("*")):
        if path.is_file():
            again = tmp_path / "again" / path.relative_to(world)
            assert path.read_bytes() == again.read_bytes(), path
