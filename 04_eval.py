"""Stage 04: base, warm-up and evolved policy side by side (paper, section 6, and its figure of the dynamics).

Reads   data/toy/{test,ood}.jsonl, data/toy/base/, runs/toy/01_warmup/model/, runs/toy/02_train_prm/model/, runs/toy/03_self_evolve/
        data/<benchmark>/ for --benchmarks: the published files (parquet, TSV or JSON), or the hub
Writes  runs/toy/04_eval/predictions.jsonl  one greedy response and K samples per policy and prompt, checked, with step scores
                         benchmarks.jsonl   one greedy response per policy and benchmark question: prediction, extraction, gold answer, verdict
                         report.json        every figure with its count and interval
                         report.md          the same as tables
                         dynamics.png       greedy accuracy, Pass@K, Reward-Pass@2 and temperature over iterations
                         prm.png            the PRM as a verifier (best of n, votes) and as a reranker (Top-2 against the rest)

Intervals are 95 % bootstrap intervals over prompts. Differences are paired: the same prompts, resampled together.
The policy that 03 began with and its PRM are those of 03's run.json. With several --runs it only draws their dynamics into
one figure and tells what training changed, over all runs that differ in nothing but the seed, and how far that differs from
the change in the first kind of runs; with --study it turns the lines of tests/study.py into a table (mean over seeds,
interval over seeds and prompts) and paired differences.

Benchmarks are asked in our one prompt form, question, lettered choices, --instruction, with the dataset's own hint or
context before the question. MMStar-R and MMBench-R leave out the perception categories, as in the paper. MMBench asks
a question several times with its choices rotated: it counts if all copies are right; "plain" looks at the base copy.

    python 04_eval.py
    python 04_eval.py --runs runs/a runs/b runs/c
    python 04_eval.py --study tests/study_rows.jsonl
    (benchmarks on a real model: the README's GPU section has the whole command)
"""

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from scipy.stats import t as student  # comes with scikit-learn

from common import (LETTERS, InputError, ScoringArgs, append_chunks, by_id_of, check_longest_prompts, distinct, flag, grouped, load_checker, load_examples, load_policy,
                    load_prm, open_run, pass_at_k, read_jsonl, reward_pass_at_k, run_stage, sample_rows, top_k, vote, write_atomic, write_json, write_jsonl)

FIGURES = {"greedy": "greedy accuracy", "sample": "mean sample accuracy", "pass_at_k": "Pass@K", "reward_pass_at_2": "Reward-Pass@2",
           "majority": "majority vote", "best_of_n": "PRM best-of-N", "weighted": "PRM-weighted vote", "unparsable": "unparsable share"}
LOOKED_AT = ("greedy", "pass_at_k", "reward_pass_at_2")
M_STAR = {"method": "continuous", "select": "top_k", "k": 2, "unlabeled": "none", "temperature": "adaptive",
          "objective": "reward_pass_at_2", "interval": 0.25, "aggregate": "min", "prm_refresh": 0}
AGAINST = [  # the comparisons behind the paper's findings, and those past it
    "M-STaR/Iterative RFT 100 %", "M-STaR/ReST-EM 100 %", "continuous 100 %/Iterative RFT 100 %", "continuous 100 %/ReST-EM 100 %",
    "continuous 25 %/Iterative RFT 100 %", "continuous 25 %/ReST-EM 100 %", "continuous 25 %/continuous 100 %", "continuous 25 %/continuous 50 %",
    "continuous 25 %/continuous 12.5 %", "continuous 25 %/continuous 6.25 %",
    "Top-2/Random-2", "Top-1/Random-2", "Random-2/continuous 25 %", "Top-2/continuous 25 %", "Top-2/PRM > alpha", "Top-2/Top-1", "Top-2/Top-4",
    "Top-1/continuous 25 %", "Top-4/continuous 25 %", "oracle without PRM/continuous 25 %", "oracle + PRM/Top-2", "oracle + PRM, mix-in 25 %/Top-2",
    "oracle + PRM, mix-in 50 %/Top-2", "oracle + PRM, mix-in 75 %/Top-2", "oracle + PRM, mix-in 75 %/oracle + PRM",
    "vote, mix-in 0 %/Top-2", "vote, mix-in 25 %/Top-2", "vote, mix-in 50 %/Top-2", "vote, mix-in 75 %/Top-2", "vote, mix-in 75 %/vote, mix-in 0 %",
    "vote, mix-in 0 %/majority vote without PRM, mix-in 0 %",
    "M-STaR/Top-2", "M-STaR/Top-2, T = 0.5", "M-STaR/Top-2, T = 0.7", "M-STaR/Top-2, T = 1.2", "M-STaR/adaptive T on Pass@K",
    "M-STaR, PRM refreshed/M-STaR", "M-STaR, PRM refreshed/M-STaR, K = 11", "M-STaR, K = 11/M-STaR", "M-STaR, T per difficulty/M-STaR"]


