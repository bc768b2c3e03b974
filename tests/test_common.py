"""Selection, metrics, temperature search, files and bad input: against hand-counted cases and brute force."""

import doctest
import itertools
import json
import os

import pytest
import torch

import common
import toy
from conftest import stage


@pytest.mark.parametrize("name", ["common", "toy", "study", "01_warmup", "02_train_prm", "03_self_evolve", "04_eval"])
def test_every_worked_example_in_a_docstring_is_true(name):
    module = {"common": common, "toy": toy}.get(name) or stage(name)
    failed, tried = doctest.testmod(module)
    assert tried > 0 and failed == 0


# ---- selection and metrics

def test_top_k_takes_the_largest_and_the_earlier_of_equals():
    assert common.top_k([0.1, 0.7, 0.7, 0.9, 0.7], 3) == [3, 1, 2]
    assert common.top_k([0.5], 2) == [0] and common.top_k([], 2) == []


@pytest.mark.parametrize("n, c, k", [(n, c, k) for n in (1, 3, 6) for c in range(n + 1) for k in range(1, n + 1)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert common.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_refuses_more_than_was_sampled():
    with pytest.raises(ValueError, match="Pass@5 needs at least 5 samples"):
        common.pass_at_k(4, 2, 5)


def test_reward_pass_ranks_all_samples_not_only_right_ones():
    rewards, correct = [0.9, 0.8, 0.7, 0.1], [False, False, True, True]
    assert [common.reward_pass_at_k(rewards, correct, k) for k in (1, 2, 3, 4)] == [False, False, True, True]


def test_min_step_is_the_weakest_step_and_no_step_is_below_every_score():
    assert common.response_reward([0.9, 0.0, 1.0]) == 0.0 and common.response_reward([]) < 0.0


@pytest.mark.parametrize("how, reward", [("min", 0.25), ("mean", 0.5), ("last", 0.75), ("product", 0.09375)])
def test_every_aggregate_by_hand(how, reward):
    assert common.response_reward([0.5, 0.25, 0.75], how) == reward and common.response_reward([], how) < 0.0


def test_selection_keeps_only_right_distinct_responses_by_min_step():
    rows = [{"id": p, "token_ids": ids, "correct": ok, "reward": r} for p, ids, ok, r in (
        ("a", [1], True, 0.2), ("a", [2], False, 0.99), ("a", [1], True, 0.2), ("a", [3], True, 0.8), ("a", [4], True, 0.8), ("b", [5], False, 0.9))]
    assert [(r["id"], r["token_ids"], r["rank"]) for r in stage("03_self_evolve").select(rows, stage("03_self_evolve").Args())] == [("a", [3], 1), ("a", [4], 2)]


def test_temperature_search_finds_a_planted_optimum_and_logs_its_whole_curve():
    grid = [round(0.3 + 0.1 * i, 1) for i in range(14)]
    best, curve = common.search_temperature(grid, lambda t: -abs(t - 0.8), current=1.0)
    assert best == 0.8 and [row["temperature"] for row in curve] == grid and curve[0]["objective"] == pytest.approx(-0.5)


def test_temperature_search_breaks_ties_by_nearness_then_downwards():
    assert common.search_temperature([0.3, 0.6, 1.4], lambda t: 1.0, current=0.5)[0] == 0.6
    assert common.search_temperature([0.75, 1.0, 1.25], lambda t: float(t != 1.0), current=1.0)[0] == 0.75


def test_votes_count_by_hand():
    vote = stage("04_eval").vote
    assert vote(["7", "8", "8", None, None, None], [1] * 6) == "8"
    assert vote(["7", "8"], [1, 1]) == "7" and vote([None, None], [1, 1]) is None
    assert vote(["7", "8", "8"], [0.9, 0.3, 0.3]) == "7"


def test_prompt_figures_match_a_hand_count():
    samples = [{"answer": a, "correct": a == "7", "reward": r} for a, r in (("8", 0.5), ("7", 0.9), ("8", 0.1), (None, -1.0))]
    got = stage("04_eval").prompt_figures({"correct": True}, samples)
    assert got == {"greedy": True, "sample": 0.25, "pass_at_k": 1.0, "reward_pass_at_2": True, "majority": False, "best_of_n": True,
                   "weighted": True, "unparsable": 0.25}


def test_batches_cover_every_item_once_per_epoch_and_keep_the_remainder():
    batches = common.epoch_batches(10, 4, 6, 0, "x")
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2]
    assert sorted(sum(batches[:3], [])) == sorted(sum(batches[3:], [])) == list(range(10)) and batches[:3] != batches[3:]
    assert batches == common.epoch_batches(10, 4, 6, 0, "x") != common.epoch_batches(10, 4, 6, 1, "x")


def test_iterations_consume_the_interval_and_every_pass_is_complete():
    evolve = stage("03_self_evolve")
    examples = [{"id": i} for i in range(8)]
    shares = [evolve.choose_prompts(examples, [], t, 8, evolve.Args(interval=0.25)) for t in range(1, 9)]
    assert [len(s) for s in shares] == [2] * 8
    for four in (shares[:4], shares[4:]):
        assert sorted(e["id"] for s in four for e in s) == list(range(8))


def test_warmup_rate_rises_once_and_stays():
    assert [common.learning_rate(s, 4e-5, 4) for s in range(6)] == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5, 4e-5, 4e-5])


