"""Stage 04: base, warm-up and evolved policy side by side (paper, section 6, and its figure of the dynamics).

Reads   data/toy/{test,ood}.jsonl, data/toy/base/, runs/toy/01_warmup/model/, runs/toy/02_train_prm/model/, runs/toy/03_self_evolve/
Writes  runs/toy/04_eval/predictions.jsonl  one greedy response and K samples per policy and prompt, checked, with step scores
                         report.json        every figure with its count and interval
                         report.md          the same as tables
                         dynamics.png       greedy accuracy, Pass@K, Reward-Pass@2 and temperature over iterations
                         prm.png            the PRM as a verifier (best of n, votes) and as a reranker (Top-2 against the rest)

Intervals are 95 % bootstrap intervals over prompts. Differences are paired: the same prompts, resampled together.
With several --runs it only draws their dynamics into one figure; with --study it turns the lines of tests/study.py into a
table (mean over seeds, interval over seeds and prompts) and paired differences.

    python 04_eval.py
    python 04_eval.py --runs runs/a runs/b runs/c
    python 04_eval.py --study runs/study/rows.jsonl
"""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import (ScoringArgs, append_chunks, check_longest_prompts, distinct, flag, grouped, load_checker, load_examples, load_policy, load_prm, open_run,
                    pass_at_k, read_jsonl, reward_pass_at_k, run_stage, sample_rows, top_k, vote, write_atomic, write_json)

FIGURES = {"greedy": "greedy accuracy", "sample": "mean sample accuracy", "pass_at_k": "Pass@K", "reward_pass_at_2": "Reward-Pass@2",
           "majority": "majority vote", "best_of_n": "PRM best-of-N", "weighted": "PRM-weighted vote", "unparsable": "unparsable share"}


@dataclass
class Args(ScoringArgs):
    """Flags of stage 04."""

    runs: list[str] = flag(["runs/toy"], "folder that holds one sub-folder per stage; several: only compare their dynamics")
    study: str = flag("", "rows.jsonl of tests/study.py: only print its table")
    against: list[str] = flag(["M-STaR/Iterative RFT 100 %", "M-STaR/ReST-EM 100 %", "Top-2/Random-2"], "with --study: pairs of rows A/B to compare")
    test: str = flag("data/toy/test.jsonl", "in-domain test prompts")
    ood: str = flag("data/toy/ood.jsonl", "out-of-domain test prompts")
    model: str = flag("data/toy/base", "base model")
    samples: int = flag(8, "K = N: samples per prompt")
    temperature: float = flag(1.0, "sampling temperature")
    resamples: int = flag(2000, "bootstrap resamples")
    chain_checker: str = flag("tests/toy.py:judge", "FILE:FUNCTION(response, example) that knows whether a chain is right, or None; only reports use it")


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


def verifier(prompts: list[list[dict]], args: Args) -> dict:
    """The PRM as a verifier: {n: {majority, best_of_n, weighted: interval}} of the first n = 1, 2, 4, ..., K samples (paper, figure 2)."""
    sizes = sorted({2 ** i for i in range(args.samples.bit_length()) if 2 ** i <= args.samples} | {args.samples})
    table = {n: [prompt_figures(p[0], p[1:n + 1]) for p in prompts] for n in sizes}
    return {n: {f: interval(np.array([row[f] for row in rows], float), args.resamples) for f in ("majority", "best_of_n", "weighted")} for n, rows in table.items()}


