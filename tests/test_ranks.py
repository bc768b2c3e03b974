"""Many ranks on a CPU, by torchrun: training, whole stages, a rank that dies, a user's mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import READ_AS, ROOT, stage
from safetensors.torch import load_file

import common

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
BATCHES = [[0, 1, 2, 3, 4], [5], [6, 7, 0], [1, 2, 3, 4], [5, 6]]
RATE, WARMUP = 1e-4, 4


def torchrun(ranks: int, *command, cwd) -> subprocess.CompletedProcess:
    """A script on several ranks of this machine, as a user starts it."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, "--nproc-per-node", str(ranks), *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True)


def leave_ranks() -> None:
    """End a rank as run_stage does: a gloo thread that still works at exit aborts the process."""
    torch.distributed.destroy_process_group()


# ---- one training phase

PHASE = """
import json, os, sys
from pathlib import Path

sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import test_ranks

for asked in json.loads(sys.argv[2]):
    test_ranks.train_phase(**asked)
test_ranks.leave_ranks()
"""


def training_rows(examples: list[dict]) -> list[dict]:
    """Eight rows of different lengths: (example, token ids)."""
    lengths = (3, 9, 1, 5, 12, 2, 7, 4)
    return [
        {"example": example, "token_ids": [(7 * place + k) % 40 + 5 for k in range(length)]}
        for place, (example, length) in enumerate(zip(examples, lengths))
    ]


def train_phase(model: str, data: str, out: str, stop: bool = False) -> None:
    """Train the toy's base in this process, one of the ranks; stop: die after the first save."""
    torch.set_num_threads(1)
    args = common.ScoringArgs(device="cpu", micro_batch=2, save_every=2)
    args.learning_rate, args.warmup_steps = RATE, WARMUP
    common.join_ranks("cpu")
    folder, norms = Path(out), []
    clip, save_state = torch.nn.utils.clip_grad_norm_, common.save_state

    def watched(parameters, largest):
        norm = clip(parameters, largest)
        norms.append(norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item())
        return norm

    def stopping(*given):
        save_state(*given)
        os._exit(7)

    def loss_of(policy, rows):
        prompts = [row["example"] for row in rows]
        return common.sft_loss(policy, prompts, [row["token_ids"] for row in rows], args)

    def count_of(row):
        return len(row["token_ids"]) + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
        if stop:
            patch.setattr(common, "save_state", stopping)
        rows = training_rows(common.load_examples(data))
        shape = {"model_out": folder / "model", "policy_folder": model, "work": folder / "work"}
        progress = common.train(
            **shape,
            batches=BATCHES,
            rows=rows,
            loss_of=loss_of,
            count_of=count_of,
            args=args,
            label="t",
        )
    if common.rank() == 0:
        common.write_json(folder / "figures.json", progress | {"norms": norms})


def trained_by_hand(model: str, data) -> tuple[dict, float, list[float], int]:
    """Weights, summed loss, gradient norms and tokens of a plain loop without our training code."""
    args = common.ScoringArgs(device="cpu")
    rows = training_rows(common.load_examples(data))
    policy = common.load_policy(model, args, training=True)
    net = policy.model.train()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0)
    total, norms, tokens = 0.0, [], 0
    for step, batch in enumerate(BATCHES):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
        losses = []
        for place in batch:
            prompt = common.encode_prompts(policy, [rows[place]["example"]], args)
            reply = torch.tensor([rows[place]["token_ids"] + [policy.eos_ids[0]]])
            length = prompt["input_ids"].shape[1]
            prompt["input_ids"] = torch.cat([prompt["input_ids"], reply], 1)
            prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
            labels = prompt["input_ids"].clone()
            labels[:, :length] = -100
            losses.append(net(**prompt, labels=labels).loss * reply.shape[1])
            tokens += reply.shape[1]
        loss = sum(losses) / sum(len(rows[place]["token_ids"]) + 1 for place in batch)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    weights = {name: tensor.detach() for name, tensor in net.named_parameters()}
    return weights, total, norms, tokens


@pytest.fixture(scope="module")
def phases(tmp_path_factory, world):
    """A folder with the same training on 1, 2 and 3 ranks, and interrupted on 2 and continued."""
    out = tmp_path_factory.mktemp("phases")
    (out / "phase.py").write_text(PHASE)

    def asked(name: str, **more) -> dict:
        (out / name).mkdir(exist_ok=True)
        return {
            "model": str(world / "base"),
            "data": str(world / "train.jsonl"),
            "out": str(out / name),
        } | more

    jobs = [asked("two"), asked("broken", stop=True)]
    done = torchrun(2, out / "phase.py", ROOT, json.dumps(jobs), cwd=out)
    assert (out / "two/figures.json").exists(), done.stderr[-4000:]
    assert done.returncode != 0 and json.loads((out / "broken/work/progress.json").read_text())
    for name in ("resumed_on_1", "resumed_on_3"):
        shutil.copytree(out / "broken", out / name)
    jobs = [asked("three"), asked("resumed_on_3")]
    done = torchrun(3, out / "phase.py", ROOT, json.dumps(jobs), cwd=out)
    assert done.returncode == 0, done.stderr[-4000:]
    train_phase(**asked("one"))
    train_phase(**asked("resumed_on_1"))
    return out


