"""Stage 03 and the step labels of 02: methods, budgets, selections, votes, no leaks, restarts."""

import json
import os
import shutil
import sys
import types
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import READ_AS, ROOT, stage

import common

train_prm, evolve = stage("02_train_prm"), stage("03_self_evolve")
SHORT = {
    "device": "cpu",
    "passes": 1.0,
    "interval": 0.5,
    "steps": 4,
    "samples": 3,
    "select": "all",
    "temperature": "1.0",
    "batch_size": 4,
    "max_new_tokens": 60,
    "warmup_steps": 3,
}
SEARCHING = {
    "temperature": "adaptive",
    "search_every": 1,
    "search_prompts": 4,
    "search_grid": [0.5, 1.0],
}


def rows(path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A working directory in which the toy's base model stands for warm-up policy and PRM."""
    shutil.copytree(world, tmp_path / "data/toy")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for name in ("01_warmup", "02_train_prm"):
        shutil.copytree(world / "base", tmp_path / f"runs/toy/{name}/model")
    common.write_json(tmp_path / "runs/toy/02_train_prm/model/prm.json", READ_AS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    common.close_runs()


def small_prm_flags(place) -> None:
    """Let the first PRM say that it was made on a tiny budget: a refreshed one takes its flags."""
    budget = {"prompts": 32, "samples": 6, "rollouts": 2, "epochs": 1, "held_out": 0.5}
    budget |= {"max_new_tokens": 60, "val_samples": 3, "val": "data/toy/val.jsonl"}
    made_with = train_prm.Args(device="cpu", **budget)
    common.write_json(place / "runs/toy/02_train_prm/run.json", {"flags": asdict(made_with)})


def contents(folder) -> dict:
    """Every file of a run, JSON without seconds and without the run's own name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".json", ".jsonl"):
            text = path.read_text().replace(f"runs/{folder.parent.name}/", "runs/")
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            found[name] = [json.loads(line) for line in lines]
            for value in found[name]:
                value.pop("seconds", None)
            if path.name == "digests.json":  # some files hold the folder's name
                found[name] = [list(value) for value in found[name]]
        elif path.is_file() and path.name != ".lock":
            found[name] = path.read_bytes()
    return found


def prepare(name: str, place):
    """A run folder with the two first stages' models; its path."""
    ignored = shutil.ignore_patterns("03_*")
    return shutil.copytree(place / "runs/toy", place / f"runs/{name}", ignore=ignored)


def evolve_as(name: str, place, **flags):
    """One run of stage 03 in runs/<name>, in this process; its folder."""
    out = prepare(name, place)
    evolve.main(evolve.Args(runs=f"runs/{name}", **SHORT | flags))
    common.close_runs()
    return out / "03_self_evolve"


# ---- methods


class Phase(NamedTuple):
    """What a training phase of stage 03 was given, began with, and left."""

    folder: Path
    inherited: Path | None
    batches: list
    before: dict
    moments_before: dict
    rate_before: float
    after: dict
    moments_after: dict


def weights_of(model) -> dict:
    """A copy of a model's weights by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moments_of(model, optimizer) -> dict:
    """A copy of AdamW's moments and step counts by name."""
    found = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            found[name, key] = value.clone()
    return found


def same(some: dict, others: dict) -> bool:
    """Whether two named sets of tensors are equal to the bit."""
    equal = [torch.equal(some[name], others[name]) for name in some]
    return some.keys() == others.keys() and all(equal)


def test_where_each_method_starts_an_iteration():
    out, start = Path("runs/a/03_self_evolve"), Path("warm-up")
    before = out / "iter_02"
    begun = {
        "continuous": (before / "model", before / "training"),
        "iterative_rft": (before / "model", None),
        "rest_em": (start, None),
    }
    for method, folders in begun.items():
        args = evolve.Args(method=method)
        assert evolve.starts_from(1, start, out, args) == (start, None)
        assert evolve.starts_from(3, start, out, args) == folders


def test_training_methods_differ_in_start_weights_moments_and_schedule_and_nowhere_else(
    place, monkeypatch
):
    train, make_optimizer, seen, made = common.train, common.make_optimizer, {}, []

    def making(model):
        made.append((model, make_optimizer(model)))
        return made[-1][1]

    def watched(model_out, folder, work, batches, rows, loss_of, args, state=None, **rest):
        found = []

        def watching(policy, part):
            if not found:
                rate = made[-1][1].param_groups[0]["lr"]
                found.extend([weights_of(made[-1][0]), moments_of(*made[-1]), rate])
            return loss_of(policy, part)

        drawn = [[(rows[i]["id"], rows[i]["token_ids"]) for i in batch] for batch in batches]
        given = (model_out, folder, work, batches, rows, watching)
        progress = train(*given, args=args, state=state, **rest)
        after = [weights_of(made[-1][0]), moments_of(*made[-1])]
        seen.setdefault(args.method, []).append(Phase(folder, state, drawn, *found, *after))
        return progress

    monkeypatch.setattr(common, "make_optimizer", making)
    monkeypatch.setattr(common, "train", watched)
    for method in ("continuous", "iterative_rft", "rest_em"):
        evolve_as(method, place, method=method)
    first, second = seen["continuous"]
    peak = evolve.Args().learning_rate
    assert not any(value.any() for value in first.moments_before.values())
    assert first.rate_before == pytest.approx(peak / 3) and first.inherited is None
    for method in ("iterative_rft", "rest_em"):
        other, other_second = seen[method]
        # the first iteration, and what the second one trains on, are the same to the bit
        assert same(other.before, first.before) and same(other.after, first.after)
        assert same(other.moments_after, first.moments_after)
        assert other.batches == first.batches and other_second.batches == second.batches
        assert not any(value.any() for value in other_second.moments_before.values())
        assert other_second.rate_before == first.rate_before
    assert same(second.before, first.after) and same(second.moments_before, first.moments_after)
    assert second.rate_before == pytest.approx(peak)  # the third step of a warm-up of three
    assert same(seen["iterative_rft"][1].before, first.after)
    assert same(seen["rest_em"][1].before, first.before)
    assert not same(first.after, first.before)
    assert any(value.any() for value in first.moments_after.values())


def test_every_method_and_interval_draws_the_same_samples_and_steps(place):
    searching = {**SEARCHING, "search_prompts": 2}
    runs = {
        "a": {},
        "b": {"interval": 1.0},
        "c": {"interval": 0.25},
        "d": {"method": "rest_em", "interval": 1.0},
        "e": {"unlabeled": "vote", "select": "random"},
        "f": {"method": "iterative_rft"},
        "g": {"unlabeled": "oracle", **searching},
    }
    budgets, iterations = set(), []
    for name, flags in runs.items():
        out = evolve_as(name, place, **flags, samples=2, validate_every=0)
        metrics = rows(out / "metrics.jsonl")
        drawn = sum(len(rows(path)) for path in out.glob("iter_*/samples.jsonl"))
        searched = sum(len(rows(path)) for path in out.glob("iter_*/search.jsonl"))
        assert sum(row.get("samples", 0) for row in metrics) == drawn
        assert sum(row["extra_samples"] for row in metrics) == searched
        budgets.add((drawn, metrics[-1]["steps"]))
        iterations.append(len(metrics) - 1)
    assert budgets == {(32 * 2, 4)} and iterations == [2, 1, 4, 1, 2, 2, 2]


def test_sft_trains_once_on_all_gold_answers_and_samples_nothing(place):
    out = evolve_as("sft", place, method="sft", steps=3)
    metrics, selected = rows(out / "metrics.jsonl"), rows(out / "iter_01/selected.jsonl")
    assert len(metrics) == 2 and metrics[1]["samples"] == 0 and metrics[1]["steps"] == 3
    gold = {row["id"]: row["answer"] for row in rows(place / "data/toy/train.jsonl")}
    stated = {row["id"]: row["messages"][1]["content"] for row in selected}
    assert len(selected) == 32
    assert stated == {prompt: f"Answer : {answer}" for prompt, answer in gold.items()}


# ---- selection, votes, unlabelled prompts

SCORED = [
    {"id": p, "token_ids": [i], "correct": c, "reward": r, "iteration": 1, "sample": i}
    for p, i, c, r in (
        ("a", 1, True, 0.4),
        ("a", 2, True, 0.9),
        ("a", 3, False, 0.0),
        ("a", 4, True, 0.6),
        ("a", 5, True, 0.6),
        ("b", 6, False, 0.0),
        ("c", 7, True, 0.1),
    )
]


def chosen(scored: list[dict], **flags) -> list[dict]:
    """What H takes of every prompt."""
    args = evolve.Args(**flags)
    return [row for _, own in common.by_prompt(scored) for row in evolve.choose(own, args)]


@pytest.mark.parametrize(
    "flags, samples",
    [
        ({"select": "top_k", "k": 1}, [2, 7]),
        ({"select": "top_k", "k": 2}, [2, 4, 7]),
        ({"select": "top_k", "k": 4}, [2, 4, 5, 1, 7]),
        ({"select": "all"}, [1, 2, 4, 5, 7]),
        ({"select": "threshold", "alpha": 0.5}, [2, 4, 5]),
        ({"select": "threshold", "alpha": 0.6}, [2]),
    ],
)
def test_every_selection_rule_on_hand_made_scores(flags, samples):
    assert [row["sample"] for row in chosen(SCORED, **flags)] == samples


def test_selection_keeps_only_right_distinct_responses_by_min_step():
    drawn = [
        {"id": p, "token_ids": ids, "correct": ok, "reward": r}
        for p, ids, ok, r in (
            ("a", [1], True, 0.2),
            ("a", [2], False, 0.99),
            ("a", [1], True, 0.2),
            ("a", [3], True, 0.8),
            ("a", [4], True, 0.8),
            ("b", [5], False, 0.9),
        )
    ]
    kept = [(row["id"], row["token_ids"], row["rank"]) for row in chosen(drawn)]
    assert kept == [("a", [3], 1), ("a", [4], 2)]


def test_random_selection_takes_k_right_ones_and_every_right_one_equally_often():
    counts = np.zeros(6)
    for seed in range(400):
        kept = chosen(SCORED[:5], select="random", k=2, seed=seed)
        picked = [row["sample"] for row in kept]
        assert len(set(picked)) == 2
        counts[picked] += 1
    assert counts[3] == 0  # it is wrong
    # 200 expected, standard deviation 10
    assert all(160 < counts[sample] < 240 for sample in (1, 2, 4, 5))


def test_pseudo_labels_follow_the_prm_weighted_vote_or_the_majority():
    drawn = (("7", 0.2), ("8", 0.9), ("7", 0.3), (None, -1.0))
    samples = [{"id": "p", "answer": answer, "reward": reward} for answer, reward in drawn]
    judged = evolve.pseudo_label(samples, "prm")
    found = [(row["pseudo_label"], row["correct"], row["reward"]) for row in judged]
    assert found == [("8", False, 0.0), ("8", True, 0.9), ("8", False, 0.0), ("8", False, 0.0)]
    equal = [row["correct"] for row in evolve.pseudo_label(samples, "equal")]
    assert equal == [True, False, True, False]
    assert evolve.pseudo_label([{"id": "q", "answer": None, "reward": -1.0}], "prm") == []
    tie = [{"id": "p", "answer": answer, "reward": 0.5} for answer in ("9", "7")]
    # of equal votes the one sampled first
    assert [row["correct"] for row in evolve.pseudo_label(tie, "prm")] == [True, False]


def test_mix_in_halves_the_labelled_prompts_from_its_share_of_training_on():
    labelled = [{"id": f"l{i}"} for i in range(16)]
    hidden = [{"id": f"u{i}"} for i in range(16)]
    for mixin, first in ((0.0, 1), (0.5, 5), (0.75, 7)):
        args, counts = evolve.Args(unlabeled="vote", mixin=mixin, interval=0.25), []
        for t in range(1, 9):
            kinds = [e["id"][0] for e in evolve.choose_prompts(labelled, hidden, t, 8, args)]
            counts.append([kinds.count("l"), kinds.count("u")])
        assert counts == [[4, 0] if t < first else [2, 2] for t in range(1, 9)]


def test_hidden_answers_reach_no_mode_but_oracle(place):
    flags = {"unlabeled": "vote", "select": "top_k"}
    before = contents(evolve_as("vote1", place, **flags))
    path, spoiled = place / "data/toy/unlabeled.jsonl", []
    for row in rows(path):
        row = {name: row[name] for name in row if name not in ("grid", "plan")}
        spoiled.append(row | {"answer": "999"})
    common.write_jsonl(path, spoiled)
    after = contents(evolve_as("vote2", place, **flags))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"run.json"}  # it holds the file's digest
    metrics, answers = before["metrics.jsonl"][1], {}
    for row in before["iter_01/samples.jsonl"]:
        if row["id"].startswith("unlabeled-"):
            answers.setdefault(row["id"], []).append(row["answer"])
    assert len(answers) == metrics["prompts"] / 2 > 0
    assert metrics["no_vote"] == sum(not any(given) for given in answers.values())
    fields = {"id", "image", "question", "choices", "source", "answer", "where"}
    for row in common.load_examples(path, hidden=True):
        assert row.keys() == fields and row["answer"] is None
    voted = before["iter_01/selected.jsonl"]
    voted = [row for row in voted if row["id"].startswith("unlabeled")]
    assert voted and all(row["answer"] == row["pseudo_label"] for row in voted)
    oracle = evolve_as("oracle", place, **flags | {"unlabeled": "oracle"})
    revealed = [r for r in rows(oracle / "iter_01/samples.jsonl") if r["id"].startswith("unlab")]
    assert revealed and not any(row["correct"] for row in revealed)  # the answers are wrong here


# ---- the search, the PRM


def test_temperature_search_finds_a_planted_optimum():
    grid = [round(0.3 + 0.1 * i, 1) for i in range(14)]
    curve = [{"temperature": T, "pass_at_k": -abs(T - 0.8), "reward_pass_at_2": T} for T in grid]
    assert evolve.best_temperature(curve, "pass_at_k", current=1.0) == 0.8
    assert evolve.best_temperature(curve, "reward_pass_at_2", current=1.0) == 1.6


def test_temperature_search_breaks_ties_by_nearness_then_downwards():
    curve = [{"temperature": T, "pass_at_k": 1.0} for T in (0.3, 0.6, 1.4)]
    assert evolve.best_temperature(curve, "pass_at_k", current=0.5) == 0.6
    curve = [{"temperature": T, "pass_at_k": float(T != 1.0)} for T in (0.75, 1.0, 1.25)]
    assert evolve.best_temperature(curve, "pass_at_k", current=1.0) == 0.75


def test_a_refreshed_prm_serves_the_search_and_the_iterations_after_it(place, monkeypatch):
    small_prm_flags(place)
    adapt, generate, used = evolve.adapt, evolve.generate, []

    def adapting(policy, prm, *rest):
        used.append(("search", Path(prm)))
        return adapt(policy, prm, *rest)

    def generating(policy, prm, *rest):
        used.append(("generate", Path(prm)))
        return generate(policy, prm, *rest)

    monkeypatch.setattr(evolve, "adapt", adapting)
    monkeypatch.setattr(evolve, "generate", generating)
    out = evolve_as("fresh", place, prm_refresh=1, **SEARCHING)
    first = Path("runs/fresh/02_train_prm/model")
    fresh = Path("runs/fresh/03_self_evolve/iter_01/prm/model")
    assert used == [("generate", first), ("search", fresh), ("generate", fresh)]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, fresh)]
    assert weights[0] != weights[1] and (fresh / "prm.json").exists()
    made = out / "iter_01/prm"
    samples = rows(made / "samples.jsonl")
    assert len(samples) == 32 * 6  # the flags of the first PRM
    seed = common.seed_of(0, "refresh", 1)  # no draw of the first PRM is drawn again
    for row in samples:
        assert row["seed"] == common.seed_of(seed, "prm", 0, row["id"], row["sample"])
    names = ("samples.jsonl", "val_samples.jsonl", "rollouts.jsonl")
    drawn = sum(len(rows(made / name)) for name in names)
    steps = json.loads((made / "metrics.json").read_text())["steps"]
    metrics = rows(out / "metrics.jsonl")
    assert steps > 0 and [row["extra_steps"] for row in metrics] == [0, steps, 0]
    # and a search: 2 temperatures, 4 prompts, K = 3
    assert [row["extra_samples"] for row in metrics] == [0, drawn + 2 * 4 * 3, 0]


