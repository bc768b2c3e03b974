"""Stage 03: continuous self-evolving, PRM Top-2, adaptive temperature: M-STaR (paper, 2, 3, 5).

Reads   data/toy/{train,val}.jsonl, runs/toy/01_warmup/model/, runs/toy/02_train_prm/model/
Writes  runs/toy/03_self_evolve/
          iter_XX/samples.jsonl   K checked responses per prompt; the right ones scored by the PRM
          iter_XX/selected.jsonl  what is trained on, as far as the iteration's steps reach
          iter_XX/val_*.jsonl     greedy responses and samples on the validation set
          iter_XX/search.jsonl    samples of the temperature search
          iter_XX/model/          the policy after the iteration, until the next one is there
          iter_XX/training/       float32 weights and AdamW moments, which the next one inherits
          iter_XX/metrics.json    what happened, with the search if there was one
          metrics.jsonl           one row per iteration, from these; row 0 is the start policy
          temperature.jsonl       every search, from these: the whole curve and the choice
          model/                  the evolved policy; it exists when the stage has finished

One optimisation runs through all iterations: neither the AdamW moments nor the schedule of the rate
is ever reset. The PRM stays fixed. Search and validation never see training, test or ood prompts.

Every other row of the paper's tables is a flag: --method, --interval, --select and --k,
--aggregate, --unlabeled and --mixin, --temperature and --objective. Whatever they say, a run draws
--passes x prompts x K samples (sft none) and takes --steps optimizer steps; what the search and a
refreshed PRM cost comes on top, as extra_samples and extra_steps; --prm_refresh is not the paper's.

Departures from the paper:
1. Every iteration takes as many steps (--steps / iterations), whatever was selected: of many
   selected responses it sees a part, few it sees more than once ("trained" in metrics.jsonl).
2. K = 8 here, 16 there; the search uses the first --search_prompts validation prompts.

    torchrun --nproc-per-node 8 03_self_evolve.py --data my/train.jsonl --val my/val.jsonl
    python 03_self_evolve.py --method rest_em --interval 1 --select all --temperature 1.0 \\
        --runs runs/rest --policy runs/toy/01_warmup/model --prm runs/toy/02_train_prm/model
"""

import importlib
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

from transformers import AutoTokenizer

import common
from common import InputError, Lines, flag, once, read_jsonl, seed_of, stream_jsonl, write_jsonl


@dataclass
class Args(common.ScoringArgs):
    """Flags of stage 03."""

    data: str = flag("data/toy/train.jsonl", "labelled prompts, JSONL")
    policy: str = flag("", "policy to start from; empty: the warm-up policy of --runs")
    prm: str = flag(
        "", "PRM, or a rule FILE:FUNCTION(response, example) -> step scores; empty: 02's of --runs"
    )
    val: str = flag(
        "", "set for dynamics and temperature search; empty: 02's, or val.jsonl beside --data"
    )
    method: Literal["continuous", "iterative_rft", "rest_em", "sft"] = flag(
        "continuous",
        "continuous: one optimisation; iterative_rft: optimizer and schedule begin anew every "
        "iteration; rest_em: the weights too; sft: --steps on the gold answers, nothing sampled",
    )
    interval: float = flag(0.25, "share of the labelled prompts in one iteration: 1 / whole number")
    passes: float = flag(2.0, "passes over the labelled prompts; passes / interval iterations")
    samples: int = flag(8, "K: responses per prompt")
    select: Literal["top_k", "random", "threshold", "all"] = flag(
        "top_k", "H: which of the right responses are trained on"
    )
    k: int = flag(2, "k of top_k and random: right responses per prompt")
    alpha: float = flag(0.5, "threshold: right responses with R_p above alpha", above=-1)
    unlabeled: Literal["none", "oracle", "vote"] = flag(
        "none", "unlabelled prompts; oracle: with true answers; vote: with pseudo-labels"
    )
    unlabeled_data: str = flag(
        "", "only oracle reads their answers; empty: unlabeled.jsonl beside --data"
    )
    mixin: float = flag(
        0.0, "T_mixin: share of training after which half of the prompts are unlabelled", above=-1
    )
    vote_weights: Literal["prm", "equal"] = flag(
        "prm", "pseudo-label: PRM-weighted vote or majority"
    )
    gold_response: str = flag("Answer : {}", "method sft: the response that states a gold answer")
    temperature: str = flag(
        "adaptive", "a number, or adaptive: the search's choice, 1.0 until the first search"
    )
    objective: Literal["reward_pass_at_2", "pass_at_k"] = flag(
        "reward_pass_at_2", "what the temperature search maximises"
    )
    search_every: int = flag(2, "iterations between two temperature searches")
    search_prompts: int = flag(64, "validation prompts that a search uses")
    search_grid: list[float] = flag(
        [i / 10 for i in range(3, 17)], "temperatures that a search tries"
    )
    prm_refresh: int = flag(
        0,
        "iterations after which stage 02 makes a new PRM from the current policy; 0: never",
        above=-1,
    )
    validate_every: int = flag(
        1,
        "iterations between two looks at the dynamics, the last is always one; 0: no other",
        above=-1,
    )
    steps: int = flag(480, "optimizer steps over all iterations")
    batch_size: int = flag(16, "responses per optimizer step")
    learning_rate: float = flag(7e-5, "peak learning rate")
    warmup_steps: int = flag(20, "steps of linear warm-up, once; then it is constant", above=-1)
    report_to: str = flag("none", "trackers: wandb, trackio, swanlab, tensorboard; comma between")