def farthest(path: Path, weights: dict) -> float:
    """The largest difference between a saved model's weights and others."""
    saved = load_file(path / "model.safetensors")
    assert saved.keys() == weights.keys()
    return max((saved[name] - weights[name]).abs().max().item() for name in saved)


@pytest.mark.parametrize("name", ["one", "two", "three", "resumed_on_1", "resumed_on_3"])
def test_training_on_any_number_of_ranks_is_that_of_a_plain_loop(phases, world, name):
    """Measured: weights within 2e-6, norms and loss within 1e-6 of themselves."""
    weights, loss, norms, tokens = trained_by_hand(str(world / "base"), world / "train.jsonl")
    figures = json.loads((phases / name / "figures.json").read_text())
    assert figures["tokens"] == tokens and figures["batch"] == figures["step"] == len(BATCHES)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    wanted = norms[2:] if "resumed" in name else norms  # two batches before the interruption
    assert figures["norms"] == pytest.approx(wanted, rel=1e-5)
    assert farthest(phases / name / "model", weights) < 1e-5


# ---- whole stages

STAGES = {
    "01_warmup": {"steps": 4, "samples": 4, "save_every": 2, "batch_size": 3},
    "02_train_prm": {
        "prompts": 20,
        "samples": 4,
        "rollouts": 2,
        "epochs": 1,
        "held_out": 0.5,
        "val_samples": 2,
        "batch_size": 8,
    },
    "03_self_evolve": {
        "passes": 0.5,
        "steps": 6,
        "samples": 3,
        "save_every": 1,
        "batch_size": 4,
        "search_every": 1,
        "search_prompts": 2,
        "search_grid": [0.5, 1.0],
        "policy": "data/toy/base",
        "prm": "prm",
    },
    "04_eval": {"samples": 2, "resamples": 20},
}
DRIVER = """
import json, sys

sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import test_ranks

test_ranks.run_stages(json.loads(sys.argv[2]), *sys.argv[3:])
test_ranks.leave_ranks()
"""


VICTIM = {"generate": 1, "save_state": 0, "look": 1}  # the rank that is killed in a function


def run_stages(names: list[str], moment: str = "") -> None:
    """Stages in this process, one of the ranks; moment: the function in which one is killed."""
    torch.set_num_threads(1)
    common.join_ranks("cpu")
    with pytest.MonkeyPatch.context() as patch:
        if moment and common.rank() == VICTIM[moment]:
            owner = common.Sampler if moment == "look" else common
            patch.setattr(owner, moment, dying(getattr(owner, moment), after=moment != "look"))
        for name in names:
            module = stage(name)
            module.main(module.Args(device="cpu", chunk=3, max_new_tokens=60, **STAGES[name]))
            common.close_runs()