def test_the_search_maximises_what_the_objective_says_and_the_aggregate_rules_every_reward(place):
    flags = {**SEARCHING, "objective": "pass_at_k", "aggregate": "mean"}
    out = evolve_as("pass", place, **flags)
    (search,), drawn = rows(out / "temperature.jsonl"), rows(out / "iter_01/search.jsonl")
    for point in search["curve"]:
        right: dict = {}
        for row in drawn:
            if row["temperature"] == point["temperature"]:
                right.setdefault(row["id"], []).append(row["correct"])
        assert point["pass_at_k"] == sum(map(any, right.values())) / 4
    best = max(point["pass_at_k"] for point in search["curve"])
    highest = [p["temperature"] for p in search["curve"] if p["pass_at_k"] == best]
    assert search["objective"] == "pass_at_k" and search["chosen"] == max(highest)
    scored = []
    for name in ("samples", "val_samples", "search"):
        for row in rows(out / f"iter_01/{name}.jsonl"):
            if row["step_scores"] and row["reward"] > 0:
                scored.append(row)
    assert len(scored) > 8 and any(len(set(row["step_scores"])) > 1 for row in scored)
    for row in scored:
        mean = sum(row["step_scores"]) / len(row["step_scores"])
        assert row["reward"] == pytest.approx(mean, abs=2e-6)


