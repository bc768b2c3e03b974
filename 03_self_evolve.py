"""Stage 03: continuous self-evolving, PRM Top-2, adaptive temperature: M-STaR (paper, 2, 3, 5).

Reads   data/toy/{train,val}.jsonl, runs/toy/01_warmup/model/, runs/toy/02_train_prm/model/
Writes  runs/toy/03_self_evolve/
          iter_XX/samples.jsonl   K checked responses per prompt; the right ones scored by the PRM
          iter_XX/selected.jsonl  what is trained on, as far as the iteration's steps reach
          iter_XX/val_*.jsonl     greedy responses and samples on the validation set
          iter_XX/search.jsonl    samples of the temperature search
          iter_XX/model/          the policy after the iteration, until the next one is there
          iter_XX/training/       float32 weights and AdamW moments, which the next one inherits
          metrics.jsonl           one row per iteration; row 0 is the start policy
          temperature.jsonl       every search: the whole curve and the choice
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

    python 03_self_evolve.py
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
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer

from common import (
    InputError,
    Lines,
    Sampler,
    ScoringArgs,
    by_id_of,
    by_prompt,
    check_longest_prompts,
    distinct,
    epoch_batches,
    flag,
    is_there,
    learning_rate,
    load_examples,
    once,
    open_run,
    rank,
    read_jsonl,
    reward_pass_at_k,
    run_stage,
    seed_of,
    sft_loss,
    stream_jsonl,
    top_k,
    train,
    vote,
    write_jsonl,
)


@dataclass
class Args(ScoringArgs):
    """Flags of stage 03."""

    data: str = flag("data/toy/train.jsonl", "labelled prompts, JSONL")
    policy: str = flag("", "policy to start from; empty: the warm-up policy of --runs")
    prm: str = flag("", "process reward model; empty: the PRM of --runs")
    val: str = flag("data/toy/val.jsonl", "fixed validation set: dynamics and temperature search")
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
    unlabeled_data: str = flag("data/toy/unlabeled.jsonl", "only oracle reads their answers")
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
        [round(0.3 + 0.1 * i, 1) for i in range(14)], "temperatures that a search tries"
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


# ---- generate


def prompts_between(examples: list[dict], start: int, stop: int, *key) -> list[dict]:
    """Prompts start to stop of endless passes over the examples, each in a new order and complete.

    >>> order = prompts_between(["a", "b", "c"], 0, 6, "key")
    >>> sorted(order[:3]), prompts_between(["a", "b", "c"], 2, 4, "key") == order[2:4]
    (['a', 'b', 'c'], True)
    """
    order, epoch = [], 0
    while len(order) < stop:
        draws = torch.Generator().manual_seed(seed_of(*key, epoch))
        order += torch.randperm(len(examples), generator=draws).tolist()
        epoch += 1
    return [examples[i] for i in order[start:stop]]


def choose_prompts(examples, unlabeled, t: int, iterations: int, args: Args) -> list[dict]:
    """D_t; after the share T_mixin of training every second prompt is unlabelled (paper, 3.4).

    A pass over the examples is a whole number of iterations, and one over the unlabelled ones ends
    where they no longer suffice for an iteration, so none holds a prompt twice. Raises InputError
    if they do not suffice for one. Method sft takes all examples.
    """
    if args.method == "sft":
        return examples
    parts, before = round(1 / args.interval), round(args.mixin * iterations)
    ends = [len(examples) * i // parts for i in range(iterations + 1)]  # consumed by iteration i
    prompts = prompts_between(examples, ends[t - 1], ends[t], args.seed, "prompts")
    if not unlabeled or t <= before:
        return prompts
    widest = math.ceil(math.ceil(len(examples) / parts) / 2)
    if widest > len(unlabeled):
        raise InputError(
            f"{args.unlabeled_data} holds {len(unlabeled)} prompts, fewer than the {widest} that "
            "one iteration takes; lower --interval"
        )
    halves = [(end - ends[before]) // 2 for end in ends]
    wanted = halves[t] - halves[t - 1]
    epoch, place = divmod(t - before - 1, len(unlabeled) // widest)
    start = epoch * len(unlabeled) + place * widest
    hidden = prompts_between(unlabeled, start, start + wanted, args.seed, "unlabeled")
    return prompts[: len(prompts) - wanted] + hidden


def gold_rows(examples: list[dict], policy, args: Args):
    """Method sft: the gold answer of every prompt, stated, in the form of a checked sample."""
    tokenizer = AutoTokenizer.from_pretrained(policy, trust_remote_code=args.trust_remote_code)
    for example in examples:
        text = args.gold_response.replace("{}", example["answer"])
        ids = tokenizer.encode(text, add_special_tokens=False)
        row = {"id": example["id"], "iteration": 1, "sample": 0, "response": text, "token_ids": ids}
        yield row | {"answer": example["answer"], "correct": True, "step_scores": [], "reward": 1.0}


def generate(
    policy, prm, prompts: list[dict], t: int, temperature: float, path, args: Args
) -> None:
    """K checked samples per prompt, R = 1(a = a*) x R_p; just R_p where the answer is hidden."""
    if args.method == "sft":
        once(path, lambda part: write_jsonl(part, gold_rows(prompts, policy, args)))
    prompts = sorted(prompts, key=lambda example: example["answer"] is None)
    with Sampler(policy, args, prm) as sampler:
        sampler.sample(path, prompts, args.samples, temperature, "evolve", t, right_only=True)


# ---- select


def pseudo_label(samples: list[dict], weights: str) -> list[dict]:
    """Samples of an unlabelled prompt, judged by their own vote (paper, section 3.4).

    a* = the answer with the largest PRM-weighted vote, R = 1(a = a*) x R_p; without a readable
    answer there are none.

    >>> rows = [{"id": "p", "answer": a, "reward": r} for a, r in (("7", .3), ("8", .5), ("7", .4))]
    >>> [(row["correct"], row["reward"]) for row in pseudo_label(rows, "prm")]
    [(True, 0.3), (False, 0.0), (True, 0.4)]
    """
    heavy = [max(row["reward"], 0.0) if weights == "prm" else 1.0 for row in samples]
    label = vote([row["answer"] for row in samples], heavy)
    judged = []
    for row in samples if label is not None else []:
        right = row["answer"] == label
        reward = row["reward"] if right else 0.0
        judged.append(row | {"pseudo_label": label, "correct": right, "reward": reward})
    return judged


def choose(samples: list[dict], args: Args) -> list[dict]:
    """H: which of a prompt's distinct right responses are trained on (paper, 3.3, table 2).

    >>> rows = [{"id": "p", "token_ids": [i], "correct": c, "reward": r}
    ...         for i, c, r in ((1, True, .4), (2, True, .9), (3, False, 0.), (4, True, .6))]
    >>> [row["token_ids"][0] for row in choose(rows, Args(select="top_k", k=2))]
    [2, 4]
    """
    right = distinct([row for row in samples if row["correct"]])
    rewards = [row["reward"] for row in right]
    picked = range(len(right))  # all
    if args.select == "threshold":
        picked = [i for i in picked if rewards[i] > args.alpha]
    elif args.select == "random":  # the order of numbers that belong to (iteration, prompt, sample)
        keys = [("select", row["iteration"], row["id"], row["sample"]) for row in right]
        picked = top_k([seed_of(args.seed, *key) for key in keys], args.k)
    elif args.select == "top_k":
        picked = top_k(rewards, args.k)
    return [right[i] | {"rank": place} for place, i in enumerate(picked, 1)]


def select(folder: Path, by_id: dict, args: Args) -> dict:
    """Phase: selected.jsonl from samples.jsonl; returns what there was to select from.

    Samples of prompts whose answer is hidden are judged by their vote first.
    """

    def judged():
        """The samples of every prompt."""
        for prompt, samples in by_prompt(stream_jsonl(folder / "samples.jsonl")):
            hidden = by_id[prompt]["answer"] is None
            yield hidden, pseudo_label(samples, args.vote_weights) if hidden else samples

    def write(part: Path) -> None:
        """The chosen responses of every prompt."""
        write_jsonl(part, (row for _, samples in judged() for row in choose(samples, args)))
        if not len(Lines(part)):
            why = f"--select {args.select} keeps none of the right samples, if there are any"
            raise InputError(f"{folder}: {why}, so nothing can be trained on")

    once(folder / "selected.jsonl", write)
    found = {"prompts": 0, "correct": 0, "voted": 0, "no_vote": 0}
    for hidden, samples in judged():
        found["prompts"] += 1
        found["voted" if hidden else "correct"] += sum(row["correct"] for row in samples)
        found["no_vote"] += not samples
    sampled = 0 if args.method == "sft" else found["prompts"] * args.samples
    return found | {"samples": sampled, "selected": len(Lines(folder / "selected.jsonl"))}


# ---- improve


def starts_from(t: int, start: Path, out: Path, args: Args) -> tuple[Path, Path | None]:
    """(policy folder, training state or None) with which iteration t begins (paper, 3.2).

    All that tells the training methods apart: continuous inherits weights, moments and schedule,
    iterative RFT the weights alone, ReST-EM nothing (table 1).
    """
    before = out / f"iter_{t - 1:02d}"
    if t == 1 or args.method == "rest_em":
        return start, None
    if args.method == "iterative_rft":
        return before / "model", None
    return before / "model", before / "training"


def improve(out: Path, start: Path, t: int, iterations: int, by_id: dict, args: Args) -> dict:
    """SFT of the policy on the selected responses: iter_t/model and iter_t/training."""
    folder = out / f"iter_{t:02d}"
    rows = Lines(folder / "selected.jsonl")
    ends = [args.steps * i // iterations for i in (t - 1, t)]
    batches = epoch_batches(len(rows), args.batch_size, ends[1] - ends[0], args.seed, "evolve", t)

    def loss_of(policy, part: list[dict]):
        """The SFT loss of a few selected responses."""
        token_ids = [row["token_ids"] for row in part]
        return sft_loss(policy, [by_id[row["id"]] for row in part], token_ids, args)

    def count_of(row: dict) -> int:
        """The tokens of a response and its closing EOS."""
        return len(row["token_ids"]) + 1

    policy, state = starts_from(t, start, out, args)
    data = (batches, rows, loss_of, count_of)
    folders = (folder / "model", policy, folder / "training")
    progress = train(*folders, *data, args, f"03 improve {t}", state=state)
    return {
        "lr": learning_rate(progress["step"] - 1, args.learning_rate, args.warmup_steps),
        "trained": len({place for batch in batches for place in batch}),
        "steps": ends[1],
        "tokens": progress["tokens"],
        "loss": progress["loss"] / len(batches),
    }


# ---- look and adapt


def mean_over_prompts(groups: list[list[dict]], figure: str) -> float:
    """Pass@K (K: all samples of a prompt) or Reward-Pass@2, averaged over prompts (paper, 5)."""
    passed = 0
    for group in groups:
        correct = [row["correct"] for row in group]
        rewards = [row["reward"] for row in group]
        passed += any(correct) if figure == "pass_at_k" else reward_pass_at_k(rewards, correct, 2)
    return passed / len(groups)


def look(
    policy, prm, val: list[dict], folder: Path, t: int, temperature: float, args: Args
) -> dict:
    """Greedy accuracy, Pass@K and Reward-Pass@2 on the validation set (paper, section 5)."""
    with Sampler(policy, args, prm) as sampler:
        sampler.look(folder, "val", val, args.samples, temperature, "val", t)
    groups = [group for _, group in by_prompt(stream_jsonl(folder / "val_samples.jsonl"))]
    greedy = [row["correct"] for row in stream_jsonl(folder / "val_greedy.jsonl")]
    samples = [row["correct"] for group in groups for row in group]
    return {
        "greedy_accuracy": sum(greedy) / len(greedy),
        "sample_accuracy": sum(samples) / len(samples),
        "pass_at_k": mean_over_prompts(groups, "pass_at_k"),
        "reward_pass_at_2": mean_over_prompts(groups, "reward_pass_at_2"),
    }


def search_temperature(grid: list[float], objective, current: float) -> tuple[float, list[dict]]:
    """T <- argmax of objective(T) over the grid; of equal ones the nearest to T, then the lower.

    Returns (best temperature, the whole curve as [{"temperature", "objective"}, ...]) (paper, 5).
    """
    curve = [{"temperature": T, "objective": objective(T)} for T in grid]

    def preference(point: dict) -> tuple:
        """Smaller is better."""
        distance = round(abs(point["temperature"] - current), 6)
        return -point["objective"], distance, point["temperature"]

    return min(curve, key=preference)["temperature"], curve


def adapt(policy, prm, val: list[dict], folder: Path, t: int, current: float, args: Args) -> dict:
    """A search: T <- argmax of Reward-Pass@2 over the grid, fixed prompts and seeds (paper, 5)."""
    grid, searched = args.search_grid, val[: args.search_prompts]
    heats = [T for T in grid for _ in searched]
    path = folder / "search.jsonl"
    with Sampler(policy, args, prm) as sampler:
        sampler.sample(path, searched * len(grid), args.samples, heats, "search", t)
    rows, size = read_jsonl(path), args.samples
    groups = [rows[first : first + size] for first in range(0, len(rows), size)]
    curve = []
    for place, T in enumerate(grid):
        tried = groups[place * len(searched) : (place + 1) * len(searched)]
        names = ("reward_pass_at_2", "pass_at_k")
        curve.append({"temperature": T} | {name: mean_over_prompts(tried, name) for name in names})
    heights = {point["temperature"]: point[args.objective] for point in curve}
    chosen, _ = search_temperature(grid, heights.get, current)
    return {"iteration": t, "was": current, "chosen": chosen, "curve": curve} | {
        "objective": args.objective
    }


# ---- past the paper: a PRM that is trained anew


def refresh_prm(policy, folder: Path, t: int, first_prm: Path, args: Args) -> dict:
    """Stage 02's phases from the current policy on its own rollouts; returns what they cost.

    The flags are those that the run's first PRM was made with, else this stage's and 02's defaults.
    """
    stage, run = importlib.import_module("02_train_prm"), first_prm.parent / "run.json"
    flags = {item.name: getattr(args, item.name) for item in fields(ScoringArgs)}
    flags |= {"data": args.data, "val": args.val}
    if run.exists():
        flags |= json.loads(run.read_text())["flags"]
    flags |= {"seed": seed_of(args.seed, "refresh", t), "engine": args.engine}
    folder.mkdir(exist_ok=True)
    stage.make_prm(folder, policy, stage.Args(**flags))
    samples = sum(
        len(Lines(folder / f"{name}.jsonl")) for name in ("samples", "val_samples", "rollouts")
    )
    steps = json.loads((folder / "metrics.json").read_text())["steps"]
    return {"extra_samples": samples, "extra_steps": steps}


def current_prm(out: Path, t: int, args: Args) -> Path:
    """The PRM of iteration t: the newest refreshed before it, else the one the run began with."""
    made = [out / f"iter_{s:02d}" / "prm" for s in range(1, t)]
    fresh = [folder / "model" for folder in made if (folder / "metrics.json").exists()]
    first = Path(args.prm or Path(args.runs) / "02_train_prm" / "model")
    return [first, *fresh][-1]


# ---- the loop


def check_flags(args: Args) -> int:
    """The number of iterations; raises InputError for flags that contradict each other."""

    def refuse(wrong: bool, sentence: str) -> None:
        if wrong:
            raise InputError(sentence)

    sft, fixed = args.method == "sft", args.temperature != "adaptive"
    hidden, grid = args.unlabeled != "none", args.search_grid
    parts = round(1 / args.interval)
    iterations = 1 if sft else round(args.passes * parts)
    uneven = abs(args.interval * parts - 1) > 1e-3 or args.interval > 1
    refuse(uneven, "--interval must be 1 over a whole number: 1, 0.5, 0.25, 0.2, ...")
    uneven = abs(args.passes * parts - iterations) > 1e-3 and not sft
    refuse(uneven, "--passes must be a multiple of --interval")
    few = not 1 <= iterations <= args.steps
    refuse(few, "--passes, --interval and --steps must give at least one iteration of one step")
    refuse(len(set(grid)) < max(1, len(grid)), "--search_grid needs different temperatures")
    bare = sft and args.gold_response.count("{}") != 1
    refuse(bare, "--gold_response must say by one {} where the answer stands")
    refuse(sft and hidden, "--method sft samples nothing: drop --unlabeled")
    late = args.prm_refresh >= iterations > 0 and args.prm_refresh > 0
    refuse(late, f"--prm_refresh: in {iterations} iteration(s) no PRM would ever be refreshed")
    late = args.search_every >= iterations and not (fixed or sft)
    refuse(late, f"--search_every: no search in {iterations} iteration(s); or fix --temperature")
    refuse(
        fixed and not is_temperature(args.temperature),
        "--temperature: a number above 0 or adaptive",
    )
    idle = fixed and args.objective != "reward_pass_at_2"
    refuse(idle, "--objective: with a fixed --temperature nothing is searched")
    mixed = args.mixin * iterations  # 0.28 x 25 is 7.000000000000001
    uneven = not 0 <= args.mixin < 1 or abs(mixed - round(mixed)) > 1e-6
    refuse(uneven, f"--mixin must be below 1 and a whole number of the {iterations} iterations")
    refuse(args.mixin > 0 and not hidden, "--mixin needs --unlabeled oracle or vote")
    idle = args.vote_weights == "equal" and args.unlabeled != "vote"
    refuse(idle, "--vote_weights equal needs --unlabeled vote")
    return iterations


def is_temperature(text: str) -> bool:
    """Whether a text is a number above 0; greedy samples are all one."""
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def rows_so_far(path: Path) -> list[dict]:
    """The rows of a file that grows with the iterations; none before the first."""
    return read_jsonl(path) if path.exists() else []


def policy_after(t: int, start: Path, out: Path) -> Path:
    """The folder of pi_theta after iteration t; iteration 0 is the policy the run began with."""
    return out / f"iter_{t:02d}" / "model" if t else start


def forget(folder: Path) -> None:
    """Delete the policy and the training state of an iteration that the next one has inherited."""
    if rank() == 0:
        shutil.rmtree(folder / "model", ignore_errors=True)
        shutil.rmtree(folder / "training", ignore_errors=True)


def main(args: Args) -> None:
    """The loop of the paper: generate, select, improve, look, adapt."""
    iterations = check_flags(args)
    start = Path(args.policy or Path(args.runs) / "01_warmup" / "model")
    first_prm = current_prm(Path(args.runs), 0, args)
    inputs = {"data": args.data, "val": args.val, "policy": start, "prm": first_prm}
    if args.unlabeled != "none":
        inputs["unlabeled"] = args.unlabeled_data
    out = open_run(args, "03_self_evolve", inputs)
    if is_there(out / "model"):
        return report(out, args)
    examples, val, unlabeled = load_examples(args.data), load_examples(args.val), []
    if args.unlabeled != "none":
        unlabeled = load_examples(args.unlabeled_data, hidden=args.unlabeled != "oracle")
    by_id = by_id_of(examples, unlabeled)
    choose_prompts(examples, unlabeled, iterations, iterations, args)  # refused now, not later
    metrics, searches = rows_so_far(out / "metrics.jsonl"), rows_so_far(out / "temperature.jsonl")
    if not metrics:
        check_longest_prompts(start, examples + unlabeled + val, args)

    for t in range(len(metrics), iterations + 1):
        clock, folder, prm = time.time(), out / f"iter_{t:02d}", current_prm(out, t, args)  # f
        folder.mkdir(exist_ok=True)
        searches = [search for search in searches if search["iteration"] < t]
        adaptive = args.temperature == "adaptive"
        chosen = [1.0, *(search["chosen"] for search in searches)]
        temperature = chosen[-1] if adaptive else float(args.temperature)  # T
        row = {"iteration": t, "temperature": temperature, "extra_samples": 0, "extra_steps": 0}
        if t > 0:
            prompts = choose_prompts(examples, unlabeled, t, iterations, args)  # D_t
            policy = policy_after(t - 1, start, out)
            generate(policy, prm, prompts, t, temperature, folder / "samples.jsonl", args)
            row |= select(folder, by_id, args)
            row |= improve(out, start, t, iterations, by_id, args)
            forget(out / f"iter_{t - 1:02d}")
        policy = policy_after(t, start, out)  # pi_theta
        if t == iterations or (args.validate_every and t % args.validate_every == 0):
            row |= look(policy, prm, val, folder, t, temperature, args)
        between = 0 < t < iterations  # nothing follows the last iteration
        if between and args.prm_refresh and t % args.prm_refresh == 0:
            row |= refresh_prm(policy, folder / "prm", t, first_prm, args)
            prm = current_prm(out, t + 1, args)
        if between and adaptive and t % args.search_every == 0:
            searches.append(adapt(policy, prm, val, folder, t, temperature, args))
            row["extra_samples"] += len(Lines(folder / "search.jsonl"))
        metrics.append(row | {"seconds": round(time.time() - clock, 1)})
        if rank() == 0:
            write_jsonl(out / "temperature.jsonl", searches)
            write_jsonl(out / "metrics.jsonl", metrics)
        print(json.dumps(metrics[-1]))
    if rank() == 0:
        shutil.rmtree(out / f"iter_{iterations:02d}" / "training", ignore_errors=True)
        os.replace(policy_after(iterations, start, out), out / "model")
        report(out, args)


def report(out: Path, args: Args) -> None:
    """Print the dynamics as a table, the budget that was spent, and what to run next."""
    names = ("greedy_accuracy", "sample_accuracy", "pass_at_k", "reward_pass_at_2")
    print("iteration    T", *(f"{name:>16}" for name in names))
    rows = read_jsonl(out / "metrics.jsonl")
    for row in rows:
        if "pass_at_k" in row:
            figures = [f"{row[name]:16.1%}" for name in names]
            print(f"{row['iteration']:9d} {row['temperature']:4.1f}", *figures)
    for name in ("samples", "extra_samples", "extra_steps"):
        print(f"{name}: {sum(row.get(name, 0) for row in rows)}")
    other = f" --aggregate {args.aggregate}" if args.aggregate != "min" else ""
    print(
        f"optimizer steps: {rows[-1]['steps']}\nnext: python 04_eval.py --runs {out.parent}{other}"
    )


if __name__ == "__main__":
    run_stage(Args, main)
