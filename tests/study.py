"""The study in miniature: every row of the paper's tables 1 to 3, and three that go past it, on the toy world.

    python tests/study.py                               # every row, seeds 0 1 2; one after the other
    python tests/study.py --only M-STaR Top-2 --seeds 0 # some of them
    python 04_eval.py --study runs/study/rows.jsonl     # the table and the paired tests

Reads   data/toy (python tests/toy.py makes it)
Writes  runs/study/seed<S>/01_warmup, 02_train_prm    shared by all rows of a seed
        runs/study/seed<S>/<row>/03_self_evolve/      one run, as stage 03 writes it
        runs/study/rows.jsonl                         one line per finished run: flags, budget, a verdict (0 or 1) per test and ood prompt

A run is stage 03 with a row's flags; then its policy answers every test and ood prompt greedily. To save time the dynamics
are looked at only after a run's last iteration, but for the rows about temperature. A driver that was killed goes on where
it was and repeats no finished run. Rows that other flags or data made are refused, flags that contradict each other too, before
anything runs; a run that stage 03 refuses later is left out and named at the end. Several drivers may share the folder: a
run that another one is at is left to it.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common

DYNAMICS, FIXED = "--validate_every 2", "--temperature 1.0"
ROWS = {  # name: (the paper's ID and OOD accuracy, flags of 03_self_evolve.py; None: not trained)
    "base": (13.6, 52.4, None),
    "warm-up": (38.8, 52.6, None),
    "SFT": (44.3, 54.8, "--method sft --policy data/toy/base"),
    "Iterative RFT 100 %": (42.3, 55.7, f"--method iterative_rft --interval 1 --select all {FIXED}"),
    "ReST-EM 100 %": (42.3, 55.1, f"--method rest_em --interval 1 --select all {FIXED}"),
    "continuous 100 %": (42.2, 56.7, f"--interval 1 --select all {FIXED}"),
    "continuous 50 %": (43.1, 56.2, f"--interval 0.5 --select all {FIXED}"),
    "continuous 25 %": (43.1, 57.2, f"--select all {FIXED}"),
    "continuous 12.5 %": (42.3, 56.1, f"--interval 0.125 --select all {FIXED}"),
    "continuous 6.25 %": (41.0, 56.8, f"--interval 0.0625 --select all {FIXED}"),
    "Random-2": (41.0, 55.5, f"--select random {FIXED}"),
    "PRM > alpha": (43.8, 57.5, f"--select threshold {FIXED}"),
    "Top-1": (43.0, 59.0, f"--k 1 {FIXED}"),
    "Top-2": (45.3, 59.2, f"{FIXED} {DYNAMICS}"),
    "Top-4": (44.0, 58.4, f"--k 4 {FIXED}"),
    "oracle without PRM": (42.5, 58.2, f"--unlabeled oracle --select all {FIXED}"),
    "oracle + PRM": (42.9, 59.1, f"--unlabeled oracle {FIXED}"),
    "oracle + PRM, mix-in 25 %": (None, None, f"--unlabeled oracle --mixin 0.25 {FIXED}"),
    "oracle + PRM, mix-in 50 %": (None, None, f"--unlabeled oracle --mixin 0.5 {FIXED}"),
    "oracle + PRM, mix-in 75 %": (None, None, f"--unlabeled oracle --mixin 0.75 {FIXED}"),
    "vote, mix-in 0 %": (43.3, 58.2, f"--unlabeled vote {FIXED}"),
    "vote, mix-in 25 %": (42.4, 57.6, f"--unlabeled vote --mixin 0.25 {FIXED}"),
    "vote, mix-in 50 %": (42.9, 58.2, f"--unlabeled vote --mixin 0.5 {FIXED}"),
    "vote, mix-in 75 %": (45.0, 58.8, f"--unlabeled vote --mixin 0.75 {FIXED}"),
    "majority vote without PRM, mix-in 0 %": (None, None, f"--unlabeled vote --vote_weights equal --select all {FIXED}"),
    "Top-2, T = 0.5": (None, None, f"--temperature 0.5 {DYNAMICS}"),
    "Top-2, T = 0.7": (None, None, f"--temperature 0.7 {DYNAMICS}"),
    "Top-2, T = 1.2": (None, None, f"--temperature 1.2 {DYNAMICS}"),
    "adaptive T on Pass@K": (42.8, 58.0, f"--objective pass_at_k {DYNAMICS}"),
    "M-STaR": (45.9, 59.5, DYNAMICS),
    "M-STaR, K = 11": (None, None, "--samples 11"),  # draws about as many samples as the next row
    "M-STaR, PRM refreshed": (None, None, "--prm_refresh 4"),
    "M-STaR, T per difficulty": (None, None, "--temperature per_class"),
}


def folder_of(name: str) -> str:
    """A row's name as a folder name.

    >>> folder_of("vote, mix-in 25 %")
    'vote_mix-in_25'
    """
    return "_".join("".join(c if c.isalnum() or c in ".-=>" else " " for c in name).split()).replace(">", "over")


def parsed(stage: str, flags: list[str]):
    """A stage's Args from its flags."""
    return common.HfArgumentParser(importlib.import_module(stage).Args).parse_args_into_dataclasses(flags)[0]


