"""Stage 03: continuous self-evolving with PRM Top-2 and adaptive temperature: M-STaR (paper, sections 2, 3 and 5).

Reads   data/toy/train.jsonl, data/toy/val.jsonl, runs/toy/01_warmup/model/, runs/toy/02_train_prm/model/
Writes  runs/toy/03_self_evolve/iter_XX/samples.jsonl   K responses per prompt of the iteration, checked; the right ones scored
                                iter_XX/selected.jsonl  what the policy was trained on
                                iter_XX/val_*.jsonl     greedy responses and samples on the validation set
                                iter_XX/search.jsonl    samples of the temperature search
                                metrics.jsonl           one row per iteration; row 0 is the warm-up policy
                                temperature.jsonl       every search: the whole curve and the choice
                                checkpoint/             policy (Hugging Face folder) and AdamW moments (safetensors), state.json
                                model/                  the evolved policy, a plain Hugging Face folder

One optimisation runs through all iterations: neither the AdamW moments nor the learning-rate schedule is ever reset, in
an iteration or a restart. The PRM stays fixed. Search and validation never see training, test or ood prompts.

Departures from the paper:
1. Every iteration takes the same number of optimizer steps (--steps / --iterations), whatever was selected.
2. K = 8 here, 16 there; the search uses the first --search_prompts validation prompts.

    python 03_self_evolve.py
"""

import json
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from common import (CommonArgs, InputError, append_chunks, check_longest_prompts, distinct, epoch_batches, fit, flag, grouped, learning_rate,
                    load_checkpoint, load_examples, load_policy, load_prm, make_optimizer, open_run, pass_at_k, read_jsonl, reward_pass_at_k, run_stage,
                    sample_rows, save_checkpoint, save_model, search_temperature, seed_of, sft_loss, top_k, write_jsonl)


@dataclass
class Args(CommonArgs):
    """Flags of stage 03."""

    data: str = flag("data/toy/train.jsonl", "labelled prompts, JSONL")
    val: str = flag("data/toy/val.jsonl", "fixed validation set: dynamics and temperature search")
    iterations: int = flag(5, "iterations of generate and improve")
    interval: float = flag(0.25, "iteration interval: share of the labelled prompts that one iteration consumes")
    samples: int = flag(8, "K: responses per prompt")
    select: int = flag(2, "k of Top-k: right responses per prompt that are trained on")
    temperature: str = flag("adaptive", "a number, or adaptive: the search's choice, 1.0 until the first search")
    search_every: int = flag(2, "iterations between two temperature searches")
    search_prompts: int = flag(64, "validation prompts that a search uses")
    search_grid: list[float] = flag([round(0.3 + 0.1 * i, 1) for i in range(14)], "temperatures that a search tries")
    steps: int = flag(500, "optimizer steps over all iterations")
    batch_size: int = flag(16, "responses per optimizer step")
    learning_rate: float = flag(7e-5, "peak learning rate")
    warmup_steps: int = flag(20, "steps of linear warm-up, once; then the rate is constant")


def iteration_prompts(examples: list[dict], t: int, args: Args) -> list[dict]:
    """D_t: the t-th share (from 1) of the labelled prompts; every pass over them is in a new order and complete."""
    share = max(1, round(args.interval * len(examples)))
    order, epoch = [], 0
    while len(order) < t * share:
        order += torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed_of(args.seed, "prompts", epoch))).tolist()
        epoch += 1
    return [examples[i] for i in order[(t - 1) * share:t * share]]


def select(rows: list[dict], k: int) -> list[dict]:
    """H: the Top-k by R = 1(a = a*) x R_p among the distinct right responses to each prompt (paper, section 3.3).

    >>> rows = [{"id": "p", "token_ids": [i], "correct": c, "reward": r} for i, c, r in ((1, True, .4), (2, True, .9), (3, False, 0.), (4, True, .6))]
    >>> [(row["token_ids"], row["rank"]) for row in select(rows, 2)]
    [([2], 1), ([4], 2)]
    """
    chosen = []
    for right in grouped(distinct([row for row in rows if row["correct"]])).values():
        chosen += [{**right[i], "rank": rank} for rank, i in enumerate(top_k([row["reward"] for row in right], k), 1)]
    return chosen


def validate(policy, prm, val: list[dict], folder: Path, t: int, temperature: float, args: Args) -> dict:
    """Greedy accuracy, Pass@K and Reward-Pass@2 on the validation set (paper, section 5)."""
    greedy = append_chunks(folder / "val_greedy.jsonl", val, 1, args.rows,
                           lambda chunk: sample_rows(policy, chunk, 1, 0.0, "val", t, args), f"03 greedy {t}")
    samples = append_chunks(folder / "val_samples.jsonl", val, args.samples, args.chunk,
                            lambda chunk: sample_rows(policy, chunk, args.samples, temperature, "val", t, args, prm), f"03 val {t}")
    groups = grouped(samples).values()
    return {"greedy_accuracy": sum(row["correct"] for row in greedy) / len(greedy),
            "sample_accuracy": sum(row["correct"] for row in samples) / len(samples),
            "pass_at_k": sum(pass_at_k(len(g), sum(r["correct"] for r in g), args.samples) for g in groups) / len(groups),
            "reward_pass_at_2": mean_reward_pass(samples)}


def mean_reward_pass(rows: list[dict], k: int = 2) -> float:
    """Reward-Pass@k over all prompts of the rows."""
    groups = grouped(rows).values()
    return sum(reward_pass_at_k([r["reward"] for r in g], [r["correct"] for r in g], k) for g in groups) / len(groups)


