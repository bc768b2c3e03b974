"""Stage 03: continuous self-evolving with PRM Top-2 and adaptive temperature: M-STaR (paper, sections 2, 3 and 5).

Reads   data/toy/train.jsonl, data/toy/val.jsonl, runs/toy/01_warmup/model/, runs/toy/02_train_prm/model/
Writes  runs/toy/03_self_evolve/iter_XX/samples.jsonl   K responses per prompt of the iteration, checked; the right ones scored
                                iter_XX/selected.jsonl  what the policy is trained on, as far as the iteration's steps reach
                                iter_XX/val_*.jsonl     greedy responses and samples on the validation set
                                iter_XX/search.jsonl    samples of the temperature search
                                metrics.jsonl           one row per iteration; row 0 is the start policy
                                temperature.jsonl       every search: the whole curve and the choice
                                checkpoint/             policy (Hugging Face folder) and AdamW moments (safetensors), state.json
                                model/                  the evolved policy, a plain Hugging Face folder

One optimisation runs through all iterations: neither the AdamW moments nor the learning-rate schedule is ever reset, in
an iteration or a restart. The PRM stays fixed. Search and validation never see training, test or ood prompts.

Every other row of the paper's tables is a flag: --method, --interval, --select and --k, --aggregate, --unlabeled and
--mixin, --temperature and --objective. Whatever they say, a run draws --passes x prompts x K samples (sft none) and takes
--steps optimizer steps; what the temperature search and a refreshed PRM cost comes on top, counted as extra_samples and
extra_steps. Two flags go past the paper: --prm_refresh and --temperature per_class.

Departures from the paper:
1. Every iteration takes the same number of optimizer steps (--steps / iterations), whatever was selected: of many selected
   responses it sees a part, few it sees more than once ("trained" in metrics.jsonl: how many different ones).
2. K = 8 here, 16 there; the search uses the first --search_prompts validation prompts.

    python 03_self_evolve.py
    python 03_self_evolve.py --method iterative_rft --interval 1 --select all --temperature 1.0 --runs runs/rft --policy runs/toy/01_warmup/model --prm runs/toy/02_train_prm/model
"""

import contextlib
import importlib
import io
import json
import math
import time
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch

from common import (InputError, ScoringArgs, append_chunks, by_id_of, check_longest_prompts, close_engine, distinct, epoch_batches, fit, flag, grouped,
                    learning_rate, load_checkpoint, load_examples, load_policy, load_prm, load_weights, make_optimizer, move_trainer, open_run, pass_at_k,
                    read_jsonl, reward_pass_at_k, run_stage, sample_rows, save_checkpoint, save_model, search_temperature, seed_of, sft_loss, top_k,
                    verdict_if_wrong, vote, write_jsonl)


