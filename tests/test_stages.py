"""The four scripts as a user runs them on a small toy world, and kill -9 at many points."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import READ_AS, ROOT, stage
from safetensors.torch import load_file

import common

FLAGS = {
    "01_warmup": "--steps 8 --samples 6 --save_every 3 --chunk 16",
    "02_train_prm": "--prompts 30 --samples 6 --rollouts 2 --epochs 1 --held_out 0.4 "
    "--save_every 2 --chunk 8 --val_samples 4 --batch_size 8",
    "03_self_evolve": "--passes 1.5 --steps 9 --samples 3 --interval 0.5 --search_prompts 4 "
    "--search_grid 0.5 1.0 --save_every 2 --chunk 8",
    "04_eval": "--samples 3 --resamples 50 --chunk 8",
}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
ENV |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def command_of(name: str, *flags: str) -> list[str]:
    """The command of a script."""
    return [sys.executable, str(ROOT / f"{name}.py"), *flags]


def run(cwd, name: str, *flags: str) -> subprocess.CompletedProcess:
    """A script to its end, in a working directory."""
    command = command_of(name, *flags)
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True)


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


def rows(path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def of_prompt(samples: list[dict], prompt: str) -> list[dict]:
    """The rows of one prompt."""
    return [row for row in samples if row["id"] == prompt]


def best_two(samples: list[dict]) -> list[dict]:
    """The two samples of a prompt with the largest rewards, of equal ones the first."""
    return sorted(samples, key=lambda row: -row["reward"])[:2]


def any_right(samples: list[dict]) -> bool:
    """Whether one of the samples is right."""
    return any(row["correct"] for row in samples)


# ---- what the stages write


def test_warmup_keeps_right_distinct_responses(finished):
    out = finished[0] / "runs/toy/01_warmup"
    samples, kept = rows(out / "samples.jsonl"), rows(out / "sft.jsonl")
    metrics = json.loads((out / "metrics.json").read_text())
    gold = {row["id"]: row for row in rows(finished[0] / "data/toy/train.jsonl")}
    assert len(samples) == 32 * 6 == len({row["seed"] for row in samples})
    for row in kept:
        assert row["finished"] and row["answer"] == gold[row["id"]]["answer"]
        asked, said = row["messages"]
        assert said["content"].strip().split("\n")[-1].strip() == f"Answer : {row['answer']}"
        assert asked["content"].startswith(gold[row["id"]]["question"])
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert row["images"] == [str(finished[0] / "data/toy" / gold[row["id"]]["image"])]
    distinct = {(row["id"], tuple(row["token_ids"])) for row in kept}
    assert len(distinct) == len(kept) == metrics["kept"] > 0
    assert max(len(of_prompt(kept, row["id"])) for row in kept) <= 2  # --keep
    assert metrics["right"] == pytest.approx(sum(row["correct"] for row in samples) / 192)
    assert metrics["steps"] == 8


def test_prm_labels_follow_from_the_rollouts(finished):
    out = finished[0] / "runs/toy/02_train_prm"
    samples = {(row["id"], row["sample"]): row for row in rows(out / "samples.jsonl")}
    right: dict = {}  # of every prefix, whether its completions are right
    for row in rows(out / "rollouts.jsonl"):
        begun = (row["id"], *row["token_ids"][: row["prefix_length"]])
        right.setdefault(begun, []).append(row["correct"])
    responses, metrics = rows(out / "steps.jsonl"), json.loads((out / "metrics.json").read_text())
    assert responses and len(responses) == len({(r["id"], r["sample"]) for r in responses})
    for row in responses:
        sample = samples[row["id"], row["sample"]]
        ids = sample["token_ids"]
        assert row["token_ids"] == ids and row["ends"][-1] == len(ids)
        assert len(row["ends"]) == len(row["labels"]) == len(row["steps_with_score"])
        assert row["completions"] == [step["step"] for step in row["steps_with_score"]]
        shares = []
        for end in row["ends"][:-1]:
            completions = right[(row["id"], *ids[:end])]
            assert len(completions) == 2
            shares.append(sum(completions) / 2)
        assert row["labels"] == [*shares, float(sample["correct"])]
    held = {row["id"] for row in responses if row["held_out"]}
    assert held and held.isdisjoint(row["id"] for row in responses if not row["held_out"])
    scored = rows(out / "held_out.jsonl")
    assert [{k: v for k, v in row.items() if k != "scores"} for row in scored] == [
        row for row in responses if row["held_out"]
    ]
    assert all(len(row["scores"]) == len(row["labels"]) for row in scored)
    assert 0 <= metrics["held_out"]["step_auc"] <= 1
    assert metrics["held_out"]["steps"] == sum(len(row["labels"]) for row in scored)
    val = rows(out / "val_samples.jsonl")
    assert len(val) == 4 * 4 and all("step_scores" in row and "reward" in row for row in val)
    assert json.loads((out / "model/prm.json").read_text())["marks"]
    assert (out / "model/model.safetensors").exists()


def test_evolving_selects_at_most_two_right_responses_by_min_step_reward(finished):
    out = finished[0] / "runs/toy/03_self_evolve"
    metrics = rows(out / "metrics.jsonl")
    assert [row["iteration"] for row in metrics] == [0, 1, 2, 3]
    assert [row["steps"] for row in metrics[1:]] == [3, 6, 9]
    for row in metrics[1:]:
        folder = out / f"iter_{row['iteration']:02d}"
        samples, selected = rows(folder / "samples.jsonl"), rows(folder / "selected.jsonl")
        assert len(samples) == 16 * 3 == row["samples"] and row["prompts"] == 16
        assert len(selected) == row["selected"] and row["extra_steps"] == 0
        assert row["trained"] == min(len(selected), 3 * 16)  # three steps of 16 responses
        for sample in samples:
            reward = min(sample["step_scores"]) if sample["correct"] else 0.0
            assert sample["reward"] == reward and sample["iteration"] == row["iteration"]
        for prompt in {sample["id"] for sample in samples}:
            right = {}
            for sample in of_prompt(samples, prompt):
                if sample["correct"]:
                    right[tuple(sample["token_ids"])] = sample["reward"]
            chosen = [sample["reward"] for sample in of_prompt(selected, prompt)]
            assert chosen == sorted(right.values(), reverse=True)[:2]


def test_metrics_follow_from_the_samples(finished):
    out = finished[0] / "runs/toy/03_self_evolve"
    for row in rows(out / "metrics.jsonl"):
        folder = out / f"iter_{row['iteration']:02d}"
        greedy, samples = rows(folder / "val_greedy.jsonl"), rows(folder / "val_samples.jsonl")
        prompts = [of_prompt(samples, first["id"]) for first in greedy]
        assert len(greedy) == 4 and [len(drawn) for drawn in prompts] == [3] * 4
        assert row["greedy_accuracy"] == sum(first["correct"] for first in greedy) / 4
        assert row["sample_accuracy"] == sum(drawn["correct"] for drawn in samples) / 12
        assert row["pass_at_k"] == sum(map(any_right, prompts)) / 4
        assert row["reward_pass_at_2"] == sum(any_right(best_two(drawn)) for drawn in prompts) / 4


def test_the_temperature_follows_from_the_search(finished):
    out = finished[0] / "runs/toy/03_self_evolve"
    (search,) = rows(out / "temperature.jsonl")  # after iteration 2; nothing follows iteration 3
    assert (search["iteration"], search["was"]) == (2, 1.0)
    assert search["objective"] == "reward_pass_at_2"
    assert [point["temperature"] for point in search["curve"]] == [0.5, 1.0]
    drawn = rows(out / "iter_02/search.jsonl")
    assert len(drawn) == 2 * 4 * 3
    for point in search["curve"]:
        tried = [row for row in drawn if row["temperature"] == point["temperature"]]
        prompts = [of_prompt(tried, prompt) for prompt in {row["id"] for row in tried}]
        assert len(prompts) == 4
        assert point["reward_pass_at_2"] == sum(any_right(best_two(own)) for own in prompts) / 4
        assert point["pass_at_k"] == sum(map(any_right, prompts)) / 4
    best = max(point["reward_pass_at_2"] for point in search["curve"])
    highest = [p["temperature"] for p in search["curve"] if p["reward_pass_at_2"] == best]
    assert search["chosen"] == max(highest)  # a tie goes to the nearest to 1.0
    metrics = rows(out / "metrics.jsonl")
    assert [row["temperature"] for row in metrics] == [1.0, 1.0, 1.0, search["chosen"]]
    assert [row["extra_samples"] for row in metrics] == [0, 0, 24, 0]


def test_evaluation_reports_every_policy_with_counts_and_intervals(finished):
    out = finished[0] / "runs/toy/04_eval"
    report = json.loads((out / "report.json").read_text())
    assert {"test", "ood", "prm"} <= report.keys()
    for split, n in (("test", 6), ("ood", 4)):
        assert list(report[split]) == ["base", "warm-up", "evolved"]  # M-STaR but for --interval
        for name, figures in report[split].items():
            greedy = rows(out / f"predictions/{name}_{split}_greedy.jsonl")
            samples = rows(out / f"predictions/{name}_{split}_samples.jsonl")
            assert len(greedy) == n and len(samples) == 3 * n
            means = {name: figure["mean"] for name, figure in figures.items()}
            assert means["greedy"] == pytest.approx(sum(row["correct"] for row in greedy) / n)
            right = sum(row["correct"] for row in samples)
            assert means["sample"] == pytest.approx(right / n / 3)
            unread = sum(row["answer"] is None for row in samples)
            assert means["unparsable"] == pytest.approx(unread / n / 3)
            prompts = [of_prompt(samples, row["id"]) for row in greedy]
            assert means["pass_at_k"] == pytest.approx(sum(map(any_right, prompts)) / n)
            for figure in figures.values():
                assert figure["low"] <= figure["mean"] <= figure["high"] and figure["n"] == n
    verifier = report["prm"]["verifier"]
    assert list(verifier) == ["1", "2", "3"]
    assert verifier["1"]["best_of_n"] == verifier["1"]["majority"]
    assert (out / "dynamics.png").read_bytes()[:4] == b"\x89PNG"
    assert "PRM-weighted vote" in (out / "report.md").read_text()


def test_every_stage_says_what_to_run_next(finished):
    following = [name for name, text in finished[1].items() if "next: python 0" in text]
    assert following == ["01_warmup", "02_train_prm", "03_self_evolve"]


# ---- kill -9, interruptions, repetitions


def contents(cwd) -> dict:
    """Everything in runs/ in a comparable form: tensors, no seconds, relative paths."""
    found = {}
    for path in sorted((cwd / "runs").rglob("*")):
        name = str(path.relative_to(cwd))
        if path.is_dir():
            found[name] = "folder"
        elif path.suffix == ".safetensors":
            found[name] = {key: value.tolist() for key, value in load_file(path).items()}
        elif path.suffix in (".json", ".jsonl"):
            text = path.read_text().replace(f"{cwd}/", "")
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            values = [json.loads(line) for line in lines]
            for value in values:
                value.pop("seconds", None)
            if path.name == "digests.json":  # some files hold the folder's name
                values = [list(value) for value in values]
            found[name] = values
        elif path.name != ".lock":
            found[name] = path.read_bytes()
    return found


KILLER = r"""
import json, os, random, runpy, signal, sys, time
root, flags = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, root)
import torch, transformers, sklearn.metrics, matplotlib.figure, pandas, common
from transformers.models.idefics3 import modeling_idefics3, processing_idefics3
torch.set_num_threads(1)
rng, kills = random.Random(0), {}