def adapt_temperature(policy, prm, val: list[dict], folder: Path, t: int, current: float, args: Args) -> tuple[float, list[dict]]:
    """T <- argmax over the grid of Reward-Pass@2 on fixed prompts and seeds (paper, section 5)."""
    tries = [(temperature, example) for temperature in args.search_grid for example in val[:args.search_prompts]]

    def produce(chunk):
        return [row for temperature, group in groupby(chunk, key=lambda pair: pair[0])
                for row in sample_rows(policy, [e for _, e in group], args.samples, temperature, "search", t, args, prm)]

    rows = append_chunks(folder / "search.jsonl", tries, args.samples, args.chunk, produce, f"03 search {t}")
    return search_temperature(args.search_grid, lambda temperature: mean_reward_pass([r for r in rows if r["temperature"] == temperature]), current)


def main(args: Args) -> None:
    """The loop of the paper: generate, select, improve, look, adapt."""
    runs = Path(args.runs)
    start_from, reward_model = runs / "01_warmup" / "model", runs / "02_train_prm" / "model"
    out = open_run(args, "03_self_evolve", {"data": args.data, "val": args.val, "policy": start_from, "prm": reward_model})
    if (out / "model").exists():
        return report(out)
    examples, val = load_examples(args.data), load_examples(args.val)
    policy, prm = load_policy(start_from, args), load_prm(reward_model, args)  # pi_theta, f
    check_longest_prompts(policy, examples + val, args)
    by_id, optimizer = {e["id"]: e for e in examples}, make_optimizer(policy)
    state = load_checkpoint(out / "checkpoint", policy, optimizer) or {"iteration": 0, "step": 0, "batch": 0, "tokens": 0, "loss": 0.0}
    metrics = read_jsonl(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
    searches = read_jsonl(out / "temperature.jsonl") if (out / "temperature.jsonl").exists() else []

    for t in range(len(metrics), args.iterations + 1):
        folder, clock = out / f"iter_{t:02d}", [time.time()]
        folder.mkdir(exist_ok=True)
        earlier = [s for s in searches if s["iteration"] < t]
        temperature = float(args.temperature) if args.temperature != "adaptive" else earlier[-1]["temperature"] if earlier else 1.0  # T
        row = {"iteration": t, "temperature": temperature}

        if t > 0:
            # Generate: K responses per prompt from the current policy
            prompts = iteration_prompts(examples, t, args)
            samples = append_chunks(folder / "samples.jsonl", prompts, args.samples, args.chunk,
                                    lambda chunk: sample_rows(policy, chunk, args.samples, temperature, "evolve", t, args, prm, True), f"03 sample {t}")
            selected = select(samples, args.select)
            if not selected:
                raise InputError(f"iteration {t}: none of {len(samples)} samples is right, so there is nothing to train on; see {folder}/samples.jsonl")
            write_jsonl(folder / "selected.jsonl", selected)
            clock.append(time.time())

            # Improve: SFT on the selected responses; moments and rate go on where they were
            steps = args.steps * t // args.iterations - args.steps * (t - 1) // args.iterations
            batches = [[selected[i] for i in b] for b in epoch_batches(len(selected), args.batch_size, steps, args.seed, "evolve", t)]
            if state["iteration"] < t:
                state = {"iteration": t, "step": state["step"], "batch": 0, "tokens": 0, "loss": 0.0}
            state = fit(policy, optimizer, batches, lambda b: sft_loss(policy, [by_id[r["id"]] for r in b], [r["token_ids"] for r in b], args),
                        args, f"03 train {t}", state, lambda s: save_checkpoint(out / "checkpoint", policy, optimizer, s))
            save_checkpoint(out / "checkpoint", policy, optimizer, state)
            row |= {"lr": learning_rate(state["step"] - 1, args.learning_rate, args.warmup_steps), "prompts": len(prompts), "samples": len(samples),
                    "correct": sum(r["correct"] for r in samples), "selected": len(selected), "steps": state["step"], "tokens": state["tokens"],
                    "loss": state["loss"] / max(state["batch"], 1)}
            clock.append(time.time())

        # Look: the dynamics on the validation set
        row |= validate(policy, prm, val, folder, t, temperature, args)
        clock.append(time.time())

        # Adapt: T <- argmax of Reward-Pass@2; nothing follows the last iteration
        if args.temperature == "adaptive" and 0 < t < args.iterations and t % args.search_every == 0:
            best, curve = adapt_temperature(policy, prm, val, folder, t, temperature, args)
            searches = [s for s in searches if s["iteration"] < t] + [{"iteration": t, "was": temperature, "temperature": best, "curve": curve}]
            write_jsonl(out / "temperature.jsonl", searches)
        clock.append(time.time())
        phases = ["sample", "train", "validate", "search"][-len(clock) + 1:]
        row["seconds"] = {name: round(b - a, 1) for name, a, b in zip(phases, clock, clock[1:])}
        metrics.append(row)
        write_jsonl(out / "metrics.jsonl", metrics)
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))
    save_model(policy, out / "model")
    report(out)


def report(out: Path) -> None:
    """Print the dynamics as a table, and what to run next."""
    print("iteration     T  greedy  sample  Pass@K  Reward-Pass@2  selected")
    for row in read_jsonl(out / "metrics.jsonl"):
        print(f"{row['iteration']:9d} {row['temperature']:5.1f} {row['greedy_accuracy']:7.1%} {row['sample_accuracy']:7.1%} {row['pass_at_k']:7.1%} "
              f"{row['reward_pass_at_2']:14.1%} {row.get('selected', 0):9d}")
    print("next: python 04_eval.py")


if __name__ == "__main__":
    run_stage(Args, main)