def run(stage: str, flags: list[str]):
    """Run a stage in this process, so that a kill ends both; its tables are not shown. Returns its Args."""
    stage_args = parsed(stage, flags)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            importlib.import_module(stage).main(stage_args)
    finally:
        common.close_engine()
        while common.LOCKS:  # else this process would hold the folder to its own end
            common.LOCKS.pop().close()
    return stage_args


def greedy_verdicts(policy_path, args) -> dict[str, str]:
    """{"test": "10...", "ood": "..."}: whether the greedy response to each prompt is right."""
    policy = common.load_policy(policy_path, args)
    verdicts = {split: "".join(str(int(r["correct"])) for r in common.sample_rows(policy, common.load_examples(f"data/toy/{split}.jsonl"), 1, 0.0, "study", 0, args))
                for split in ("test", "ood")}
    common.close_engine()
    return verdicts


@functools.cache
def data_digests() -> dict:
    """What the toy world holds, in short."""
    return {part: common.digest(f"data/toy/{part}") for part in ("train.jsonl", "unlabeled.jsonl", "val.jsonl", "test.jsonl", "ood.jsonl", "base")}


def identity(name: str, seed: int, args) -> dict:
    """What a finished row must have been made with to count as this one."""
    return {"name": name, "seed": seed, "flags": " ".join(f"{ROWS[name][2] or ''} {args.extra}".split()), "shared_flags": [args.extra01, args.extra02],
            "data": data_digests()}


def is_finished(name: str, seed: int, table: Path, args) -> bool:
    """Whether the table holds this row. Raises InputError if it holds one of this name and seed that was made in another way."""
    wanted = identity(name, seed, args)
    for row in common.read_jsonl(table) if table.exists() else ():
        if (row["name"], row["seed"]) == (name, seed):
            if changed := [key for key in wanted if row[key] != wanted[key]]:
                raise common.InputError(f"{table} holds {name!r}, seed {seed}, made with another {changed[0]}: {row[changed[0]]!r}, "
                                        f"now {wanted[changed[0]]!r}; choose another --out")
            return True
    return False