def state():
    found = []
    for folder, _, names in os.walk("runs"):
        for name in names:
            try:
                found.append((folder, name, os.path.getsize(os.path.join(folder, name))))
            except OSError:
                pass
    return frozenset(found)


for name, line in flags.items():
    seen, kills[name], over = {state()}, 0, False
    while not over:
        pid = os.fork()
        if pid == 0:
            sys.argv = [name + ".py", "--device", "cpu", *line.split()]
            sys.stdout = open(os.devnull, "w")
            try:
                runpy.run_path(os.path.join(root, name + ".py"), run_name="__main__")
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
            os._exit(0)
        ended = 0
        while not ended:
            ended, status = os.waitpid(pid, os.WNOHANG)
            now = state()
            if not ended and now not in seen:
                seen.add(now)
                if kills[name] < 9 and rng.random() < 0.4:
                    time.sleep(rng.random() * 0.02)
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
        if os.WIFSIGNALED(status):
            kills[name] += 1
        elif status != 0:
            sys.exit(f"{name} failed")
        else:
            over = True
print(json.dumps(kills))
"""


def test_a_run_killed_at_many_points_ends_in_the_files_of_an_unbroken_one(
    finished, tmp_path, world
):
    cwd = place(tmp_path, world)
    command = [sys.executable, "-c", KILLER, str(ROOT), json.dumps(FLAGS)]
    done = subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kills = json.loads(done.stdout.splitlines()[-1])
    assert sum(kills.values()) >= 20 and min(kills.values()) >= 1, kills
    killed, unbroken = contents(cwd), contents(finished[0])
    assert killed.keys() == unbroken.keys()
    assert [path for path in unbroken if killed[path] != unbroken[path]] == []
    left = [name for name in unbroken if ".part" in name or "/batch_" in name]
    assert left == []


@pytest.mark.parametrize("name", FLAGS)
def test_a_finished_stage_run_again_changes_nothing(finished, name):
    before = contents(finished[0])
    done = run(finished[0], name, "--device", "cpu", *FLAGS[name].split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1:] == finished[1][name].splitlines()[-1:]
    assert contents(finished[0]) == before


def test_an_interrupted_stage_says_so_in_a_line_and_goes_on(tmp_path, world):
    cwd, flags = place(tmp_path, world), ["--device", "cpu", "--chunk", "1", "--steps", "2"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    stopped = subprocess.Popen(command_of("01_warmup", *flags), cwd=cwd, env=ENV, **pipes)
    parts = cwd / "runs/toy/01_warmup/samples.jsonl.parts"
    while not parts.exists() or len(list(parts.iterdir())) < 3:
        assert stopped.poll() is None
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=60)
    assert stopped.returncode != 0 and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("interrupted: ")
    assert run(cwd, "01_warmup", *flags).returncode == 0


@pytest.mark.parametrize("kib", [40, 1500])  # samples do not fit; the training state does not
def test_a_full_disk_loses_nothing_that_was_written(finished, tmp_path, world, kib):
    cwd, flags = place(tmp_path, world), ["--device", "cpu", *FLAGS["01_warmup"].split()]
    command = " ".join(command_of("01_warmup", *flags))
    limited = ["bash", "-c", f"ulimit -f {kib}; exec {command}"]  # no larger file
    done = subprocess.run(limited, cwd=cwd, env=ENV, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: could not write")
    assert (cwd / "runs/toy/01_warmup/samples.jsonl").exists() == (kib > 40)
    assert run(cwd, "01_warmup", *flags).returncode == 0
    unbroken = {k: v for k, v in contents(finished[0]).items() if "01_warmup" in k}
    assert {k: v for k, v in contents(cwd).items() if "01_warmup" in k} == unbroken


# ---- what the stages refuse


@pytest.mark.parametrize(
    "name, flags, says",
    [
        ("01_warmup", "--steps 9", "flag steps was 8, now 9"),
        ("02_train_prm", "--runs other", "run 01_warmup.py first"),
        ("03_self_evolve", "--interval 0", "error: --interval: 0.0 is not above 0"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_1(finished, name, flags, says):
    done = run(finished[0], name, "--device", "cpu", *flags.split())
    (sentence,) = done.stderr.strip().splitlines()
    assert done.returncode == 1 and sentence.startswith("error: ") and says in sentence


def test_an_unknown_flag_ends_with_exit_code_2(tmp_path):
    done = run(tmp_path, "01_warmup", "--stepps", "9")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "--stepps" in last and list(tmp_path.iterdir()) == []


def in_process(name: str, cwd, monkeypatch, **flags) -> None:
    """A stage in this process."""
    monkeypatch.chdir(cwd)
    module = stage(name)
    try:
        module.main(module.Args(device="cpu", **flags))
    finally:
        common.close_runs()


@pytest.fixture
def unanswerable(tmp_path, world, tiny):
    """A folder where a random model is policy and PRM, and no answer can be right."""
    cwd = place(tmp_path, world)
    data = rows(cwd / "data/toy/train.jsonl")
    for row in data:
        row |= {"answer": "999", "choices": None}
    common.write_jsonl(cwd / "data/toy/train.jsonl", data)
    for name in ("01_warmup", "02_train_prm"):
        shutil.copytree(tiny, cwd / f"runs/toy/{name}/model")
    common.write_json(cwd / "runs/toy/02_train_prm/model/prm.json", READ_AS)
    return cwd


def test_no_right_sample_at_all_stops_warmup_with_a_sentence(unanswerable, tiny, monkeypatch):
    flags = {"runs": "runs/new", "model": str(tiny), "samples": 1, "max_new_tokens": 8}
    with pytest.raises(common.InputError, match="none of .*32 sampled responses is right"):
        in_process("01_warmup", unanswerable, monkeypatch, **flags)


def test_no_right_sample_in_an_iteration_stops_evolving_with_a_sentence(unanswerable, monkeypatch):
    flags = {"samples": 1, "interval": 0.5, "max_new_tokens": 8}
    with pytest.raises(common.InputError, match="iter_01: --select top_k keeps none"):
        in_process("03_self_evolve", unanswerable, monkeypatch, **flags)
    assert not (unanswerable / "runs/toy/03_self_evolve/iter_01/selected.jsonl").exists()


def test_no_mixed_prompt_stops_the_prm_with_a_sentence(unanswerable, monkeypatch):
    flags = {"runs": "runs/new", "policy": "runs/toy/01_warmup/model", "samples": 1}
    with pytest.raises(common.InputError, match="no prompt has both right and wrong samples"):
        in_process("02_train_prm", unanswerable, monkeypatch, max_new_tokens=8, **flags)


def test_prompts_for_the_prm_and_for_its_validation_that_share_ids_are_refused(
    finished, tmp_path, monkeypatch
):
    cwd, policy = finished[0], {"policy": "runs/toy/01_warmup/model"}
    shared = "train.jsonl line 1: id 'train-00000' stands already in data/toy/train.jsonl line 1"
    with pytest.raises(common.InputError, match=shared):  # whose image and answer would count?
        flags = {"runs": str(tmp_path), "val": "data/toy/train.jsonl"}
        in_process("02_train_prm", cwd, monkeypatch, **flags, **policy)


def test_a_report_on_steps_that_are_all_good_has_no_auc_and_is_valid_json():
    report = stage("02_train_prm").step_report
    assert json.loads(json.dumps(report([(1.0, 0.75)]), allow_nan=False)) == {
        "steps": 1,
        "share_good": 1.0,
        "step_auc": None,
        "step_auc_hard": None,
        "brier": 0.0625,
        "calibration": {"0.75": 1.0},
    }


def test_the_calibration_of_a_report_is_by_tenths_of_the_score():
    steps = [(1.0, 0.92), (0.5, 0.98), (0.25, 0.91), (0.0, 0.14), (0.75, 0.18), (0.0, 0.0)]
    report = stage("02_train_prm").step_report(steps)
    assert report["calibration"] == {"0.00": 0.0, "0.16": 0.5, "0.94": pytest.approx(2 / 3)}
    assert report["step_auc"] == pytest.approx(8 / 9)  # of 9 pairs one is wrong: 0.18 < 0.91
    assert report["step_auc_hard"] == 1.0 and report["steps"] == 6 and report["share_good"] == 0.5


# ---- step labels from elsewhere, files for other tools

TRAIN_PRM = {"runs": "runs/outside", "policy": "data/toy/base", "epochs": 1, "held_out": 0.3}
TRAIN_PRM |= {"val_samples": 2, "max_new_tokens": 12, "batch_size": 8}


def visual_prm(folder, count: int) -> list[dict]:
    """Records in the published form of VisualPRM400K; every prompt has two responses."""
    prompts = rows(folder / "data/toy/train.jsonl")
    records = []
    for number in range(count):
        prompt = prompts[number // 2]
        steps = [f"3 + {number % 4} = 7", "so  the\nanswer", "Answer : 7"]
        scores = (1.0, 0.25 * (number % 4), number % 2)
        scored = [
            {"step": step, "score": score, "num_mc_correct": int(16 * score), "num_mc_total": 16}
            for step, score in zip(steps, scores)
        ]
        record = {"image": f"../data/toy/{prompt['image']}", "answer": "7", "response": ""}
        record |= {"question": f"<image>\n{prompt['question']}\nThink.", "num_mc_sequences": 16}
        records.append(record | {"question_orig": prompt["question"], "steps_with_score": scored})
    return records


@pytest.fixture
def outside(tmp_path, world):
    """A working directory with a file of VisualPRM400K's form, 20 records, the last one broken."""
    cwd = place(tmp_path, world)
    records = visual_prm(cwd, 20)
    records[-1]["image"] = "missing.png"
    (cwd / "labels").mkdir()
    common.write_jsonl(cwd / "labels/visual.jsonl", records)
    return cwd


