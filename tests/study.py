"""The study in miniature: every row of the paper's tables 1 to 3, and some past it.

    python tests/study.py                                # every row, 8 seeds or 3, one by one
    python tests/study.py --only M-STaR Top-2 --seeds 0  # some of them
    python tests/study.py --table runs/study/rows.jsonl  # the table and the paired differences
    python tests/study.py --compare runs/a runs/b        # what training changed, in several runs
    python tests/study.py --properties runs/toy          # what the world and the PRM are like
    python tests/study.py --document                     # STUDY.md from study_rows.jsonl

Reads   data/toy (python tests/toy.py makes it)
Writes  runs/study/seed<S>/01_warmup, 02_train_prm   shared by all rows of a seed
        runs/study/seed<S>/mixed, likelihood         other PRMs for the rows that compare them
        runs/study/seed<S>/<row>/03_self_evolve/     one run, as stage 03 writes it
        runs/study/seed<S>/<row>/verdicts/           its greedy answers to the test and ood prompts
        runs/study/rows.jsonl                        a line per run: flags, budget, looks, verdicts
        <first run>/compare.png                      --compare: the dynamics of several runs
        tests/STUDY.md, study.png, study_forest.png  --document

A run is stage 03 with a row's flags; then its policy answers every test and ood prompt greedily. To
save time the dynamics are looked at only after a run's last iteration, but for the rows about
temperature. A driver that was killed goes on where it was and repeats no finished run. Rows that
other flags, code or data made are refused, flags that contradict each other too, before anything
runs; a run that stage 03 refuses later is left out and named at the end. Several drivers may share
the folder: a run that another one is at is left to it.

The tables: means over seeds with 95 % intervals over seeds and prompts; differences are paired, the
same seeds and prompts on both sides. The verdicts on the paper's findings take wider intervals,
corrected for their number (Bonferroni). --compare never pools runs that differ in more than the
seed.
"""

import argparse
import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import transformers
from matplotlib.figure import Figure
from scipy.stats import t as student  # comes with scikit-learn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import toy

import common

evaluate = importlib.import_module("04_eval")

MEASURED = Path(__file__).resolve().parent / "study_rows.jsonl"
DYNAMICS = "--validate_every 2"
FIXED = "--temperature 1.0"


class Row(NamedTuple):
    """A row of the study: the paper's accuracies in percent, and what makes it here."""

    paper_id: float | None
    paper_ood: float | None
    flags: str | None  # of 03_self_evolve.py; None: not trained