@dataclass
class Args(ScoringArgs):
    """Flags of stage 04."""

    runs: list[str] = flag(["runs/toy"], "folder that holds one sub-folder per stage; several: only compare their dynamics")
    study: str = flag("", "rows.jsonl of tests/study.py: only print its table")
    against: list[str] = flag(AGAINST, "with --study: pairs of rows A/B to compare")
    test: str = flag("data/toy/test.jsonl", "in-domain test prompts")
    ood: str = flag("data/toy/ood.jsonl", "out-of-domain test prompts")
    benchmarks: list[str] = flag([], "also evaluate on mathvista, m3cot, mmstar_r, mmbench_r, ai2d")
    data_root: str = flag("data", "folder with one sub-folder per benchmark: its published files, and what is made of them")
    model: str = flag("data/toy/base", "base model")
    samples: int = flag(8, "K = N: samples per prompt")
    temperature: float = flag(1.0, "sampling temperature")
    resamples: int = flag(2000, "bootstrap resamples")
    chain_checker: str = flag("tests/toy.py:judge", "FILE:FUNCTION(response, example) that knows whether a chain is right, or None; only reports use it")


# ---------------------------------------------------------------- benchmarks: published records to our examples

TASKS = {"figure question answering": "FQA", "geometry problem solving": "GPS", "math word problem": "MWP", "textbook question answering": "TQA", "visual question answering": "VQA"}
MMBENCH = "opencompass.openxlab.space/utils/benchmarks/MMBench/MMBench_DEV_EN_V11.tsv"  # published there, not on the hub
FORMATS = {".parquet": "parquet", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


def mathvista(row: dict) -> dict:
    r"""MathVista: the question is its own `query` up to the choices, so our prompt is its prompt; the answer of a choice question is a text.

    >>> row = {"pid": "168", "query": "Hint: h\nQuestion: q\nChoices:\n(A) (c)\n(B) (a)", "choices": ["(c)", "(a)"], "answer": "(a)",
    ...        "answer_type": "text", "precision": None, "metadata": {"task": "math word problem"}}
    >>> {key: mathvista(row)[key] for key in ("question", "answer", "category")}
    {'question': 'Hint: h\nQuestion: q', 'answer': 'B', 'category': 'MWP'}
    """
    question, _, listed = row["query"].strip().partition("\nChoices:\n")
    choices = row["choices"] or None
    shown = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, choices or []))
    if listed.split() != shown.split() or (choices and choices.count(row["answer"]) != 1):
        raise ValueError(f"choices {choices}, answer {row['answer']!r} and query {row['query']!r} do not fit together")
    kind = None if choices or row["answer_type"] == "text" else row["answer_type"]
    return {"id": row["pid"], "question": question, "choices": choices, "category": TASKS[row["metadata"]["task"]],
            "answer": LETTERS[choices.index(row["answer"])] if choices else row["answer"],
            **({"answer_type": kind} if kind else {}), **({"precision": int(row["precision"])} if kind == "float" else {})}


def m3cot(row: dict) -> dict:
    """M3CoT: the context, if there is one, stands before the question; the category is the domain."""
    context = (row["context"] or "").strip()
    return {"id": row["id"], "question": f"Context: {context}\n{row['question']}" if context else row["question"], "choices": row["choices"],
            "answer": row["answer"], "category": row["domain"]}


def mmstar_r(row: dict) -> dict | None:
    """MMStar-R: the options stand inside the question, so the answer is a bare letter; None for a perception question."""
    if "perception" in row["category"]:
        return None
    if row["category"] not in ("instance reasoning", "logical reasoning", "math", "science & technology"):
        raise ValueError(f"unknown category {row['category']!r}")
    return {"id": str(row["index"]), "question": row["question"], "answer": row["answer"], "choices": None, "answer_type": "letter", "category": row["category"]}


def mmbench_r(row: dict) -> dict | None:
    """MMBench-R: copies of a question with rotated choices share index % 1000000; None for a perception question."""
    if "perception" in row["l2-category"]:
        return None
    if row["l2-category"] not in ("attribute_reasoning", "relation_reasoning", "logic_reasoning"):
        raise ValueError(f"unknown l2-category {row['l2-category']!r}")
    hint, *choices = ("" if row.get(key) in (None, "nan", "NaN") else row[key].strip() for key in ("hint", *"ABCD"))
    if "" in choices[:sum(map(bool, choices))]:
        raise ValueError("an option is missing between two others")
    return {"id": row["index"], "question": f"Hint: {hint}\nQuestion: {row['question']}" if hint else row["question"], "choices": [c for c in choices if c],
            "answer": row["answer"], "category": row["l2-category"], "group": int(row["index"]) % 1000000}


def ai2d(row: dict) -> dict:
    """AI2D: the answer is the position of the right option, as a text; stored as a letter, for option texts may be letters."""
    return {"id": str(row["row"]), "question": row["question"], "choices": row["options"], "answer": LETTERS[int(row["answer"])]}


BENCHMARKS = {  # name: (loader, title, hub name and split, local files, image column, questions in the published set)
    "mathvista": (mathvista, "MathVista", ("AI4Math/MathVista", "testmini"), "*testmini*", "decoded_image", 1000),
    "m3cot": (m3cot, "M3CoT", ("LightChen2333/M3CoT", "test"), "*test*", "image", 2318),
    "mmstar_r": (mmstar_r, "MMStar-R", ("Lin-Chen/MMStar", "val"), "*mmstar*", "image", 1000),
    "mmbench_r": (mmbench_r, "MMBench-R", None, "*MMBench_DEV_EN_V11*", "image", None),
    "ai2d": (ai2d, "AI2D", ("lmms-lab/ai2d", "test"), "*test*", "image", 3088)}