@dataclass
class Args(ScoringArgs):
    """Flags of stage 03."""

    data: str = flag("data/toy/train.jsonl", "labelled prompts, JSONL")
    policy: str = flag("", "policy to start from; empty: the warm-up policy of --runs")
    prm: str = flag("", "process reward model; empty: the PRM of --runs")
    val: str = flag("data/toy/val.jsonl", "fixed validation set: dynamics and temperature search")
    method: Literal["continuous", "iterative_rft", "rest_em", "sft"] = flag(
        "continuous", "continuous: one optimisation; iterative_rft: optimizer and rate schedule begin anew every iteration; rest_em: the weights as well; "
                      "sft: --steps on the gold answers, nothing sampled")
    interval: float = flag(0.25, "iteration interval: share of the labelled prompts that one iteration consumes; 1 over a whole number")
    passes: float = flag(2.0, "passes over the labelled prompts in all; passes / interval iterations")
    samples: int = flag(8, "K: responses per prompt")
    select: Literal["top_k", "random", "threshold", "all"] = flag("top_k", "H: which of the right responses are trained on")
    k: int = flag(2, "k of top_k and random: right responses per prompt")
    alpha: float = flag(0.5, "threshold: right responses with R_p above alpha")
    unlabeled: Literal["none", "oracle", "vote"] = flag("none", "unlabelled prompts: none; oracle: with their true answers; vote: with pseudo-labels")
    unlabeled_data: str = flag("data/toy/unlabeled.jsonl", "unlabelled prompts, JSONL; only oracle reads their answers")
    mixin: float = flag(0.0, "T_mixin: share of the iterations after which half of the prompts are unlabelled ones")
    vote_weights: Literal["prm", "equal"] = flag("prm", "pseudo-label: the answer with the largest PRM-weighted vote, or the majority")
    gold_response: str = flag("Answer : {}", "method sft: the response that states a gold answer")
    temperature: str = flag("adaptive", "a number; adaptive: the search's choice, 1.0 until the first search; per_class: one choice per "
                                           "difficulty, for prompts sampled before, so from the second pass on")
    objective: Literal["reward_pass_at_2", "pass_at_k"] = flag("reward_pass_at_2", "what the temperature search maximises")
    search_every: int = flag(2, "iterations between two temperature searches")
    search_prompts: int = flag(64, "validation prompts that a search uses")
    search_grid: list[float] = flag([round(0.3 + 0.1 * i, 1) for i in range(14)], "temperatures that a search tries")
    prm_refresh: int = flag(0, "iterations after which stage 02 trains a new PRM on rollouts of the current policy; 0: never")
    validate_every: int = flag(1, "iterations between two looks at the dynamics; 0: only after the last, which is always looked at")
    steps: int = flag(480, "optimizer steps over all iterations")
    batch_size: int = flag(16, "responses per optimizer step")
    learning_rate: float = flag(7e-5, "peak learning rate")
    warmup_steps: int = flag(20, "steps of linear warm-up, once; then the rate is constant")


# ---------------------------------------------------------------- generate

def prompts_between(examples: list[dict], start: int, stop: int, *key) -> list[dict]:
    """Prompts start to stop of an endless series of passes over the examples; every pass is in a new order and complete.

    >>> order = prompts_between(["a", "b", "c"], 0, 6, "key")
    >>> sorted(order[:3]), sorted(order[3:]), prompts_between(["a", "b", "c"], 2, 4, "key") == order[2:4]
    (['a', 'b', 'c'], ['a', 'b', 'c'], True)
    """
    order, epoch = [], 0
    while len(order) < stop:
        order += torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed_of(*key, epoch))).tolist()
        epoch += 1
    return [examples[i] for i in order[start:stop]]


