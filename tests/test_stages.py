"""The four scripts as a user runs them, on a small toy world: what they write, what they refuse, and kill -9 at many points."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import common
from conftest import ROOT, stage

FLAGS = {
    "01_warmup": "--steps 8 --samples 6 --save_every 3 --chunk 16",
    "02_train_prm": "--prompts 30 --samples 6 --rollouts 2 --epochs 1 --held_out 0.4 --save_every 2 --chunk 8 --val_samples 4 --batch_size 8",
    "03_self_evolve": "--passes 1.5 --steps 9 --samples 3 --interval 0.5 --search_prompts 4 --search_grid 0.5 1.0 --save_every 2 --chunk 8",
    "04_eval": "--samples 3 --resamples 50 --chunk 8",
}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def run(cwd, name, *flags):
    return subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *flags], cwd=cwd, env=ENV, capture_output=True, text=True)


def place(folder, world):
    """A working directory with the default paths: data/toy and tests/toy.py."""
    shutil.copytree(world, folder / "data/toy")
    (folder / "tests").symlink_to(ROOT / "tests")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, world):
    """A folder in which all four scripts have run, unbroken, and what they printed."""
    cwd, printed = place(tmp_path_factory.mktemp("finished"), world), {}
    for name, flags in FLAGS.items():
        done = run(cwd, name, "--device", "cpu", *flags.split())
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
        printed[name] = done.stdout
    return cwd, printed


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_warmup_keeps_right_distinct_responses(finished):
    out = finished[0] / "runs/toy/01_warmup"
    samples, kept, metrics = rows(out / "samples.jsonl"), rows(out / "sft.jsonl"), json.loads((out / "metrics.json").read_text())
    gold = {row["id"]: row for row in rows(finished[0] / "data/toy/train.jsonl")}
    assert len(samples) == 32 * 6 == len({row["seed"] for row in samples})
    for row in kept:
        assert row["finished"] and row["answer"] == gold[row["id"]]["answer"]
        assert row["response"].strip().split("\n")[-1].strip() == f"Answer : {row['answer']}"
    assert len({(row["id"], tuple(row["token_ids"])) for row in kept}) == len(kept) == metrics["kept"] > 0
    assert metrics["right"] == pytest.approx(sum(row["correct"] for row in samples) / 192) and metrics["steps"] == 8


def test_prm_labels_follow_from_the_rollouts(finished):
    out = finished[0] / "runs/toy/02_train_prm"
    steps, rollouts, samples = rows(out / "steps.jsonl"), rows(out / "rollouts.jsonl"), rows(out / "samples.jsonl")
    whole = {(row["id"], row["sample"]): row for row in samples}
    for step in steps:
        ids = whole[step["id"], step["sample"]]["token_ids"]
        if step["end"] == len(ids):
            assert step["soft"] == float(whole[step["id"], step["sample"]]["correct"])
        else:
            mine = [r for r in rollouts if r["id"] == step["id"] and r["prefix_length"] == step["end"] and r["token_ids"][:step["end"]] == ids[:step["end"]]]
            assert len(mine) == 2 and step["soft"] == sum(r["correct"] for r in mine) / 2
    assert 0 <= json.loads((out / "metrics.json").read_text())["held_out"]["step_auc"] <= 1
    assert json.loads((out / "model/prm.json").read_text())["marks"] and (out / "model/model.safetensors").exists()


def test_evolving_selects_at_most_two_right_responses_by_min_step_reward(finished):
    out = finished[0] / "runs/toy/03_self_evolve"
    metrics = rows(out / "metrics.jsonl")
    assert [row["iteration"] for row in metrics] == [0, 1, 2, 3] and [row["steps"] for row in metrics[1:]] == [3, 6, 9]
    for row in metrics[1:]:
        samples, selected = (rows(out / f"iter_{row['iteration']:02d}/{name}.jsonl") for name in ("samples", "selected"))
        assert len(samples) == 16 * 3 == row["samples"] and len(selected) == row["selected"] and row["prompts"] == 16
        assert row["trained"] == min(len(selected), 3 * 16) and row["extra_steps"] == 0  # three steps of 16 responses
        for sample in samples:
            assert sample["reward"] == (min(sample["step_scores"]) if sample["correct"] else 0.0) and sample["iteration"] == row["iteration"]
        for prompt in {s["id"] for s in selected}:
            right = {tuple(s["token_ids"]): s["reward"] for s in samples if s["id"] == prompt and s["correct"]}
            assert [s["reward"] for s in selected if s["id"] == prompt] == sorted(right.values(), reverse=True)[:2]


def test_metrics_and_temperature_follow_from_the_samples(finished):
    out = finished[0] / "runs/toy/03_self_evolve"
    for row in rows(out / "metrics.jsonl"):
        folder = out / f"iter_{row['iteration']:02d}"
        greedy, samples = rows(folder / "val_greedy.jsonl"), rows(folder / "val_samples.jsonl")
        by_prompt = [[s for s in samples if s["id"] == g["id"]] for g in greedy]
        assert row["greedy_accuracy"] == sum(g["correct"] for g in greedy) / len(greedy)
        assert row["pass_at_k"] == sum(any(s["correct"] for s in p) for p in by_prompt) / len(greedy)
        top = [sorted(p, key=lambda s: (-s["reward"], s["sample"]))[:2] for p in by_prompt]
        assert row["reward_pass_at_2"] == sum(any(s["correct"] for s in p) for p in top) / len(greedy)
    (search,) = rows(out / "temperature.jsonl")  # after iteration 2; nothing follows iteration 3
    assert search["iteration"] == 2 and [c["temperature"] for c in search["curves"]["all"]] == [0.5, 1.0]
    drawn = rows(out / "iter_02/search.jsonl")
    for curve, point in zip(search["curves"]["all"], search["curves"]["pass_at_k"]):
        of = {}
        for row in drawn:
            of.setdefault(row["id"], []).append(row) if row["temperature"] == curve["temperature"] else None
        top = [sorted(mine, key=lambda s: (-s["reward"], s["sample"]))[:2] for mine in of.values()]
        assert curve["objective"] == sum(any(s["correct"] for s in two) for two in top) / 4  # Reward-Pass@2 of the search's 4 prompts
        assert point["pass_at_k"] == sum(any(s["correct"] for s in mine) for mine in of.values()) / 4
    best = max(c["objective"] for c in search["curves"]["all"])
    assert search["choice"]["all"] == max(c["temperature"] for c in search["curves"]["all"] if c["objective"] == best)  # a tie goes to the nearest to 1.0
    assert rows(out / "metrics.jsonl")[3]["temperature"] == search["choice"]["all"]


def test_evaluation_reports_every_policy_with_counts_and_intervals(finished):
    out = finished[0] / "runs/toy/04_eval"
    predictions, report = rows(out / "predictions.jsonl"), json.loads((out / "report.json").read_text())
    assert list(report) == ["test", "ood", "prm"] and len(predictions) == (6 + 4) * 3 * (1 + 3)
    for split, policies in list(report.items())[:2]:
        assert list(policies) == ["base", "warm-up", "evolved"]  # M-STaR but for its interval
        for name, figures in policies.items():
            mine = [p for p in predictions if (p["split"], p["policy"]) == (split, name)]
            n = {"test": 6, "ood": 4}[split]
            assert figures["greedy"]["mean"] == pytest.approx(sum(p["correct"] for p in mine if p["temperature"] == 0) / n)
            assert figures["sample"]["mean"] == pytest.approx(sum(p["correct"] for p in mine if p["temperature"] > 0) / n / 3)
            assert figures["unparsable"]["mean"] == pytest.approx(sum(p["answer"] is None for p in mine if p["temperature"] > 0) / n / 3)
            assert all(f["low"] <= f["mean"] <= f["high"] and f["n"] == n for f in figures.values())
    assert list(report["prm"]["verifier"]) == ["1", "2", "3"] and report["prm"]["verifier"]["1"]["best_of_n"] == report["prm"]["verifier"]["1"]["majority"]
    assert (out / "prm.png").read_bytes()[:4] == b"\x89PNG" and "PRM-weighted vote" in (out / "report.md").read_text() and (out / "dynamics.png").read_bytes()[:4] == b"\x89PNG"


def test_every_stage_says_what_to_run_next(finished):
    assert [name for name, text in finished[1].items() if "next: python 0" in text] == ["01_warmup", "02_train_prm", "03_self_evolve"]


def contents(cwd):
    """Everything in runs/ in a comparable form: weights as tensors, JSON without seconds."""
    found = {}
    for path in sorted((cwd / "runs").rglob("*")):
        if path.suffix == ".safetensors":
            found[str(path.relative_to(cwd))] = {k: v.tolist() for k, v in load_file(path).items()}
        elif path.suffix in (".json", ".jsonl") and path.is_file():
            lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
            found[str(path.relative_to(cwd))] = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
        elif path.is_file() and path.name != ".lock":
            found[str(path.relative_to(cwd))] = path.read_bytes()
    return found


KILLER = r"""
import json, os, random, runpy, signal, sys, time
root, flags = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, root)
import torch, transformers, sklearn.metrics, matplotlib.figure, common
from transformers.models.idefics3 import modeling_idefics3, processing_idefics3
torch.set_num_threads(1)
rng, kills = random.Random(0), 0
def state():
    found = []
    for folder, _, names in os.walk("runs"):
        for name in names:
            try: found.append((folder, name, os.path.getsize(os.path.join(folder, name))))
            except OSError: pass
    return frozenset(found)