# ---- step labels

class Words:
    """Token i is the i-th word."""
    words = ["3 + 4 = 7", "\n", "Answer : 7", " ", "a\nb"]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


@pytest.mark.parametrize("ids, ends", [([], []), ([1, 1], []), ([0], [1]), ([0, 1], [2]), ([0, 1, 2], [2, 3]), ([1, 0, 1, 1, 2, 3], [4, 6]),
                                       ([0, 1, 3, 1, 2, 1], [4, 6]), ([4, 1], [1, 2])])
def test_steps_end_with_the_token_that_holds_the_line_break(ids, ends):
    assert common.step_ends(ids, Words()) == ends


def test_step_labels_count_completions_and_the_last_step_is_the_answer_check():
    prm = stage("02_train_prm")
    rows = [{"id": "a", "sample": k, "token_ids": ids, "correct": ok, "finished": True} for k, (ids, ok) in enumerate((([0, 1, 0, 1, 2], True), ([0, 1, 2], False)))]
    rows += [{"id": "b", "sample": 0, "token_ids": [0, 1, 2], "correct": True, "finished": True}]  # all right: no signal
    responses = prm.mixed_responses(rows)
    prefixes = prm.step_prefixes(responses, Words())
    assert prefixes == [{"id": "a", "prefix": [0, 1]}, {"id": "a", "prefix": [0, 1, 0, 1]}]  # the shared prefix once
    rollouts = [{"correct": ok} for ok in (True, False, False, False, False, False, False, False)]
    steps = prm.label_steps(responses, prefixes, rollouts, 4, Words())
    assert [(s["sample"], s["step"], s["end"], s["soft"], s["hard"]) for s in steps] == [
        (0, 0, 2, 0.25, 1.0), (0, 1, 4, 0.0, 0.0), (0, 2, 5, 1.0, 1.0), (1, 0, 2, 0.25, 1.0), (1, 1, 3, 0.0, 0.0)]


def test_chain_report_counts_pairs_of_one_prompt_and_one_answer():
    rows = [{"id": p, "token_ids": [k], "response": c, "correct": ok, "reward": r} for k, (p, c, ok, r) in enumerate((
        ("a", "right", True, 0.9), ("a", "wrong", True, 0.5), ("a", "wrong", True, 0.9), ("a", "wrong", False, 1.0), ("b", "wrong", True, 0.0)))]
    got = stage("02_train_prm").chain_report(rows, {"a": {}, "b": {}}, lambda response, example: response == "right")
    assert got == {"right_answers_judged": 4, "of_them_right_chains": 1, "pairs": 2, "right_chain_above_wrong_chain": 0.75}


# ---- files

def write(path, text):
    path.write_text(text)
    return path


def rows_of(chunk):
    return [{"item": item, "copy": k} for item in chunk for k in range(2)]