# ---- restarts


@pytest.mark.parametrize(
    "flags",
    [
        {"method": "rest_em", "unlabeled": "vote", "save_every": 1},
        {"method": "iterative_rft", "unlabeled": "oracle", "save_every": 1, "validate_every": 0},
        {"prm_refresh": 1, "passes": 2.0, "interval": 1.0, **SEARCHING},
    ],
)
def test_every_variant_goes_on_after_an_interruption_at_any_write_as_if_there_had_been_none(
    place, monkeypatch, flags
):
    small_prm_flags(place)
    fsync, writes = os.fsync, []

    def counting(file):
        writes.append(file)
        fsync(file)

    monkeypatch.setattr(common.os, "fsync", counting)
    whole = contents(evolve_as("whole", place, **flags))
    total = len(writes)
    stops = iter(np.random.default_rng(0).permutation(range(2, total // 3))[:6].tolist())

    def failing(file):  # as kill -9 would: what this write was for is not finished
        writes.append(file)
        if len(writes) == stop:
            raise KeyboardInterrupt
        fsync(file)

    monkeypatch.setattr(common.os, "fsync", failing)
    broken = prepare("broken", place)
    interrupted, done = 0, False
    while not done:
        writes.clear()
        stop = next(stops, 0)
        try:
            evolve.main(evolve.Args(runs="runs/broken", **SHORT | flags))
            done = True
        except KeyboardInterrupt:
            interrupted += 1
        common.close_runs()
    assert total > 8 and interrupted >= 2
    after = contents(broken / "03_self_evolve")
    assert after.keys() == whole.keys()
    assert [name for name in whole if after[name] != whole[name]] == []


def test_a_phase_that_is_killed_twice_after_its_last_batch_goes_on(tiny, args, examples, tmp_path):
    """The second time while nothing but the model is still to be written."""
    args.save_every = 50

    def train():
        def loss_of(policy, part):
            return common.sft_loss(policy, part, [[5, 6, 7]] * len(part), args)

        def count_of(row):
            return 4

        shape = (tmp_path / "model", tiny, tmp_path / "work", [[0, 1], [2]], examples)
        return common.train(*shape, loss_of, count_of, args, "twice")

    def killed(*given, **named):
        raise KeyboardInterrupt

    for name in ("save_policy", "dcp.save"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"common.{name}", killed)
            patch.setattr(common, "save_policy", killed)
            with pytest.raises(KeyboardInterrupt):
                train()
    assert train()["batch"] == 2 and (tmp_path / "model/model.safetensors").exists()


# ---- flags, prompts, looks


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"temperature": "0"}, "above 0"),
        ({"temperature": "nan"}, "above 0"),
        ({"temperature": "-1"}, "above 0"),
        ({"temperature": "warm"}, "above 0"),
        ({"unlabeled": "vote", "mixin": 0.3}, "whole number"),
        ({"unlabeled": "vote", "mixin": 1.0}, "below 1"),
        ({"mixin": 0.5}, "--unlabeled"),
        ({"validate_every": -1}, "--validate_every"),
        ({"interval": 0.0}, "--interval"),
        ({"interval": 0.3}, "whole number"),
        ({"passes": 1.1}, "multiple"),
        ({"steps": 7}, "at least one iteration of one step"),
        ({"search_grid": [0.0, 1.0]}, "--search_grid"),
        ({"search_grid": [1.0, 1.0]}, "--search_grid"),
        ({"search_grid": []}, "--search_grid"),
        ({"method": "sft", "gold_response": "Answer"}, "--gold_response"),
        ({"method": "sft", "unlabeled": "vote"}, "sft"),
        ({"method": "sft", "prm_refresh": 1}, "PRM|sft"),
        ({"prm_refresh": 8}, "no PRM"),
        ({"vote_weights": "equal"}, "--unlabeled vote"),
        ({"interval": 1.0}, "no search in 2"),
        ({"search_every": 8}, "no search in 8"),
        ({"temperature": "1.0", "objective": "pass_at_k"}, "nothing is searched"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags, says):
    args = evolve.Args(**flags)
    with pytest.raises(common.InputError, match=says):
        common.check_ranges(args)
        evolve.check_flags(args)


def test_a_share_that_floats_cannot_hold_is_a_whole_number_of_iterations():
    flags = {"unlabeled": "vote", "mixin": 0.28, "interval": 0.04, "passes": 1.0}
    assert evolve.check_flags(evolve.Args(**flags)) == 25  # 0.28 x 25 = 7.000000000000001


def test_iterations_consume_the_interval_and_every_pass_is_complete():
    examples, args = [{"id": i} for i in range(8)], evolve.Args(interval=0.25)
    shares = [evolve.choose_prompts(examples, [], t, 8, args) for t in range(1, 9)]
    assert [len(share) for share in shares] == [2] * 8
    for four in (shares[:4], shares[4:]):
        assert sorted(e["id"] for share in four for e in share) == list(range(8))


def prompt_ids(labelled: int, hidden: int, iterations: int, args) -> list[list[int]]:
    """The prompts of every iteration; ids from 100 on are unlabelled."""
    examples = [{"id": i} for i in range(labelled)]
    others = [{"id": 100 + i} for i in range(hidden)]
    drawn = []
    for t in range(1, iterations + 1):
        prompts = evolve.choose_prompts(examples, others, t, iterations, args)
        drawn.append([prompt["id"] for prompt in prompts])
    return drawn


def test_a_pass_shows_every_prompt_once_and_no_iteration_shows_one_twice():
    seen = prompt_ids(7, 0, 6, evolve.Args(interval=1 / 3))
    assert [len(ids) for ids in seen] == [2, 2, 3, 2, 2, 3]
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(7))
    mixed = prompt_ids(7, 7, 6, evolve.Args(interval=1 / 3, unlabeled="vote", mixin=0.5))
    assert [len(ids) for ids in mixed] == [2, 2, 3, 2, 2, 3]
    assert [sum(i >= 100 for i in ids) for ids in mixed] == [0, 0, 0, 1, 1, 1]
    args = evolve.Args(interval=0.5, unlabeled="vote")
    mixed = prompt_ids(12, 7, 8, args)  # 3 of 7 unlabelled ones in each
    for ids in mixed:
        assert len(set(ids)) == len(ids) == 6 and sum(i >= 100 for i in ids) == 3
    assert len({i for i in sum(mixed, []) if i >= 100}) == 7
    with pytest.raises(common.InputError, match="holds 2 prompts, fewer than the 3"):
        prompt_ids(12, 2, 8, args)