for name, line in flags.items():
    seen, mine = {state()}, 0
    while True:
        pid = os.fork()
        if pid == 0:
            sys.argv = [name + ".py", "--device", "cpu", *line.split()]
            sys.stdout = open(os.devnull, "w")
            try: runpy.run_path(os.path.join(root, name + ".py"), run_name="__main__")
            except BaseException as error: os.write(2, repr(error).encode()); os._exit(1)
            os._exit(0)
        status = None
        while status is None:
            done, code = os.waitpid(pid, os.WNOHANG)
            if done: status = code; break
            now = state()
            if now not in seen:
                seen.add(now)
                if mine < 9 and rng.random() < 0.4:
                    time.sleep(rng.random() * 0.02)
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
        if os.WIFSIGNALED(status): kills += 1; mine += 1; os.waitstatus_to_exitcode(status); continue
        if status != 0: sys.exit(f"{name} failed")
        break
print(kills)
"""


def test_a_run_killed_at_many_points_ends_in_the_same_files_as_an_unbroken_one(finished, tmp_path, world):
    cwd = place(tmp_path, world)
    done = subprocess.run([sys.executable, "-c", KILLER, str(ROOT), json.dumps(FLAGS)], cwd=cwd, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 20
    killed, unbroken = contents(cwd), contents(finished[0])
    assert killed.keys() == unbroken.keys()
    assert [path for path in unbroken if killed[path] != unbroken[path]] == []


def test_a_finished_stage_run_again_changes_nothing(finished):
    before = contents(finished[0])
    done = run(finished[0], "03_self_evolve", "--device", "cpu", *FLAGS["03_self_evolve"].split())
    assert done.returncode == 0 and "Reward-Pass@2" in done.stdout and contents(finished[0]) == before


def test_errors_are_one_sentence_and_exit_code_1(finished, tmp_path, world):
    done = run(finished[0], "01_warmup", "--device", "cpu", "--steps", "9")
    assert done.returncode == 1 and done.stderr.strip().startswith("error: ") and "flag steps was 8, now 9" in done.stderr
    done = run(place(tmp_path, world), "02_train_prm")
    assert done.returncode == 1 and "run 01_warmup.py first" in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_loses_nothing_that_was_written(finished, tmp_path, world):
    cwd, flags = place(tmp_path, world), ["--device", "cpu", *FLAGS["01_warmup"].split()]
    command = f"ulimit -f 40; exec {sys.executable} {ROOT}/01_warmup.py {' '.join(flags)}"  # no file over 40 KiB
    done = subprocess.run(["bash", "-c", command], cwd=cwd, env=ENV, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: could not write")
    assert run(cwd, "01_warmup", *flags).returncode == 0
    unbroken = {k: v for k, v in contents(finished[0]).items() if "01_warmup" in k}
    assert contents(cwd) == unbroken


def in_process(name, cwd, monkeypatch, **flags):
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(common, "LOCKS", [])
    module = stage(name)
    module.main(module.Args(device="cpu", **flags))


def test_no_right_sample_at_all_stops_warmup_with_a_sentence(tiny, world, tmp_path, monkeypatch):
    cwd = place(tmp_path, world)
    data = [{**row, "answer": "999", "choices": None} for row in rows(cwd / "data/toy/train.jsonl")]
    common.write_jsonl(cwd / "data/toy/train.jsonl", data)
    with pytest.raises(common.InputError, match="none of 32 sampled responses is right"):
        in_process("01_warmup", cwd, monkeypatch, model=str(tiny), samples=1, max_new_tokens=8)


def test_no_right_sample_in_an_iteration_stops_evolving_with_a_sentence(tiny, world, tmp_path, monkeypatch):
    cwd = place(tmp_path, world)
    common.write_jsonl(cwd / "data/toy/train.jsonl", [{**row, "answer": "999", "choices": None} for row in rows(cwd / "data/toy/train.jsonl")])
    shutil.copytree(tiny, cwd / "runs/toy/01_warmup/model")
    shutil.copytree(tiny, cwd / "runs/toy/02_train_prm/model")
    common.write_json(cwd / "runs/toy/02_train_prm/model/prm.json", {"marks": [3, 4]})
    with pytest.raises(common.InputError, match="iteration 1: of 16 samples 0 are right"):
        in_process("03_self_evolve", cwd, monkeypatch, samples=1, interval=0.5, max_new_tokens=8)


def test_prompts_for_the_prm_and_for_its_validation_that_share_ids_are_refused(finished, tmp_path, monkeypatch):
    cwd = finished[0]
    with pytest.raises(common.InputError, match="train.jsonl line 1: id 'train-00000' stands already in data/toy/train.jsonl line 1; rename one"):  # else the image and the answer of one would stand for the other
        in_process("02_train_prm", cwd, monkeypatch, runs=str(tmp_path), val="data/toy/train.jsonl", policy="runs/toy/01_warmup/model")
    with pytest.raises(common.InputError, match="holds 0 out"):
        in_process("02_train_prm", cwd, monkeypatch, runs=str(tmp_path / "b"), held_out=0.0, policy="runs/toy/01_warmup/model")


def test_a_report_on_steps_that_are_all_good_or_on_none_has_no_auc_and_is_valid_json():
    report = stage("02_train_prm").step_report
    assert report([{"soft": 1.0, "hard": 1.0, "score": 0.75}])["step_auc"] is None
    assert json.loads(json.dumps(report([]), allow_nan=False)) == {"steps": 0, "share_good": 0.0, "step_auc": None, "step_auc_hard": None, "calibration_error": 0.0, "calibration": []}


def test_a_finished_evaluation_is_not_refused_because_the_list_of_the_studys_comparisons_grew(finished, monkeypatch, capsys):
    in_process("04_eval", finished[0], monkeypatch, samples=3, resamples=50, against=["A/B"])
    assert "| greedy accuracy" in capsys.readouterr().out