def reranker(prompts: list[list[dict]], examples: dict, checker, args: Args) -> dict:
    """The PRM as a reranker of right responses: steps and share of right chains in its Top-2 against the rest (paper, figure 2).

    Only prompts with more than two distinct right samples have a rest; intervals are over those prompts.
    """
    table: dict = {name: {"steps": [], "right_chain": []} for name in ("Top-2", "rest")}
    for p in prompts:
        right = distinct([row for row in p[1:] if row["correct"]])
        best = top_k([row["reward"] for row in right], 2)
        for name, part in (("Top-2", [right[i] for i in best]), ("rest", [row for i, row in enumerate(right) if i not in best])):
            if len(right) > 2:
                judged = [ok for row in part if (ok := checker(row["response"], examples[row["id"]])) is not None]
                table[name]["steps"].append(sum(len(row["step_scores"]) for row in part) / len(part))
                table[name]["right_chain"] += [sum(judged) / len(judged)] if judged else []
    return {name: {f: interval(np.array(v, float), args.resamples) for f, v in row.items() if v} for name, row in table.items()}


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


def prm_markdown(report: dict) -> str:
    """The PRM as verifier and as reranker, as two tables."""
    show = lambda r, scale=100: f"{scale * r['mean']:.1f} [{scale * r['low']:.1f}, {scale * r['high']:.1f}]"
    lines = ["## PRM on samples of the warm-up policy, test\n", "| n | majority vote | PRM-weighted vote | PRM best-of-n |", "|---|---|---|---|"]
    lines += [f"| {n} | {show(row['majority'])} | {show(row['weighted'])} | {show(row['best_of_n'])} |" for n, row in report["verifier"].items()]
    lines += ["", "| right responses | steps | right chains, % | prompts |", "|---|---|---|---|"]
    lines += [f"| {name} | {show(row['steps'], 1)} | {show(row['right_chain']) if 'right_chain' in row else '-'} | {row['steps']['n']} |"
              for name, row in report["reranker"].items() if "steps" in row]
    return "\n".join([*lines, ""])


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


def draw_prm(report: dict, path: Path) -> None:
    """The paper's figure 2 in our terms: votes and best-of-n over n; steps and right chains of the Top-2 against the rest."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for key, label, style in (("majority", "majority vote", "o-"), ("weighted", "PRM-weighted vote", "^-"), ("best_of_n", "PRM best-of-n", "s-")):
        n, rows = [int(n) for n in report["verifier"]], [row[key] for row in report["verifier"].values()]
        line = left.plot(n, [100 * r["mean"] for r in rows], style, label=label)[0]
        left.fill_between(n, [100 * r["low"] for r in rows], [100 * r["high"] for r in rows], alpha=0.12, color=line.get_color())
    left.set(xscale="log", xlabel="n samples", ylabel="test prompts, %", xticks=n, xticklabels=n, title="PRM as a verifier (warm-up policy)")
    left.minorticks_off()
    left.legend(frameon=False)
    for axis, key, scale, title in ((middle, "steps", 1, "steps of right responses"), (right, "right_chain", 100, "right chains, %")):
        bars = {name: row[key] for name, row in report["reranker"].items() if key in row}
        axis.bar(list(bars), [scale * b["mean"] for b in bars.values()], color=["C2", "0.7"][:len(bars)], width=0.6,
                 yerr=[[scale * (b["mean"] - b["low"]) for b in bars.values()], [scale * (b["high"] - b["mean"]) for b in bars.values()]], capsize=4)
        axis.set_title(title)
    figure.savefig(path, dpi=150)


def compare_runs(runs: list[str], path: Path) -> None:
    """The dynamics of several runs in one figure, each drawn from its own metrics.jsonl."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for axis, (key, title, scale) in zip(axes, (("greedy_accuracy", "greedy accuracy, %", 100), ("pass_at_k", "Pass@K at the run's temperature, %", 100),
                                                ("reward_pass_at_2", "Reward-Pass@2, %", 100), ("temperature", "temperature T", 1))):
        for run in runs:
            metrics = read_jsonl(Path(run) / "03_self_evolve" / "metrics.jsonl")
            axis.plot([row["iteration"] / metrics[-1]["iteration"] for row in metrics], [scale * row[key] for row in metrics], "o-", ms=3, label=Path(run).name)
        axis.set(title=title, xlabel="share of training")
        axis.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def crossed_interval(values: np.ndarray, resamples: int, seed: int = 0) -> dict:
    """Mean of verdicts (seeds, prompts) and its 95 % bootstrap interval over seeds and prompts, both resampled: every seed answers the same prompts.

    >>> {k: round(v, 2) for k, v in crossed_interval(np.array([[1.0, 0.0], [1.0, 0.0]]), 1000).items()}
    {'mean': 0.5, 'low': 0.0, 'high': 1.0, 'seeds': 2, 'n': 2}
    """
    rng, (s, n) = np.random.default_rng(seed), values.shape
    means = [values[rng.integers(s, size=s)][:, rng.integers(n, size=n)].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "seeds": s, "n": n}