def dying(function, after: bool):
    """The function, but kill -9 before it begins, or once it has ended."""

    def wrapped(*given, **named):
        if after:
            function(*given, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    return wrapped


def rows(path: Path) -> list[dict]:
    """The rows of a JSONL file, without the folder in which its run and its images are."""
    text = re.sub(r'"[^"]*/data/toy/', '"data/toy/', path.read_text())
    return [json.loads(line) for line in text.splitlines()]


def place(folder: Path, world: Path) -> Path:
    """A working directory with the toy's data, and its base model as the PRM that 03 is given."""
    shutil.copytree(world, folder / "data/toy")
    shutil.copytree(world / "base", folder / "prm")
    common.write_json(folder / "prm/prm.json", READ_AS)
    (folder / "tests").symlink_to(ROOT / "tests")
    (folder / "driver.py").write_text(DRIVER)
    return folder


def on_ranks(ranks: int, cwd: Path, names: list[str], moment: str = ""):
    """Stages by `run_stages` under torchrun; the finished process and how long it took."""
    begun = time.time()
    done = torchrun(ranks, cwd / "driver.py", ROOT, json.dumps(names), moment, cwd=cwd)
    return done, time.time() - begun


@pytest.fixture(scope="module")
def alone(tmp_path_factory, world):
    """A folder in which one process has run the four stages, unbroken."""
    cwd = place(tmp_path_factory.mktemp("alone"), world)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        run_stages(list(STAGES))
    return cwd / "runs/toy"


@pytest.fixture(scope="module")
def together(tmp_path_factory, world):
    """The same on two ranks."""
    cwd = place(tmp_path_factory.mktemp("together"), world)
    done, _ = on_ranks(2, cwd, list(STAGES))
    assert done.returncode == 0, done.stderr[-4000:]
    return cwd / "runs/toy"


ROUNDED = ("reward", "step_scores", "scores")  # what a PRM reads; all else is equal to the last bit


def assert_same_rows(path: Path, other: Path) -> None:
    """Two files of rows are the same: all that was sampled exactly, PRM scores to rounding."""
    for mine, theirs in zip(rows(path), rows(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            wanted = pytest.approx(value, abs=1e-4) if name in ROUNDED else value
            assert mine[name] == wanted, (path, name)


def assert_same_evolution(mine: Path, theirs: Path) -> None:
    """Two runs of stage 03: samples and selection equal, weights and figures to rounding."""
    for path in sorted(theirs.glob("iter_*/*.jsonl")):
        assert_same_rows(mine / path.relative_to(theirs), path)
    assert farthest(mine / "model", load_file(theirs / "model/model.safetensors")) < 1e-5
    for a, b in zip(rows(mine / "metrics.jsonl"), rows(theirs / "metrics.jsonl"), strict=True):
        del a["seconds"], b["seconds"]
        assert a == pytest.approx(b, rel=1e-5)
    found = {path.relative_to(mine) for path in mine.rglob("*")}
    assert found == {path.relative_to(theirs) for path in theirs.rglob("*")}


def test_warm_up_and_prm_on_two_ranks_are_those_of_one_process(alone, together):
    files = {"01_warmup": ("samples", "sft"), "02_train_prm": ("samples", "prefixes", "rollouts")}
    for name, kinds in files.items():
        for kind in kinds:
            assert_same_rows(together / name / f"{kind}.jsonl", alone / name / f"{kind}.jsonl")
    for kind in ("steps", "held_out", "val_samples"):
        assert_same_rows(*(run / "02_train_prm" / f"{kind}.jsonl" for run in (together, alone)))
    for name in files:
        weights = load_file(alone / name / "model/model.safetensors")
        assert farthest(together / name / "model", weights) < 1e-5
    mine, theirs = (
        json.loads((run / "01_warmup/metrics.json").read_text()) for run in (together, alone)
    )
    assert mine == pytest.approx(theirs, rel=1e-5)


def test_evolving_on_two_ranks_samples_and_selects_what_one_process_does(alone, together):
    assert_same_evolution(together / "03_self_evolve", alone / "03_self_evolve")


def test_the_report_on_two_ranks_holds_the_figures_of_one_process(alone, together):
    mine, theirs = (
        json.loads((run / "04_eval/report.json").read_text()) for run in (together, alone)
    )
    assert mine["test"] == theirs["test"] and mine["ood"] == theirs["ood"]
    for path in sorted((alone / "04_eval/predictions").glob("*.jsonl")):
        assert_same_rows(together / "04_eval/predictions" / path.name, path)


# ---- a rank that dies


@pytest.fixture(scope="module")
def broken(tmp_path_factory, world):
    """A folder in which stage 03 lost a rank in generate, then in training, then in a look."""
    cwd = place(tmp_path_factory.mktemp("broken"), world)
    runs = cwd / "runs/toy/03_self_evolve"
    for ranks, moment, left in (
        (2, "generate", "iter_00/val_greedy.jsonl.parts"),
        (3, "save_state", "iter_01/training/progress.json"),
        (2, "look", "iter_01/model"),
    ):
        done, seconds = on_ranks(ranks, cwd, ["03_self_evolve"], moment)
        assert done.returncode != 0 and seconds < 60
        assert (runs / left).exists() and not (runs / "model").exists()
    return cwd


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_job_that_lost_ranks_goes_on_with_any_number(broken, alone, tmp_path, ranks):
    cwd = tmp_path / "copy"
    shutil.copytree(broken, cwd, symlinks=True)
    done, _ = on_ranks(ranks, cwd, ["03_self_evolve"])
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_evolution(cwd / "runs/toy/03_self_evolve", alone / "03_self_evolve")


# ---- a user's mistake


def assert_said_once(stderr: str, sentence: str) -> None:
    """The ranks said one sentence; what torchrun adds, a traceback and a table, is its own."""
    lines = stderr.splitlines()
    (said,) = [line for line in lines if line.startswith("error: ")]
    assert sentence in said and not any(line.startswith("[rank") for line in lines)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--seed", "5"], "flag seed was 0, now 5"),  # rank 0 alone sees it
        (["--runs", "elsewhere"], "run 01_warmup.py first"),  # every rank sees it
    ],
)
def test_a_mistake_on_two_ranks_ends_with_one_sentence(together, flags, says):
    begun = time.time()
    command = (ROOT / "02_train_prm.py", "--device", "cpu", *flags)
    done = torchrun(2, *command, cwd=together.parent.parent)
    assert done.returncode == 1 and time.time() - begun < 60
    assert_said_once(done.stderr, says)


LATE = """
import sys

sys.path.insert(0, sys.argv.pop(1))
import common


def main(args):
    if common.rank() == 1:
        raise common.InputError("only rank 1 has read this line")
    common.sum_over_ranks(0)


common.run_stage(common.CommonArgs, main)
"""


def test_a_mistake_that_one_rank_alone_sees_is_said_by_it(tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    done = torchrun(2, tmp_path / "late.py", ROOT, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 1
    assert_said_once(done.stderr, "only rank 1 has read this line")