def test_looking_less_often_changes_no_sample_and_no_weight(place):
    often, seldom = evolve_as("often", place), evolve_as("seldom", place, validate_every=0)
    for name in (
        "model/model.safetensors",
        "iter_01/samples.jsonl",
        "iter_02/selected.jsonl",
        "iter_02/val_samples.jsonl",
    ):
        assert (often / name).read_bytes() == (seldom / name).read_bytes(), name
    looks = [["pass_at_k" in r for r in rows(out / "metrics.jsonl")] for out in (often, seldom)]
    assert looks == [[True, True, True], [False, False, True]]


# ---- experiment trackers


class Tracker(types.ModuleType):
    """A package with the calls that wandb, trackio and swanlab share; it notes them."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def init(self, project, name, config):
        """A run begins."""
        self.calls.append((project, name, config["select"]))

    def log(self, row, step):
        """A row of a run."""
        self.calls.append((step, row))

    def finish(self):
        """A run ends."""
        self.calls.append("finish")


class Writer:
    """torch's SummaryWriter, as far as it is used; it notes what it is given."""

    scalars: dict = {}

    def __init__(self, folder):
        self.folder = str(folder)

    def add_scalar(self, name, value, step):
        """A figure."""
        self.scalars[self.folder, step, name] = value

    def close(self):
        """The end."""
        self.scalars["closed"] = self.folder