def test_labels_of_visualprm_train_a_prm_without_a_sample_of_its_own(outside, monkeypatch):
    in_process("02_train_prm", outside, monkeypatch, labels="labels/visual.jsonl", **TRAIN_PRM)
    out = outside / "runs/outside/02_train_prm"
    assert not list(out.glob("samples*")) and not list(out.glob("rollouts*"))
    made, metrics = rows(out / "steps.jsonl"), json.loads((out / "metrics.json").read_text())
    records, gold = visual_prm(outside, 19), rows(outside / "data/toy/train.jsonl")
    assert len(made) == metrics["responses"] == 19 and metrics["left_out"] == 1
    assert metrics["labelled_prompts"] == 10 and metrics["step_labels"] == 57
    instruction = common.CommonArgs().instruction
    for number, (row, record) in enumerate(zip(made, records)):
        assert row["steps_with_score"] == record["steps_with_score"]
        assert row["labels"] == [1.0, 0.25 * (number % 4), float(number % 2)]
        assert row["completions"] == [step["step"] for step in record["steps_with_score"]]
        assert row["prompt"] == f"{gold[number // 2]['question']}\n{instruction}"
        assert os.path.samefile(row["image"], outside / "data/toy" / gold[number // 2]["image"])
        assert len(row["ends"]) == 3 and row["ends"][-1] == len(row["token_ids"])
    held = {row["id"] for row in made if row["held_out"]}
    assert 0 < len(held) < 10 == len({row["id"] for row in made})
    assert held.isdisjoint(row["id"] for row in made if not row["held_out"])
    assert metrics["held_out"]["steps"] == 3 * sum(row["held_out"] for row in made)


def test_an_image_of_labels_that_cannot_be_read_stops_the_run_before_it_trains(
    outside, monkeypatch
):
    records = visual_prm(outside, 19)
    (outside / "labels/torn.png").write_text("no image")
    records[11]["image"] = "torn.png"
    common.write_jsonl(outside / "labels/torn.jsonl", records)
    flags = TRAIN_PRM | {"runs": "runs/torn", "labels": "labels/torn.jsonl"}
    with pytest.raises(common.InputError, match="torn.png cannot be read .*; put a whole file"):
        in_process("02_train_prm", outside, monkeypatch, **flags)
    common.close_runs()
    assert not (outside / "runs/torn/02_train_prm/training").exists()


def test_steps_that_02_wrote_are_labels_for_another_run(outside, monkeypatch):
    own = [
        {"id": f"train-{number // 2:05d}", "steps_with_score": record["steps_with_score"]}
        for number, record in enumerate(visual_prm(outside, 20))
    ]
    common.write_jsonl(outside / "labels/own.jsonl", own)
    flags = {"label_kind": "hard", **TRAIN_PRM}
    in_process("02_train_prm", outside, monkeypatch, labels="labels/own.jsonl", **flags)
    out = outside / "runs/outside/02_train_prm"
    first, again = rows(out / "steps.jsonl"), outside / "again.jsonl"
    assert {row["id"] for row in first} == {f"train-{number:05d}" for number in range(10)}
    assert {label for row in first for label in row["labels"]} == {0.0, 1.0}
    shutil.copy(out / "steps.jsonl", again)
    flags = TRAIN_PRM | {"label_kind": "hard", "runs": "runs/again"}
    in_process("02_train_prm", outside, monkeypatch, labels=str(again), **flags)
    assert rows(outside / "runs/again/02_train_prm/steps.jsonl") == first


@pytest.mark.parametrize(
    "broken",
    [
        {"image": "missing.png"},
        {"image": None},
        {"question": 7},
        {"steps_with_score": []},
        {"steps_with_score": 7},
        {"steps_with_score": [{"step": " ", "score": 1.0}]},  # no step to be found again
        {"steps_with_score": [{"step": "3 + 4 = 7", "score": 1.5}]},
        {"steps_with_score": [{"step": "3 + 4 = 7", "score": float("nan")}]},
        {"steps_with_score": [{"step": "3 + 4 = 7"}]},
        {"steps_with_score": ["3 + 4 = 7"]},
    ],
)
def test_labels_of_which_more_than_a_tenth_is_unusable_are_refused(outside, monkeypatch, broken):
    records = visual_prm(outside, 20)
    for number in (6, 9, 12):
        records[number] |= broken
    common.write_jsonl(outside / "labels/visual.jsonl", records)
    says = r"labels/visual.jsonl line 7, and 3 of 20 in all, cannot be used"
    with pytest.raises(common.InputError, match=says):
        in_process("02_train_prm", outside, monkeypatch, labels="labels/visual.jsonl", **TRAIN_PRM)


def test_labels_that_are_all_held_out_or_none_are_refused(outside, monkeypatch):
    flags = TRAIN_PRM | {"labels": "labels/visual.jsonl"}
    for share, held in ((1e-9, 0), (1.0, 19)):
        says = f"holds {held} of 19 labelled responses out"
        with pytest.raises(common.InputError, match=says):
            in_process("02_train_prm", outside, monkeypatch, **flags | {"held_out": share})
        shutil.rmtree(outside / "runs/outside")


def test_the_prompts_of_the_prm_are_drawn_by_seed_from_the_whole_file(finished):
    samples = rows(finished[0] / "runs/toy/02_train_prm/samples.jsonl")
    drawn = list(dict.fromkeys(row["id"] for row in samples))
    order = sorted(
        (row["id"] for row in rows(finished[0] / "data/toy/train.jsonl")),
        key=lambda prompt: common.seed_of(0, "prm-prompts", prompt),
    )
    assert drawn == order[:30] != sorted(drawn)