def keyed_records(path: str) -> list[dict]:
    """The records of a JSON file {key: record, ...}, the form of MathVista's own testmini.json; none if it has another form."""
    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8")) if path.endswith(".json") else None
    except json.JSONDecodeError:  # JSON lines under another name
        return []
    return list(whole.values()) if isinstance(whole, dict) and all(isinstance(row, dict) for row in whole.values()) else []


def published_rows(name: str, folder: Path):
    """The published records of a benchmark, streamed: from the files in its folder, else from the hub; images stay undecoded."""
    from datasets import Features, Value, disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError
    disable_progress_bars()
    _, _, hub, pattern, _, _ = BENCHMARKS[name]
    files = [str(p) for p in sorted(folder.rglob(pattern)) if p.suffix in FORMATS]
    if len({Path(f).suffix for f in files}) > 1:
        raise InputError(f"{folder} holds {', '.join(files)}: keep one format")
    if not files and not hub:
        raise InputError(f"{folder} has no file {pattern}; put {MMBENCH} there or name its parent by --data_root")
    if files and (keyed := keyed_records(files[0])):
        return (yield from keyed)
    source = {"path": FORMATS[Path(files[0]).suffix], "data_files": files, "split": "train"} if files else dict(zip(("path", "split"), hub))
    if files and source["path"] == "csv":  # every cell is text: "2", "None" and "" must stay what they are
        with open(files[0], encoding="utf-8") as file:
            columns = file.readline().rstrip("\r\n").split("\t")
        source |= {"sep": "\t", "na_filter": False, "features": Features({column: Value("string") for column in columns})}
    try:
        yield from load_dataset(**source, streaming=True).decode(False)
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(f"{', '.join(files)} cannot be read" if files else f"{folder} has no file {pattern} (parquet, tsv, json or jsonl) and {hub[0]} cannot be "
                         f"reached ({(str(error) or type(error).__name__).splitlines()[0]}); put it there or name its parent by --data_root") from None


def save_image(cell, folder: Path) -> str:
    """Write an image cell {"bytes", "path"} once, named by its content; its path relative to the folder. A path, as in JSON files, stays as it is."""
    if isinstance(cell, str):
        return cell
    kind = Image.open(io.BytesIO(cell["bytes"])).format.lower()
    file = folder / "images" / f"{hashlib.sha256(cell['bytes']).hexdigest()[:20]}.{kind}"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.with_suffix(".part").write_bytes(cell["bytes"])
        file.with_suffix(".part").replace(file)
    return str(file.relative_to(folder))


def make_benchmark(name: str, folder: Path) -> Path:
    """Turn a benchmark's published records into our JSONL and image files; returns the path of <folder>/examples.jsonl.

    It is made anew at every start (seconds) while the published files are there. Raises InputError with the number of a
    record that is not as published.
    """
    out, (loader, _, _, pattern, column, _) = folder / "examples.jsonl", BENCHMARKS[name]
    if out.exists() and not any(p.suffix in FORMATS for p in folder.rglob(pattern)):
        return out  # made from the hub, or the published files have been put away
    folder.mkdir(parents=True, exist_ok=True)
    examples, images = [], {}  # MMBench's images by the index of their row
    for number, row in enumerate(published_rows(name, folder), 1):
        try:
            example, cell = loader({"row": number - 1, **row}), row.get(column) or row["image"]
            if name != "mmbench_r":
                image = save_image(cell, folder) if example else ""
            elif len(cell) > 64:
                image, images[row["index"]] = row["index"], save_image({"bytes": base64.b64decode(cell, validate=True)}, folder)
            else:
                image = cell  # the index of the row that holds it
            if example:
                examples.append({**example, "id": f"{name}-{example['id']}", "image": image, "source": name})
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, UnidentifiedImageError) as error:
            raise InputError(f"{name} record {number} is not as published ({type(error).__name__}: {error})") from None
    for example in examples if name == "mmbench_r" else ():
        if example["image"] not in images:
            raise InputError(f"{example['id']}: its image is said to be in row {example['image']}, which holds none")
        example["image"] = images[example["image"]]
    write_jsonl(out, examples)
    return out


# ---------------------------------------------------------------- figures


def prompt_figures(greedy: dict, samples: list[dict]) -> dict[str, float]:
    """Every figure of one prompt: 0 or 1, or a share, of its greedy response and its K samples."""
    answers, correct, rewards = ([row[key] for row in samples] for key in ("answer", "correct", "reward"))
    right = {row["answer"]: row["correct"] for row in reversed(samples)}  # whether an answer is right, by the first sample that gives it
    return {"greedy": greedy["correct"], "sample": sum(correct) / len(correct), "pass_at_k": pass_at_k(len(correct), sum(correct), len(correct)),
            "reward_pass_at_2": reward_pass_at_k(rewards, correct, 2), "majority": right.get(vote(answers, [1.0] * len(answers)), False),
            "best_of_n": correct[top_k(rewards, 1)[0]], "weighted": right.get(vote(answers, [max(r, 0.0) for r in rewards]), False),
            "unparsable": sum(a is None for a in answers) / len(answers)}