# ---- generate


def prompts_between(examples: list[dict], start: int, stop: int, *key) -> list[dict]:
    """Prompts start to stop of endless passes over the examples, each in a new order and complete.

    >>> order = prompts_between(["a", "b", "c"], 0, 6, "key")
    >>> sorted(order[:3]), prompts_between(["a", "b", "c"], 2, 4, "key") == order[2:4]
    (['a', 'b', 'c'], True)
    """
    order = common.epoch_batches(len(examples), 1, stop, *key)
    return [examples[i] for (i,) in order[start:]]


def choose_prompts(examples, unlabeled, t, iterations, args) -> list[dict]:
    """D_t; after the share T_mixin of training every second prompt is unlabelled (paper, 3.4).

    A pass over the examples is a whole number of iterations, and one over the unlabelled ones ends
    where they no longer suffice for an iteration, so none holds a prompt twice. The unlabelled ones
    come last. Raises InputError if they do not suffice for one. Method sft takes all examples.
    """
    if args.method == "sft":
        return examples
    parts, before = round(1 / args.interval), round(args.mixin * iterations)
    start, stop, mixed = (len(examples) * i // parts for i in (t - 1, t, before))  # consumed by i
    prompts = prompts_between(examples, start, stop, args.seed, "prompts")
    if not unlabeled or t <= before:
        return prompts
    widest = math.ceil(len(examples) / (2 * parts))
    if widest > len(unlabeled):
        raise InputError(
            f"{args.unlabeled_data} holds {len(unlabeled)} prompts, fewer than the {widest} that "
            "one iteration takes; lower --interval"
        )
    wanted = (stop - mixed) // 2 - (start - mixed) // 2
    epoch, place = divmod(t - before - 1, len(unlabeled) // widest)
    first = epoch * len(unlabeled) + place * widest
    hidden = prompts_between(unlabeled, first, first + wanted, args.seed, "unlabeled")
    return prompts[: len(prompts) - wanted] + hidden


def gold_rows(examples, policy, args):
    """Method sft: the gold answer of every prompt, stated, in the form of a checked sample."""
    tokenizer = AutoTokenizer.from_pretrained(policy, trust_remote_code=args.trust_remote_code)
    for example in examples:
        text = args.gold_response.replace("{}", example["answer"])
        ids = tokenizer.encode(text, add_special_tokens=False)
        row = {"id": example["id"], "iteration": 1, "sample": 0, "response": text, "token_ids": ids}
        yield row | {"answer": example["answer"], "correct": True, "step_scores": [], "reward": 1.0}


def generate(policy, prm, prompts, folder, t, temperature, args):
    """K checked samples per prompt, R = 1(a = a*) x R_p; just R_p where the answer is hidden."""
    path = folder / "samples.jsonl"
    if args.method == "sft":
        return once(path, lambda part: write_jsonl(part, gold_rows(prompts, policy, args)))
    with common.Sampler(policy, args, prm) as sampler:
        sampler.sample(path, prompts, args.samples, temperature, "evolve", t, right_only=True)


# ---- select


def pseudo_label(samples, weights) -> list[dict]:
    """Samples of an unlabelled prompt, judged by their own vote (paper, section 3.4).

    a* = the answer with the largest PRM-weighted vote, R = 1(a = a*) x R_p; without a readable
    answer there are none.

    >>> rows = [{"id": "p", "answer": a, "reward": r} for a, r in (("7", .3), ("8", .5), ("7", .4))]
    >>> [(row["correct"], row["reward"]) for row in pseudo_label(rows, "prm")]
    [(True, 0.3), (False, 0.0), (True, 0.4)]
    """
    heavy = [max(row["reward"], 0.0) if weights == "prm" else 1.0 for row in samples]
    label = common.vote([row["answer"] for row in samples], heavy)
    if label is None:
        return []
    judged = [row | {"pseudo_label": label, "correct": row["answer"] == label} for row in samples]
    return [row if row["correct"] else row | {"reward": 0.0} for row in judged]


def choose(samples, args) -> list[dict]:
    """H: which of a prompt's distinct right responses are trained on (paper, 3.3, table 2).

    >>> rows = [{"id": "p", "token_ids": [i], "correct": c, "reward": r}
    ...         for i, c, r in ((1, True, .4), (2, True, .9), (3, False, 0.), (4, True, .6))]
    >>> [row["token_ids"][0] for row in choose(rows, Args(select="top_k", k=2))]
    [2, 4]
    """
    right = common.distinct(row for row in samples if row["correct"])
    heights = [row["reward"] for row in right]
    if args.select == "random":  # the order of numbers that belong to (iteration, prompt, sample)
        heights = [
            seed_of(args.seed, "select", row["iteration"], row["id"], row["sample"])
            for row in right
        ]
    if args.select in ("top_k", "random"):
        right = [right[i] for i in common.top_k(heights, args.k)]
    elif args.select == "threshold":
        right = [row for row in right if row["reward"] > args.alpha]
    return [row | {"rank": place} for place, row in enumerate(right, 1)]


def select(folder, by_id, args):
    """Phase: selected.jsonl from samples.jsonl; returns what there was to select from.

    Samples of prompts whose answer is hidden are judged by their vote first.
    """

    def judged():
        """The samples of every prompt, and as what the right ones count."""
        for prompt, samples in common.by_prompt(stream_jsonl(folder / "samples.jsonl")):
            if by_id[prompt]["answer"] is None:
                yield pseudo_label(samples, args.vote_weights), "voted"
            else:
                yield samples, "correct"

    def write(part):
        """The chosen responses of every prompt."""
        chosen = (row for samples, _ in judged() for row in choose(samples, args))
        write_jsonl(part, (common.sft_row(row, by_id[row["id"]], args) for row in chosen))
        if len(Lines(part)) == 0:
            raise InputError(
                f"{folder}: --select {args.select} keeps none of the right samples, if there are "
                "any, so nothing can be trained on"
            )

    once(folder / "selected.jsonl", write)
    found = {"prompts": 0, "correct": 0, "voted": 0, "no_vote": 0}
    for samples, kind in judged():
        found["prompts"] += 1
        found[kind] += sum(row["correct"] for row in samples)
        found["no_vote"] += len(samples) == 0
    found["samples"] = 0 if args.method == "sft" else found["prompts"] * args.samples
    return found | {"selected": len(Lines(folder / "selected.jsonl"))}


# ---- improve


def starts_from(t, start, out, args):
    """(policy folder, training state or None) with which iteration t begins (paper, 3.2).

    All that tells the training methods apart: continuous inherits weights, moments and schedule,
    iterative RFT the weights alone, ReST-EM nothing (table 1).
    """
    before = out / f"iter_{t - 1:02d}"
    if t == 1 or args.method == "rest_em":
        return start, None
    state = before / "training" if args.method == "continuous" else None
    return before / "model", state


def improve(folder, start, t, iterations, by_id, args):
    """SFT of the policy on the selected responses: iter_t/model and iter_t/training."""
    rows = Lines(folder / "selected.jsonl")
    done, steps = (args.steps * i // iterations for i in (t - 1, t))
    batches = common.epoch_batches(len(rows), args.batch_size, steps - done, args.seed, "evolve", t)
    policy, state = starts_from(t, start, folder.parent, args)
    model, work = folder / "model", folder / "training"
    how = common.sft(by_id, args) | {"args": args, "label": f"03 improve {t}"}
    progress = common.train(model, policy, work, batches, rows, **how, state=state)
    return {
        "lr": common.learning_rate(progress["step"] - 1, args.learning_rate, args.warmup_steps),
        "trained": len(set().union(*batches)),
        "steps": steps,  # since the run began; tokens and loss are of this iteration
        "tokens": progress["tokens"],
        "loss": progress["loss"] / len(batches),
    }


# ---- look and adapt


def pass_rates(rows):
    """(Pass@K (K: all samples of a prompt), Reward-Pass@2), averaged over prompts (paper, 5)."""
    passed, ranked = [], []
    for _, group in common.by_prompt(rows):
        correct = [row["correct"] for row in group]
        passed.append(any(correct))
        ranked.append(common.reward_pass_at_k([row["reward"] for row in group], correct, 2))
    return fmean(passed), fmean(ranked)


def look(policy, prm, val, folder, t, temperature, args):
    """Greedy accuracy, Pass@K and Reward-Pass@2 on the validation set (paper, section 5)."""
    with common.Sampler(policy, args, prm) as sampler:
        sampler.look(folder, "val", val, args.samples, temperature, "val", t)
    samples = read_jsonl(folder / "val_samples.jsonl")
    pass_at_k, reward_pass_at_2 = pass_rates(samples)
    return {
        "greedy_accuracy": fmean(
            row["correct"] for row in stream_jsonl(folder / "val_greedy.jsonl")
        ),
        "sample_accuracy": fmean(row["correct"] for row in samples),
        "pass_at_k": pass_at_k,
        "reward_pass_at_2": reward_pass_at_2,
    }


def best_temperature(curve, objective, current) -> float:
    """T <- argmax of the objective over a curve; of equal ones the nearest to T, then the lower.

    >>> curve = [{"temperature": T, "pass_at_k": 0.5} for T in (0.3, 0.6, 1.4)]
    >>> best_temperature(curve, "pass_at_k", current=0.5)
    0.6
    """
    order = []
    for point in curve:
        T = point["temperature"]
        order.append((-point[objective], round(abs(T - current), 6), T))
    return min(order)[-1]


def adapt(policy, prm, val, folder, t, current, args):
    """A search: T <- argmax of Reward-Pass@2 over the grid, each on the same seeds (paper, 5)."""
    path, grid, searched = folder / "search.jsonl", args.search_grid, val[: args.search_prompts]
    heats = [T for T in grid for _ in searched]
    with common.Sampler(policy, args, prm) as sampler:
        sampler.sample(path, searched * len(grid), args.samples, heats, "search", t)
    rows, curve = read_jsonl(path), []
    for T in grid:
        passed, ranked = pass_rates(row for row in rows if row["temperature"] == T)
        curve.append({"temperature": T, "reward_pass_at_2": ranked, "pass_at_k": passed})
    return {
        "iteration": t,
        "was": current,
        "chosen": best_temperature(curve, args.objective, current),
        "curve": curve,
        "objective": args.objective,
    }


# ---- past the paper: a PRM that is trained anew


def refresh_prm(policy, folder, t, args):
    """Stage 02's phases from the current policy on its own rollouts; returns what they cost.

    The flags are those that the run's first PRM was made with, else this stage's and 02's defaults.
    """
    stage = importlib.import_module("02_train_prm")
    run = first_prm(args).parent / "run.json"
    shared = [item.name for item in fields(common.ScoringArgs)]
    flags = {name: getattr(args, name) for name in [*shared, "data", "val"]}
    if run.exists():
        flags |= common.read_json(common.unchanged(run))["flags"]
    flags |= {"seed": seed_of(args.seed, "refresh", t), "engine": args.engine, "labels": ""}
    folder.mkdir(exist_ok=True)
    stage.make_prm(folder, policy, stage.Args(**flags))
    names = ("samples.jsonl", "val_samples.jsonl", "rollouts.jsonl")
    samples = sum(len(Lines(folder / name)) for name in names)
    steps = common.read_json(folder / "metrics.json")["steps"]
    return {"extra_samples": samples, "extra_steps": steps}


def first_prm(args) -> Path:
    """The PRM that the run begins with."""
    return Path(args.prm or Path(args.runs) / "02_train_prm" / "model")


def current_prm(out, t, args) -> Path:
    """The PRM of iteration t: the newest refreshed before it, else the one the run began with."""
    prm = first_prm(args)
    for s in range(1, t):
        fresh = out / f"iter_{s:02d}" / "prm"
        if (fresh / "metrics.json").exists():
            prm = fresh / "model"
    return prm


# ---- experiment trackers


class TensorBoard:
    """torch's writer behind the calls that the other trackers share."""

    def __init__(self, out):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(out)

    def log(self, row, step):
        """Every figure of a row."""
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def finish(self):
        """Write what is left."""
        self.writer.close()


def start_trackers(args, out) -> list:
    """A run in every tracker of --report_to; raises InputError for one that is not there."""
    found = []
    for name in args.report_to.replace("none", "").split(","):
        if name not in ("", "wandb", "trackio", "swanlab", "tensorboard"):
            raise InputError(f"--report_to {name}: not wandb, trackio, swanlab or tensorboard")
        try:
            if name == "tensorboard":
                found.append(TensorBoard(out / name))
            elif name:
                found.append(importlib.import_module(name))
                found[-1].init(project="m-star", name=out.parent.name, config=asdict(args))
        except ImportError as error:
            raise InputError(f"--report_to {name}: {error}; pip install {name}") from None
    return found


def send(rows, trackers):
    """Rows of metrics.jsonl to every tracker."""
    for tracker in trackers:
        for row in rows:
            tracker.log(row, step=row["iteration"])


# ---- the loop


def check_flags(args) -> int:
    """The number of iterations; raises InputError for flags that contradict each other."""
    sft, fixed = args.method == "sft", args.temperature != "adaptive"
    hidden, grid, parts = args.unlabeled != "none", args.search_grid, round(1 / args.interval)
    iterations = 1 if sft else round(args.passes * parts)
    refused = {  # the first that holds is told
        "--interval must be 1 over a whole number: 1, 0.5, 0.25, 0.2, ...": (
            abs(args.interval * parts - 1) > 1e-3
        ),
        "--passes must be a multiple of --interval": (
            abs(args.passes * parts - iterations) > 1e-3 and not sft
        ),
        "--passes, --interval and --steps must give at least one iteration of one step": (
            not 1 <= iterations <= args.steps
        ),
        "--search_grid needs different temperatures": len(set(grid)) < max(1, len(grid)),
        "--gold_response must say by one {} where the answer stands": (
            sft and args.gold_response.count("{}") != 1
        ),
        "--method sft samples nothing: drop --unlabeled": sft and hidden,
        f"--prm_refresh: in {iterations} iteration(s) no PRM would ever be refreshed": (
            args.prm_refresh >= iterations
        ),
        f"--search_every: no search in {iterations} iteration(s); or fix --temperature": (
            args.search_every >= iterations and not fixed and not sft
        ),
        "--temperature: a number above 0 or adaptive": (
            fixed and not is_temperature(args.temperature)
        ),
        "--objective: with a fixed --temperature nothing is searched": (
            fixed and args.objective != "reward_pass_at_2"
        ),
        f"--mixin must be below 1 and a whole number of the {iterations} iterations": (
            not 0 <= args.mixin < 1
            or round(args.mixin * iterations, 6) % 1 > 0  # 0.28 x 25 is 7.000000000000001
        ),
        "--mixin needs --unlabeled oracle or vote": args.mixin > 0 and not hidden,
        "--vote_weights equal needs --unlabeled vote": (
            args.vote_weights == "equal" and args.unlabeled != "vote"
        ),
    }
    for sentence, holds in refused.items():
        if holds:
            raise InputError(sentence)
    return iterations


def is_temperature(text) -> bool:
    """Whether a text is a number above 0; greedy samples are all one."""
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def so_far(out, iterations):
    """The rows of metrics.jsonl and temperature.jsonl, written from what each iteration left."""
    metrics = []
    for t in range(iterations + 1):
        path = out / f"iter_{t:02d}" / "metrics.json"
        if not common.is_made(path):
            break
        metrics.append(common.read_json(path))
    searches = [row.pop("search") for row in metrics if "search" in row]
    if common.rank() == 0:
        write_jsonl(out / "temperature.jsonl", searches)
        write_jsonl(out / "metrics.jsonl", metrics)
    return metrics, searches


def main(args):
    """The loop of the paper: generate, select, improve, look, adapt."""
    iterations = check_flags(args)
    start = Path(args.policy or Path(args.runs) / "01_warmup" / "model")
    beside = Path(args.data).with_name
    args.val = args.val or str(beside("val.jsonl"))
    args.unlabeled_data = args.unlabeled_data or str(beside("unlabeled.jsonl"))
    inputs = {"data": args.data, "val": args.val, "policy": start, "prm": first_prm(args)}
    if args.unlabeled != "none":
        inputs["unlabeled"] = args.unlabeled_data
    out = common.open_run(args, "03_self_evolve", inputs)
    metrics, searches = so_far(out, iterations)
    if len(metrics) > iterations and common.is_made(out / "model"):
        return report(out, metrics, args)
    files = [common.load_examples(args.data), common.load_examples(args.val)]
    if "unlabeled" in inputs:
        hidden = args.unlabeled == "vote"
        files.append(common.load_examples(args.unlabeled_data, hidden))
    by_id = common.by_id_of(*files)  # refuses a val prompt that is trained on
    examples, val, *unlabeled = common.fitting(out, start, args, *files)
    unlabeled = sum(unlabeled, [])
    choose_prompts(examples, unlabeled, iterations, iterations, args)  # refused now, not later
    trackers = start_trackers(args, out) if common.rank() == 0 else []
    send(metrics, trackers)  # a restart begins a new run there, which is whole, too

    adaptive = args.temperature == "adaptive"
    temperature = 1.0 if adaptive else float(args.temperature)  # T
    for t in range(len(metrics), iterations + 1):
        clock, folder, prm = time.time(), out / f"iter_{t:02d}", current_prm(out, t, args)  # f
        folder.mkdir(exist_ok=True)
        if searches:
            temperature = searches[-1]["chosen"]
        row = {"iteration": t, "temperature": temperature, "extra_samples": 0, "extra_steps": 0}
        before = out / f"iter_{t - 1:02d}"
        policy = before / "model" if t > 1 else start  # pi_theta
        if t > 0:
            prompts = choose_prompts(examples, unlabeled, t, iterations, args)  # D_t
            generate(policy, prm, prompts, folder, t, temperature, args)
            row |= select(folder, by_id, args)
            row |= improve(folder, start, t, iterations, by_id, args)
            policy = folder / "model"
            if common.rank() == 0:  # this iteration has inherited them
                shutil.rmtree(before / "model", ignore_errors=True)
                shutil.rmtree(before / "training", ignore_errors=True)
        if t == iterations or (args.validate_every > 0 and t % args.validate_every == 0):
            row |= look(policy, prm, val, folder, t, temperature, args)
        between = 0 < t < iterations  # nothing follows the last iteration
        if between and args.prm_refresh > 0 and t % args.prm_refresh == 0:
            row |= refresh_prm(policy, folder / "prm", t, args)
            prm = folder / "prm" / "model"
        if between and adaptive and t % args.search_every == 0:
            row["search"] = adapt(policy, prm, val, folder, t, temperature, args)
            row["extra_samples"] += len(Lines(folder / "search.jsonl"))
        row["seconds"] = round(time.time() - clock, 1)
        once(folder / "metrics.json", partial(common.write_json, value=row))
        metrics, searches = so_far(out, iterations)
        send(metrics[-1:], trackers)
        print(json.dumps(metrics[-1]))
    for tracker in trackers:
        tracker.finish()
    if common.rank() == 0:
        last = out / f"iter_{iterations:02d}"
        shutil.rmtree(last / "training", ignore_errors=True)
        os.replace(last / "model", out / "model")
        for name in ("metrics.jsonl", "temperature.jsonl", "model"):
            common.seal(out / name)
        report(out, metrics, args)


def report(out, rows, args):
    """Print the dynamics as a table, the budget that was spent, and what to run next."""
    names = ("greedy_accuracy", "sample_accuracy", "pass_at_k", "reward_pass_at_2")
    print("iteration    T  greedy_accuracy  sample_accuracy        pass_at_k reward_pass_at_2")
    for row in rows:
        if "pass_at_k" in row:
            start = f"{row['iteration']:9d} {row['temperature']:4.1f}"
            print(start, *(f"{row[name]:16.1%}" for name in names))
    for name in ("samples", "extra_samples", "extra_steps"):
        print(f"{name}: {sum(row.get(name, 0) for row in rows)}")
    other = f" --aggregate {args.aggregate}" if args.aggregate != "min" else ""
    print(
        f"optimizer steps: {rows[-1]['steps']}\nnext: python 04_eval.py --runs {out.parent}{other}"
    )


if __name__ == "__main__":
    common.run_stage(Args, main)