def choose_prompts(examples: list[dict], unlabeled: list[dict], t: int, iterations: int, args: Args) -> list[dict]:
    """D_t; after the share T_mixin of the iterations every second prompt is an unlabelled one (paper, section 3.4).

    A pass over the examples is a whole number of iterations, and one over the unlabelled ones ends where they no longer suffice
    for an iteration, so none holds a prompt twice. Raises InputError if they do not suffice for one.
    """
    parts, before = round(1 / args.interval), round(args.mixin * iterations)
    consumed = lambda t: len(examples) * t // parts  # by the end of iteration t
    prompts = prompts_between(examples, consumed(t - 1), consumed(t), args.seed, "prompts")
    if not unlabeled or t <= before:
        return prompts
    widest, wanted = math.ceil(math.ceil(len(examples) / parts) / 2), (consumed(t) - consumed(before)) // 2 - (consumed(t - 1) - consumed(before)) // 2
    if widest > len(unlabeled):
        raise InputError(f"{args.unlabeled_data} holds {len(unlabeled)} prompts, fewer than the {widest} that one iteration takes; lower --interval")
    epoch, place = divmod(t - before - 1, len(unlabeled) // widest)
    start = epoch * len(unlabeled) + place * widest
    return prompts[:len(prompts) - wanted] + prompts_between(unlabeled, start, start + wanted, args.seed, "unlabeled")


def gold_rows(policy, examples: list[dict], args: Args) -> list[dict]:
    """Method sft: the gold answer of every prompt, stated by args.gold_response, in the form of a selected sample."""
    rows = []
    for example in examples:
        text = args.gold_response.format(example["answer"])
        rows.append({"id": example["id"], "iteration": 1, "sample": 0, "response": text, "answer": example["answer"], "correct": True,
                     "token_ids": policy.tokenizer.encode(text, add_special_tokens=False), "step_scores": [], "reward": 1.0})
    return rows


def pseudo_label(rows: list[dict], weights: str) -> tuple[list[dict], int]:
    """Samples of unlabelled prompts, judged by their own vote: a* = the answer with the largest PRM-weighted vote (paper, section 3.4).

    R = 1(a = a*) x R_p; a prompt of which no answer can be read is left out. Returns (rows, number of prompts left out).

    >>> rows = [{"id": "p", "answer": a, "reward": r} for a, r in (("7", .3), ("8", .5), ("7", .4), (None, -1.))]
    >>> [(row["correct"], row["reward"]) for row in pseudo_label(rows, "prm")[0]], pseudo_label([{"id": "q", "answer": None, "reward": -1.}], "prm")
    ([(True, 0.3), (False, 0.0), (True, 0.4), (False, 0.0)], ([], 1))
    """
    judged, skipped = [], 0
    for samples in grouped(rows).values():
        label = vote([r["answer"] for r in samples], [max(r["reward"], 0.0) if weights == "prm" else 1.0 for r in samples])
        skipped += label is None
        if label is not None:
            judged += [{**r, "pseudo_label": label, "correct": r["answer"] == label, "reward": r["reward"] if r["answer"] == label else 0.0} for r in samples]
    return judged, skipped


def generate_samples(policy, prm, prompts: list[dict], t: int, choice: dict, classes: dict, folder: Path, args: Args) -> list[dict]:
    """K checked samples per prompt, with R = 1(a = a*) x R_p; of unlabelled prompts every sample gets R_p, for the vote."""
    temperature_of = lambda e: choice.get(e["answer"] and classes.get(e["id"]), choice["all"])  # a hidden answer gives no solve rate
    kind = lambda e: (e["answer"] is None, temperature_of(e))

    def produce(chunk):
        """Rows of a chunk of prompts, those of one temperature and kind in one batch."""
        return [row for (hidden, temperature), group in groupby(chunk, key=kind)
                for row in sample_rows(policy, list(group), args.samples, temperature, "evolve", t, args, prm, right_only=not hidden)]

    hidden = {e["id"] for e in prompts if e["answer"] is None}
    return append_chunks(folder / "samples.jsonl", sorted(prompts, key=kind), args.samples, args.chunk, produce, f"03 sample {t}",
                         lean=lambda row: row if row["id"] in hidden else verdict_if_wrong(row))


# ---------------------------------------------------------------- select and improve

def select(rows: list[dict], args: Args) -> list[dict]:
    """H: which of the distinct right responses to each prompt are trained on (paper, section 3.3, table 2).

    >>> rows = [{"id": "p", "token_ids": [i], "correct": c, "reward": r} for i, c, r in ((1, True, .4), (2, True, .9), (3, False, 0.), (4, True, .6))]
    >>> [[row["token_ids"][0] for row in select(rows, Args(select=how, k=2, alpha=.5))] for how in ("top_k", "all", "threshold")]
    [[2, 4], [1, 2, 4], [2, 4]]
    """
    chosen = []
    for prompt, right in grouped(distinct([row for row in rows if row["correct"]])).items():
        rewards = [row["reward"] for row in right]
        if args.select == "random":  # the order of random numbers that belong to (iteration, prompt, sample)
            picked = top_k([seed_of(args.seed, "select", row["iteration"], prompt, row["sample"]) for row in right], args.k)
        elif args.select == "threshold":
            picked = [i for i in range(len(right)) if rewards[i] > args.alpha]
        else:
            picked = top_k(rewards, args.k) if args.select == "top_k" else range(len(right))
        chosen += [{**right[i], "rank": rank} for rank, i in enumerate(picked, 1)]
    return chosen


def begin_iteration(policy, optimizer, state: dict, t: int, start_from, args: Args) -> dict:
    """All that tells the training methods apart: what an iteration inherits from the one before (paper, section 3.2, table 1)."""
    if args.method == "rest_em" and t > 1:
        load_weights(policy, start_from)
    if args.method in ("iterative_rft", "rest_em"):
        optimizer.state.clear()
        state = {**state, "reset": state["step"]}
    return {**state, "iteration": t, "batch": 0, "tokens": 0, "loss": 0.0}


def refresh_prm(policy, out: Path, folder: Path, state: dict, first_prm: Path, args: Args) -> tuple[int, int]:
    """Past the paper: stage 02 trains a new PRM, from the current policy and on its rollouts; returns the samples and steps it took.

    Its flags are those that the run's first PRM was made with; where that left no run.json, this stage's and 02's defaults.
    """
    stage, run = importlib.import_module("02_train_prm"), first_prm.parent / "run.json"
    here = {f.name: getattr(args, f.name) for f in fields(ScoringArgs)} | {"data": args.data, "val": args.val}
    flags = here | (json.loads(run.read_text())["flags"] if run.exists() else {})
    flags |= {"runs": str(folder), "policy": str(out / "checkpoint" / f"step_{state['step']:06d}" / "policy"),
              "seed": seed_of(args.seed, "refresh", state["iteration"]), "engine": args.engine, "overwrite": False}
    close_engine()  # it holds this stage's policy
    move_trainer(policy, "cpu")
    with contextlib.redirect_stdout(io.StringIO()):  # its figures are in metrics.json, its advice is for a run of its own
        stage.main(stage.Args(**flags))
    close_engine()
    move_trainer(policy, args.device)
    made = folder / "02_train_prm"
    samples = sum(len(read_jsonl(made / name)) for name in ("samples.jsonl", "val.jsonl", "rollouts.jsonl"))
    return samples, json.loads((made / "metrics.json").read_text())["steps"]


def current_prm(out: Path, t: int, args: Args) -> Path:
    """The PRM of iteration t: the newest that was refreshed before it, else the one the run began with (t = 0)."""
    fresh = [path for s in range(1, t) if (path := out / f"iter_{s:02d}" / "02_train_prm" / "model").exists()]
    return fresh[-1] if args.prm_refresh and fresh else Path(args.prm or Path(args.runs) / "02_train_prm" / "model")


# ---------------------------------------------------------------- look and adapt

def validate(policy, prm, val: list[dict], folder: Path, t: int, temperature: float, args: Args) -> dict:
    """Greedy accuracy, Pass@K and Reward-Pass@2 on the validation set (paper, section 5)."""
    greedy = append_chunks(folder / "val_greedy.jsonl", val, 1, args.rows,
                           lambda chunk: sample_rows(policy, chunk, 1, 0.0, "val", t, args), f"03 greedy {t}")
    samples = append_chunks(folder / "val_samples.jsonl", val, args.samples, args.chunk,
                            lambda chunk: sample_rows(policy, chunk, args.samples, temperature, "val", t, args, prm), f"03 val {t}")
    return {"greedy_accuracy": sum(row["correct"] for row in greedy) / len(greedy),
            "sample_accuracy": sum(row["correct"] for row in samples) / len(samples),
            "pass_at_k": mean_over_prompts(samples, "pass_at_k"), "reward_pass_at_2": mean_over_prompts(samples, "reward_pass_at_2")}


def mean_over_prompts(rows: list[dict], figure: str) -> float:
    """Pass@K (K: all samples of a prompt) or Reward-Pass@2, averaged over the prompts of the rows."""
    groups = grouped(rows).values()
    if figure == "pass_at_k":
        return sum(pass_at_k(len(g), sum(r["correct"] for r in g), len(g)) for g in groups) / len(groups)
    return sum(reward_pass_at_k([r["reward"] for r in g], [r["correct"] for r in g], 2) for g in groups) / len(groups)


def difficulty(rows: list[dict]) -> dict[str, str]:
    """{prompt id: hard, middle or easy}: less than a third, less than two thirds, or more of its samples are right.

    >>> difficulty([{"id": "p", "correct": True}, {"id": "p", "correct": False}, {"id": "q", "correct": False}])
    {'p': 'middle', 'q': 'hard'}
    """
    solved = {prompt: sum(r["correct"] for r in group) / len(group) for prompt, group in grouped(rows).items()}
    return {prompt: "hard" if s < 1 / 3 else "middle" if s < 2 / 3 else "easy" for prompt, s in solved.items()}


def adapt_temperature(policy, prm, val: list[dict], folder: Path, t: int, choice: dict, args: Args) -> tuple[dict, dict]:
    """T <- argmax over the grid of Reward-Pass@2 on fixed prompts and seeds (paper, section 5).

    Returns ({"all": T}, {"all": curve, "pass_at_k": Pass@K over T}); with --temperature per_class also a T and a curve for every
    difficulty class of at least an eighth of the prompts. Here a prompt's class is read from its samples at all temperatures (of
    one alone, the class would speak for or against that very temperature); a training prompt's from those it was given.
    """
    searched = val[:args.search_prompts]
    tries = [(temperature, example) for temperature in args.search_grid for example in searched]

    def produce(chunk):
        """Rows of a chunk of (temperature, prompt), those of one temperature in one batch."""
        return [row for temperature, group in groupby(chunk, key=lambda pair: pair[0])
                for row in sample_rows(policy, [e for _, e in group], args.samples, temperature, "search", t, args, prm)]

    rows = append_chunks(folder / "search.jsonl", tries, args.samples, args.chunk, produce, f"03 search {t}")
    groups = {"all": {e["id"] for e in searched}}
    for prompt, name in difficulty(rows).items() if args.temperature == "per_class" else ():
        groups.setdefault(name, set()).add(prompt)
    groups = {name: ids for name, ids in groups.items() if len(ids) >= len(searched) / 8}
    mean_at = lambda T, ids, figure: mean_over_prompts([r for r in rows if r["temperature"] == T and r["id"] in ids], figure)
    found = {name: search_temperature(args.search_grid, lambda T: mean_at(T, ids, args.objective), choice.get(name, choice["all"])) for name, ids in groups.items()}
    curves = {name: curve for name, (_, curve) in found.items()}
    curves["pass_at_k"] = [{"temperature": T, "pass_at_k": mean_at(T, groups["all"], "pass_at_k")} for T in args.search_grid]
    return {name: best for name, (best, _) in found.items()}, curves


def current_temperature(searches: list[dict], out: Path, t: int, args: Args) -> tuple[dict, dict]:
    """({"all": T, class: T}, {prompt id: class}) of iteration t; the class is read from the prompt's last samples before t."""
    if args.temperature not in ("adaptive", "per_class"):
        return {"all": float(args.temperature)}, {}
    earlier = [s["choice"] for s in searches if s["iteration"] < t]
    classes: dict = {}
    for s in range(1, t) if args.temperature == "per_class" else ():
        classes |= difficulty(read_jsonl(out / f"iter_{s:02d}" / "samples.jsonl"))
    return earlier[-1] if earlier else {"all": 1.0}, classes


# ---------------------------------------------------------------- the loop

def check_flags(args: Args) -> int:
    """The number of iterations; raises InputError for flags that contradict each other."""
    parts, sft, adaptive = round(1 / args.interval) if 0 < args.interval <= 1 else 0, args.method == "sft", args.temperature in ("adaptive", "per_class")
    iterations, mixin = 1 if sft else round(args.passes * parts), args.mixin
    try:
        fixed = 1.0 if adaptive else float(args.temperature)
    except ValueError:
        fixed = math.nan
    refused = [  # (whether, what to do about it)
        (not parts or abs(args.interval * parts - 1) > 1e-3, f"--interval {args.interval} must be 1 over a whole number: 1, 0.5, 0.25, 0.2, ..."),
        (not sft and abs(args.passes * parts - iterations) > 1e-3, f"--passes {args.passes} must be a multiple of --interval {args.interval}"),
        (min(args.search_every, args.search_prompts, args.k, args.samples) < 1 or min(args.validate_every, args.prm_refresh) < 0,
         "--search_every, --search_prompts, --k and --samples must be at least 1, --validate_every and --prm_refresh at least 0"),
        (not args.search_grid or min(args.search_grid) <= 0 or len(set(args.search_grid)) < len(args.search_grid),
         f"--search_grid needs different temperatures above 0, found {args.search_grid}"),
        (sft and args.gold_response.count("{}") != 1, f"--gold_response {args.gold_response!r} must say by one {{}} where the answer stands"),
        (sft and (args.unlabeled != "none" or args.prm_refresh), "--method sft samples nothing: drop --unlabeled and --prm_refresh"),
        (args.prm_refresh and args.prm_refresh >= iterations, f"--prm_refresh {args.prm_refresh}: with {iterations} iterations no PRM would ever be refreshed"),
        (iterations < 1 or args.steps < iterations, "--passes, --interval and --steps must give at least one iteration of at least one step"),
        (not 0 < fixed < math.inf, f"--temperature must be a number above 0, adaptive or per_class, found {args.temperature!r}"),  # greedy samples are all one
        (adaptive and not sft and args.search_every >= iterations, f"--search_every {args.search_every}: no search in {iterations} iteration(s); make more or fix --temperature"),
        (args.temperature == "per_class" and args.passes <= 1, f"--passes {args.passes}: --temperature per_class reads a prompt's class in an earlier pass"),
        (not adaptive and args.objective != "reward_pass_at_2", f"--objective {args.objective}: with a fixed --temperature nothing is searched"),
        (args.unlabeled != "none" and not (0 <= mixin < 1 and (mixin * iterations).is_integer()),
         f"--mixin {mixin} must be at least 0, below 1 and a whole number of the {iterations} iterations"),
        (args.unlabeled == "none" and mixin or args.unlabeled != "vote" and args.vote_weights == "equal",
         "--mixin needs --unlabeled oracle or vote, --vote_weights equal needs --unlabeled vote")]
    for wrong, says in refused:
        if wrong:
            raise InputError(says)
    return iterations


def main(args: Args) -> None:
    """The loop of the paper: generate, select, improve, look, adapt."""
    iterations, start_from, first_prm = check_flags(args), args.policy or Path(args.runs) / "01_warmup" / "model", current_prm(Path(args.runs), 0, args)
    out = open_run(args, "03_self_evolve", {"data": args.data, "val": args.val, "policy": start_from, "prm": first_prm,
                                            **({} if args.unlabeled == "none" else {"unlabeled": args.unlabeled_data})})
    if (out / "model").exists():
        return report(out, args)
    examples, val = load_examples(args.data), load_examples(args.val)
    unlabeled = [] if args.unlabeled == "none" else load_examples(args.unlabeled_data, hidden=args.unlabeled != "oracle")
    choose_prompts(examples, unlabeled, iterations, iterations, args)  # refused now, not after hours
    policy, prm, prm_from = load_policy(start_from, args), None, None  # pi_theta, f
    check_longest_prompts(policy, examples + unlabeled + val, args)
    by_id, optimizer = by_id_of(examples, unlabeled), make_optimizer(policy)
    state = load_checkpoint(out / "checkpoint", policy, optimizer) or {"iteration": 0, "step": 0, "reset": 0, "batch": 0, "tokens": 0, "loss": 0.0}
    metrics = read_jsonl(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
    searches = read_jsonl(out / "temperature.jsonl") if (out / "temperature.jsonl").exists() else []

    for t in range(len(metrics), iterations + 1):
        folder, clock = out / f"iter_{t:02d}", [time.time()]
        folder.mkdir(exist_ok=True)
        if prm_from != current_prm(out, t, args):
            prm_from, prm = current_prm(out, t, args), None  # two of them need not fit
            prm = load_prm(prm_from, args)
        choice, classes = current_temperature(searches, out, t, args)  # T
        row = {"iteration": t, "temperature": choice["all"], "extra_samples": 0, "extra_steps": 0}

        if t > 0:
            # Generate: K responses per prompt from the current policy
            if args.method == "sft":
                prompts, samples, no_vote = examples, gold_rows(policy, examples, args), 0
            else:
                prompts = choose_prompts(examples, unlabeled, t, iterations, args)
                samples = generate_samples(policy, prm, prompts, t, choice, classes, folder, args)
                voted, no_vote = pseudo_label([r for r in samples if by_id[r["id"]]["answer"] is None], args.vote_weights)
                samples = [r for r in samples if by_id[r["id"]]["answer"] is not None] + voted

            # Select: H(R)
            selected = samples if args.method == "sft" else select(samples, args)
            if not selected:
                raise InputError(f"iteration {t}: of {len(samples)} samples {sum(r['correct'] for r in samples)} are right and --select {args.select} keeps none, "
                                 f"so there is nothing to train on; see {folder}/samples.jsonl")
            write_jsonl(folder / "selected.jsonl", selected)
            clock.append(time.time())

            # Improve: SFT on the selected responses; moments and rate go on where they were
            steps = args.steps * t // iterations - args.steps * (t - 1) // iterations
            picks = epoch_batches(len(selected), args.batch_size, steps, args.seed, "evolve", t)
            batches = [[selected[i] for i in pick] for pick in picks]
            if state["iteration"] < t:
                state = begin_iteration(policy, optimizer, state, t, start_from, args)
            if args.offload:
                move_trainer(prm, "cpu")  # it rests meanwhile
            state = fit(policy, optimizer, batches, lambda b: sft_loss(policy, [by_id[r["id"]] for r in b], [r["token_ids"] for r in b], args),
                        args, f"03 train {t}", state, lambda s: save_checkpoint(out / "checkpoint", policy, optimizer, s))
            save_checkpoint(out / "checkpoint", policy, optimizer, state)
            if args.offload:
                move_trainer(prm, args.device)
            row |= {"lr": learning_rate(state["step"] - state["reset"] - 1, args.learning_rate, args.warmup_steps), "prompts": len(prompts),
                    "samples": 0 if args.method == "sft" else len(prompts) * args.samples, "no_vote": no_vote,
                    "correct": sum(r["correct"] for r in samples if "pseudo_label" not in r), "voted": sum(r["correct"] for r in samples if "pseudo_label" in r),
                    "selected": len(selected), "trained": len({i for pick in picks for i in pick}), "steps": state["step"], "tokens": state["tokens"],
                    "loss": state["loss"] / max(state["batch"], 1)}
            clock.append(time.time())

        # Look: the dynamics on the validation set
        if t == iterations or args.validate_every and t % args.validate_every == 0:
            row |= validate(policy, prm, val, folder, t, choice["all"], args)
        clock.append(time.time())

        # Adapt: T <- argmax of Reward-Pass@2, by the PRM that selects next; nothing follows the last iteration
        if args.prm_refresh and 0 < t < iterations and t % args.prm_refresh == 0:
            prm = None
            row["extra_samples"], row["extra_steps"] = refresh_prm(policy, out, folder, state, first_prm, args)
            prm_from = current_prm(out, t + 1, args)
            prm = load_prm(prm_from, args)
        if args.temperature in ("adaptive", "per_class") and 0 < t < iterations and t % args.search_every == 0:
            best, curves = adapt_temperature(policy, prm, val, folder, t, choice, args)
            searches = [s for s in searches if s["iteration"] < t] + [{"iteration": t, "was": choice, "choice": best, "objective": args.objective, "curves": curves}]
            write_jsonl(out / "temperature.jsonl", searches)
            row["extra_samples"] += len(args.search_grid) * len(val[:args.search_prompts]) * args.samples
        clock.append(time.time())
        phases = ["sample", "train", "validate", "search"][-len(clock) + 1:]
        row["seconds"] = {name: round(b - a, 1) for name, a, b in zip(phases, clock, clock[1:])}
        metrics.append(row)
        write_jsonl(out / "metrics.jsonl", metrics)
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))
    save_model(policy, out / "model")
    report(out, args)


def report(out: Path, args: Args) -> None:
    """Print the dynamics as a table, the budget that was spent, and what to run next."""
    print("iteration     T  greedy  sample  Pass@K  Reward-Pass@2  selected")
    rows = read_jsonl(out / "metrics.jsonl")
    for row in rows:
        if "pass_at_k" in row:
            print(f"{row['iteration']:9d} {row['temperature']:5.1f} {row['greedy_accuracy']:7.1%} {row['sample_accuracy']:7.1%} {row['pass_at_k']:7.1%} "
                  f"{row['reward_pass_at_2']:14.1%} {row.get('selected', 0):9d}")
    print(f"budget: {sum(row.get('samples', 0) for row in rows)} samples, {sum(row['extra_samples'] for row in rows)} more for the temperature and the PRM, "
          f"{rows[-1].get('steps', 0)} optimizer steps, {sum(row.get('extra_steps', 0) for row in rows)} more for the PRM\n"
          f"next: python 04_eval.py --runs {out.parent}" + f" --aggregate {args.aggregate}" * (args.aggregate != "min"))


if __name__ == "__main__":
    run_stage(Args, main)