def test_every_row_of_metrics_goes_to_the_trackers_and_a_restart_sends_the_first_ones_anew(
    place, monkeypatch
):
    names = ("wandb", "swanlab")
    trackers = {name: Tracker(name) for name in names}
    for name, tracker in trackers.items():
        monkeypatch.setitem(sys.modules, name, tracker)
    board = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    improve, refused = evolve.improve, []

    def stopping(folder, start, t, *rest):
        if t == 2 and not refused:
            refused.append(t)
            raise KeyboardInterrupt
        return improve(folder, start, t, *rest)

    monkeypatch.setattr(evolve, "improve", stopping)
    out = prepare("logged", place)
    flags = {"runs": "runs/logged", "validate_every": 0, **SHORT}
    with pytest.raises(KeyboardInterrupt):
        evolve.main(evolve.Args(report_to="wandb,swanlab", **flags))
    common.close_runs()
    evolve.main(evolve.Args(report_to="wandb,tensorboard", **flags))  # another one may follow
    metrics = rows(out / "03_self_evolve/metrics.jsonl")
    sent, begun = [(row["iteration"], row) for row in metrics], ("m-star", "logged", "all")
    assert trackers["swanlab"].calls == [begun, *sent[:2]]
    assert trackers["wandb"].calls == [begun, *sent[:2], begun, *sent, "finish"]
    board = "runs/logged/03_self_evolve/tensorboard"
    scalars = {(board, step, name): value for step, row in sent for name, value in row.items()}
    assert Writer.scalars == scalars | {"closed": board}