def interval(values: np.ndarray, resamples: int, seed: int = 0) -> dict:
    """Mean of per-prompt values (n,), their count, and the 95 % bootstrap interval of the mean."""
    pick = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))  # (R, n)
    low, high = np.percentile(values[pick].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def show(r: dict, sign: str = "", scale: float = 100) -> str:
    """An interval as text, in percent unless scaled otherwise.

    >>> show({"mean": 0.5, "low": 0.25, "high": 0.75}), show({"mean": 2.0, "low": -1.0, "high": 5.0}, "+", scale=1)
    ('50.0 [25.0, 75.0]', '+2.0 [-1.0, +5.0]')
    """
    return f"{scale * r['mean']:{sign}.1f} [{scale * r['low']:{sign}.1f}, {scale * r['high']:{sign}.1f}]"


def verifier(prompts: list[list[dict]], args: Args) -> dict:
    """The PRM as a verifier: {n: {majority, best_of_n, weighted: interval}} of the first n = 1, 2, 4, ..., K samples (paper, figure 2)."""
    sizes = sorted({2 ** i for i in range(args.samples.bit_length()) if 2 ** i <= args.samples} | {args.samples})
    table = {n: [prompt_figures(p[0], p[1:n + 1]) for p in prompts] for n in sizes}
    return {n: {f: interval(np.array([row[f] for row in rows], float), args.resamples) for f in ("majority", "best_of_n", "weighted")} for n, rows in table.items()}


def reranker(prompts: list[list[dict]], examples: dict, checker, args: Args) -> dict:
    """The PRM as a reranker of right responses: steps and share of right chains in its Top-2 against the rest (paper, figure 2).

    Only prompts with more than two distinct right samples have a rest; intervals are over those prompts, and paired for "difference".
    """
    table: dict = {name: {"steps": [], "right_chain": []} for name in ("Top-2", "rest")}
    for p in prompts:
        right = distinct([row for row in p[1:] if row["correct"]])
        if len(right) <= 2:
            continue
        best = top_k([row["reward"] for row in right], 2)
        parts = {"Top-2": [right[i] for i in best], "rest": [row for i, row in enumerate(right) if i not in best]}
        judged = {name: [ok for row in part if (ok := checker(row["response"], examples[row["id"]])) is not None] for name, part in parts.items()}
        for name, part in parts.items():
            table[name]["steps"].append(sum(len(row["step_scores"]) for row in part) / len(part))
            if all(judged.values()):
                table[name]["right_chain"].append(sum(judged[name]) / len(judged[name]))
    arrays = {name: {f: np.array(v, float) for f, v in row.items() if v} for name, row in table.items()}
    arrays["difference"] = {f: v - arrays["rest"][f] for f, v in arrays["Top-2"].items()}
    return {name: {f: interval(v, args.resamples) for f, v in row.items()} for name, row in arrays.items()}


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
            cells = [show(p[figure]) for p in policies.values()]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        gains = [p.get("greedy_gain") for p in policies.values()]
        cells = [f"{show(g, '+')} over {g['over']}" if g else "" for g in gains]
        lines += ["| greedy gain, paired | " + " | ".join(cells) + " |", ""]
    return "\n".join(lines)


def prm_markdown(report: dict) -> str:
    """The PRM as verifier and as reranker, as two tables."""
    lines = ["## PRM on samples of the policy that evolving starts from, test\n", "| n | majority vote | PRM-weighted vote | PRM best-of-n |", "|---|---|---|---|"]
    lines += [f"| {n} | {show(row['majority'])} | {show(row['weighted'])} | {show(row['best_of_n'])} |" for n, row in report["verifier"].items()]
    lines += ["", "| right responses | steps | right chains, % | prompts |", "|---|---|---|---|"]
    lines += [f"| {name} | {show(row['steps'], scale=1)} | {show(row['right_chain']) if 'right_chain' in row else '-'} | {row['steps']['n']} |"
              for name, row in report["reranker"].items() if "steps" in row]
    return "\n".join([*lines, ""])


def draw_dynamics(metrics: list[dict], searches: list[dict], path: Path, k: int) -> None:
    """The paper's figures: greedy accuracy, Pass@K, Reward-Pass@2 and T over iterations; Pass@K at fixed temperatures, from the searches."""
    metrics = [row for row in metrics if "pass_at_k" in row]  # the iterations that were looked at
    t = [row["iteration"] for row in metrics]
    figure = Figure(figsize=(11 if searches else 7, 4.2), layout="constrained")
    left, *rest = figure.subplots(1, 2 if searches else 1, squeeze=False)[0]
    for key, label, style in (("pass_at_k", f"Pass@{k}", "s-"), ("reward_pass_at_2", "Reward-Pass@2", "^-"), ("greedy_accuracy", "greedy accuracy", "o-")):
        left.plot(t, [100 * row[key] for row in metrics], style, label=label)
    left.set(xlabel="iteration (0 is the start policy)", ylabel="validation prompts, %", xticks=t, title="Dynamics of self-evolving")
    right = left.twinx()
    right.step(t, [row["temperature"] for row in metrics], "k:", where="mid", label="temperature T (right axis)")
    right.set(ylabel="temperature", ylim=(0, 1.7))
    handles = [line for axis in (left, right) for line in axis.get_lines()]
    left.legend(handles, [line.get_label() for line in handles], loc="lower left", bbox_to_anchor=(0, -0.42), ncols=2, frameon=False)
    for axis in rest:
        grid = [point["temperature"] for point in searches[0]["curves"]["pass_at_k"]]
        for i in sorted({round(j * (len(grid) - 1) / 4) for j in range(5)}):  # five temperatures from end to end
            axis.plot([s["iteration"] for s in searches], [100 * s["curves"]["pass_at_k"][i]["pass_at_k"] for s in searches], "o-", label=f"T = {grid[i]}")
        axis.set(xlabel="iteration", ylabel="prompts of the search, %", xticks=[s["iteration"] for s in searches], title=f"Pass@{k} at fixed temperatures")
        axis.legend(frameon=False)
    for axis in (left, *rest):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def draw_prm(report: dict, path: Path) -> None:
    """The paper's figure 2 in our terms: votes and best-of-n over n; steps and right chains of the Top-2 against the rest."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for key, label, style in (("majority", "majority vote", "o-"), ("weighted", "PRM-weighted vote", "^-"), ("best_of_n", "PRM best-of-n", "s-")):
        n, rows = [int(n) for n in report["verifier"]], [row[key] for row in report["verifier"].values()]
        line = left.plot(n, [100 * r["mean"] for r in rows], style, label=label)[0]
        left.fill_between(n, [100 * r["low"] for r in rows], [100 * r["high"] for r in rows], alpha=0.12, color=line.get_color())
    left.set(xscale="log", xlabel="n samples", ylabel="test prompts, %", xticks=n, xticklabels=n, title="PRM as a verifier (start policy)")
    left.minorticks_off()
    left.legend(frameon=False)
    for axis, key, scale, title in ((middle, "steps", 1, "steps of right responses"), (right, "right_chain", 100, "right chains, %")):
        bars = {name: row[key] for name, row in report["reranker"].items() if key in row and name != "difference"}
        axis.bar(list(bars), [scale * b["mean"] for b in bars.values()], color=["C2", "0.7"][:len(bars)], width=0.6,
                 yerr=[[scale * (b["mean"] - b["low"]) for b in bars.values()], [scale * (b["high"] - b["mean"]) for b in bars.values()]], capsize=4)
        axis.set_title(title)
    figure.savefig(path, dpi=150)


def origin_of(folder: Path) -> dict:
    """{"flags", "inputs"} of a run of stage 03; raises InputError where there is none."""
    if not (folder / "run.json").exists():
        raise InputError(f"{folder} holds no run; run 03_self_evolve.py first")
    return json.loads((folder / "run.json").read_text())


def policies_of(runs: Path, flags: dict, base: str) -> dict[str, Path]:
    """{name: checkpoint} of the policies to judge, given the flags of stage 03: the base, what 03 began with and what became of it.

    >>> flags = M_STAR | {"policy": "runs/a/01_warmup/model", "method": "rest_em"}
    >>> {name: str(path) for name, path in policies_of(Path("runs/b"), flags, "base").items()}
    {'base': 'base', 'warm-up': 'runs/a/01_warmup/model', 'evolved': 'runs/b/03_self_evolve/model'}
    """
    start = Path(flags["policy"] or runs / "01_warmup" / "model")
    became = "M-STaR" if all(flags[key] == value for key, value in M_STAR.items()) else "evolved"
    started = {} if start == Path(base) else {"warm-up" if start.parent.name == "01_warmup" else "start": start}
    return {"base": Path(base), **started, became: runs / "03_self_evolve" / "model"}


def compare_runs(runs: list[str], path: Path) -> None:
    """The dynamics of several runs in one figure, each drawn from its own metrics.jsonl."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes, read = figure.subplots(2, 2).flat, []
    for folder in (Path(run) / "03_self_evolve" for run in runs):
        flags = origin_of(folder)["flags"]
        read.append(("/".join(folder.parts[-3:-1]), read_jsonl(folder / "metrics.jsonl"), 1 if flags["method"] == "sft" else flags["passes"] / flags["interval"]))
    for axis, (key, title, scale) in zip(axes, (("greedy_accuracy", "greedy accuracy, %", 100), ("pass_at_k", "Pass@K at the run's temperature, %", 100),
                                                ("reward_pass_at_2", "Reward-Pass@2, %", 100), ("temperature", "temperature T", 1))):
        for label, rows, iterations in read:
            looked = [row for row in rows if key in row]
            axis.plot([row["iteration"] / iterations for row in looked], [scale * row[key] for row in looked], "o-", ms=3, label=label)
        axis.set(title=title, xlabel="share of training")
        axis.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def looks_of(folder: Path) -> dict[str, list[dict]]:
    """{prompt: [its figures at the first look at the dynamics, at the last]} of a run, on validation; empty if it looked once only."""
    iterations, table = [row["iteration"] for row in read_jsonl(folder / "metrics.jsonl") if "pass_at_k" in row], {}
    for t in (iterations[0], iterations[-1]) if len(iterations) > 1 else ():
        greedy, samples = (grouped(read_jsonl(folder / f"iter_{t:02d}" / name)) for name in ("val_greedy.jsonl", "val_samples.jsonl"))
        for prompt, rows in samples.items():
            table.setdefault(prompt, []).append(prompt_figures(greedy[prompt][0], rows))
    return table


def kinds_of_runs(runs: list[str]) -> tuple[list[dict], list[str]]:
    """(kinds, runs that looked once only, so that they show no change); a kind: {"name", "flags", "seeds": {seed: looks}, "inputs"}.

    looks is an array (prompts, first and last look, figures). Runs of one kind have the same flags; of two with the same seed,
    which other models or data were given, the second begins another kind. Raises InputError if runs cannot be compared:
    other prompts, another K, or one run twice.
    """
    kinds, once, prompts, samples = [], [], None, None
    for run in runs:
        origin, looks = origin_of(Path(run) / "03_self_evolve"), looks_of(Path(run) / "03_self_evolve")
        if not looks:
            once.append(run)
            continue
        flags, seed = {k: v for k, v in origin["flags"].items() if k not in ("seed", "policy", "prm", "validate_every")}, origin["flags"]["seed"]
        prompts, samples = prompts or list(looks), samples or flags["samples"]
        if list(looks) != prompts or flags["samples"] != samples:
            raise InputError(f"{run} looked at other prompts, or with another K, than the runs before it; compare runs with the same --val and --samples")
        alike = [kind for kind in kinds if kind["flags"] == flags]
        if any(kind["inputs"].get(seed) == origin["inputs"] for kind in alike):
            raise InputError(f"{run} has the flags, the seed and the inputs of another run; give one of them")
        kind = next((kind for kind in alike if seed not in kind["seeds"]), None)
        if kind is None:
            kinds.append(kind := {"name": run, "flags": flags, "seeds": {}, "inputs": {}})
        kind["seeds"][seed] = np.array([[[float(look[name]) for name in LOOKED_AT] for look in pair] for pair in looks.values()])
        kind["inputs"][seed] = origin["inputs"]
    return kinds, once


def dynamics_table(runs: list[str], args: Args) -> str:
    """What training changed on validation, from the first look to the last, for every kind of runs, and how far that differs from the first kind.

    Runs of one kind differ in nothing but their seed (and what that made: warm-up, PRM); intervals are over seeds and prompts,
    between kinds paired over the seeds that both have.
    """
    kinds, once = kinds_of_runs(runs)
    plural = lambda n: f"{n} seed{'s' * (n > 1)}"
    change = lambda kind, seeds: np.stack([kind["seeds"][seed][:, 1] - kind["seeds"][seed][:, 0] for seed in seeds])  # (seeds, prompts, figures)
    lines = [f"{run} looked at the dynamics once only (--validate_every): it is in no table" for run in once]
    for kind in kinds:
        looks, against = np.stack(list(kind["seeds"].values())), ""  # (seeds, prompts, 2, figures)
        both = [seed for seed in kinds[0]["seeds"] if seed in kind["seeds"]]
        if kind is not kinds[0] and both:
            against = f" less that of {kinds[0]['name']}, {plural(len(both))} |"
        lines += ["", f"| {kind['name']}, {plural(len(looks))}, validation | first look | last look | change |" + against, "|---|---|---|---|" + "---|" * bool(against)]
        for k, name in enumerate(LOOKED_AT):
            cells = [f"{100 * looks[:, :, when, k].mean():.1f}" for when in (0, 1)] + [show(crossed_interval(change(kind, kind["seeds"])[..., k], args.resamples), "+")]
            if against:
                cells.append(show(crossed_interval((change(kind, both) - change(kinds[0], both))[..., k], args.resamples), "+"))
            lines.append(f"| {FIGURES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def crossed_interval(values: np.ndarray, resamples: int, seed: int = 0) -> dict:
    """Mean of verdicts (seeds, prompts) and its 95 % bootstrap interval over seeds and prompts: every seed answers the same prompts.

    The part between seeds is Student's t with s - 1 degrees of freedom, the part between prompts a bootstrap; what seeds and
    prompts do together is in both, so the interval is rather too wide. With one seed it is over prompts only.

    >>> {k: round(v, 2) for k, v in crossed_interval(np.array([[1.0, 0.0], [1.0, 0.0]]), 1000).items()}
    {'mean': 0.5, 'low': 0.0, 'high': 1.0, 'seeds': 2, 'n': 2}
    """
    rng, (s, n) = np.random.default_rng(seed), values.shape
    by_seed, by_prompt, mean = values.mean(1), values.mean(0), values.mean()
    between = by_seed.std(ddof=1) / s ** 0.5 * rng.permutation(student.ppf((np.arange(resamples) + 0.5) / resamples, s - 1)) if s > 1 else np.zeros(resamples)
    means = between + by_prompt[rng.integers(n, size=(resamples, n))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(mean), "low": float(low), "high": float(high), "seeds": s, "n": n}


def study_table(rows: list[dict], args: Args) -> str:
    """The lines of tests/study.py as a table beside the paper's figures, and the paired differences of args.against.

    Raises InputError if the lines are not comparable: other data, shared stages or, within a row, flags.
    """
    names = list(dict.fromkeys(row["name"] for row in rows))
    of = {name: {row["seed"]: row for row in rows if row["name"] == name} for name in names}
    if len({json.dumps([row["data"], row["shared_flags"]], sort_keys=True) for row in rows}) > 1:
        raise InputError(f"{args.study} holds rows made with different data or shared flags; keep them in different files")
    if mixed := [name for name in names if len({row["flags"] for row in of[name].values()}) > 1]:
        raise InputError(f"{args.study}: the seeds of {mixed[0]!r} were made with different flags")
    stack = lambda name, seeds, split: np.array([[int(v) for v in of[name][s]["verdicts"][split]] for s in seeds], float)  # (seeds, prompts)
    share = lambda r: show({"mean": r["mean"], "low": max(r["low"], 0.0), "high": min(r["high"], 1.0)})
    spent = lambda name, key: round(sum(row.get(key, 0) for row in of[name].values()) / len(of[name]))

    def steps_of(name):
        """Optimizer steps of a row as text, with those of a refreshed PRM."""
        return f"{spent(name, 'steps')} + {spent(name, 'extra_steps')}" if spent(name, "extra_steps") else f"{spent(name, 'steps')}"

    lines = ["| | test (ID) | ood | seeds | paper ID / OOD | samples + extra | steps + extra | flags of 03_self_evolve.py |", "|---|---|---|---|---|---|---|---|"]
    for name in names:
        seeds, first = sorted(of[name]), next(iter(of[name].values()))
        cells = [share(crossed_interval(stack(name, seeds, split), args.resamples)) for split in ("test", "ood")]
        paper = f"{first['paper_id']} / {first['paper_ood']}" if first["paper_id"] else "-"
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {len(seeds)} | {paper} | {spent(name, 'samples')} + {spent(name, 'extra_samples')} | {steps_of(name)} | `{first['flags']}` |")
    lines += ["", "| paired difference | test (ID) | ood | seeds |", "|---|---|---|---|"]
    if wrong := [pair for pair in args.against if pair.count("/") != 1 or args.against != Args().against and not set(pair.split("/")) <= set(names)]:
        raise InputError(f"--against takes pairs of rows A/B of {args.study}, found {wrong}")
    for a, b in (pair.split("/") for pair in args.against):
        if seeds := sorted(set(of.get(a, ())) & set(of.get(b, ()))):
            cells = [show(crossed_interval(stack(a, seeds, split) - stack(b, seeds, split), args.resamples), "+") for split in ("test", "ood")]
            lines.append(f"| {a} - {b} | {cells[0]} | {cells[1]} | {len(seeds)} |")
    return "\n".join(lines)


def predict(path: Path, paths: dict, splits: dict, per_prompt: int, answer, args: Args, label: str) -> list[dict]:
    """Every policy on every prompt of every split, as rows of a JSONL file; answer(policy, examples) gives per_prompt rows per example, in order."""
    loaded: dict = {}

    def produce(chunk):
        """Rows of a chunk of (split, policy, prompt)."""
        rows = []
        for (split, name), group in groupby(chunk, key=lambda item: item[:2]):
            if name not in loaded:
                loaded.clear()  # one policy at a time
                loaded[name] = load_policy(paths[name], args)
            examples = [example for _, _, example in group]
            rows += [{"split": split, "policy": name, "gold": examples[k // per_prompt]["answer"], **row} for k, row in enumerate(answer(loaded[name], examples))]
        return rows

    items = [(split, name, example) for name in paths for split, examples in splits.items() for example in examples]
    return append_chunks(path, items, per_prompt, args.chunk, produce, label)


def benchmark_figures(rows: list[dict], by_id: dict, resamples: int = 2000) -> dict:
    """Figures of one policy on one benchmark: score, plain score, unparsable share, and the score by category.

    Rows of one "group" are copies of a question: it is right if all are; plain looks at the copy whose number is the
    group's. macro is the mean over categories, micro that over questions.

    >>> examples = {f"m-{k}": {"group": k % 10, "category": "ab"[k % 10 - 1]} for k in (1, 11, 2)}
    >>> got = benchmark_figures([{"id": k, "correct": k != "m-11", "answer": "A"} for k in examples], examples)
    >>> got["score"]["mean"], got["plain"]["mean"], {name: row["mean"] for name, row in got["categories"].items()}
    (0.5, 1.0, {'a': 0.0, 'b': 1.0})
    """
    questions: dict = {}
    for row in rows:
        questions.setdefault(by_id[row["id"]].get("group", row["id"]), []).append(row)
    right = {key: float(all(row["correct"] for row in copies)) for key, copies in questions.items()}
    plain = [float(next((row for row in copies if row["id"].endswith(f"-{key}")), copies[0])["correct"]) for key, copies in questions.items()]
    of: dict = {}
    for key, copies in questions.items():
        of.setdefault(by_id[copies[0]["id"]].get("category"), []).append(right[key])
    figures = {"score": interval(np.array(list(right.values())), resamples), "plain": interval(np.array(plain), resamples),
               "unparsable": interval(np.array([float(row["answer"] is None) for row in rows]), resamples)}
    if None not in of:
        figures |= {"categories": {name: {"mean": sum(v) / len(v), "n": len(v)} for name, v in sorted(of.items())},
                    "macro": sum(sum(v) / len(v) for v in of.values()) / len(of), "micro": figures["score"]["mean"]}
    return figures


def benchmark_tables(report: dict) -> str:
    """{benchmark: {policy: figures}} as the paper's Table 4, then one table per benchmark."""
    def line(label, cells):
        """A row of a table: texts as they are, shares in percent, a dash where there is none."""
        return "| " + " | ".join([label, *("-" if x is None else x if isinstance(x, str) else f"{100 * x:.1f}" for x in cells)]) + " |"

    policies = list(next(iter(report.values())))
    lines = ["## Benchmarks (the paper's Table 4)\n", "Greedy accuracy, percent; the average needs all five.\n",
             line("", [*(title for _, title, *_ in BENCHMARKS.values()), "average"]), "|---|" + "---|" * 6]
    for policy in policies:
        scores = [report[name][policy]["score"]["mean"] if name in report else None for name in BENCHMARKS]
        lines.append(line(policy, [*scores, None if None in scores else sum(scores) / len(scores)]))
    for name, of in report.items():
        first, title, published = of[policies[0]], BENCHMARKS[name][1], BENCHMARKS[name][5]
        found, asked = first["score"]["n"], first["unparsable"]["n"]
        lines += [f"\n### {title}: {found} questions" + f", asked {asked} times" * (asked != found) + f" of the {published} published" * (published not in (None, found)) + "\n",
                  line("", policies), "|---|" + "---|" * len(policies)]
        rows = {"all copies right": "score", "plain: base copy right": "plain"} if asked != found else {"accuracy": "score"}
        for label, key in {**rows, "unparsable share": "unparsable"}.items():
            lines.append(line(label, [show(p[key]) for p in of.values()]))
        lines += [line(f"{category} ({row['n']})", [p["categories"][category]["mean"] for p in of.values()]) for category, row in first.get("categories", {}).items()]
        if "macro" in first:
            lines += [line("macro: mean of categories", [p["macro"] for p in of.values()]), line("micro: mean of questions", [p["micro"] for p in of.values()])]
    return "\n".join(lines) + "\n"


def settings(args: Args) -> str:
    """What the figures depend on besides weights and data: prompt, decoding, versions."""
    return (f"\n## Settings\n\nPrompt: the processor's chat template around one user turn, the image and then\n\n```\n<question>\nChoices:\n(A) <choice>\n(B) ...\n"
            f"{args.instruction}\n```\n\n(without the lines of choices where there are none). Decoding: greedy for accuracy, temperature {args.temperature} with K = {args.samples} "
            f"samples for the rest, at most {args.max_new_tokens} new tokens; a response cut there is wrong. Seed {args.seed}. "
            f"Versions: torch {torch.__version__}, transformers {transformers.__version__}.\n")


def main(args: Args) -> None:
    """Sample every policy on every split, judge, tabulate, draw."""
    if args.study:
        return print(study_table(read_jsonl(args.study), args))
    if len(args.runs) > 1:
        compare_runs(args.runs, Path(args.runs[0]) / "compare.png")
        print(f"wrote {args.runs[0]}/compare.png")
        return print(dynamics_table(args.runs, args))
    args.runs = args.runs[0]
    runs = Path(args.runs)
    evolving, nothing_yet = runs / "03_self_evolve", M_STAR | {"policy": "", "prm": "", "aggregate": args.aggregate}
    trained = origin_of(evolving)["flags"] if (evolving / "model").exists() or (evolving / "run.json").exists() else nothing_yet  # open_run says what to run first
    paths, reward_model = policies_of(runs, trained, args.model), Path(trained["prm"] or runs / "02_train_prm" / "model")
    start, became = list(paths)[-2:]
    if unknown := set(args.benchmarks) - set(BENCHMARKS):
        raise InputError(f"--benchmarks knows {', '.join(BENCHMARKS)}, not {', '.join(sorted(unknown))}")
    benchmarks = {name: make_benchmark(name, Path(args.data_root) / name) for name in args.benchmarks}
    if trained["aggregate"] != args.aggregate:
        raise InputError(f"stage 03 selected with --aggregate {trained['aggregate']}, so its policy is judged with that: give the same flag here")
    out = open_run(args, "04_eval", {"test": args.test, "ood": args.ood, "model": args.model, "warm-up": paths[start], "M-STaR": paths[became],
                                     "prm": reward_model, **benchmarks})
    if (out / "report.json").exists():
        return print((out / "report.md").read_text())
    splits, metrics, searches = {"test": load_examples(args.test), "ood": load_examples(args.ood)}, read_jsonl(evolving / "metrics.jsonl"), evolving / "temperature.jsonl"
    prm, checker = load_prm(reward_model, args), load_checker(args.chain_checker)
    asked = {name: load_examples(path) for name, path in benchmarks.items()}
    check_longest_prompts(prm, sum([*splits.values(), *asked.values()], []), args)

    def greedy_and_samples(policy, examples):
        """Per prompt its greedy response and then its K samples, as JSON rows."""
        greedy = sample_rows(policy, examples, 1, 0.0, "eval", 0, args, prm)
        samples = sample_rows(policy, examples, args.samples, args.temperature, "eval", 0, args, prm)
        return [row for i, first in enumerate(greedy) for row in (first, *samples[i * args.samples:(i + 1) * args.samples])]

    rows = predict(out / "predictions.jsonl", paths, splits, 1 + args.samples, greedy_and_samples, args, "04 eval")
    report = summarize(sorted(rows, key=lambda row: (list(splits).index(row["split"]), list(paths).index(row["policy"]))), args)
    first, by_id = list(grouped([r for r in rows if (r["split"], r["policy"]) == ("test", start)]).values()), by_id_of(splits["test"])
    prm_report = {"verifier": verifier(first, args), "reranker": reranker(first, by_id, checker, args)}
    text = markdown(report, args) + prm_markdown(prm_report)
    if asked:
        judged = predict(out / "benchmarks.jsonl", paths, asked, 1, lambda policy, examples: sample_rows(policy, examples, 1, 0.0, "eval", 0, args), args, "04 benchmarks")
        report["benchmarks"] = {split: {name: benchmark_figures([r for r in judged if (r["split"], r["policy"]) == (split, name)],
                                                               by_id_of(examples), args.resamples) for name in paths}
                                for split, examples in asked.items()}
        text += "\n" + benchmark_tables(report["benchmarks"])
    text += settings(args)
    write_atomic(out / "report.md", text)
    draw_dynamics(metrics, read_jsonl(searches) if searches.exists() else [], out / "dynamics.png", trained["samples"])
    draw_prm(prm_report, out / "prm.png")
    write_json(out / "report.json", report | {"prm": prm_report})
    print(text)


if __name__ == "__main__":
    run_stage(Args, main)
