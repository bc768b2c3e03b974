"""Stage 04: base, warm-up and evolved policy side by side (paper, section 6, and its figure of the dynamics).

Reads   data/toy/{test,ood}.jsonl, data/toy/base/, runs/toy/01_warmup/model/, runs/toy/02_train_prm/model/, runs/toy/03_self_evolve/
Writes  runs/toy/04_eval/predictions.jsonl  one greedy response and K samples per policy and prompt, checked, with step scores
                         report.json        every figure with its count and interval
                         report.md          the same as tables
                         dynamics.png       greedy accuracy, Pass@K, Reward-Pass@2 and temperature over iterations

Intervals are 95 % bootstrap intervals over prompts. Differences are paired: the same prompts, resampled together.

    python 04_eval.py
"""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import (CommonArgs, append_chunks, check_longest_prompts, flag, grouped, load_examples, load_policy, load_prm, open_run,
                    pass_at_k, read_jsonl, reward_pass_at_k, run_stage, sample_rows, top_k, write_atomic, write_json)

FIGURES = {"greedy": "greedy accuracy", "sample": "mean sample accuracy", "pass_at_k": "Pass@K", "reward_pass_at_2": "Reward-Pass@2",
           "majority": "majority vote", "best_of_n": "PRM best-of-N", "weighted": "PRM-weighted vote", "unparsable": "unparsable share"}


@dataclass
class Args(CommonArgs):
    """Flags of stage 04."""

    test: str = flag("data/toy/test.jsonl", "in-domain test prompts")
    ood: str = flag("data/toy/ood.jsonl", "out-of-domain test prompts")
    model: str = flag("data/toy/base", "base model")
    samples: int = flag(8, "K = N: samples per prompt")
    temperature: float = flag(1.0, "sampling temperature")
    resamples: int = flag(2000, "bootstrap resamples")


def vote(answers: list[str | None], weights: list[float]) -> str | None:
    """The answer with the largest total weight; of equal ones the one sampled first. Unparsable answers have no vote.

    >>> vote(["7", "8", None, "8"], [1.0, 0.6, 9.0, 0.6])
    '8'
    """
    totals: dict[str, float] = {}
    for answer, weight in zip(answers, weights):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    return max(totals, key=totals.get, default=None)  # max keeps the first of equals


def prompt_figures(greedy: dict, samples: list[dict]) -> dict[str, float]:
    """Every figure of one prompt: 0 or 1, or a share, of its greedy response and its K samples."""
    answers, correct, rewards = ([row[key] for row in samples] for key in ("answer", "correct", "reward"))
    right = {row["answer"]: row["correct"] for row in samples}  # whether an answer is right
    return {"greedy": greedy["correct"], "sample": sum(correct) / len(correct), "pass_at_k": pass_at_k(len(correct), sum(correct), len(correct)),
            "reward_pass_at_2": reward_pass_at_k(rewards, correct, 2), "majority": right.get(vote(answers, [1.0] * len(answers)), False),
            "best_of_n": correct[top_k(rewards, 1)[0]], "weighted": right.get(vote(answers, [max(r, 0.0) for r in rewards]), False),
            "unparsable": sum(a is None for a in answers) / len(answers)}