@pytest.mark.parametrize(
    "names, says",
    [("wandb,mlflow", "mlflow: not wandb, trackio"), ("swanlab", "pip install swanlab")],
)
def test_a_tracker_that_is_unknown_or_missing_is_refused_before_any_sample(
    place, monkeypatch, names, says
):
    monkeypatch.setitem(sys.modules, "wandb", Tracker("wandb"))
    monkeypatch.setitem(sys.modules, "swanlab", None)  # as if it were not installed
    with pytest.raises(common.InputError, match=says):
        evolve_as("refused", place, report_to=names)
    assert not list((place / "runs/refused/03_self_evolve").glob("iter_*"))


# ---- step labels, chains


class Words:
    """A tokenizer whose token i is the i-th word."""

    words = ("3 + 4 = 7", "\n", "Answer : 7", " ", "a\nb")

    def decode(self, ids) -> str:
        """The text of some tokens."""
        return "".join(self.words[i] for i in ids)


@pytest.mark.parametrize(
    "ids, ends",
    [
        ([], []),
        ([1, 1], []),
        ([0], [1]),
        ([0, 1], [2]),
        ([0, 1, 2], [2, 3]),
        ([1, 0, 1, 1, 2, 3], [4, 6]),
        ([0, 1, 3, 1, 2, 1], [4, 6]),
        ([4, 1], [1, 2]),
    ],
)
def test_steps_end_with_the_token_that_holds_the_line_break(ids, ends):
    assert common.step_ends(ids, Words()) == ends


