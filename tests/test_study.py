"""Stage 04 on one run, and the study: figures by hand, runs compared, drivers that resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import study
from conftest import READ_AS, ROOT, stage

import common

evolve, evaluate = stage("03_self_evolve"), stage("04_eval")


@pytest.fixture(autouse=True)
def free_folders():
    """Every test leaves its run folders unlocked."""
    yield
    common.close_runs()


def write_look(folder, name, prompts):
    """What Sampler.look leaves: {prompt: (greedy row, sample rows)}."""
    folder.mkdir(parents=True, exist_ok=True)
    greedy = [{"id": prompt, **first} for prompt, (first, _) in prompts.items()]
    samples = [{"id": prompt, **row} for prompt, (_, rows) in prompts.items() for row in rows]
    common.write_jsonl(folder / f"{name}_greedy.jsonl", greedy)
    common.write_jsonl(folder / f"{name}_samples.jsonl", samples)


def means(report):
    """The means of a report of intervals, two levels deep."""
    return {
        key: {figure: interval["mean"] for figure, interval in row.items()}
        for key, row in report.items()
    }


# ---- figures of one run


def sampled(prompt, *samples):
    """A right greedy row, and samples (answer, right, reward, number of steps) of a prompt."""
    rows = [
        {
            "answer": answer,
            "correct": correct,
            "reward": reward,
            "token_ids": [i],
            "step_scores": [reward] * steps,
            "response": f"{prompt}{i}",
        }
        for i, (answer, correct, reward, steps) in enumerate(samples, 1)
    ]
    return {"answer": "1", "correct": True, "reward": 0.5, "step_scores": [0.5]}, rows


def test_votes_and_best_of_n_over_n_by_hand(tmp_path):
    right, wrong = ("1", True), ("2", False)
    p = sampled("p", (*right, 0.2, 1), (*wrong, 0.1, 1), (*right, 0.3, 1), (*right, 0.3, 1))
    right, wrong = ("6", True), ("5", False)
    q = sampled("q", (*wrong, 0.1, 1), (*right, 0.4, 1), (*wrong, 0.2, 1), (*wrong, 0.3, 1))
    write_look(tmp_path, "base_test", {"p": p, "q": q})
    report = evaluate.verifier(tmp_path, "base_test", evaluate.Args(samples=4, resamples=20))
    assert means(report) == {
        # the first sample: p right, q wrong
        1: {"majority": 0.5, "weighted": 0.5, "best_of_n": 0.5},
        # equal votes: the answer sampled first; rewards 0.2 > 0.1 and 0.4 > 0.1
        2: {"majority": 0.5, "weighted": 1.0, "best_of_n": 1.0},
        # q: three votes for 5, which weigh 0.6; 0.4 is the largest reward
        4: {"majority": 0.5, "weighted": 0.5, "best_of_n": 1.0},
    }


def test_the_sizes_that_a_verifier_is_judged_at_end_with_all_samples(tmp_path):
    write_look(tmp_path, "base_test", {"p": sampled("p", *[("1", True, 0.5, 1)] * 6)})
    report = evaluate.verifier(tmp_path, "base_test", evaluate.Args(samples=6, resamples=20))
    assert list(report) == [1, 2, 4, 6]


def test_the_rerankers_top_2_are_compared_with_the_rest_prompt_by_prompt(tmp_path):
    p = [("1", True, 0.1, 6), ("1", True, 0.9, 2), ("1", True, 0.5, 4), ("2", False, 1.0, 9)]
    q = [("1", True, 0.2, 5), ("1", True, 0.3, 5), ("1", True, 0.6, 2), ("1", True, 0.4, 2)]
    two = [("1", True, 0.2, 7), ("1", True, 0.3, 7), ("3", False, 0.3, 7), ("3", False, 0.3, 7)]
    looks = {"p": sampled("p", *p), "q": sampled("q", *q), "r": sampled("r", *two)}  # r: no rest
    write_look(tmp_path, "base_test", looks)
    chains = {"p1": False, "p2": True, "p3": False, "q1": True, "q2": False, "q3": True, "q4": True}
    checker = tmp_path / "checker.py"
    checker.write_text(f"def judge(response, example):\n    return {chains}[response]\n")
    args = evaluate.Args(samples=4, resamples=20, chain_checker=f"{checker}:judge")
    report = evaluate.reranker(tmp_path, "base_test", {prompt: {} for prompt in "pqr"}, args)
    assert means(report) == {
        "Top-2": {"steps": 2.5, "right_chain": 0.75},
        "rest": {"steps": 5.5, "right_chain": 0.25},
        "difference": {"steps": -3.0, "right_chain": 0.5},
    }
    assert all(row["steps"]["n"] == 2 for row in report.values())
    checker.write_text(
        f"def judge(response, example):\n    return {chains | {'p3': None}}[response]\n"
    )
    report = evaluate.reranker(tmp_path, "base_test", {prompt: {} for prompt in "pqr"}, args)
    assert means(report)["rest"] == {"steps": 5.5, "right_chain": 0.5}  # of q alone
    assert all(row["right_chain"]["n"] == 1 for row in report.values())
    checker.write_text("def judge(response, example):\n    return None\n")
    report = evaluate.reranker(tmp_path, "base_test", {prompt: {} for prompt in "pqr"}, args)
    assert all(list(row) == ["steps"] for row in report.values())  # no chain can be judged


def test_the_gain_of_a_policy_is_paired_with_the_one_before_it(tmp_path):
    verdicts = {"base": [0, 0, 1, 1], "warm-up": [0, 1, 1, 1], "M-STaR": [1, 1, 0, 1]}
    for policy, right in verdicts.items():
        looks = {}
        for i, verdict in enumerate(right):
            greedy, samples = sampled(f"p{i}", ("1", True, 0.5, 1))
            looks[f"p{i}"] = greedy | {"correct": bool(verdict)}, samples
        write_look(tmp_path, f"{policy}_test", looks)
    report = evaluate.summarize(tmp_path, list(verdicts), "test", evaluate.Args(samples=1))
    gains = {policy: figures.get("greedy_gain") for policy, figures in report.items()}
    assert gains["base"] is None and gains["warm-up"]["mean"] == 0.25
    assert gains["M-STaR"] == {"mean": 0.0, "low": -0.75, "high": 0.75, "n": 4}
    assert report["M-STaR"]["greedy"]["mean"] == 0.75


# ---- stage 04 on one run


@pytest.fixture
def variant(world, tiny, tmp_path, monkeypatch):
    """A working directory with a finished run of a variant, its warm-up and PRM from elsewhere."""
    shutil.copytree(world, tmp_path / "data/toy")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for folder in ("toy/01_warmup", "toy/02_train_prm", "variant/03_self_evolve"):
        shutil.copytree(tiny, tmp_path / "runs" / folder / "model")
    common.write_json(tmp_path / "runs/toy/02_train_prm/model/prm.json", READ_AS)
    flags = {"policy": "runs/toy/01_warmup/model", "prm": "runs/toy/02_train_prm/model"}
    trained = vars(evolve.Args(method="rest_em", samples=3, **flags))
    evolving = tmp_path / "runs/variant/03_self_evolve"
    common.write_json(evolving / "run.json", {"flags": trained, "inputs": {}})
    look = {"greedy_accuracy": 0.5, "sample_accuracy": 0.5, "pass_at_k": 1.0}
    look |= {"iteration": 0, "temperature": 1.0, "reward_pass_at_2": 0.5}
    common.write_jsonl(
        evolving / "metrics.jsonl",
        [look, {"iteration": 1, "temperature": 1.0}, look | {"iteration": 2, "temperature": 0.5}],
    )
    curve = [{"temperature": T, "reward_pass_at_2": 0.5, "pass_at_k": T / 2} for T in (0.5, 1.0)]
    search = {"iteration": 1, "was": 1.0, "chosen": 0.5, "objective": "reward_pass_at_2"}
    common.write_jsonl(evolving / "temperature.jsonl", [search | {"curve": curve}])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/variant"


def judge_variant(**flags):
    """Stage 04 on the variant, small."""
    settings = {"device": "cpu", "samples": 3, "resamples": 20, "max_new_tokens": 12}
    evaluate.main(evaluate.Args(**{"runs": "runs/variant", **settings, **flags}))
    common.close_runs()


def test_a_variant_with_a_policy_and_prm_from_elsewhere_is_judged_under_its_own_name(variant):
    judge_variant()
    out = variant / "04_eval"
    report = json.loads((out / "report.json").read_text())
    assert list(report) == ["test", "ood", "prm"]
    assert list(report["test"]) == ["base", "warm-up", "evolved"]
    predictions = {path.name: common.read_jsonl(path) for path in out.glob("predictions/*.jsonl")}
    assert len(predictions) == 3 * 2 * 2  # policies, splits, greedy and samples
    for name, figures in report["test"].items():
        greedy, samples = (
            predictions[f"{name}_test_{kind}.jsonl"] for kind in ("greedy", "samples")
        )
        assert len(greedy) == 6 and len(samples) == 6 * 3
        assert all("step_scores" in row and "reward" in row for row in greedy + samples)
        right = sum(row["correct"] for row in greedy)
        assert figures["greedy"]["mean"] == pytest.approx(right / 6)
        unparsable = sum(row["answer"] is None for row in samples)
        assert figures["unparsable"]["mean"] == pytest.approx(unparsable / 18)
        assert all(f["low"] <= f["mean"] <= f["high"] and f["n"] == 6 for f in figures.values())
    assert list(report["prm"]["verifier"]) == ["1", "2", "3"]
    assert (out / "dynamics.png").read_bytes()[:4] == b"\x89PNG"


def test_policies_have_the_names_of_what_they_were_made_by(tmp_path):
    from_base = vars(evolve.Args(method="sft", policy="data/toy/base"))
    names = list(evaluate.policies_of(tmp_path, from_base, "data/toy/base"))
    assert names == ["base", "evolved"]  # the start policy is the base: it is judged once
    names = list(evaluate.policies_of(tmp_path, vars(evolve.Args()), "data/toy/base"))
    assert names == ["base", "warm-up", "M-STaR"]
    elsewhere = vars(evolve.Args(policy="models/mine", k=4))
    names = list(evaluate.policies_of(tmp_path, elsewhere, "data/toy/base"))
    assert names == ["base", "start", "evolved"]


def test_another_aggregate_than_the_one_that_selected_is_refused(variant):
    with pytest.raises(common.InputError, match="selected with --aggregate min: give the same"):
        judge_variant(aggregate="mean")


def test_an_evaluation_without_a_run_of_stage_03_says_what_to_run(variant):
    with pytest.raises(common.InputError, match="holds no run; run 03_self_evolve.py first"):
        judge_variant(runs="runs/toy")
    shutil.rmtree(variant / "03_self_evolve/model")  # it has begun, and is not finished
    with pytest.raises(common.InputError, match="run 03_self_evolve.py first"):
        judge_variant()


def test_a_finished_evaluation_samples_nothing_and_prints_its_report(variant, monkeypatch, capsys):
    judge_variant()
    first = capsys.readouterr().out
    assert "| greedy accuracy |" in first and "| PRM-weighted vote |" in first
    monkeypatch.setattr(common.Sampler, "start", None)
    judge_variant()
    engine, _, report = capsys.readouterr().out.partition("\n")
    assert engine.startswith("engine: ") and first.endswith(report)


def test_an_evaluation_killed_before_its_report_goes_on_with_what_it_predicted(
    variant, monkeypatch
):
    def kill(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "draw_dynamics", kill)
        judge_variant()
    common.close_runs()
    out = variant / "04_eval"
    assert (out / "report.md").exists() and not (out / "report.json").exists()
    made = {path: path.stat().st_mtime_ns for path in out.glob("predictions/*.jsonl")}
    judge_variant()
    assert (out / "report.json").exists() and (out / "dynamics.png").exists()
    assert {path: path.stat().st_mtime_ns for path in out.glob("predictions/*.jsonl")} == made


def test_two_ranks_write_the_report_that_one_writes(variant):
    image = common.load_examples("data/toy/test.jsonl")[0]["image"]
    record = {"id": "q", "context": "", "question": "Which?", "choices": ["x", "y"], "answer": "A"}
    record |= {"domain": "science", "image": "q.png"}
    published = variant.parent.parent / "data/m3cot"
    published.mkdir()
    shutil.copy(image, published / "q.png")
    common.write_jsonl(published / "test.jsonl", [record])
    flags = "--runs runs/variant --device cpu --samples 3 --resamples 20 --max_new_tokens 12"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [str(ROOT / "04_eval.py"), *flags.split(), "--chunk", "2", "--benchmarks", "m3cot"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    assert done.stdout.count("# Evaluation\n") == 1  # one rank speaks
    two = json.loads((variant / "04_eval/report.json").read_text())
    assert two["benchmarks"]["m3cot"]["base"]["score"]["n"] == 1
    shutil.rmtree(variant / "04_eval")
    judge_variant(chunk=2, benchmarks=["m3cot"])
    assert json.loads((variant / "04_eval/report.json").read_text()) == two


# ---- the study: statistics and tables


def test_intervals_over_seeds_and_prompts_collapse_without_spread():
    flat = study.crossed_interval(np.ones((3, 5)) * 0.25, 100)
    assert (flat["mean"], flat["low"], flat["high"]) == (0.25, 0.25, 0.25)


def test_intervals_over_seeds_are_students_t_and_of_one_seed_over_prompts():
    # all the spread is between the seeds: 0.5 +- t(0.975, 1) x sd / sqrt(2)
    wide = study.crossed_interval(np.array([[0.0] * 50, [1.0] * 50]), 2000)
    assert wide["mean"] == 0.5
    assert wide["low"] == pytest.approx(0.5 - 12.706 * 0.5, rel=0.05)
    assert wide["high"] == pytest.approx(0.5 + 12.706 * 0.5, rel=0.05)
    skewed = study.crossed_interval(np.array([[8.0], [2.9], [2.9]]), 4000)
    half = 4.303 * 2.944 / 3**0.5
    assert skewed["low"] == pytest.approx(4.6 - half, abs=0.1)
    assert skewed["high"] == pytest.approx(4.6 + half, abs=0.1)
    # one seed: prompts only, 0.5 +- 1.96 x 0.5 / 20
    one = study.crossed_interval(np.array([[0.0, 1.0] * 200]), 2000)
    assert one["low"] == pytest.approx(0.451, abs=0.006)
    assert one["high"] == pytest.approx(0.549, abs=0.006)


def study_row(name, seed, verdicts, **changed):
    """A line of rows.jsonl."""
    row = {"name": name, "seed": seed, "flags": "", "data": {}, "shared_flags": [], "code": "c"}
    row |= {"paper_id": 1.0, "paper_ood": 2.0, "samples": 8, "extra_samples": 5, "steps": 3}
    row |= {"extra_steps": 2 if name == "A" else 0}
    return row | {"verdicts": {"test": verdicts, "ood": verdicts}} | changed


MADE = [
    study_row("A", 0, "1100"),
    study_row("B", 0, "1000"),
    study_row("A", 1, "1110"),
    study_row("B", 1, "1100"),
    study_row("A", 2, "0000"),
]


def test_the_study_table_holds_hand_counted_means_and_paired_differences():
    a, b = study.study_table(MADE, 200).splitlines()[2:]
    assert a.startswith("| A | 41.7 [") and "| 3 | 1.0 / 2.0 | 8 + 5 | 3 + 2 |" in a
    assert b.startswith("| B | 37.5 [") and "| 8 + 5 | 3 |" in b
    line = study.difference_table(MADE, [("A", "B"), ("A", "C")], 200).splitlines()[-1]
    assert line.startswith("| A - B | +25.0 [") and line.endswith("| 2 | - / - |")  # seeds of both
    # the same verdicts: paired, they differ by nothing
    twins = [{**row, "name": name} for row in MADE if row["name"] == "A" for name in "AB"]
    line = study.difference_table(twins, [("A", "B")], 200).splitlines()[-1]
    assert line == "| A - B | +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] | 3 | 1 / 1 |"


def test_the_seeds_that_two_points_need_follow_from_the_spread_between_seeds():
    # A - B is 0, 25 and 50 points by seed: sd 25, (2.8 x 25 / 2)^2 = 1225
    made = [study_row("B", seed, "0000") for seed in range(3)]
    made += [study_row("A", seed, v) for seed, v in enumerate(("0000", "1000", "1100"))]
    assert study.seeds_needed(study.by_name(made), ("A", "B"), "test") == "1225"
    assert study.seeds_needed(study.by_name(made[1:]), ("A", "B"), "test") == "-"  # two seeds


def test_a_finding_is_judged_by_an_interval_that_is_wider_for_more_comparisons():
    values = np.array([[0.0] * 50, [1.0] * 50])
    usual = study.crossed_interval(values, 20000)
    # all the spread is between two seeds: 0.5 +- t(0.995, 1) x sd / sqrt(2)
    strict = study.crossed_interval(values, 20000, level=0.99)
    assert strict["low"] == pytest.approx(0.5 - 63.657 * 0.5, rel=0.05)
    assert strict["low"] < usual["low"] and strict["high"] > usual["high"]


def test_findings_are_above_below_or_not_decided_beside_the_papers_difference():
    made = []
    for seed in range(2):
        made.append(study_row("M-STaR", seed, "1" * 40))
        made.append(study_row("Iterative RFT 100 %", seed, "0" * 40))
        made.append(study_row("Top-2", seed, "1" * 39 + "0"))
    lines = {line.split(" |")[0]: line for line in study.findings_table(made, 500).splitlines()}
    line = lines["| M-STaR - Iterative RFT 100 %"]  # 45.9 - 42.3 and 59.5 - 55.7 in the paper
    assert line.endswith("| +100.0 [+100.0, +100.0] | above | 2 |") and "| +3.6 / +3.8 |" in line
    assert "not decided" in lines["| M-STaR - Top-2"]
    assert lines["| M-STaR - ReST-EM 100 %"].endswith("| - | not measured | - | not measured | 0 |")


def test_rows_of_other_data_or_flags_are_in_no_table_and_pairs_must_exist():
    other = study_row("A", 5, "1100", data={"test": "other"})
    with pytest.raises(common.InputError, match="different data"):
        study.study_table([*MADE, other], 20)
    with pytest.raises(common.InputError, match="different code"):
        study.study_table([*MADE, study_row("A", 5, "1100", code="d")], 20)
    with pytest.raises(common.InputError, match="'A' were made with different flags"):
        study.study_table([*MADE, study_row("A", 5, "1100", flags="--k 1")], 20)
    for pair in ("A/Bee", "A", "A/B/C"):
        with pytest.raises(common.InputError, match=f"found {pair}$"):
            study.pairs_of([pair], MADE)


def test_the_study_document_is_what_the_command_writes_and_its_rows_are_those_of_the_study(
    tmp_path,
):
    measured = common.read_jsonl(ROOT / "tests/study_rows.jsonl")
    study.document(measured, tmp_path)
    assert (ROOT / "tests/STUDY.md").read_text() == (tmp_path / "STUDY.md").read_text()
    for name in ("study.png", "study_forest.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert (ROOT / "tests" / name).exists()
    for row in measured:
        assert row["flags"] == " ".join((study.ROWS[row["name"]].flags or "").split())
        assert row["shared_flags"] == ["", ""]
        assert {split: len(v) for split, v in row["verdicts"].items()} == {"test": 500, "ood": 300}


def test_the_study_command_prints_the_tables_and_only_the_pairs_asked_for(
    tmp_path, monkeypatch, capsys
):
    common.write_jsonl(tmp_path / "rows.jsonl", MADE)
    flags = ["--table", str(tmp_path / "rows.jsonl"), "--against", "B/A", "--resamples", "20"]
    monkeypatch.setattr(sys, "argv", ["study.py", *flags])
    study.main()
    printed = capsys.readouterr().out
    assert "| M-STaR - Top-2 | " in printed
    assert "| A | 41.7 [" in printed and "| B - A | -25.0 [" in printed
    assert study.study_table(MADE, 20) in printed


# ---- several runs


def look(folder, verdicts, iteration):
    """A look at validation; verdicts: per prompt of the greedy response and of K = 2 samples."""
    prompts = {}
    for prompt, (greedy, *samples) in verdicts.items():
        rows = [{"answer": "1", "correct": c, "reward": 0.5 - k} for k, c in enumerate(samples)]
        prompts[prompt] = {"answer": "1", "correct": greedy}, rows
    write_look(folder / f"iter_{iteration:02d}", "val", prompts)
    row = {"iteration": iteration, "temperature": 1.0}
    return row | {"greedy_accuracy": 0.0, "pass_at_k": 0.0, "reward_pass_at_2": 0.0}


def finish(run, looks, model="0", **flags):
    """A finished run of stage 03 with these looks at validation, a dict per iteration or None."""
    folder = run / "03_self_evolve"
    metrics = []
    for t, verdicts in enumerate(looks):
        row = look(folder, verdicts, t) if verdicts else {"iteration": t, "temperature": 1.0}
        metrics.append(row)
    common.write_jsonl(folder / "metrics.jsonl", metrics)
    defaults = {"method": "continuous", "passes": 2.0, "interval": 1.0, "samples": 2, "k": 2}
    origin = {"flags": defaults | flags, "inputs": {"policy": model}}
    common.write_json(folder / "run.json", origin)
    return str(run)


START = {"p": (0, 0, 0), "q": (0, 1, 1)}


@pytest.fixture
def runs(tmp_path):
    """Two runs of a kind, seeds 0 and 1."""
    first = finish(tmp_path / "a", [START, None, {"p": (1, 1, 0), "q": (1, 0, 1)}], seed=0)
    second = finish(tmp_path / "b", [START, None, {"p": (1, 1, 1), "q": (0, 0, 0)}], seed=1)
    return [first, second]


def test_several_runs_are_drawn_together_over_the_share_of_training(tmp_path, runs, monkeypatch):
    path = tmp_path / "a/03_self_evolve/metrics.jsonl"
    metrics = common.read_jsonl(path)
    metrics[0]["greedy_accuracy"] = 0.25
    metrics[1]["temperature"] = 0.5
    metrics[2]["pass_at_k"] = 0.75
    common.write_jsonl(path, metrics)
    drawn = []

    def keep_lines(figure, path, dpi):
        """What a chart shows, in place of a file."""
        for axis in figure.axes:
            drawn.append([line.get_xydata().tolist() for line in axis.get_lines()])

    monkeypatch.setattr(study.Figure, "savefig", keep_lines)
    study.draw_runs(runs, tmp_path / "compare.png")
    accuracy, passed, _, temperature = drawn  # a line per run in each; y is percent
    flat = [[0.0, 0.0], [1.0, 0.0]]
    assert accuracy == [[[0.0, 25.0], [1.0, 0.0]], flat]
    assert passed == [[[0.0, 0.0], [1.0, 75.0]], flat]
    assert temperature[0] == [[0.0, 1.0], [0.5, 0.5], [1.0, 1.0]]
    assert temperature[1] == [[0.0, 1.0], [0.5, 1.0], [1.0, 1.0]]


def test_what_training_changed_is_counted_by_hand_over_the_seeds_of_a_kind(runs):
    title, _, greedy, passed, rewarded = study.dynamics_table(runs, 50).strip().splitlines()
    assert title == f"| {runs[0]}, 2 seeds, validation | first look | last look | change |"
    assert greedy.startswith("| greedy accuracy | 0.0 | 75.0 | +75.0 [")  # 0 of 4, then 3 of 4
    assert passed.startswith("| Pass@K | 50.0 | 75.0 | +25.0 [")
    assert rewarded.startswith("| Reward-Pass@2 | 50.0 | 75.0 | +25.0 [")  # of K = 2 all are top


def test_kinds_of_runs_are_never_pooled_but_compared_over_the_seeds_of_both(tmp_path, runs):
    c = finish(tmp_path / "c", [START, None, {"p": (0, 0, 0), "q": (1, 0, 0)}], seed=1, k=1)
    _, second = study.dynamics_table([*runs, c], 50).strip().split("\n\n")
    title, _, greedy, passed, _ = second.splitlines()
    assert title.startswith(f"| {c}, 1 seed, validation |")
    assert title.endswith(f"| change | less that of {runs[0]}, 1 seed |")
    assert greedy.startswith("| greedy accuracy | 0.0 | 50.0 | +50.0 [")
    assert greedy.split("|")[5].startswith(" +0.0 [")  # c gains on q, b of the same seed on p
    assert passed.startswith("| Pass@K | 50.0 | 0.0 | -50.0 [")
    assert passed.split("|")[5].startswith(" -50.0 [")
    # the same flags and seed on another model: another kind
    other = finish(tmp_path / "g", [START, None, START], model="1", seed=0)
    kinds, _ = study.kinds_of_runs([*runs, other])
    assert [(kind.name, list(kind.looks)) for kind in kinds] == [(runs[0], [0, 1]), (other, [0])]


def test_runs_that_cannot_be_compared_are_named(tmp_path, runs):
    once = finish(tmp_path / "once", [START], seed=2)
    first, *_ = study.dynamics_table([once, *runs], 50).splitlines()
    assert first == f"{once} looked at the dynamics once only (--validate_every): it is in no table"
    with pytest.raises(common.InputError, match="d/03_self_evolve holds no run"):
        study.dynamics_table([*runs, str(tmp_path / "d")], 50)
    others = {"p": (0, 0, 0), "r": (0, 0, 0)}
    other_prompts = finish(tmp_path / "e", [others, others], seed=2)
    other_k = finish(tmp_path / "f", [START, START], seed=2, samples=3)
    for run in (other_prompts, other_k):
        with pytest.raises(common.InputError, match="other prompts, or with another K"):
            study.dynamics_table([*runs, run], 50)
    with pytest.raises(common.InputError, match="the flags, the seed and the inputs of another"):
        study.dynamics_table([*runs, runs[0]], 50)


def test_the_compare_command_draws_into_the_first_run_and_prints_the_table(
    tmp_path, runs, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["study.py", "--compare", *runs, "--resamples", "50"])
    study.main()
    assert (tmp_path / "a/compare.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert printed.startswith(f"wrote {runs[0]}/compare.png")
    assert study.dynamics_table(runs, 50) in printed


# ---- the driver


@pytest.fixture
def drivers(world, tmp_path):
    """A working directory for drivers of a small study: (folder, command, environment)."""
    shutil.copytree(world, tmp_path / "data/toy")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    prm = "--prompts 30 --samples 6 --rollouts 2 --epochs 1 --held_out 0.4 --val_samples 4"
    command = [sys.executable, str(ROOT / "tests/study.py"), "--seeds", "0"]
    command += ["--extra01", "--steps 4 --samples 4", "--extra02", prm]
    command += ["--extra", "--passes 1 --interval 0.5 --samples 3 --steps 4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return tmp_path, command, env


def test_a_killed_study_goes_on_without_repeating_finished_rows(drivers):
    folder, command, env = drivers
    command += ["--only", "warm-up", "Random-2", "Top-2", "base"]
    table, seed = folder / "runs/study/rows.jsonl", folder / "runs/study/seed0"
    quiet = {"stdout": subprocess.DEVNULL, "start_new_session": True}
    driver = subprocess.Popen(command, cwd=folder, env=env, **quiet)
    while not (seed / "Top-2/03_self_evolve/iter_01").exists():
        assert driver.poll() is None
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    first = common.read_jsonl(table)
    assert [row["name"] for row in first] == ["warm-up", "Random-2"]
    finished = [seed / "02_train_prm/metrics.json"]
    finished.append(seed / "Random-2/03_self_evolve/model/model.safetensors")
    made = [path.stat().st_mtime_ns for path in finished]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = common.read_jsonl(table)
    # in the order of the paper's tables
    assert [row["name"] for row in rows] == ["base", "warm-up", "Random-2", "Top-2"]
    assert rows[1:3] == first and [path.stat().st_mtime_ns for path in finished] == made
    for row in rows:
        assert {split: len(v) for split, v in row["verdicts"].items()} == {"test": 6, "ood": 4}
    assert rows[3]["samples"] == 32 * 3
    changed = [text.replace("--steps 4", "--steps 5") for text in command]
    other = subprocess.run(changed, cwd=folder, env=env, capture_output=True, text=True)
    assert other.returncode and "made with" in other.stderr
    assert common.read_jsonl(table) == rows


def test_two_drivers_share_a_study_and_a_refused_row_stops_no_other(drivers):
    folder, command, env = drivers
    command += ["--only", "PRM > alpha", "Random-2", "warm-up", "base"]
    # no reward is above 1, so that row has nothing to train on
    command[command.index("--extra") + 1] += " --alpha 1.0"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=folder, env=env, **pipes) for _ in range(2)]
    errors = [driver.communicate()[1] for driver in both]
    rows = common.read_jsonl(folder / "runs/study/rows.jsonl")
    assert sorted(row["name"] for row in rows) == ["Random-2", "base", "warm-up"], errors
    for driver, error in zip(both, errors):
        assert driver.returncode and "refused, or still with another driver" in error
        assert "'PRM > alpha', 0" in error
    assert any("error: PRM > alpha, seed 0: " in error for error in errors)


def test_a_row_is_judged_anew_where_its_prompts_are_others(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path / "data/toy")
    monkeypatch.chdir(tmp_path)
    args = evolve.Args(runs="runs/row", device="cpu", max_new_tokens=8)
    first = study.greedy_verdicts("data/toy/base", args)
    assert {split: len(verdicts) for split, verdicts in first.items()} == {"test": 6, "ood": 4}
    assert study.greedy_verdicts("data/toy/base", args) == first
    shutil.copy("data/toy/val.jsonl", "data/toy/test.jsonl")
    with pytest.raises(common.InputError, match="was made otherwise: input test was"):
        study.greedy_verdicts("data/toy/base", args)


def test_study_rows_name_flags_that_stage_03_knows():
    for name, row in study.ROWS.items():
        if row.flags is not None:
            args = study.parsed("03_self_evolve", row.flags.split())
            assert evolve.check_flags(args) >= 1, name
    assert len({study.folder_of(name) for name in study.ROWS}) == len(study.ROWS)


def test_the_study_compares_rows_that_it_has():
    pairs = [*study.DECIDING, *study.FURTHER]
    assert {name for pair in pairs for name in pair} <= set(study.ROWS)
    assert len(set(pairs)) == len(pairs)
    assert set(study.MANY_SEEDS) | set(study.COMPARED) <= set(study.ROWS)


def test_the_version_of_the_code_is_that_of_the_stages_without_their_docstrings(
    tmp_path, monkeypatch
):
    names = ("01_warmup", "02_train_prm", "03_self_evolve", "common")
    for name in names:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    now = study.code_version()
    monkeypatch.setattr(study.common, "__file__", str(tmp_path / "common.py"))
    path = tmp_path / "03_self_evolve.py"
    text = path.read_text()
    path.write_text(text.replace('"""Stage 03: ', '"""Another word: '))
    study.code_version.cache_clear()
    assert study.code_version() == now
    path.write_text(text.replace("7e-5", "8e-5"))
    study.code_version.cache_clear()
    assert study.code_version() != now
    monkeypatch.undo()
    study.code_version.cache_clear()


def test_a_row_may_take_another_prm_made_of_the_same_warm_up(drivers):
    folder, command, env = drivers
    rules = ("Top-2, likelihood in the PRM", "Top-2 by likelihood", "Top-2 by the chain checker")
    done = subprocess.run(
        [*command, "--only", *rules], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seed = folder / "runs/study/seed0"
    mixed = json.loads((seed / "mixed/02_train_prm/model/prm.json").read_text())
    assert (mixed["mark_weight"], mixed["likelihood"]) == (0.1, 6.0) and len(mixed["marks"]) == 2
    assert json.loads((seed / "likelihood/prm.json").read_text())["marks"] is None
    labels = [(seed / f"{run}02_train_prm/steps.jsonl") for run in ("", "mixed/")]
    scores = [[row["labels"] for row in common.read_jsonl(path)] for path in labels]
    assert scores[0] == scores[1]
    rows = common.read_jsonl(folder / "runs/study/rows.jsonl")
    assert [row["name"] for row in rows] == list(rules)
    assert [look["iteration"] for look in rows[0]["looks"]] == [2]
    checked = common.read_jsonl(
        seed / study.folder_of(rules[2]) / "03_self_evolve/iter_01/samples.jsonl"
    )
    assert {score for row in checked for score in row["step_scores"]} <= {0.0, 1.0}


def test_properties_of_a_run_are_measured_on_validation(drivers):
    folder, command, env = drivers
    done = subprocess.run([*command, "--only", "warm-up"], cwd=folder, env=env)
    assert done.returncode == 0
    asked = [sys.executable, str(ROOT / "tests/study.py"), "--properties", "runs/study/seed0"]
    done = subprocess.run(asked, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("base: greedy", "warm-up: Pass@16", "PRM: right chains among Top-2 / all"):
        assert f"| {name} | " in done.stdout
