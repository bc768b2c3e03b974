"""The study in miniature: every row of the paper's tables 1 to 3, and some past it.

    python tests/study.py                                # every row, seeds 0 1 2, one by one
    python tests/study.py --only M-STaR Top-2 --seeds 0  # some of them
    python tests/study.py --table runs/study/rows.jsonl  # the table and the paired differences
    python tests/study.py --compare runs/a runs/b        # what training changed, in several runs
    python tests/study.py --document tests/STUDY.md      # the tables of tests/study_rows.jsonl

Reads   data/toy (python tests/toy.py makes it)
Writes  runs/study/seed<S>/01_warmup, 02_train_prm   shared by all rows of a seed
        runs/study/seed<S>/<row>/03_self_evolve/     one run, as stage 03 writes it
        runs/study/seed<S>/<row>/verdicts/           its greedy answers to the test and ood prompts
        runs/study/rows.jsonl                        a line per run: flags, budget, verdicts
        <first run>/compare.png                      --compare: the dynamics of several runs

A run is stage 03 with a row's flags; then its policy answers every test and ood prompt greedily. To
save time the dynamics are looked at only after a run's last iteration, but for the rows about
temperature. A driver that was killed goes on where it was and repeats no finished run. Rows that
other flags or data made are refused, flags that contradict each other too, before anything runs; a
run that stage 03 refuses later is left out and named at the end. Several drivers may share the
folder: a run that another one is at is left to it.

The tables: means over seeds with 95 % intervals over seeds and prompts; differences are paired, the
same seeds and prompts on both sides. --compare never pools runs that differ in more than the seed.
"""

import argparse
import contextlib
import fcntl
import functools
import importlib
import os
import shlex
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
AGAINST = [  # the comparisons behind the paper's findings, and those past it
    ("M-STaR", "Iterative RFT 100 %"),
    ("M-STaR", "ReST-EM 100 %"),
    ("continuous 100 %", "Iterative RFT 100 %"),
    ("continuous 100 %", "ReST-EM 100 %"),
    ("continuous 25 %", "Iterative RFT 100 %"),
    ("continuous 25 %", "ReST-EM 100 %"),
    ("continuous 25 %", "continuous 100 %"),
    ("continuous 25 %", "continuous 50 %"),
    ("continuous 25 %", "continuous 12.5 %"),
    ("continuous 25 %", "continuous 6.25 %"),
    ("Top-2", "Random-2"),
    ("Top-1", "Random-2"),
    ("Random-2", "continuous 25 %"),
    ("Top-2", "continuous 25 %"),
    ("Top-2", "PRM > alpha"),
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
    ("vote, mix-in 0 %", "Top-2"),
    ("vote, mix-in 25 %", "Top-2"),
    ("vote, mix-in 50 %", "Top-2"),
    ("vote, mix-in 75 %", "Top-2"),
    ("vote, mix-in 75 %", "vote, mix-in 0 %"),
    ("vote, mix-in 0 %", "majority vote without PRM, mix-in 0 %"),
    ("M-STaR", "Top-2"),
    ("M-STaR", "Top-2, T = 0.5"),
    ("M-STaR", "Top-2, T = 0.7"),
    ("M-STaR", "Top-2, T = 1.2"),
    ("M-STaR", "adaptive T on Pass@K"),
    ("M-STaR, PRM refreshed", "M-STaR"),
    ("M-STaR, PRM refreshed", "M-STaR, K = 11"),
    ("M-STaR, K = 11", "M-STaR"),
]
SPLITS = ("test", "ood")
BUDGET = ("samples", "extra_samples", "extra_steps")


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