def test_step_labels_count_completions_and_the_last_step_is_the_answer_check():
    samples = [
        {"id": p, "sample": k, "token_ids": ids, "correct": ok, "finished": done}
        for p, k, ids, ok, done in (
            ("all right", 0, [0, 1, 2], True, True),  # no signal
            ("bare", 0, [2], True, True),  # one step only: nothing to complete
            ("bare", 1, [0], False, True),
            ("mixed", 0, [0, 1, 0, 1, 2], True, True),
            ("mixed", 1, [0, 1, 2], False, True),
            ("mixed", 2, [0, 1, 0], False, False),  # cut
        )
    ]
    mixed = list(train_prm.mixed_responses(samples))
    drawn = [(row["id"], row["sample"]) for row in mixed]
    assert drawn == [("bare", 0), ("bare", 1), ("mixed", 0), ("mixed", 1)]
    prefixes = [(r["id"], r["token_ids"]) for r in train_prm.step_prefixes(mixed, Words())]
    assert prefixes == [("mixed", [0, 1]), ("mixed", [0, 1, 0, 1])]  # the shared one once
    rollouts = [
        {"id": "mixed", "token_ids": prefix + [2] * k, "prefix_length": len(prefix), "correct": ok}
        for prefix, verdicts in (([0, 1], (1, 0, 0, 0)), ([0, 1, 0, 1], (0, 0, 0, 0)))
        for k, ok in enumerate(verdicts)
    ]
    by_id = {
        name: {"id": name, "question": f"{name} ?", "choices": None, "image": f"/{name}.png"}
        for name in ("bare", "mixed")
    }

    def labelled(kind, seed=0):
        flags = {"rollouts": 4, "label_kind": kind, "seed": seed, "held_out": 0.5}
        args = train_prm.Args(instruction="Think.", **flags)
        return list(train_prm.labelled_responses(samples, rollouts, by_id, Words(), args))

    soft, hard = labelled("soft"), labelled("hard")
    found = [
        (r["id"], r["sample"], r["ends"], r["labels"], h["labels"]) for r, h in zip(soft, hard)
    ]
    assert found == [
        ("bare", 0, [1], [1.0], [1.0]),
        ("bare", 1, [1], [0.0], [0.0]),
        ("mixed", 0, [2, 4, 5], [0.25, 0.0, 1.0], [1.0, 0.0, 1.0]),
        ("mixed", 1, [2, 3], [0.25, 0.0], [1.0, 0.0]),
    ]
    assert soft[3] == {
        "id": "mixed",
        "sample": 1,
        "image": "/mixed.png",
        "prompt": "mixed ?\nThink.",
        "completions": ["3 + 4 = 7", "Answer : 7"],
        "labels": [0.25, 0.0],
        "steps_with_score": [
            {"step": "3 + 4 = 7", "score": 0.25, "num_mc_correct": 1, "num_mc_total": 4},
            {"step": "Answer : 7", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 1},
        ],
        "ends": [2, 3],
        "token_ids": [0, 1, 2],
        "held_out": soft[2]["held_out"],  # of one prompt all or none
    }
    draws = {tuple(row["held_out"] for row in labelled("soft", seed)) for seed in range(30)}
    assert len(draws) == 4 and all(a == b and c == d for a, b, c, d in draws)


def test_chain_report_counts_pairs_of_one_prompt_and_one_answer():
    drawn = (
        ("a", "right", True, 0.9),
        ("a", "wrong", True, 0.5),
        ("a", "wrong", True, 0.9),
        ("a", "wrong", False, 1.0),
        ("b", "wrong", True, 0.0),
        ("b", "unknown", True, 0.0),
    )
    samples = [
        {"id": p, "token_ids": [k], "response": chain, "correct": ok, "reward": reward}
        for k, (p, chain, ok, reward) in enumerate(drawn)
    ]

    def checker(response, example):
        return {"right": True, "wrong": False}.get(response)

    assert train_prm.chain_report(samples, {"a": {}, "b": {}}, checker) == {
        "right_answers_judged": 4,
        "of_them_right_chains": 1,
        "pairs": 2,
        "right_chain_above_wrong_chain": 0.75,  # one is won, one is a tie
    }