@pytest.mark.parametrize("cut", range(0, 190, 7))
def test_append_chunks_repairs_a_file_that_was_cut_anywhere(tmp_path, cut):
    whole = common.append_chunks(tmp_path / "a.jsonl", list(range(5)), 2, 2, rows_of, "test")
    full = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(full[:cut])
    assert common.append_chunks(tmp_path / "a.jsonl", list(range(5)), 2, 2, rows_of, "test") == whole
    assert (tmp_path / "a.jsonl").read_bytes() == full


def test_append_chunks_does_not_repeat_what_is_there(tmp_path):
    common.append_chunks(tmp_path / "a.jsonl", list(range(4)), 2, 2, rows_of, "test")
    common.append_chunks(tmp_path / "a.jsonl", list(range(4)), 2, 2, lambda chunk: pytest.fail("produced again"), "test")


GOOD = {"id": "a", "image": "images/a.png", "question": "q", "answer": "7", "choices": None, "source": "s"}


@pytest.mark.parametrize("line, message", [
    ('{"id": "a", ', "line 2: not JSON"), ("[1, 2]", "line 2: expected a JSON object, found list"),
    (json.dumps({**GOOD, "id": None}), 'line 2: field "id" must be a text that is not empty, found None'),
    (json.dumps({k: v for k, v in GOOD.items() if k != "question"}), 'line 2: field "question"'),
    (json.dumps({**GOOD, "answer": 7}), 'line 2: field "answer" must be a text that is not empty, found 7'),
    (json.dumps({**GOOD, "answer": "  "}), 'line 2: field "answer"'), (json.dumps({**GOOD, "choices": "A"}), 'line 2: field "choices"'),
    (json.dumps({**GOOD, "id": "b", "choices": ["1", "2"]}), "line 2: the answer '7' is none of the choices"),
    (json.dumps({**GOOD}), "line 2: id 'a' stands already in line 1"),
    (json.dumps({**GOOD, "id": "b", "image": "images/none.png"}), "none.png does not exist"),
    (json.dumps({**GOOD, "id": "b", "image": "images/broken.png"}), "broken.png cannot be read"),
    (json.dumps({**GOOD, "id": "b", "image": "../outside.png"}), "leaves the data folder"),
    (json.dumps({**GOOD, "id": "b", "image": "/etc/hostname"}), "leaves the data folder")])
def test_a_bad_record_is_refused_with_file_and_line(tmp_path, world, line, message):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(next((world / "images").iterdir()).read_bytes())
    (tmp_path / "images/broken.png").write_bytes((tmp_path / "images/a.png").read_bytes()[:60])
    with pytest.raises(common.InputError) as error:
        common.load_examples(write(tmp_path / "d.jsonl", json.dumps(GOOD) + "\n" + line + "\n"))
    assert message in str(error.value) and "d.jsonl" in str(error.value)


def test_an_empty_and_a_missing_data_file_are_refused(tmp_path):
    with pytest.raises(common.InputError, match="is empty"):
        common.load_examples(write(tmp_path / "d.jsonl", ""))
    with pytest.raises(common.InputError, match="does not exist"):
        common.load_examples(tmp_path / "none.jsonl")


def test_a_run_folder_with_other_settings_is_refused_by_naming_them_and_overwrite_starts_anew(tmp_path):
    args, data = common.CommonArgs(runs=str(tmp_path / "r"), device="cpu"), write(tmp_path / "d", "1")
    out = common.open_run(args, "01_warmup", {"data": data})
    common.LOCKS.pop().close()
    (out / "samples.jsonl").write_text("{}\n")
    common.open_run(args, "01_warmup", {"data": data})
    common.LOCKS.pop().close()
    args.seed = 5
    with pytest.raises(common.InputError, match="flag seed was 0, now 5"):
        common.open_run(args, "01_warmup", {"data": data})
    common.LOCKS.pop().close()
    args.seed, _ = 0, data.write_text("2")
    with pytest.raises(common.InputError, match="input data was"):
        common.open_run(args, "01_warmup", {"data": data})
    common.LOCKS.pop().close()
    args.overwrite = True
    assert common.open_run(args, "01_warmup", {"data": data}) == out and not (out / "samples.jsonl").exists()
    common.LOCKS.pop().close()