def interval(values: np.ndarray, resamples: int, seed: int = 0) -> dict:
    """Mean of per-prompt values (n,), their count, and the 95 % bootstrap interval of the mean."""
    pick = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))  # (R, n)
    low, high = np.percentile(values[pick].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def summarize(rows: list[dict], args: Args) -> dict:
    """{split: {policy: {figure: interval}}}, and the paired difference of each policy to the one before it."""
    report: dict = {}
    for (split, name), group in groupby(rows, key=lambda row: (row["split"], row["policy"])):
        prompts = grouped(list(group)).values()
        table = [prompt_figures(p[0], p[1:]) for p in prompts]  # the greedy row comes first
        report.setdefault(split, {})[name] = {figure: np.array([row[figure] for row in table], float) for figure in FIGURES}
    for policies in report.values():
        names = list(policies)
        for before, name in zip([None, *names], names):
            values = policies[name]
            policies[name] = {figure: interval(v, args.resamples) for figure, v in values.items()}
            if before:
                policies[name]["greedy_gain"] = interval(values["greedy"] - arrays["greedy"], args.resamples) | {"over": before}
            arrays = values
    return report


def markdown(report: dict, args: Args) -> str:
    """The report as one table per split."""
    lines = [f"# Evaluation\n\nK = N = {args.samples} samples at temperature {args.temperature}; percent, with 95 % bootstrap intervals over prompts.\n"]
    for split, policies in report.items():
        lines += [f"## {split} ({next(iter(policies.values()))['greedy']['n']} prompts)\n", "| | " + " | ".join(policies) + " |", "|---|" + "---|" * len(policies)]
        for figure, title in FIGURES.items():
            cells = [f"{100 * p[figure]['mean']:.1f} [{100 * p[figure]['low']:.1f}, {100 * p[figure]['high']:.1f}]" for p in policies.values()]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        gains = [p.get("greedy_gain") for p in policies.values()]
        cells = [f"{100 * g['mean']:+.1f} [{100 * g['low']:+.1f}, {100 * g['high']:+.1f}] over {g['over']}" if g else "" for g in gains]
        lines += ["| greedy gain, paired | " + " | ".join(cells) + " |", ""]
    return "\n".join(lines)


def draw_dynamics(metrics: list[dict], path: Path, k: int) -> None:
    """The paper's figure: greedy accuracy, Pass@K and Reward-Pass@2 on validation, and the temperature, over iterations."""
    t = [row["iteration"] for row in metrics]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    left = figure.subplots()
    for key, label, style in (("pass_at_k", f"Pass@{k}", "s-"), ("reward_pass_at_2", "Reward-Pass@2", "^-"), ("greedy_accuracy", "greedy accuracy", "o-")):
        left.plot(t, [100 * row[key] for row in metrics], style, label=label)
    left.set(xlabel="iteration (0 is the warm-up policy)", ylabel="validation prompts, %", xticks=t, title="Dynamics of self-evolving")
    left.grid(alpha=0.3)
    right = left.twinx()
    right.step(t, [row["temperature"] for row in metrics], "k:", where="mid", label="temperature T (right axis)")
    right.set(ylabel="temperature", ylim=(0, 1.7))
    handles = [line for axis in (left, right) for line in axis.get_lines()]
    figure.legend(handles, [line.get_label() for line in handles], loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def main(args: Args) -> None:
    """Sample every policy on every split, judge, tabulate, draw."""
    runs = Path(args.runs)
    paths = {"base": Path(args.model), "warm-up": runs / "01_warmup" / "model", "M-STaR": runs / "03_self_evolve" / "model"}
    reward_model, metrics = runs / "02_train_prm" / "model", runs / "03_self_evolve" / "metrics.jsonl"
    out = open_run(args, "04_eval", {"test": args.test, "ood": args.ood, **paths, "prm": reward_model})
    if (out / "report.json").exists():
        return print((out / "report.md").read_text())
    splits = {"test": load_examples(args.test), "ood": load_examples(args.ood)}
    prm, loaded = load_prm(reward_model, args), {}
    check_longest_prompts(prm, sum(splits.values(), []), args)

    def produce(chunk):
        rows = []
        for (split, name), group in groupby(chunk, key=lambda item: item[:2]):
            if name not in loaded:
                loaded.clear()  # one policy at a time
                loaded[name] = load_policy(paths[name], args)
            examples = [example for _, _, example in group]
            greedy = sample_rows(loaded[name], examples, 1, 0.0, "eval", 0, args, prm)
            samples = sample_rows(loaded[name], examples, args.samples, args.temperature, "eval", 0, args, prm)
            for i, row in enumerate(greedy):
                rows += [{"split": split, "policy": name, **r} for r in (row, *samples[i * args.samples:(i + 1) * args.samples])]
        return rows

    items = [(split, name, example) for name in paths for split, examples in splits.items() for example in examples]
    rows = append_chunks(out / "predictions.jsonl", items, 1 + args.samples, args.chunk, produce, "04 eval")
    report = summarize(sorted(rows, key=lambda row: (list(splits).index(row["split"]), list(paths).index(row["policy"]))), args)
    text = markdown(report, args)
    write_atomic(out / "report.md", text)
    draw_dynamics(read_jsonl(metrics), out / "dynamics.png", args.samples)
    write_json(out / "report.json", report)
    print(text)


if __name__ == "__main__":
    run_stage(Args, main)