def train_and_judge(name: str, seed: int, out: Path, args) -> dict:
    """One row of the table."""
    shared, runs, row, seconds = out / f"seed{seed}", out / f"seed{seed}" / folder_of(name), identity(name, seed, args), 0.0
    look = [] if "--validate_every" in row["flags"] else ["--validate_every", "0"]  # what is looked at changes no result
    flags = ["--runs", str(runs), "--prm", f"{shared}/02_train_prm/model", "--policy", f"{shared}/01_warmup/model", *look, *shlex.split(row["flags"]),
             "--seed", str(seed), "--device", args.device]
    policy, budget = {"base": "data/toy/base", "warm-up": shared / "01_warmup/model"}.get(name), {"samples": 0, "extra_samples": 0, "steps": 0, "extra_steps": 0}
    if policy is None:
        stage_args, policy = run("03_self_evolve", flags), runs / "03_self_evolve/model"
        metrics = common.read_jsonl(runs / "03_self_evolve/metrics.jsonl")
        budget = {key: sum(m.get(key, 0) for m in metrics) for key in ("samples", "extra_samples", "extra_steps")} | {"steps": metrics[-1]["steps"]}
        seconds = sum(sum(m["seconds"].values()) for m in metrics)  # of the processes that ended its iterations
    else:
        stage_args = parsed("03_self_evolve", flags)
    paper, start = {"paper_id": ROWS[name][0], "paper_ood": ROWS[name][1]}, time.time()
    return row | paper | budget | {"verdicts": greedy_verdicts(policy, stage_args), "seconds": round(seconds + time.time() - start, 1)}


def add_row(name: str, seed: int, out: Path, table: Path, args) -> None:
    """Make a row and append it to the table, unless it is there or another driver is at it."""
    folder = out / f"seed{seed}" / folder_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".driver", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if is_finished(name, seed, table, args):
            return
        row = train_and_judge(name, seed, out, args)
        with open(out / ".table", "w") as turns:  # drivers side by side take turns
            fcntl.flock(turns, fcntl.LOCK_EX)
            rows = (common.read_jsonl(table) if table.exists() else []) + [row]
            place = {name: k for k, name in enumerate(ROWS)}  # rows that are no longer in the study stay, at the end
            common.write_jsonl(table, sorted(rows, key=lambda row: (place.get(row["name"], len(ROWS)), row["name"], row["seed"])))
    print(name, seed, {split: round(v.count("1") / len(v), 3) for split, v in row["verdicts"].items()}, f"{row['seconds']:.0f} s", flush=True)


def share_stages(seed: int, out: Path, args) -> None:
    """Warm-up and PRM of a seed, once; a second driver waits for the first."""
    (out / f"seed{seed}").mkdir(parents=True, exist_ok=True)
    with open(out / f"seed{seed}" / ".driver", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stage, extra in (("01_warmup", args.extra01), ("02_train_prm", args.extra02)):
            run(stage, ["--runs", f"{out}/seed{seed}", "--seed", str(seed), "--device", args.device, *shlex.split(extra)])


def main() -> None:
    """Every wanted (seed, row) that no line of rows.jsonl holds yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(ROWS), help="names of rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--extra", default="", help="flags for every 03_self_evolve.py")
    parser.add_argument("--extra01", default="", help="flags for 01_warmup.py")
    parser.add_argument("--extra02", default="", help="flags for 02_train_prm.py")
    args = parser.parse_args()
    if unknown := sorted(set(args.only) - set(ROWS)):
        sys.exit(f"unknown rows {unknown}; there are {list(ROWS)}")
    common.transformers.logging.set_verbosity_error()
    common.transformers.logging.disable_progress_bar()
    out, table = Path(args.out), Path(args.out) / "rows.jsonl"
    for name in args.only:
        if ROWS[name][2] is not None:  # a wrong flag, or two that contradict each other, show now, not after hours
            importlib.import_module("03_self_evolve").check_flags(parsed("03_self_evolve", shlex.split(f"{ROWS[name][2]} {args.extra}")))
    wanted = lambda: [(name, seed) for name in args.only for seed in args.seeds if not is_finished(name, seed, table, args)]
    for seed in sorted({seed for _, seed in wanted()}):
        share_stages(seed, out, args)
    for name, seed in wanted():
        try:
            add_row(name, seed, out, table, args)
        except common.InputError as error:  # the other rows can do without this one
            print(f"error: {name}, seed {seed}: {error}", file=sys.stderr, flush=True)
    if missing := wanted():
        sys.exit(f"error: refused, or still with another driver: {missing}")


if __name__ == "__main__":
    try:
        main()
    except common.InputError as error:
        sys.exit(f"error: {error}")