def test_overwrite_does_not_delete_a_folder_that_is_no_run(tmp_path):
    args = common.CommonArgs(runs=str(tmp_path), device="cpu", overwrite=True)
    (tmp_path / "01_warmup").mkdir()
    (tmp_path / "01_warmup/thesis.txt").write_text("x")
    with pytest.raises(common.InputError, match="will not delete"):
        common.open_run(args, "01_warmup", {})
    assert (tmp_path / "01_warmup/thesis.txt").exists()
    common.LOCKS.pop().close()


def test_a_second_process_on_one_run_folder_is_refused(tmp_path):
    args = common.CommonArgs(runs=str(tmp_path), device="cpu")
    common.open_run(args, "01_warmup", {})
    with pytest.raises(common.InputError, match="another process is writing"):  # a second open file counts as another holder
        common.open_run(args, "01_warmup", {})
    common.LOCKS.pop().close()


def test_flags_of_memory_and_speed_may_change_between_restarts_and_no_others(tmp_path):
    made = common.CommonArgs(runs=str(tmp_path), device="cpu")
    common.open_run(made, "01_warmup", {})
    common.LOCKS.pop().close()
    common.open_run(common.replace(made, rows=64, micro_batch=2, chunk=8, save_every=9, gradient_checkpointing=True, max_prompt_tokens=99), "01_warmup", {})
    common.LOCKS.pop().close()
    with pytest.raises(common.InputError, match="flag max_new_tokens was 80, now 81"):
        common.open_run(common.replace(made, max_new_tokens=81), "01_warmup", {})
    common.LOCKS.pop().close()
    with pytest.raises(common.InputError, match="--micro_batch must be above 0, found 0"):
        common.open_run(common.replace(made, micro_batch=0), "01_warmup", {})


def test_a_missing_earlier_stage_is_named(tmp_path):
    with pytest.raises(common.InputError, match=r"02_train_prm needs .*01_warmup/model.*run 01_warmup.py first"):
        common.open_run(common.CommonArgs(runs=str(tmp_path)), "02_train_prm", {"policy": tmp_path / "01_warmup" / "model"})


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(common.InputError, match="cannot write to .*choose another --runs"):
        common.open_run(common.CommonArgs(runs=str(write(tmp_path / "file", "x"))), "01_warmup", {})


# ---- the toy world

def test_handwriting_pools_share_no_image():
    seen = [{image.tobytes() for image in images} for images, _ in toy.handwriting().values()]
    assert sum(map(len, seen)) == len(set.union(*seen))


@pytest.mark.parametrize("seed", range(40))
def test_every_written_chain_is_right_and_every_spoiled_number_is_noticed(seed):
    import numpy as np
    rng = np.random.default_rng(seed)
    _, grid = toy.draw_grid(toy.handwriting()["val"], rng)
    question = toy.draw_question(toy.IN_DOMAIN + toy.OUT_OF_DOMAIN, grid, rng)
    chain = toy.write_chain(question, grid, rng)
    assert toy.check_chain(chain, question, grid)[1] and common.is_correct(common.extract_answer(chain), question)
    lines = chain.split("\n")
    for i in range(len(lines) - 1):  # change the last number of every step in turn
        head, _, last = lines[i].rpartition(" ")
        spoiled = head + " " + ("ABCD"["ABCD".index(last) - 1] if last in "ABCD" else str(int(last) + 1))
        assert not toy.check_chain("\n".join([*lines[:i], spoiled, *lines[i + 1:]]), question, grid)[1], spoiled


def test_a_bare_answer_is_no_right_chain_and_ood_questions_are_other_questions():
    import numpy as np
    _, grid = toy.draw_grid(toy.handwriting()["val"], np.random.default_rng(0))
    question = toy.draw_question(toy.IN_DOMAIN, grid, np.random.default_rng(0))
    assert not toy.check_chain(f"Answer : {question['answer']}", question, grid)[1]
    assert not set(toy.IN_DOMAIN) & set(toy.OUT_OF_DOMAIN)


def test_pretraining_asks_in_the_words_of_the_stages():
    example = {"question": "q ?", "choices": ["1", "2"]}
    assert toy.user_text("q ?", ["1", "2"]) == common.user_text(example, common.CommonArgs().instruction)


def test_the_world_is_the_same_every_time(world, tmp_path):
    toy.write_world(tmp_path / "again", scale=1 / 75)
    for path in sorted(world.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(world)).read_bytes(), path
