"""The variants of stage 03 and the study: methods differ where they should, selections and votes by hand, no leaks, equal budgets."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch

import common
import study
from conftest import ROOT, stage

train_prm, evolve, evaluate = stage("02_train_prm"), stage("03_self_evolve"), stage("04_eval")
SHORT = dict(device="cpu", passes=1.0, interval=0.5, steps=4, samples=3, select="all", temperature="1.0", batch_size=4, max_new_tokens=60, warmup_steps=3)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A working directory in which the toy's base model stands for warm-up policy and PRM."""
    shutil.copytree(world, tmp_path / "data/toy")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for name in ("01_warmup", "02_train_prm"):
        shutil.copytree(world / "base", tmp_path / f"runs/toy/{name}/model")
    common.write_json(tmp_path / "runs/toy/02_train_prm/model/prm.json", {"marks": [3, 4]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "LOCKS", [])
    return tmp_path


def contents(folder):
    """Every file of a run, JSON without seconds and without the run's own name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            text = path.read_text().replace(f"runs/{folder.parent.name}/", "runs/") if path.suffix in (".json", ".jsonl") else ""
            lines = text.splitlines() if path.suffix == ".jsonl" else [text] if text else []
            found[str(path.relative_to(folder))] = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines] or path.read_bytes()
    return found


def evolve_as(name, place, **flags):
    """One run of stage 03 in runs/<name>, in this process; its folder."""
    shutil.copytree(place / "runs/toy", place / f"runs/{name}", ignore=shutil.ignore_patterns("03_*"))
    evolve.main(evolve.Args(runs=f"runs/{name}", **SHORT | flags))
    return place / f"runs/{name}/03_self_evolve"


# ---------------------------------------------------------------- methods

def test_training_methods_differ_in_start_weights_moments_and_schedule_and_nowhere_else(place, monkeypatch):
    fit, seen = evolve.fit, {}

    def watched(policy, optimizer, batches, loss_of, args, label, state, save):
        weights = lambda: {n: p.detach().clone() for n, p in policy.model.named_parameters()}
        moments = lambda: [{k: v.clone() for k, v in optimizer.state[p].items()} for p in policy.model.parameters() if p in optimizer.state]
        before = weights(), moments(), state["step"] - state["reset"], [[r["token_ids"] for r in b] for b in batches]
        state = fit(policy, optimizer, batches, loss_of, args, label, state, save)
        seen.setdefault(args.method, []).append((before, (weights(), moments())))
        return state

    monkeypatch.setattr(evolve, "fit", watched)
    for method in ("continuous", "iterative_rft", "rest_em"):
        evolve_as(method, place, method=method)
    same = lambda a, b: all(torch.equal(a[n], b[n]) for n in a)
    (first, after), (second, _) = seen["continuous"]
    for method in ("iterative_rft", "rest_em"):  # the first iteration, and what the second one trains on, are the same to the bit
        (other, other_after), (other_second, _) = seen[method]
        assert same(first[0], other[0]) and same(after[0], other_after[0]) and first[2:] == other[2:] and second[3] == other_second[3]
    assert same(second[0], after[0]) and all(same(a, b) for a, b in zip(second[1], after[1])) and len(second[1]) == len(after[1]) > 0 and second[2] == 2
    for method, start in (("iterative_rft", after[0]), ("rest_em", first[0])):
        weights, moments, schedule, _ = seen[method][1][0]
        assert same(weights, start) and moments == [] and schedule == 0
    assert not same(after[0], first[0])


def test_every_method_and_interval_draws_the_same_samples_and_steps(place):
    budgets = {}
    for name, flags in {"a": {}, "b": {"interval": 1.0}, "c": {"interval": 0.25}, "d": {"method": "rest_em", "interval": 1.0}, "e": {"unlabeled": "vote", "select": "random"},
                        "f": {"method": "iterative_rft"}, "g": {"unlabeled": "oracle", "temperature": "adaptive", "search_every": 1, "search_prompts": 2, "search_grid": [0.5, 1.0]}}.items():
        out = evolve_as(name, place, **flags)
        metrics, drawn = rows(out / "metrics.jsonl"), sum(len(rows(path)) for path in out.glob("iter_*/samples.jsonl"))
        assert sum(m.get("samples", 0) for m in metrics) == drawn and sum(m["extra_samples"] for m in metrics) == sum(len(rows(path)) for path in out.glob("iter_*/search.jsonl"))
        budgets[name] = (drawn, metrics[-1]["steps"], len(metrics) - 1)
    assert {b[:2] for b in budgets.values()} == {(32 * 3, 4)} and [b[2] for b in budgets.values()] == [2, 1, 4, 1, 2, 2, 2]


def test_sft_trains_once_on_gold_answers_and_samples_nothing(place):
    out = evolve_as("sft", place, method="sft", steps=3)
    metrics, selected, data = rows(out / "metrics.jsonl"), rows(out / "iter_01/selected.jsonl"), rows(place / "data/toy/train.jsonl")
    assert len(metrics) == 2 and metrics[1]["samples"] == 0 and metrics[1]["steps"] == 3 and not (out / "iter_01/samples.jsonl").exists()
    assert [(s["id"], s["response"]) for s in selected] == [(e["id"], f"Answer : {e['answer']}") for e in data]


# ---------------------------------------------------------------- selection, votes, unlabelled prompts

SCORED = [{"id": p, "token_ids": [i], "correct": c, "reward": r, "iteration": 1, "sample": i} for p, i, c, r in (
    ("a", 1, True, 0.4), ("a", 2, True, 0.9), ("a", 3, False, 0.0), ("a", 4, True, 0.6), ("a", 5, True, 0.6), ("b", 6, False, 0.0), ("c", 7, True, 0.1))]


@pytest.mark.parametrize("flags, chosen", [
    ({"select": "top_k", "k": 1}, [2, 7]), ({"select": "top_k", "k": 2}, [2, 4, 7]), ({"select": "top_k", "k": 4}, [2, 4, 5, 1, 7]),
    ({"select": "all"}, [1, 2, 4, 5, 7]), ({"select": "threshold", "alpha": 0.5}, [2, 4, 5]), ({"select": "threshold", "alpha": 0.6}, [2])])
def test_every_selection_rule_on_hand_made_scores(flags, chosen):
    assert [row["sample"] for row in evolve.select(SCORED, evolve.Args(**flags))] == chosen


def test_random_selection_takes_k_right_ones_and_every_right_one_equally_often():
    counts = np.zeros(6)
    for seed in range(400):
        picked = [row["sample"] for row in evolve.select(SCORED, evolve.Args(select="random", k=2, seed=seed)) if row["id"] == "a"]
        assert len(set(picked)) == 2
        counts[picked] += 1
    assert counts[3] == 0 and all(160 < counts[i] < 240 for i in (1, 2, 4, 5))  # 200 expected, standard deviation 10


def test_pseudo_labels_follow_the_prm_weighted_vote_or_the_majority():
    samples = [{"id": "p", "answer": a, "reward": r} for a, r in (("7", 0.2), ("8", 0.9), ("7", 0.3), (None, -1.0))] + [{"id": "q", "answer": None, "reward": -1.0}]
    judged, skipped = evolve.pseudo_label(samples, "prm")
    assert skipped == 1 and [(r["id"], r["pseudo_label"], r["correct"], r["reward"]) for r in judged] == [
        ("p", "8", False, 0.0), ("p", "8", True, 0.9), ("p", "8", False, 0.0), ("p", "8", False, 0.0)]
    assert [r["correct"] for r in evolve.pseudo_label(samples, "equal")[0]] == [True, False, True, False]
    tie = [{"id": "p", "answer": a, "reward": 0.5} for a in ("9", "7")]
    assert [r["correct"] for r in evolve.pseudo_label(tie, "prm")[0]] == [True, False]  # of equal votes the one sampled first


def test_mix_in_halves_the_labelled_prompts_from_its_share_of_training_on():
    labelled, hidden = [{"id": f"l{i}"} for i in range(16)], [{"id": f"u{i}"} for i in range(16)]
    for mixin, first in ((0.0, 1), (0.5, 5), (0.75, 7)):
        args = evolve.Args(unlabeled="vote", mixin=mixin, interval=0.25)
        counts = [[sum(e["id"].startswith(kind) for e in evolve.choose_prompts(labelled, hidden, t, 8, args)) for kind in "lu"] for t in range(1, 9)]
        assert counts == [[4, 0] if t < first else [2, 2] for t in range(1, 9)]


def test_hidden_answers_reach_no_mode_but_oracle(place):
    flags = dict(unlabeled="vote", select="top_k")
    before = contents(evolve_as("vote1", place, **flags))
    path = place / "data/toy/unlabeled.jsonl"
    spoiled = [{**{k: v for k, v in row.items() if k not in ("grid", "plan")}, "answer": "999"} for row in rows(path)]
    common.write_jsonl(path, spoiled)
    after = contents(evolve_as("vote2", place, **flags))
    assert {name for name in before if before[name] != after.get(name)} == {"run.json"} and before.keys() == after.keys()  # it holds the file's digest
    drawn, metrics = before["iter_01/samples.jsonl"], before["metrics.jsonl"][1]
    unlabeled = {r["id"]: [s["answer"] for s in drawn if s["id"] == r["id"]] for r in drawn if r["id"].startswith("unlabeled-")}
    assert unlabeled and metrics["no_vote"] == sum(not any(answers) for answers in unlabeled.values()) and len(unlabeled) == metrics["prompts"] / 2
    assert all(set(row) == {"id", "image", "question", "choices", "source", "answer", "where"} and row["answer"] is None
               for row in common.load_examples(path, hidden=True))
    oracle = rows(evolve_as("oracle", place, **flags | {"unlabeled": "oracle"}) / "iter_01/samples.jsonl")
    assert not any(r["correct"] for r in oracle if r["id"].startswith("unlabeled"))  # here the revealed answers are wrong
    voted = [r for r in rows(place / "runs/vote2/03_self_evolve/iter_01/selected.jsonl") if r["id"].startswith("unlabeled")]
    assert voted and all(r["answer"] == r["pseudo_label"] for r in voted)


# ---------------------------------------------------------------- the PRM as verifier and reranker

def sampled(prompt, *samples):
    """A greedy row and samples (answer, right, reward, number of steps) of one prompt."""
    greedy = {"id": prompt, "answer": "1", "correct": True, "reward": 0.5, "token_ids": [0], "step_scores": [0.5], "response": "greedy"}
    return [greedy] + [{"id": prompt, "answer": a, "correct": c, "reward": r, "token_ids": [i], "step_scores": [r] * n, "response": f"{prompt}{i}"}
                       for i, (a, c, r, n) in enumerate(samples, 1)]


def test_votes_and_best_of_n_over_n_by_hand():
    prompts = [sampled("p", ("1", True, 0.2, 1), ("2", False, 0.1, 1), ("1", True, 0.3, 1), ("1", True, 0.3, 1)),
               sampled("q", ("5", False, 0.1, 1), ("6", True, 0.4, 1), ("5", False, 0.2, 1), ("5", False, 0.3, 1))]
    table = {n: {figure: row[figure]["mean"] for figure in row} for n, row in evaluate.verifier(prompts, evaluate.Args(samples=4, resamples=20)).items()}
    assert table == {1: {"majority": 0.5, "best_of_n": 0.5, "weighted": 0.5},  # the first sample: p right, q wrong
                     2: {"majority": 0.5, "best_of_n": 1.0, "weighted": 1.0},  # equal votes: the answer sampled first; rewards 0.2 > 0.1 and 0.4 > 0.1
                     4: {"majority": 0.5, "best_of_n": 1.0, "weighted": 0.5}}  # q: three votes for 5, which weigh 0.6; 0.4 is the largest reward


def test_several_runs_are_drawn_together_and_what_training_changed_is_counted_by_hand(tmp_path, monkeypatch):
    def look(folder, right, **looked):  # right: per prompt the greedy verdict and those of K = 2 samples
        (folder / f"iter_{looked['iteration']:02d}").mkdir(parents=True)
        greedy = [{"id": p, "answer": "1", "correct": r[0]} for p, r in right.items()]
        samples = [{"id": p, "answer": "1", "correct": c, "reward": 0.5 - k} for p, r in right.items() for k, c in enumerate(r[1:])]
        for name, made in (("val_greedy", greedy), ("val_samples", samples)):
            common.write_jsonl(folder / f"iter_{looked['iteration']:02d}" / f"{name}.jsonl", made)
        return {"temperature": 1.0, "greedy_accuracy": 0.0, "pass_at_k": 0.0, "reward_pass_at_2": 0.0, **looked}

    def finish(run, looks, model="0", **flags):
        common.write_jsonl(tmp_path / run / "03_self_evolve" / "metrics.jsonl", looks)
        common.write_json(tmp_path / run / "03_self_evolve" / "run.json", {"flags": {"method": "continuous", "passes": 2.0, "interval": 1.0, "samples": 2, "k": 2, **flags},
                                                                              "inputs": {"policy": model}})
        return str(tmp_path / run)

    def two_looks(run, first, last):
        return [look(tmp_path / run / "03_self_evolve", first, iteration=0), {"iteration": 1, "temperature": 1.0}, look(tmp_path / run / "03_self_evolve", last, iteration=2)]

    start = {"p": (0, 0, 0), "q": (0, 1, 1)}
    runs = [finish("a", two_looks("a", start, {"p": (1, 1, 0), "q": (1, 0, 1)}), seed=0), finish("b", two_looks("b", start, {"p": (1, 1, 1), "q": (0, 0, 0)}), seed=1)]
    drawn = []
    monkeypatch.setattr(evaluate.Figure, "savefig", lambda self, path, dpi: drawn.append([[line.get_xydata().tolist() for line in axis.get_lines()] for axis in self.axes]))
    metrics = rows(tmp_path / "a/03_self_evolve/metrics.jsonl")
    metrics[0]["greedy_accuracy"], metrics[2]["pass_at_k"], metrics[1]["temperature"] = 0.25, 0.75, 0.5
    common.write_jsonl(tmp_path / "a/03_self_evolve/metrics.jsonl", metrics)
    evaluate.compare_runs(runs, tmp_path / "compare.png")
    ((accuracy, passed, _, temperature),) = drawn  # one line per run in each; x is the share of training, y percent
    assert accuracy == [[[0.0, 25.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]] and passed == [[[0.0, 0.0], [1.0, 75.0]], [[0.0, 0.0], [1.0, 0.0]]]
    assert temperature == [[[0.0, 1.0], [0.5, 0.5], [1.0, 1.0]], [[0.0, 1.0], [0.5, 1.0], [1.0, 1.0]]]

    args = evaluate.Args(resamples=50)
    greedy, passed, rewarded = evaluate.dynamics_table(runs, args).splitlines()[3:]
    assert greedy.startswith("| greedy accuracy | 0.0 | 75.0 | +75.0 [")  # first 0 of 4, last 3 of 4
    assert passed.startswith("| Pass@K | 50.0 | 75.0 | +25.0 [") and rewarded.startswith("| Reward-Pass@2 | 50.0 | 75.0 | +25.0 [")  # of K = 2 the top two are all

    c = finish("c", two_looks("c", start, {"p": (0, 0, 0), "q": (1, 0, 0)}), seed=1, k=1)  # another kind of run: never pooled with a and b, but compared
    second = evaluate.dynamics_table([*runs, c], args).splitlines()[7:]
    assert second[0] == f"| {c}, 1 seed, validation | first look | last look | change | less that of {runs[0]}, 1 seed |"
    assert second[2].startswith("| greedy accuracy | 0.0 | 50.0 | +50.0 [") and second[2].split("|")[5].startswith(" +0.0 [")  # c +50 on q; b, of the same seed, +50 on p
    assert second[3].startswith("| Pass@K | 50.0 | 0.0 | -50.0 [") and second[3].split("|")[5].startswith(" -50.0 [")

    once = finish("once", [look(tmp_path / "once/03_self_evolve", start, iteration=0)], seed=2)
    assert evaluate.dynamics_table([once, *runs], args).splitlines()[0] == f"{once} looked at the dynamics once only (--validate_every): it is in no table"
    with pytest.raises(common.InputError, match="d/03_self_evolve holds no run"):
        evaluate.dynamics_table([*runs, str(tmp_path / "d")], args)
    others = {"p": (0, 0, 0), "r": (0, 0, 0)}
    for run, flags, looks in (("e", {"seed": 2}, two_looks("e", others, others)), ("f", {"seed": 2, "samples": 3}, two_looks("f", start, start))):
        with pytest.raises(common.InputError, match="other prompts, or with another K"):
            evaluate.dynamics_table([*runs, finish(run, looks, **flags)], args)
    with pytest.raises(common.InputError, match="has the flags, the seed and the inputs of another run"):
        evaluate.dynamics_table([*runs, runs[0]], args)
    other = finish("g", two_looks("g", start, start), model="1", seed=0)  # the same flags and seed on another model: another kind
    assert [(kind["name"], list(kind["seeds"])) for kind in evaluate.kinds_of_runs([*runs, other])[0]] == [(runs[0], [0, 1]), (other, [0])]


def test_the_rerankers_top_2_are_compared_with_the_rest_prompt_by_prompt():
    prompts = [sampled("p", ("1", True, 0.1, 6), ("1", True, 0.9, 2), ("1", True, 0.5, 4), ("2", False, 1.0, 9)),
               sampled("q", ("1", True, 0.2, 5), ("1", True, 0.3, 5), ("1", True, 0.6, 2), ("1", True, 0.4, 2)),
               sampled("r", ("1", True, 0.2, 7), ("1", True, 0.3, 7), ("3", False, 0.3, 7), ("3", False, 0.3, 7))]  # only two right: no rest
    chains = {"p1": False, "p2": True, "p3": False, "q1": True, "q2": False, "q3": True, "q4": True}
    report = evaluate.reranker(prompts, {p: {} for p in "pqr"}, lambda response, example: chains[response], evaluate.Args(samples=4, resamples=20))
    means = {name: {figure: value["mean"] for figure, value in row.items()} for name, row in report.items()}
    assert means == {"Top-2": {"steps": 2.5, "right_chain": 0.75}, "rest": {"steps": 5.5, "right_chain": 0.25}, "difference": {"steps": -3.0, "right_chain": 0.5}}
    assert all(row["steps"]["n"] == 2 for row in report.values())


# ---------------------------------------------------------------- past the paper

def test_a_refreshed_prm_serves_the_search_and_the_iterations_after_it(place):
    base = (place / "runs/toy/02_train_prm/model/model.safetensors").read_bytes()
    made_with = asdict(train_prm.Args(device="cpu", max_new_tokens=60, prompts=32, samples=6, rollouts=2, epochs=1, held_out=0.5, val_samples=3))
    common.write_json(place / "runs/toy/02_train_prm/run.json", {"flags": made_with})  # stage 02 at its default size would take minutes
    out, scorers = place / "runs/toy/03_self_evolve", []
    with pytest.MonkeyPatch.context() as patch:
        search = evolve.adapt_temperature
        patch.setattr(evolve, "adapt_temperature", lambda policy, prm, *rest: scorers.append(prm.model.state_dict()) or search(policy, prm, *rest))
        evolve.main(evolve.Args(**SHORT | dict(prm_refresh=1, temperature="adaptive", search_every=1, search_prompts=4, search_grid=[0.5, 1.0])))
    refreshed = out / "iter_01/02_train_prm"
    fresh = common.load_prm(refreshed / "model", evolve.Args(**SHORT)).model.state_dict()
    assert (refreshed / "model/model.safetensors").read_bytes() != base and all(torch.equal(scorers[0][name], fresh[name]) for name in fresh)
    assert evolve.current_prm(out, 2, evolve.Args(prm_refresh=1)) == refreshed / "model"
    assert evolve.current_prm(out, 1, evolve.Args(prm_refresh=1)) == evolve.Path("runs/toy/02_train_prm/model")
    drawn = sum(len(rows(refreshed / name)) for name in ("samples.jsonl", "val.jsonl", "rollouts.jsonl"))
    flags = json.loads((refreshed / "run.json").read_text())["flags"]
    assert flags["seed"] == common.seed_of(0, "refresh", 1)  # no draw of the first PRM is drawn again
    assert flags["prompts"] == 32 and len(rows(refreshed / "samples.jsonl")) == 32 * 6
    assert [m["extra_steps"] for m in rows(out / "metrics.jsonl")] == [0, json.loads((refreshed / "metrics.json").read_text())["steps"], 0] != [0, 0, 0]
    assert [m["extra_samples"] for m in rows(out / "metrics.jsonl")] == [0, drawn + 2 * 4 * 3, 0]  # and a search: 2 temperatures, 4 prompts, K = 3


def test_temperature_per_class_goes_by_the_share_of_right_samples_of_each_prompt(place, monkeypatch):
    monkeypatch.setattr(evolve, "search_temperature", lambda grid, objective, current: (next(temperatures), [{"temperature": 1.0, "objective": objective(1.0)}]))
    temperatures = iter([0.9, 0.8, 0.7, 0.6])  # all, then every class that the search's prompts have
    out = evolve_as("classes", place, temperature="per_class", passes=2.0, interval=1.0, search_every=1, search_prompts=4, search_grid=[1.0])
    (search,) = rows(out / "temperature.jsonl")
    names, solved, seen = [name for name in search["choice"] if name != "all"], {}, set()
    assert search["choice"]["all"] == 0.9 and names and [search["choice"][name] for name in names] == [0.8, 0.7, 0.6][:len(names)]
    drawn = {}
    for row in rows(out / "iter_01/search.jsonl"):
        drawn.setdefault(row["id"], []).append(row)
    kind_of = {p: "hard" if (s := sum(r["correct"] for r in mine) / len(mine)) < 1 / 3 else "middle" if s < 2 / 3 else "easy" for p, mine in drawn.items()}
    for name in ("all", *names):  # the objective of a class is Reward-Pass@2 of its own prompts
        top = [sorted(mine, key=lambda r: -r["reward"])[:2] for p, mine in drawn.items() if name in ("all", kind_of[p])]
        assert search["curves"][name][0]["objective"] == sum(any(r["correct"] for r in two) for two in top) / len(top)
    assert set(names) == set(kind_of.values())
    for row in rows(out / "iter_01/samples.jsonl"):
        solved.setdefault(row["id"], []).append(row["correct"])
    for row in rows(out / "iter_02/samples.jsonl"):  # every prompt again
        share = sum(solved[row["id"]]) / 3
        seen.add(kind := "hard" if share < 1 / 3 else "middle" if share < 2 / 3 else "easy")
        assert row["temperature"] == search["choice"].get(kind, 0.9)
    assert seen & set(names)


def test_a_class_is_read_at_all_temperatures_and_one_of_too_few_prompts_gets_no_temperature_of_its_own(place, monkeypatch):
    def search(right):  # {prompt: verdicts of its two samples at T = 0.5 and at T = 1.0}; of 16 prompts the others are never right
        drawn = [{"id": f"v{i}", "temperature": T, "correct": bool(c), "reward": 0.5} for k, T in enumerate((0.5, 1.0)) for i in range(16) for c in right.get(i, ((0, 0), (0, 0)))[k]]
        monkeypatch.setattr(evolve, "append_chunks", lambda *rest: drawn)
        return evolve.adapt_temperature(None, None, [{"id": f"v{i}"} for i in range(16)], place, 2, {"all": 1.0}, evolve.Args(temperature="per_class", search_grid=[0.5, 1.0], samples=2))

    late = ((0, 0), (1, 1))  # by T = 1.0 alone, which is the current one, this prompt would be easy; by 0.5 alone hard
    choice, curves = search({0: late, 1: late})
    assert set(choice) == {"all", "middle", "hard"} and [c["objective"] for c in curves["middle"]] == [0.0, 1.0]
    choice, curves = search({0: late})
    assert set(choice) == {"all", "hard"}  # one prompt of 16 is less than an eighth
    assert [c["objective"] for c in curves["all"]] == [0.0, 1 / 16] and [c["objective"] for c in curves["hard"]] == [0.0, 0.0]


def test_the_search_maximises_what_the_objective_says_and_the_aggregate_rules_every_reward(place):
    out = evolve_as("pass", place, temperature="adaptive", objective="pass_at_k", search_every=1, search_prompts=4, search_grid=[0.5, 1.0], aggregate="mean")
    (search,), drawn = rows(out / "temperature.jsonl"), rows(out / "iter_01/search.jsonl")
    for curve, point in zip(search["curves"]["all"], search["curves"]["pass_at_k"]):
        of = {}
        for row in drawn:
            of.setdefault(row["id"], []).append(row["correct"]) if row["temperature"] == curve["temperature"] else None
        assert curve["objective"] == point["pass_at_k"] == sum(map(any, of.values())) / 4
    scored = [row for name in ("samples", "val_samples", "search") for row in rows(out / f"iter_01/{name}.jsonl") if row["step_scores"] and row["reward"] > 0]
    assert len(scored) > 8 and any(len(set(row["step_scores"])) > 1 for row in scored)
    assert all(row["reward"] == pytest.approx(sum(row["step_scores"]) / len(row["step_scores"]), abs=2e-6) for row in scored)


def test_a_variant_with_a_policy_and_prm_from_elsewhere_is_judged_under_its_own_name(place, capsys):
    shared = dict(policy="runs/toy/01_warmup/model", prm="runs/toy/02_train_prm/model")
    evolve.main(evolve.Args(runs="runs/variant", **SHORT | shared | {"method": "rest_em"}))
    assert "next: python 04_eval.py --runs runs/variant" in capsys.readouterr().out
    evaluate.main(evaluate.Args(runs=["runs/variant"], device="cpu", samples=3, resamples=20, max_new_tokens=60))
    report = json.loads((place / "runs/variant/04_eval/report.json").read_text())
    assert list(report["test"]) == ["base", "warm-up", "evolved"]
    from_base = evolve.Args(method="sft", policy="data/toy/base")
    assert list(evaluate.policies_of(place, vars(from_base), "data/toy/base")) == ["base", "evolved"]  # the start policy is the base: judged once
    assert list(evaluate.policies_of(place, vars(evolve.Args()), "data/toy/base")) == ["base", "warm-up", "M-STaR"]
    with pytest.raises(common.InputError, match="--aggregate min, so its policy is judged with that"):
        evaluate.main(evaluate.Args(runs=["runs/variant"], device="cpu", samples=3, resamples=20, max_new_tokens=60, aggregate="mean"))


@pytest.mark.parametrize("flags", [
    dict(method="rest_em", unlabeled="vote", save_every=1), dict(method="iterative_rft", unlabeled="oracle", save_every=1, validate_every=0),
    dict(temperature="per_class", prm_refresh=1, search_every=1, search_prompts=4, search_grid=[0.5, 1.0], passes=2.0, interval=1.0)])
def test_every_variant_goes_on_after_an_interruption_at_any_write_as_if_there_had_been_none(place, monkeypatch, flags):
    made_with = asdict(train_prm.Args(device="cpu", max_new_tokens=60, prompts=32, samples=6, rollouts=2, epochs=1, held_out=0.5, val_samples=3))
    common.write_json(place / "runs/toy/02_train_prm/run.json", {"flags": made_with})
    fsync, writes = os.fsync, []
    monkeypatch.setattr(common.os, "fsync", lambda file: writes.append(file) or fsync(file))
    whole = contents(evolve_as("whole", place, **flags))
    stops, total = iter(np.random.default_rng(0).permutation(range(2, len(writes)))[:6].tolist()), len(writes)

    def failing(file):  # as kill -9 would: what this write was for is not finished
        writes.append(file)
        if len(writes) == stop:
            raise KeyboardInterrupt
        fsync(file)

    monkeypatch.setattr(common.os, "fsync", failing)
    shutil.copytree(place / "runs/toy", place / "runs/broken", ignore=shutil.ignore_patterns("03_*"))
    interrupted, stop, done = 0, 0, False
    while not done:
        writes.clear()
        stop = next(stops, 0)
        try:
            evolve.main(evolve.Args(runs="runs/broken", **SHORT | flags))
            done = not stop or len(writes) < stop
        except KeyboardInterrupt:
            interrupted += 1
        while common.LOCKS:
            common.LOCKS.pop().close()
    assert total > 8 and interrupted >= 2
    broken = contents(place / "runs/broken/03_self_evolve")
    assert broken.keys() == whole.keys() and [name for name in whole if broken[name] != whole[name]] == []


# ---------------------------------------------------------------- the study

def test_intervals_over_seeds_and_prompts_are_paired_and_collapse_without_spread():
    flat = evaluate.crossed_interval(np.ones((3, 5)) * 0.25, 100)
    assert (flat["mean"], flat["low"], flat["high"]) == (0.25, 0.25, 0.25)
    wide = evaluate.crossed_interval(np.array([[0.0] * 50, [1.0] * 50]), 2000)  # all the spread is between the seeds: 0.5 +- t(0.975, 1) x sd / sqrt(2)
    assert wide["mean"] == 0.5 and wide["low"] == pytest.approx(0.5 - 12.706 * 0.5, rel=0.05) and wide["high"] == pytest.approx(0.5 + 12.706 * 0.5, rel=0.05)
    skewed = evaluate.crossed_interval(np.array([[8.0], [2.9], [2.9]]), 4000)  # 4.6 +- 4.303 x 2.944 / sqrt(3)
    assert skewed["low"] == pytest.approx(4.6 - 7.315, abs=0.1) and skewed["high"] == pytest.approx(4.6 + 7.315, abs=0.1)
    one = evaluate.crossed_interval(np.array([[0.0, 1.0] * 200]), 2000)  # one seed: prompts only, 0.5 +- 1.96 x 0.5 / 20
    assert one["low"] == pytest.approx(0.451, abs=0.006) and one["high"] == pytest.approx(0.549, abs=0.006)


def test_the_study_table_holds_hand_counted_means_and_paired_differences():
    made = [{"name": name, "seed": seed, "paper_id": 1.0, "paper_ood": 2.0, "samples": 8, "extra_samples": 5, "steps": 3, "extra_steps": 2 * (name == "A"),
             "flags": "", "data": {}, "shared_flags": [], "verdicts": {"test": v, "ood": v}} for name, seed, v in (("A", 0, "1100"), ("B", 0, "1000"), ("A", 1, "1110"), ("B", 1, "1100"), ("A", 2, "0000"))]
    table = evaluate.study_table(made, evaluate.Args(against=["A/B"], resamples=200)).splitlines()
    assert table[2].startswith("| A | 41.7 [") and "| 3 | 1.0 / 2.0 | 8 + 5 | 3 + 2 |" in table[2] and table[3].startswith("| B | 37.5 [") and "| 8 + 5 | 3 |" in table[3]
    assert table[-1].startswith("| A - B | +25.0 [") and table[-1].endswith("| 2 |")  # the two seeds that both rows have
    twins = [{**row, "name": name} for row in made if row["name"] == "A" for name in "AB"]  # the same verdicts: paired, they differ by nothing
    assert evaluate.study_table(twins, evaluate.Args(against=["A/B"], resamples=200)).endswith("| A - B | +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] | 3 |")
    for spoiled, says in (([*made, {**made[0], "seed": 5, "data": {"test": "other"}}], "different data"), ([*made, {**made[0], "seed": 5, "flags": "--k 1"}], "different flags")):
        with pytest.raises(common.InputError, match=says):
            evaluate.study_table(spoiled, evaluate.Args(resamples=20))
    with pytest.raises(common.InputError, match="A/Bee"):
        evaluate.study_table(made, evaluate.Args(against=["A/Bee"], resamples=20))


@pytest.fixture
def drivers(world, tmp_path):
    """A working directory for drivers of a small study: (folder, command, environment)."""
    shutil.copytree(world, tmp_path / "data/toy")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    command = [sys.executable, str(ROOT / "tests/study.py"), "--seeds", "0", "--extra01", "--steps 4 --samples 4",
               "--extra02", "--prompts 30 --samples 6 --rollouts 2 --epochs 1 --held_out 0.4 --val_samples 4", "--extra", "--passes 1 --interval 0.5 --samples 3 --steps 4"]
    return tmp_path, command, {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def test_a_killed_study_goes_on_without_repeating_finished_rows(drivers):
    folder, command, env = drivers
    command += ["--only", "warm-up", "Random-2", "Top-2", "base"]
    table, evolving = folder / "runs/study/rows.jsonl", folder / "runs/study/seed0/Top-2/03_self_evolve/iter_01"
    driver = subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    while not evolving.exists():
        assert driver.poll() is None
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    first, finished = rows(table), [folder / "runs/study/seed0" / name for name in ("02_train_prm/metrics.json", "Random-2/03_self_evolve/model/model.safetensors")]
    made = [path.stat().st_mtime_ns for path in finished]
    assert [r["name"] for r in first] == ["warm-up", "Random-2"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [r["name"] for r in rows(table)] == ["base", "warm-up", "Random-2", "Top-2"] and rows(table)[1:3] == first  # in the order of the paper's tables
    assert [path.stat().st_mtime_ns for path in finished] == made
    assert all(len(r["verdicts"]["test"]) == 6 and len(r["verdicts"]["ood"]) == 4 for r in rows(table)) and rows(table)[3]["samples"] == 32 * 3
    other = subprocess.run([c.replace("--steps 4", "--steps 5") for c in command], cwd=folder, env=env, capture_output=True, text=True)
    assert other.returncode and "made with" in other.stderr and len(rows(table)) == 4


def test_two_drivers_share_a_study_and_a_refused_row_stops_no_other(drivers):
    folder, command, env = drivers
    command += ["--only", "PRM > alpha", "Random-2", "warm-up", "base"]
    command[command.index("--extra") + 1] += " --alpha 1.0"  # no reward is above it, so that row has nothing to train on
    both = [subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [driver.communicate()[1] for driver in both]
    assert sorted(r["name"] for r in rows(folder / "runs/study/rows.jsonl")) == ["Random-2", "base", "warm-up"]
    assert all(driver.returncode for driver in both) and all("refused, or still with another driver" in error and "'PRM > alpha', 0" in error for error in errors)
    assert any("--select threshold keeps none" in error for error in errors)


def test_study_rows_name_flags_that_stage_03_knows():
    parser = common.HfArgumentParser(evolve.Args)
    for name, (_, _, flags) in study.ROWS.items():
        if flags is not None:
            assert evolve.check_flags(parser.parse_args_into_dataclasses(flags.split())[0]) >= 1, name
    assert len({study.folder_of(name) for name in study.ROWS}) == len(study.ROWS)


def test_a_pass_shows_every_prompt_once_and_no_iteration_shows_one_twice():
    examples, hidden = [{"id": i} for i in range(7)], [{"id": 100 + i} for i in range(7)]
    seen = [[e["id"] for e in evolve.choose_prompts(examples, [], t, 6, evolve.Args(interval=1 / 3))] for t in range(1, 7)]
    assert [len(ids) for ids in seen] == [2, 2, 3, 2, 2, 3] and sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(7))
    args = evolve.Args(interval=1 / 3, unlabeled="vote", mixin=0.5)
    halves = [[e["id"] >= 100 for e in evolve.choose_prompts(examples, hidden, t, 6, args)] for t in range(1, 7)]
    assert [len(h) for h in halves] == [2, 2, 3, 2, 2, 3] and [sum(h) for h in halves] == [0, 0, 0, 1, 1, 1]
    args, labelled = evolve.Args(interval=0.5, unlabeled="vote"), [{"id": i} for i in range(12)]
    mixed = [[e["id"] for e in evolve.choose_prompts(labelled, hidden, t, 8, args)] for t in range(1, 9)]  # 3 of 7 unlabelled ones in each
    assert all(len(set(ids)) == len(ids) == 6 and sum(i >= 100 for i in ids) == 3 for ids in mixed) and len({i for ids in mixed for i in ids if i >= 100}) == 7
    with pytest.raises(common.InputError, match="holds 2 prompts, fewer than the 3"):
        evolve.choose_prompts(labelled, hidden[:2], 1, 8, args)


@pytest.mark.parametrize("flags, says", [
    ({"temperature": "0"}, "above 0"), ({"temperature": "nan"}, "above 0"), ({"temperature": "-1"}, "above 0"), ({"temperature": "warm"}, "above 0"),
    ({"unlabeled": "vote", "mixin": 0.3}, "whole number"), ({"unlabeled": "vote", "mixin": 1.0}, "below 1"), ({"mixin": 0.5}, "--unlabeled"),
    ({"validate_every": -1}, "--validate_every"), ({"interval": 0.0}, "--interval"), ({"interval": 0.3}, "whole number"), ({"passes": 1.1}, "multiple"), ({"search_grid": [0.0, 1.0]}, "--search_grid"),
    ({"search_grid": [1.0, 1.0]}, "--search_grid"), ({"method": "sft", "gold_response": "Answer"}, "--gold_response"), ({"prm_refresh": 8}, "no PRM"),
    ({"vote_weights": "equal"}, "--unlabeled vote"), ({"interval": 1.0}, "no search in 2"), ({"temperature": "per_class", "search_every": 8}, "no search in 8"),
    ({"temperature": "1.0", "objective": "pass_at_k"}, "nothing is searched"), ({"temperature": "per_class", "passes": 1.0}, "earlier pass"), ({"method": "sft", "prm_refresh": 1}, "sft")])
def test_flags_that_cannot_be_meant_are_refused(flags, says):
    with pytest.raises(common.InputError, match=says):
        evolve.check_flags(evolve.Args(**flags))


def test_looking_less_often_changes_no_sample_and_no_weight(place):
    often, seldom = evolve_as("often", place), evolve_as("seldom", place, validate_every=0)
    for name in ("model/model.safetensors", "iter_01/samples.jsonl", "iter_02/selected.jsonl", "iter_02/val_samples.jsonl"):
        assert (often / name).read_bytes() == (seldom / name).read_bytes(), name
    assert ["pass_at_k" in m for m in rows(often / "metrics.jsonl")] == [True, True, True]
    assert ["pass_at_k" in m for m in rows(seldom / "metrics.jsonl")] == [False, False, True]


def test_the_readme_shows_what_its_study_command_prints_and_every_row_is_one_of_the_study():
    measured, readme = common.read_jsonl(ROOT / "tests/study_rows.jsonl"), (ROOT / "README.md").read_text().splitlines()
    section = readme[next(i for i, line in enumerate(readme) if line.startswith("## The study")):readme.index("## I have a GPU")]
    assert [line for line in section if line.startswith("|")] == [line for line in evaluate.study_table(measured, evaluate.Args()).splitlines() if line]
    for row in measured:
        assert row["flags"] == " ".join((study.ROWS[row["name"]][2] or "").split()) and row["shared_flags"] == ["", ""]
        assert {split: len(verdicts) for split, verdicts in row["verdicts"].items()} == {"test": 500, "ood": 300}