ROWS = {
    "base": Row(13.6, 52.4, None),
    "warm-up": Row(38.8, 52.6, None),
    "SFT": Row(44.3, 54.8, "--method sft --policy data/toy/base"),
    "Iterative RFT 100 %": Row(
        42.3, 55.7, f"--method iterative_rft --interval 1 --select all {FIXED}"
    ),
    "ReST-EM 100 %": Row(42.3, 55.1, f"--method rest_em --interval 1 --select all {FIXED}"),
    "continuous 100 %": Row(42.2, 56.7, f"--interval 1 --select all {FIXED}"),
    "continuous 50 %": Row(43.1, 56.2, f"--interval 0.5 --select all {FIXED}"),
    "continuous 25 %": Row(43.1, 57.2, f"--select all {FIXED}"),
    "continuous 12.5 %": Row(42.3, 56.1, f"--interval 0.125 --select all {FIXED}"),
    "continuous 6.25 %": Row(41.0, 56.8, f"--interval 0.0625 --select all {FIXED}"),
    "Random-2": Row(41.0, 55.5, f"--select random {FIXED}"),
    "PRM > alpha": Row(43.8, 57.5, f"--select threshold {FIXED}"),
    "Top-1": Row(43.0, 59.0, f"--k 1 {FIXED}"),
    "Top-2": Row(45.3, 59.2, f"{FIXED} {DYNAMICS}"),
    "Top-4": Row(44.0, 58.4, f"--k 4 {FIXED}"),
    "Top-2, likelihood in the PRM": Row(
        None, None, f"--prm {{shared}}/mixed/02_train_prm/model {FIXED}"
    ),
    "Top-2 by likelihood": Row(None, None, f"--prm {{shared}}/likelihood {FIXED}"),
    "Top-2 by the chain checker": Row(None, None, f"--prm tests/toy.py:step_scores {FIXED}"),
    "oracle without PRM": Row(42.5, 58.2, f"--unlabeled oracle --select all {FIXED}"),
    "oracle + PRM": Row(42.9, 59.1, f"--unlabeled oracle {FIXED}"),
    "oracle + PRM, mix-in 25 %": Row(None, None, f"--unlabeled oracle --mixin 0.25 {FIXED}"),
    "oracle + PRM, mix-in 50 %": Row(None, None, f"--unlabeled oracle --mixin 0.5 {FIXED}"),
    "oracle + PRM, mix-in 75 %": Row(None, None, f"--unlabeled oracle --mixin 0.75 {FIXED}"),
    "vote, mix-in 0 %": Row(43.3, 58.2, f"--unlabeled vote {FIXED}"),
    "vote, mix-in 25 %": Row(42.4, 57.6, f"--unlabeled vote --mixin 0.25 {FIXED}"),
    "vote, mix-in 50 %": Row(42.9, 58.2, f"--unlabeled vote --mixin 0.5 {FIXED}"),
    "vote, mix-in 75 %": Row(45.0, 58.8, f"--unlabeled vote --mixin 0.75 {FIXED}"),
    "majority vote without PRM, mix-in 0 %": Row(
        None, None, f"--unlabeled vote --vote_weights equal --select all {FIXED}"
    ),
    "Top-2, T = 0.5": Row(None, None, f"--temperature 0.5 {DYNAMICS}"),
    "Top-2, T = 0.7": Row(None, None, f"--temperature 0.7 {DYNAMICS}"),
    "Top-2, T = 1.2": Row(None, None, f"--temperature 1.2 {DYNAMICS}"),
    "adaptive T on Pass@K": Row(42.8, 58.0, f"--objective pass_at_k {DYNAMICS}"),
    "M-STaR": Row(45.9, 59.5, DYNAMICS),
    "M-STaR, K = 11": Row(None, None, "--samples 11"),  # about as many samples as the next one
    "M-STaR, PRM refreshed": Row(None, None, "--prm_refresh 4"),
}
# Flags of 02 for a PRM whose score holds the likelihood of a step's tokens.
MIXED = "--mark_weight 0.1 --likelihood 6 --epochs 1 --learning_rate 3e-4"
MANY_SEEDS = (  # the rows that carry a finding
    *("base", "warm-up", "Iterative RFT 100 %", "ReST-EM 100 %", "continuous 100 %"),
    *("continuous 25 %", "Random-2", "PRM > alpha", "Top-2", "M-STaR"),
    *("Top-2, T = 0.5", "Top-2, T = 0.7", "Top-2, T = 1.2"),
)
FINDINGS = {  # of the paper: the comparisons that decide them
    "1. Continuous self-evolving beats iterative RFT and ReST-EM; 25 % is a good interval": [
        ("M-STaR", "Iterative RFT 100 %"),
        ("M-STaR", "ReST-EM 100 %"),
        ("continuous 25 %", "Iterative RFT 100 %"),
        ("continuous 25 %", "ReST-EM 100 %"),
        ("continuous 25 %", "continuous 100 %"),
    ],
    "2. The PRM is a good reranker: Top-2 helps": [
        ("Top-2", "Random-2"),
        ("Top-2", "continuous 25 %"),
        ("Top-2", "PRM > alpha"),
    ],
    "3. Unlabelled prompts do not help, and the later they come the less they hurt": [
        ("vote, mix-in 0 %", "Top-2"),
        ("vote, mix-in 75 %", "Top-2"),
        ("vote, mix-in 75 %", "vote, mix-in 0 %"),
    ],
    "5. An adaptive temperature on Reward-Pass@2 helps": [
        ("M-STaR", "Top-2"),
        ("M-STaR", "Top-2, T = 0.5"),
        ("M-STaR", "Top-2, T = 0.7"),
        ("M-STaR", "Top-2, T = 1.2"),
        ("M-STaR", "adaptive T on Pass@K"),
    ],
}
DECIDING = [pair for pairs in FINDINGS.values() for pair in pairs]
FURTHER = [  # other comparisons
    ("M-STaR", "warm-up"),
    ("warm-up", "base"),
    ("continuous 100 %", "Iterative RFT 100 %"),
    ("continuous 100 %", "ReST-EM 100 %"),
    ("continuous 25 %", "continuous 50 %"),
    ("continuous 25 %", "continuous 12.5 %"),
    ("continuous 25 %", "continuous 6.25 %"),
    ("Top-2 by the chain checker", "Random-2"),
    ("Top-2 by the chain checker", "Top-2"),
    ("Top-2", "Top-2 by likelihood"),
    ("Top-2, likelihood in the PRM", "Top-2"),
    ("Top-2 by likelihood", "Random-2"),
    ("Top-2, likelihood in the PRM", "Random-2"),
    ("Top-1", "Random-2"),
    ("Random-2", "continuous 25 %"),
    ("Top-2", "Top-1"),
    ("Top-2", "Top-4"),
    ("Top-1", "continuous 25 %"),
    ("Top-4", "continuous 25 %"),
    ("oracle without PRM", "continuous 25 %"),
    ("oracle + PRM", "Top-2"),
    ("oracle + PRM, mix-in 25 %", "Top-2"),
    ("oracle + PRM, mix-in 50 %", "Top-2"),
    ("oracle + PRM, mix-in 75 %", "Top-2"),
    ("oracle + PRM, mix-in 75 %", "oracle + PRM"),
    ("vote, mix-in 25 %", "Top-2"),
    ("vote, mix-in 50 %", "Top-2"),
    ("vote, mix-in 0 %", "majority vote without PRM, mix-in 0 %"),
    ("M-STaR, PRM refreshed", "M-STaR"),
    ("M-STaR, PRM refreshed", "M-STaR, K = 11"),
    ("M-STaR, K = 11", "M-STaR"),
]
SPLITS = ("test", "ood")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
BUDGET = ("samples", "extra_samples", "extra_steps")
LOOK = ("iteration", "temperature", "greedy_accuracy", "pass_at_k", "reward_pass_at_2")


# ---- the driver: rows of the study, one run after the other


def folder_of(name: str) -> str:
    """A row's name as a folder name.

    >>> folder_of("vote, mix-in 25 %"), folder_of("PRM > alpha")
    ('vote_mix-in_25', 'PRM_over_alpha')
    """
    kept = "".join(c if c.isalnum() or c in ".-=>" else " " for c in name)
    return "_".join(kept.split()).replace(">", "over")


def parsed(stage: str, flags: list[str]):
    """A stage's Args from its flags; raises InputError for a number out of its range."""
    args, _ = common.parse_flags(importlib.import_module(stage).Args, flags)
    common.check_ranges(args)
    return args


def run(stage: str, flags: list[str]):
    """Run a stage in this process, so that a kill ends both; its tables are not shown.

    Returns the stage's Args.
    """
    stage_args = parsed(stage, flags)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            importlib.import_module(stage).main(stage_args)
    finally:
        common.close_runs()
    return stage_args