def study_table(rows: list[dict], args: Args) -> str:
    """The lines of tests/study.py as a table beside the paper's figures, and the paired differences of args.against."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    of = {name: {row["seed"]: row for row in rows if row["name"] == name} for name in names}
    stack = lambda name, seeds, split: np.array([of[name][s]["verdicts"][split] for s in seeds], float)  # (seeds, prompts)
    show = lambda r, sign="": f"{100 * r['mean']:{sign}.1f} [{100 * r['low']:{sign}.1f}, {100 * r['high']:{sign}.1f}]"
    lines = ["| | test (ID) | ood | seeds | paper ID / OOD | samples | steps | command |", "|---|---|---|---|---|---|---|---|"]
    for name in names:
        seeds, first = sorted(of[name]), next(iter(of[name].values()))
        cells = [show(crossed_interval(stack(name, seeds, split), args.resamples)) for split in ("test", "ood")]
        paper = f"{first['paper_id']} / {first['paper_ood']}" if first["paper_id"] else "-"
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {len(seeds)} | {paper} | {first['samples']} | {first['steps']} | `{first.get('command', '')}` |")
    lines += ["", "| paired difference | test (ID) | ood | seeds |", "|---|---|---|---|"]
    for a, b in (pair.split("/") for pair in args.against):
        if seeds := sorted(set(of.get(a, ())) & set(of.get(b, ()))):
            cells = [show(crossed_interval(stack(a, seeds, split) - stack(b, seeds, split), args.resamples), "+") for split in ("test", "ood")]
            lines.append(f"| {a} - {b} | {cells[0]} | {cells[1]} | {len(seeds)} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    """Sample every policy on every split, judge, tabulate, draw."""
    if args.study:
        return print(study_table(read_jsonl(args.study), args))
    if len(args.runs) > 1:
        compare_runs(args.runs, Path(args.runs[0]) / "compare.png")
        return print(f"wrote {args.runs[0]}/compare.png")
    args.runs = args.runs[0]
    runs = Path(args.runs)
    paths = {"base": Path(args.model), "warm-up": runs / "01_warmup" / "model", "M-STaR": runs / "03_self_evolve" / "model"}
    reward_model, metrics = runs / "02_train_prm" / "model", runs / "03_self_evolve" / "metrics.jsonl"
    out = open_run(args, "04_eval", {"test": args.test, "ood": args.ood, **paths, "prm": reward_model})
    if (out / "report.json").exists():
        return print((out / "report.md").read_text())
    splits = {"test": load_examples(args.test), "ood": load_examples(args.ood)}
    prm, checker, loaded = load_prm(reward_model, args), load_checker(args.chain_checker), {}
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
    first, by_id = list(grouped([r for r in rows if (r["split"], r["policy"]) == ("test", "warm-up")]).values()), {e["id"]: e for e in splits["test"]}
    prm_report = {"verifier": verifier(first, args), "reranker": reranker(first, by_id, checker, args)}
    text = markdown(report, args) + prm_markdown(prm_report)
    write_atomic(out / "report.md", text)
    draw_dynamics(read_jsonl(metrics), out / "dynamics.png", args.samples)
    draw_prm(prm_report, out / "prm.png")
    write_json(out / "report.json", report | {"prm": prm_report})
    print(text)


if __name__ == "__main__":
    run_stage(Args, main)