def identity(name: str, seed: int, args) -> dict:
    """What a finished row must have been made with to count as this one."""
    return {
        "name": name,
        "seed": seed,
        "flags": " ".join(f"{ROWS[name].flags or ''} {args.extra}".split()),
        "shared_flags": [args.extra01, args.extra02],
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
                if row[key] != value:
                    raise common.InputError(
                        f"{table} holds {name!r}, seed {seed}, made with another {key}: "
                        f"{row[key]!r}, now {value!r}; choose another --out"
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
    flags += shlex.split(row["flags"])
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
    """Warm-up and PRM of a seed, once; a second driver waits for the first."""
    with locked(out / f"seed{seed}" / ".driver"):
        for stage, extra in (("01_warmup", args.extra01), ("02_train_prm", args.extra02)):
            flags = ["--runs", f"{out}/seed{seed}", "--seed", str(seed), "--device", args.device]
            run(stage, flags + shlex.split(extra))


def missing_rows(table: Path, args) -> list[tuple[str, int]]:
    """The wanted (row, seed) that the table does not hold."""
    wanted = [(name, seed) for name in args.only for seed in args.seeds]
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
    for seed in sorted({seed for _, seed in missing_rows(table, args)}):
        share_stages(seed, out, args)
    for name, seed in missing_rows(table, args):
        try:
            add_row(name, seed, out, table, args)
        except common.InputError as error:  # the other rows can do without this one
            print(f"error: {name}, seed {seed}: {error}", file=sys.stderr, flush=True)
    if missing := missing_rows(table, args):
        sys.exit(f"error: refused, or still with another driver: {missing}")


# ---- the table of the study


def crossed_interval(values: np.ndarray, resamples: int, seed: int = 0) -> dict:
    """Mean of values (seeds, prompts) and its 95 % interval over seeds and prompts.

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
    low, high = np.percentile(between + values.mean(0)[picks].mean(1), [2.5, 97.5])
    mean = float(values.mean())
    return {"mean": mean, "low": float(low), "high": float(high), "seeds": s, "n": n}


def by_name(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """{name: {seed: row}}; raises InputError for rows that cannot stand in one table."""
    names: dict = {}
    for row in rows:
        names.setdefault(row["name"], {})[row["seed"]] = row
        if (row["data"], row["shared_flags"]) != (rows[0]["data"], rows[0]["shared_flags"]):
            raise common.InputError(
                "some rows were made with different data or shared flags; keep them in two files"
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


def difference_table(rows: list[dict], against: list[tuple], resamples: int = 2000) -> str:
    """Paired differences of rows (A, B) over the seeds that both have, if there are any."""
    names = by_name(rows)
    lines = [["paired difference", "test (ID)", "ood", "seeds"]]
    for a, b in against:
        seeds = sorted(set(names.get(a, ())) & set(names.get(b, ())))
        if seeds:
            cells = []
            for split in SPLITS:
                mine, other = (verdicts_of(names[name], seeds, split) for name in (a, b))
                cells.append(evaluate.show(crossed_interval(mine - other, resamples), "+"))
            lines.append([f"{a} - {b}", *cells, str(len(seeds))])
    return markdown(lines)


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


def document(rows: list[dict]) -> str:
    """tests/STUDY.md: both tables, and how they were made."""
    return f"""# The study

Every row of the paper's tables 1 to 3, and some past it, on the toy world: measured with commit
4a787f7, before stage 03 ran as phases; same flags, seeds and budgets. Accuracy in percent with 95 %
intervals over seeds and prompts (Student's t between seeds, a bootstrap over prompts; of one seed
over prompts only). "extra" are the samples of the temperature search and of a refreshed PRM, whose
steps are added too. `tests/study_rows.jsonl` keeps the verdict on every prompt of each run.

    python tests/study.py --table tests/study_rows.jsonl   # these tables
    python tests/study.py --document tests/STUDY.md        # this file

{study_table(rows)}
Differences are paired over seeds and prompts:

{difference_table(rows, AGAINST)}"""


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(ROWS), help="names of rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--extra", default="", help="flags for every 03_self_evolve.py")
    parser.add_argument("--extra01", default="", help="flags for 01_warmup.py")
    parser.add_argument("--extra02", default="", help="flags for 02_train_prm.py")
    parser.add_argument("--table", metavar="FILE", help="print the tables of a rows.jsonl")
    parser.add_argument("--against", nargs="+", metavar="A/B", help="with --table: these pairs")
    parser.add_argument("--resamples", type=int, default=2000, help="of the intervals of tables")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="print what training changed")
    parser.add_argument("--document", metavar="FILE", help="write the tables of study_rows.jsonl")
    args = parser.parse_args()
    if args.table:
        rows = common.read_jsonl(args.table)
        against = pairs_of(args.against, rows) if args.against else AGAINST
        print(study_table(rows, args.resamples))
        print(difference_table(rows, against, args.resamples))
    elif args.compare:
        chart = Path(args.compare[0]) / "compare.png"
        draw_runs(args.compare, chart)
        print(f"wrote {chart}")
        print(dynamics_table(args.compare, args.resamples))
    elif args.document:
        common.write_atomic(args.document, [document(common.read_jsonl(MEASURED))])
    else:
        drive(args)


if __name__ == "__main__":
    try:
        main()
    except common.InputError as error:
        sys.exit(f"error: {error}")