def greedy_verdicts(policy_path, args) -> dict[str, str]:
    """{"test": "10...", "ood": "..."}: whether the greedy response to each prompt is right."""
    data = {split: f"data/toy/{split}.jsonl" for split in SPLITS}
    out = common.open_run(args, "verdicts", {**data, "policy": policy_path})
    try:
        with common.Sampler(policy_path, args) as sampler:
            for split, path in data.items():
                examples, answers = common.load_examples(path), out / f"{split}.jsonl"
                sampler.sample(answers, examples, n=1, temperature=0.0, purpose="study")
    finally:
        common.close_runs()
    verdicts = {}
    for split in SPLITS:
        rows = common.stream_jsonl(out / f"{split}.jsonl")
        verdicts[split] = "".join("1" if row["correct"] else "0" for row in rows)
    return verdicts


@functools.cache
def data_digests() -> dict[str, str]:
    """What the toy world holds, in short."""
    files = [f"{name}.jsonl" for name in ("train", "unlabeled", "val", "test", "ood")]
    return {part: common.digest(f"data/toy/{part}") for part in [*files, "base"]}


@functools.cache
def code_version() -> str:
    """A digest of what a row is made by: stages 01 to 03 and common.py, their docstrings apart."""
    sha = hashlib.sha256()
    for name in ("01_warmup", "02_train_prm", "03_self_evolve", "common"):
        tree = ast.parse((Path(common.__file__).parent / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        sha.update(ast.dump(tree).encode())
    return sha.hexdigest()[:16]


def identity(name: str, seed: int, args) -> dict:
    """What a finished row must have been made with to count as this one."""
    return {
        "name": name,
        "seed": seed,
        "flags": " ".join(f"{ROWS[name].flags or ''} {args.extra}".split()),
        "shared_flags": [args.extra01, args.extra02],
        "code": code_version(),
        "data": data_digests(),
    }


def finished_rows(table: Path) -> list[dict]:
    """The lines of rows.jsonl; none before the first."""
    return common.read_jsonl(table) if table.exists() else []


def is_finished(name: str, seed: int, table: Path, args) -> bool:
    """Whether the table holds this row; InputError if that was made in another way."""
    wanted = identity(name, seed, args)
    for row in finished_rows(table):
        if (row["name"], row["seed"]) == (name, seed):
            for key, value in wanted.items():
                if row.get(key) != value:
                    raise common.InputError(
                        f"{table} holds {name!r}, seed {seed}, made with another {key}: "
                        f"{row.get(key)!r}, now {value!r}; choose another --out"
                    )
            return True
    return False


def seconds_of(row: dict) -> float:
    """How long an iteration took, by its row of metrics.jsonl: a number, or one per phase.

    >>> seconds_of({"seconds": 3.0}), seconds_of({"seconds": {"generate": 2.0, "look": 1.0}})
    (3.0, 3.0)
    """
    seconds = row["seconds"]
    return sum(seconds.values()) if isinstance(seconds, dict) else seconds


def train_and_judge(name: str, seed: int, out: Path, args) -> dict:
    """One row of the table."""
    row = identity(name, seed, args)
    shared, runs = out / f"seed{seed}", out / f"seed{seed}" / folder_of(name)
    flags = ["--runs", str(runs), "--seed", str(seed), "--device", args.device]
    flags += ["--policy", f"{shared}/01_warmup/model", "--prm", f"{shared}/02_train_prm/model"]
    if "--validate_every" not in row["flags"]:  # what is looked at changes no result
        flags += ["--validate_every", "0"]
    flags += shlex.split(row["flags"].replace("{shared}", str(shared)))
    budget, seconds = dict.fromkeys((*BUDGET, "steps"), 0), 0.0
    untrained = {"base": "data/toy/base", "warm-up": shared / "01_warmup/model"}
    if name in untrained:
        stage_args, policy = parsed("03_self_evolve", flags), untrained[name]
    else:
        stage_args, policy = run("03_self_evolve", flags), runs / "03_self_evolve/model"
        metrics = common.read_jsonl(runs / "03_self_evolve/metrics.jsonl")
        for key in BUDGET:
            budget[key] = sum(row.get(key, 0) for row in metrics)
        budget["steps"] = metrics[-1]["steps"]
        seconds = sum(seconds_of(row) for row in metrics)
        row["looks"] = [{key: m[key] for key in LOOK} for m in metrics if "pass_at_k" in m]
    start = time.time()
    row |= {"paper_id": ROWS[name].paper_id, "paper_ood": ROWS[name].paper_ood, **budget}
    row["verdicts"] = greedy_verdicts(policy, stage_args)
    return row | {"seconds": round(seconds + time.time() - start, 1)}


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; gives whether it is held, which without `wait` it may not be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def place_in_study(row: dict) -> tuple:
    """Where a row stands in the table: as in ROWS; one that is no longer there, at the end."""
    names = list(ROWS)
    known = row["name"] in ROWS
    return (names.index(row["name"]) if known else len(names), row["name"], row["seed"])


def add_row(name: str, seed: int, out: Path, table: Path, args) -> None:
    """Make a row and append it to the table, unless it is there or another driver is at it."""
    with locked(out / f"seed{seed}" / folder_of(name) / ".driver", wait=False) as mine:
        if not mine or is_finished(name, seed, table, args):
            return
        row = train_and_judge(name, seed, out, args)
        with locked(out / ".table"):  # drivers side by side take turns
            rows = [*finished_rows(table), row]
            common.write_jsonl(table, sorted(rows, key=place_in_study))
    shares = {split: round(v.count("1") / len(v), 3) for split, v in row["verdicts"].items()}
    print(name, seed, shares, f"{row['seconds']:.0f} s", flush=True)


def share_stages(seed: int, out: Path, args) -> None:
    """Warm-up and PRMs of a seed, once; a second driver waits for the first."""
    shared = out / f"seed{seed}"
    wanted = " ".join(ROWS[name].flags or "" for name in args.only)
    with locked(shared / ".driver"):
        flags = ["--seed", str(seed), "--device", args.device]
        run("01_warmup", ["--runs", str(shared), *flags, *shlex.split(args.extra01)])
        run("02_train_prm", ["--runs", str(shared), *flags, *shlex.split(args.extra02)])
        policy = shared / "01_warmup" / "model"
        if "{shared}/mixed" in wanted:  # the same labels
            flags += ["--labels", f"{shared}/02_train_prm/steps.jsonl", "--policy", str(policy)]
            flags += ["--runs", f"{shared}/mixed", *shlex.split(f"{args.extra02} {MIXED}")]
            run("02_train_prm", flags)
        if "{shared}/likelihood" in wanted:
            likelihood_prm(policy, shared / "likelihood")


def likelihood_prm(policy: Path, path: Path) -> None:
    """A policy folder as a PRM that ranks by its own likelihood."""
    if not path.exists():
        part = path.with_suffix(".part")
        shutil.copytree(policy, part, dirs_exist_ok=True)
        common.write_json(part / "prm.json", {"marks": None, "likelihood": 1.0})
        part.rename(path)


def seeds_for(name: str, args) -> list[int]:
    """The seeds that a row is made with, unless --seeds says otherwise."""
    return args.seeds or list(range(8 if name in MANY_SEEDS else 3))


def missing_rows(table: Path, args) -> list[tuple[str, int]]:
    """The wanted (row, seed) that the table does not hold, seed by seed."""
    wanted = [(name, seed) for name in args.only for seed in seeds_for(name, args)]
    wanted.sort(key=lambda key: key[1])  # stable
    return [key for key in wanted if not is_finished(*key, table, args)]


def drive(args) -> None:
    """Every wanted (row, seed) that no line of rows.jsonl holds yet."""
    if unknown := sorted(set(args.only) - set(ROWS)):
        sys.exit(f"unknown rows {unknown}; there are {list(ROWS)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = Path(args.out)
    table = out / "rows.jsonl"
    for name in args.only:  # a wrong flag, or two that contradict each other, show now
        if ROWS[name].flags is not None:
            flags = shlex.split(f"{ROWS[name].flags} {args.extra}")
            importlib.import_module("03_self_evolve").check_flags(parsed("03_self_evolve", flags))
    for name, seed in missing_rows(table, args):
        try:
            share_stages(seed, out, args)
            add_row(name, seed, out, table, args)
        except common.InputError as error:  # the other rows can do without this one
            print(f"error: {name}, seed {seed}: {error}", file=sys.stderr, flush=True)
    if missing := missing_rows(table, args):
        sys.exit(f"error: refused, or still with another driver: {missing}")


# ---- the table of the study


def crossed_interval(values: np.ndarray, resamples: int, seed: int = 0, level=0.95) -> dict:
    """Mean of values (seeds, prompts) and its interval over seeds and prompts, 95 % unless said.

    Every seed answers the same prompts. The part between seeds is Student's t with s - 1 degrees of
    freedom, the part between prompts a bootstrap; what seeds and prompts do together is in both, so
    the interval is rather too wide. With one seed it is over prompts only.

    >>> found = crossed_interval(np.array([[1.0, 0.0], [1.0, 0.0]]), 1000)
    >>> {key: round(value, 2) for key, value in found.items()}
    {'mean': 0.5, 'low': 0.0, 'high': 1.0, 'seeds': 2, 'n': 2}
    """
    rng = np.random.default_rng(seed)
    s, n = values.shape
    between = np.zeros(resamples)
    if s > 1:
        error = values.mean(1).std(ddof=1) / s**0.5
        quantiles = student.ppf((np.arange(resamples) + 0.5) / resamples, s - 1)
        between = error * rng.permutation(quantiles)
    picks = rng.integers(n, size=(resamples, n))  # (R, n)
    tails = [50 * (1 - level), 50 * (1 + level)]
    low, high = np.percentile(between + values.mean(0)[picks].mean(1), tails)
    mean = float(values.mean())
    return {"mean": mean, "low": float(low), "high": float(high), "seeds": s, "n": n}


def by_name(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """{name: {seed: row}}; raises InputError for rows that cannot stand in one table."""
    names: dict = {}
    for row in rows:
        names.setdefault(row["name"], {})[row["seed"]] = row
        for key in ("data", "code", "shared_flags"):
            if row.get(key) != rows[0].get(key):
                raise common.InputError(
                    f"some rows were made with different {key}; keep them in two files"
                )
    for name, seeds in names.items():
        if len({row["flags"] for row in seeds.values()}) > 1:
            raise common.InputError(f"the seeds of {name!r} were made with different flags")
    return names


def verdicts_of(rows: dict[int, dict], seeds: list[int], split: str) -> np.ndarray:
    """The verdicts of some seeds of a row as numbers 0 and 1 (seeds, prompts)."""
    return np.array([list(rows[seed]["verdicts"][split]) for seed in seeds]).astype(float)


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table; the first line is its header.

    >>> print(markdown([["n", "vote"], ["1", "50.0"]]), end="")
    | n | vote |
    | --- | --- |
    | 1 | 50.0 |
    """
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def study_line(name: str, rows: dict[int, dict], resamples: int) -> list[str]:
    """A row of the study as a line of its table."""
    seeds, first = sorted(rows), next(iter(rows.values()))
    cells = []
    for split in SPLITS:
        found = crossed_interval(verdicts_of(rows, seeds, split), resamples)
        in_range = {"low": max(found["low"], 0.0), "high": min(found["high"], 1.0)}
        cells.append(evaluate.show(found | in_range))
    paper = f"{first['paper_id']} / {first['paper_ood']}" if first["paper_id"] else "-"
    spent = {}
    for key in (*BUDGET, "steps"):
        spent[key] = round(sum(row.get(key, 0) for row in rows.values()) / len(rows))
    samples = f"{spent['samples']} + {spent['extra_samples']}"
    steps = f"{spent['steps']}"
    if spent["extra_steps"]:
        steps += f" + {spent['extra_steps']}"
    flags = f"`{first['flags']}`" if first["flags"] else "-"
    return [name, *cells, str(len(seeds)), paper, samples, steps, flags]


def study_table(rows: list[dict], resamples: int = 2000) -> str:
    """Rows of the study beside the paper's figures: means over seeds, with intervals."""
    header = ["", "test (ID)", "ood", "seeds", "paper ID / OOD", "samples + extra", "steps + extra"]
    lines = [[*header, "flags of 03_self_evolve.py"]]
    for name, seeds in by_name(rows).items():
        lines.append(study_line(name, seeds, resamples))
    return markdown(lines)


def seeds_of_pair(names: dict, pair: tuple) -> list[int]:
    """The seeds that both rows of a pair have."""
    a, b = pair
    return sorted(set(names.get(a, ())) & set(names.get(b, ())))


def difference(names: dict, pair: tuple, split: str, **how) -> dict:
    """The paired difference of two rows: its interval over seeds and prompts."""
    mine, other = (verdicts_of(names[name], seeds_of_pair(names, pair), split) for name in pair)
    return crossed_interval(mine - other, **how)


def seeds_needed(names: dict, pair: tuple, split: str, points: float = 2.0) -> str:
    """Seeds with which a difference of `points` is seen in four of five studies, at 95 %.

    n = ((1.96 + 0.84) sd / points)^2, sd: of the difference between seeds, which holds the
    prompts' own noise too; "-" with fewer than three seeds.
    """
    seeds = seeds_of_pair(names, pair)
    if len(seeds) < 3:
        return "-"
    mine, other = (verdicts_of(names[name], seeds, split) for name in pair)
    deviation = 100 * (mine - other).mean(1).std(ddof=1)
    return str(max(1, int(np.ceil((2.8 * deviation / points) ** 2))))


def difference_table(rows: list[dict], against: list[tuple], resamples: int = 2000) -> str:
    """Paired differences of rows (A, B) over the seeds that both have, if there are any."""
    names = by_name(rows)
    header = ["paired difference", "test (ID)", "ood", "seeds", "seeds for 2 points, test / ood"]
    lines = [header]
    for pair in against:
        if seeds := seeds_of_pair(names, pair):
            line = [" - ".join(pair)]
            for split in SPLITS:
                found = difference(names, pair, split, resamples=resamples)
                line.append(evaluate.show(found, "+"))
            needed = " / ".join(seeds_needed(names, pair, split) for split in SPLITS)
            lines.append([*line, str(len(seeds)), needed])
    return markdown(lines)


def verdict(found: dict) -> str:
    """What an interval says of a difference.

    >>> verdict({"low": 0.01, "high": 0.1}), verdict({"low": -0.01, "high": 0.1})
    ('above', 'not decided')
    """
    if found["low"] > 0:
        return "above"
    return "below" if found["high"] < 0 else "not decided"


def findings_table(rows: list[dict], resamples: int = 20000) -> str:
    """The comparisons that decide the paper's findings, by intervals corrected for their number."""
    names = by_name(rows)
    level = 1 - 0.05 / (len(DECIDING) * len(SPLITS))
    lines = [["", "paper, test / ood", "test (ID)", "", "ood", "", "seeds"]]
    for finding, pairs in FINDINGS.items():
        lines.append([f"*{finding}*", *[""] * 6])
        for pair in pairs:
            seeds = seeds_of_pair(names, pair)
            line = [" - ".join(pair), paper_difference(names, pair)]
            for split in SPLITS:
                if len(seeds) < 2:
                    line += ["-", "not measured"]
                    continue
                found = difference(names, pair, split, resamples=resamples, level=level)
                line += [evaluate.show(found, "+"), verdict(found)]
            lines.append([*line, str(len(seeds))])
    return markdown(lines)


def paper_difference(names: dict, pair: tuple) -> str:
    """The paper's difference of two rows in points, test and ood, or "-"."""
    gaps = [paper_gap(names, pair, key) for key in ("paper_id", "paper_ood")]
    return "-" if None in gaps else " / ".join(f"{gap:+.1f}" for gap in gaps)


def paper_gap(names: dict, pair: tuple, key: str) -> float | None:
    """The paper's difference of two rows in one of its columns, if it has both."""
    found = [getattr(ROWS[name], key) if name in ROWS else None for name in pair]
    return None if None in found else found[0] - found[1]


def draw_forest(rows: list[dict], path: Path, resamples: int = 2000) -> None:
    """Every paired difference with its 95 % interval, beside the paper's."""
    names = by_name(rows)
    pairs = [pair for pair in [*DECIDING, *FURTHER] if len(seeds_of_pair(names, pair)) > 1]
    places = np.arange(len(pairs))[::-1]
    figure = Figure(figsize=(11, 1.5 + 0.27 * len(pairs)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, split, key in zip(axes, SPLITS, ("paper_id", "paper_ood")):
        found = [difference(names, pair, split, resamples=resamples) for pair in pairs]
        means, lows, highs = (
            100 * np.array([one[part] for one in found]) for part in ("mean", "low", "high")
        )
        reach = [means - lows, highs - means]
        axis.errorbar(means, places, xerr=reach, fmt="o", ms=4, capsize=2, label="here, 95 %")
        theirs = [paper_gap(names, pair, key) for pair in pairs]
        known = [i for i, gap in enumerate(theirs) if gap is not None]
        axis.plot([theirs[i] for i in known], places[known], "D", mfc="none", label="paper")
        axis.axvline(0, color="k", lw=0.8)
        axis.set(title=split, xlabel="difference of greedy accuracy, points")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(places, [" - ".join(pair) for pair in pairs], fontsize=8)
    axes[0].legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=110)


COMPARED = (
    *("base", "warm-up", "Iterative RFT 100 %", "ReST-EM 100 %", "continuous 25 %"),
    *("Random-2", "Top-2", "M-STaR", "Top-2 by the chain checker"),
)


def draw_looks(axis, looks: list[list[dict]]) -> None:
    """Greedy accuracy, Pass@K and Reward-Pass@2 over iterations: mean and range over seeds."""
    steps = [look["iteration"] for look in looks[0]]
    for key in ("pass_at_k", "reward_pass_at_2", "greedy_accuracy"):
        curves = 100 * np.array([[look[key] for look in run] for run in looks])  # (seeds, looks)
        axis.plot(steps, curves.mean(0), "o-", ms=3, label=key.replace("_", " "))
        axis.fill_between(steps, curves.min(0), curves.max(0), alpha=0.15)
    axis.set(title=f"M-STaR on validation, {seeds_of(len(looks))}", xlabel="iteration", ylabel="%")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def draw_study(rows: list[dict], path: Path, resamples: int = 2000) -> None:
    """The README's picture: the main comparison, and M-STaR's dynamics where rows hold looks."""
    names = by_name(rows)
    looks = [row["looks"] for row in names["M-STaR"].values() if "looks" in row]
    figure = Figure(figsize=(11 if looks else 8, 3.8), layout="constrained")
    if looks:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.3])
        draw_looks(left, looks)
    else:
        right = figure.subplots()
    shown = [name for name in COMPARED if name in names]
    for split, shift in zip(SPLITS, (-0.17, 0.17)):
        found = []
        for name in shown:
            verdicts = verdicts_of(names[name], sorted(names[name]), split)
            found.append(crossed_interval(verdicts, resamples))
        means = 100 * np.array([one["mean"] for one in found])
        lows, highs = (100 * np.array([one[part] for one in found]) for part in ("low", "high"))
        places = np.arange(len(shown))[::-1] + shift
        right.barh(places, means, 0.32, xerr=[means - lows, highs - means], label=split)
    right.set_yticks(np.arange(len(shown))[::-1], shown, fontsize=8)
    right.set(title="greedy accuracy after the same budget, 95 %", xlabel="%", xlim=(0, 100))
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def pairs_of(texts: list[str], rows: list[dict]) -> list[tuple]:
    """--against as pairs of rows: "A/B" is (A, B); raises InputError if there are no such rows.

    >>> pairs_of(["A/B"], [{"name": "A"}, {"name": "B"}])
    [('A', 'B')]
    """
    names = {row["name"] for row in rows}
    pairs = [tuple(text.split("/")) for text in texts]
    for text, pair in zip(texts, pairs):
        if len(pair) != 2 or not names.issuperset(pair):
            raise common.InputError(f"--against takes pairs of rows A/B of the table, found {text}")
    return pairs


def document(rows: list[dict], folder: Path) -> None:
    """tests/STUDY.md with its pictures: all tables, and how they were made."""
    draw_forest(rows, folder / "study_forest.png")
    draw_study(rows, folder / "study.png")
    text = f"""# The study

Every row of the paper's tables 1 to 3, and some past it, on the toy world. Accuracy in percent with
95 % intervals over seeds and prompts (Student's t between seeds, a bootstrap over prompts). "extra"
are the samples of the temperature search and of a refreshed PRM, whose steps are added too.
`study_rows.jsonl` keeps the verdict on every prompt of each run, beside a digest of its data and,
for rows made from now on, of the code. These were measured with commit 4a787f7, before stage 03 ran
as phases; same flags, seeds and budgets.

    python tests/study.py                                  # makes the rows, in runs/study
    python tests/study.py --table tests/study_rows.jsonl   # the tables
    python tests/study.py --document                       # this file and its pictures

## The paper's findings

Intervals here are corrected for the {len(DECIDING) * len(SPLITS)} comparisons of this table
(Bonferroni), so they are wider than those below.

{findings_table(rows)}
## All rows

{study_table(rows)}
## All paired differences

Paired over seeds and prompts, 95 %, not corrected for their number. The last column: how many seeds
a difference of 2 points would need to be seen in four studies of five, by the spread between seeds.

![all paired differences beside the paper's](study_forest.png)

{difference_table(rows, [*DECIDING, *FURTHER])}"""
    common.write_atomic(folder / "STUDY.md", [text])


# ---- properties: what the world and the PRM are like, on validation alone


def share(values) -> str:
    """A mean in percent; "-" of none.

    >>> share([True, False]), share([])
    ('50.0', '-')
    """
    values = list(values)
    return f"{100 * sum(values) / len(values):.1f}" if values else "-"


def properties(runs: list[str]) -> str:
    """What the warm-up policies and PRMs of some runs are like on val prompts, a column per run."""
    columns = [run_properties(Path(run)) for run in runs]
    lines = [["", *runs]]
    for name in columns[0]:
        lines.append([name, *(column[name] for column in columns)])
    return markdown(lines)


def run_properties(run: Path) -> dict[str, str]:
    """The properties of one run, which has a warm-up and a PRM: {what: figure}."""
    args = parsed("02_train_prm", ["--runs", str(run)])
    val = common.read_json(common.unchanged(run / "02_train_prm" / "run.json"))["flags"]["val"]
    out = common.open_run(args, "properties", {"val": val, "policy": run / "01_warmup/model"})
    examples = common.load_examples(val)
    by_id, found = common.by_id_of(examples), {}
    prms = {"PRM": run / "02_train_prm" / "model", "own likelihood": out / "likelihood"}
    likelihood_prm(run / "01_warmup" / "model", out / "likelihood")
    try:
        for name, policy in (("base", "data/toy/base"), ("warm-up", run / "01_warmup/model")):
            with common.Sampler(policy, args) as sampler:
                sampler.look(out, name, examples, 16, 1.0, "properties")
            found |= policy_properties(out, name, by_id)
        for name, prm in prms.items():
            rows = rescored(out / "warm-up_samples.jsonl", prm, by_id, args)
            found |= prm_properties(name, rows, by_id)
    finally:
        common.close_runs()
    return found


def policy_properties(out: Path, name: str, by_id: dict) -> dict[str, str]:
    """Accuracy, Pass@16, direct answers by kind of question, and right chains of a policy."""
    greedy = common.read_jsonl(out / f"{name}_greedy.jsonl")
    samples = list(common.by_prompt(common.read_jsonl(out / f"{name}_samples.jsonl")))
    found = {f"{name}: greedy": share(row["correct"] for row in greedy)}
    found[f"{name}: Pass@16"] = share(any(r["correct"] for r in rows) for _, rows in samples)
    direct: dict = {True: [], False: []}
    for prompt, rows in samples:
        with_sum = "sum" in by_id[prompt]["plan"]["ops"]
        direct[with_sum] += ["\n" not in row["response"] for row in rows]
    shares = f"{share(direct[True])} / {share(direct[False])}"
    found[f"{name}: direct answers to questions with a sum / without"] = shares
    right = [common.distinct(r for r in rows if r["correct"]) for _, rows in samples]
    right = [rows for rows in right if rows]
    found[f"{name}: distinct right responses where any"] = f"{np.mean(list(map(len, right))):.1f}"
    chains = [toy.judge(r["response"], by_id[r["id"]]) for g in right if len(g) > 2 for r in g]
    found[f"{name}: right chains among them, of 3 or more"] = share(chains)
    return found


def rescored(path: Path, prm: Path, by_id: dict, args) -> list[dict]:
    """The right distinct responses of a file of samples with the rewards of another PRM."""
    model, rows = common.load_prm(prm, args), common.read_jsonl(path)
    groups = [
        common.distinct(row for row in g if row["correct"]) for _, g in common.by_prompt(rows)
    ]
    groups = [group for group in groups if len(group) > 2]
    examples = [by_id[group[0]["id"]] for group in groups]
    token_ids = [[row["token_ids"] for row in group] for group in groups]
    scored = []
    for group, found in zip(groups, common.score_steps(model, examples, token_ids, args)):
        for row, steps in zip(group, found):
            scored.append(row | {"reward": common.response_reward(steps, args.aggregate)})
    return scored


def prm_properties(name: str, rows: list[dict], by_id: dict) -> dict[str, str]:
    """How well rewards tell right chains from wrong ones with the same right answer."""
    stage = importlib.import_module("02_train_prm")
    chains = stage.chain_report(rows, by_id, toy.judge)
    top, every = [], []
    for prompt, group in common.by_prompt(rows):
        right = [toy.judge(row["response"], by_id[prompt]) for row in group]
        top += [right[i] for i in common.top_k([row["reward"] for row in group], 2)]
        every += right
    return {
        f"{name}: right chain above wrong chain": share([chains["right_chain_above_wrong_chain"]]),
        f"{name}: right chains among Top-2 / all": f"{share(top)} / {share(every)}",
    }


# ---- several runs: what training changed

LOOKED_AT = ("greedy", "pass_at_k", "reward_pass_at_2")
CHARTS = {  # key in metrics.jsonl: (title, scale)
    "greedy_accuracy": ("greedy accuracy, %", 100),
    "pass_at_k": ("Pass@K at the run's temperature, %", 100),
    "reward_pass_at_2": ("Reward-Pass@2, %", 100),
    "temperature": ("temperature T", 1),
}
NOT_OF_A_KIND = ("seed", "policy", "prm", "validate_every")  # flags in which runs of a kind differ


def draw_runs(runs: list[str], path: Path) -> None:
    """The dynamics of several runs in one figure, each drawn from its own metrics.jsonl."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    for axis, (title, _) in zip(axes, CHARTS.values()):
        axis.set(title=title, xlabel="share of training")
        axis.grid(alpha=0.3)
    for folder in (Path(run) / "03_self_evolve" for run in runs):
        flags = evaluate.origin_of(folder)["flags"]
        iterations = 1 if flags["method"] == "sft" else flags["passes"] / flags["interval"]
        metrics = common.read_jsonl(folder / "metrics.jsonl")
        label = "/".join(folder.parts[-3:-1])
        for axis, (key, (_, scale)) in zip(axes, CHARTS.items()):
            looks = [row for row in metrics if key in row]
            shares = [row["iteration"] / iterations for row in looks]
            axis.plot(shares, [scale * row[key] for row in looks], "o-", ms=3, label=label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def look_at(folder: Path) -> dict[str, list[float]]:
    """{prompt: its figures, in the order of LOOKED_AT} of an iteration's look at validation."""
    looks = {}
    for greedy, samples in evaluate.prompts_of(folder, "val"):
        figures = evaluate.prompt_figures(greedy, samples)
        looks[greedy["id"]] = [float(figures[name]) for name in LOOKED_AT]
    return looks


def first_and_last_look(folder: Path) -> list[dict]:
    """What a run of stage 03 saw at its first and its last look; fewer if it looked once only."""
    metrics = common.read_jsonl(folder / "metrics.jsonl")
    looked = [row["iteration"] for row in metrics if "pass_at_k" in row]
    return [look_at(folder / f"iter_{t:02d}") for t in sorted({looked[0], looked[-1]})]


class Kind(NamedTuple):
    """Runs that differ in nothing but their seed, and what that made: warm-up and PRM."""

    name: str  # its first run
    flags: dict
    inputs: dict  # {seed: digests of the run's inputs}
    looks: dict  # {seed: (2, prompts, figures), the first look and the last}


def kinds_of_runs(runs: list[str]) -> tuple[list[Kind], list[str]]:
    """(kinds, runs that looked once only, so that they show no change).

    Of two runs with the same flags and seed, which other models or data were given, the second
    begins another kind. Raises InputError if runs cannot be compared: other prompts, another K, or
    one run twice.
    """
    kinds: list[Kind] = []
    once, shown = [], None
    for run in runs:
        folder = Path(run) / "03_self_evolve"
        origin, looks = evaluate.origin_of(folder), first_and_last_look(folder)
        if len(looks) < 2:
            once.append(run)
            continue
        shown = shown or (list(looks[0]), origin["flags"]["samples"])
        if (list(looks[0]), origin["flags"]["samples"]) != shown:
            raise common.InputError(
                f"{run} looked at other prompts, or with another K, than the runs before it; "
                "compare runs with the same --val and --samples"
            )
        seed, inputs = origin["flags"]["seed"], origin["inputs"]
        flags = {key: v for key, v in origin["flags"].items() if key not in NOT_OF_A_KIND}
        alike = [kind for kind in kinds if kind.flags == flags]
        if any(kind.inputs.get(seed) == inputs for kind in alike):
            raise common.InputError(
                f"{run} has the flags, the seed and the inputs of another run; give one of them"
            )
        free = [kind for kind in alike if seed not in kind.looks]
        if not free:
            free = [Kind(run, flags, {}, {})]
            kinds += free
        free[0].inputs[seed] = inputs
        free[0].looks[seed] = np.array([list(look.values()) for look in looks])
    return kinds, once


def seeds_of(count: int) -> str:
    """A number of seeds in words.

    >>> seeds_of(1), seeds_of(3)
    ('1 seed', '3 seeds')
    """
    return f"{count} seed" if count == 1 else f"{count} seeds"


def changes(kind: Kind, seeds: list[int]) -> np.ndarray:
    """What training changed in some seeds of a kind: the last look less the first.

    Returns (seeds, prompts, figures).
    """
    return np.stack([kind.looks[seed][1] - kind.looks[seed][0] for seed in seeds])


def kind_table(kind: Kind, first: Kind, resamples: int) -> str:
    """First look, last look and change of a kind of runs, and that change less the first kind's.

    Changes are compared over the seeds that both kinds have.
    """
    both = [seed for seed in first.looks if seed in kind.looks]
    looks = np.stack(list(kind.looks.values()))  # (seeds, 2, prompts, figures)
    title = f"{kind.name}, {seeds_of(len(looks))}, validation"
    header = [title, "first look", "last look", "change"]
    compared = bool(both) and kind is not first
    if compared:
        header.append(f"less that of {first.name}, {seeds_of(len(both))}")
    lines = [header]
    for k, name in enumerate(LOOKED_AT):
        change = crossed_interval(changes(kind, list(kind.looks))[..., k], resamples)
        shares = [f"{100 * looks[:, when, :, k].mean():.1f}" for when in (0, 1)]
        line = [evaluate.TITLES[name], *shares, evaluate.show(change, "+")]
        if compared:
            gap = (changes(kind, both) - changes(first, both))[..., k]
            line.append(evaluate.show(crossed_interval(gap, resamples), "+"))
        lines.append(line)
    return markdown(lines)


def dynamics_table(runs: list[str], resamples: int = 2000) -> str:
    """What training changed on validation, for every kind of runs; kinds are never pooled."""
    kinds, once = kinds_of_runs(runs)
    text = ""
    for run in once:
        text += f"{run} looked at the dynamics once only (--validate_every): it is in no table\n"
    for kind in kinds:
        text += "\n" + kind_table(kind, kinds[0], resamples)
    return text


# ---- the command


def main() -> None:
    """Drive the study, or print or write what --table, --compare and --document ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/study")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="default: 8 for rows that carry a finding, else 3"
    )
    parser.add_argument("--only", nargs="+", default=list(ROWS), help="names of rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--extra", default="", help="flags for every 03_self_evolve.py")
    parser.add_argument("--extra01", default="", help="flags for 01_warmup.py")
    parser.add_argument("--extra02", default="", help="flags for 02_train_prm.py")
    parser.add_argument("--table", metavar="FILE", help="print the tables of a rows.jsonl")
    parser.add_argument("--against", nargs="+", metavar="A/B", help="with --table: these pairs")
    parser.add_argument("--resamples", type=int, default=2000, help="of the intervals of tables")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="print what training changed")
    parser.add_argument("--properties", nargs="+", metavar="RUN", help="of world and PRM, on val")
    parser.add_argument("--document", action="store_true", help="STUDY.md from study_rows.jsonl")
    args = parser.parse_args()
    if args.table:
        rows = common.read_jsonl(args.table)
        against = pairs_of(args.against, rows) if args.against else [*DECIDING, *FURTHER]
        print(findings_table(rows))
        print(study_table(rows, args.resamples))
        print(difference_table(rows, against, args.resamples))
    elif args.compare:
        chart = Path(args.compare[0]) / "compare.png"
        draw_runs(args.compare, chart)
        print(f"wrote {chart}")
        print(dynamics_table(args.compare, args.resamples))
    elif args.document:
        document(common.read_jsonl(MEASURED), MEASURED.parent)
    elif args.properties:
        print(properties(args.properties))
    else:
        drive(args)


if __name__ == "__main__":
    try:
        main()
    except common.InputError as error:
        sys.exit(f"error: {error}")
