"""Stage 04: base, warm-up and evolved policy side by side (paper, sections 5 and 6).

Reads   data/toy/{test,ood}.jsonl, data/toy/base/, runs/toy/01_warmup/model/,
        runs/toy/02_train_prm/model/, runs/toy/03_self_evolve/
        data/<benchmark>/ for --benchmarks: the published files, images beside them, or the hub
Writes  runs/toy/04_eval/predictions/, benchmarks/  responses of every policy, checked and scored
                        report.json    every figure with its count and interval; written last
                        report.md      the same as tables
                        dynamics.png   accuracy, Pass@K, Reward-Pass@2, temperature over iterations

Intervals are 95 % bootstrap intervals over prompts; gains are paired: the same prompts, resampled
together. Start policy and PRM are those of 03's run.json. tests/study.py compares several runs.

Benchmarks are asked in our one prompt form: question, lettered choices, --instruction, with the
dataset's own hint or context before the question. MMStar-R and MMBench-R leave out the perception
categories, as in the paper. MMBench asks a question several times with its choices rotated: it
counts if all copies are right; "plain" looks at the base copy. VisualProcessBench is for the PRM:
its verdicts on the steps of other models' responses against human ones.

    python 04_eval.py    (for benchmarks on a real model see the README's GPU section)
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd  # comes with datasets, as does pyarrow
import torch
import transformers
from matplotlib.figure import Figure
from pyarrow.parquet import ParquetFile

from common import (
    LETTERS,
    InputError,
    Sampler,
    ScoringArgs,
    alone,
    by_id_of,
    by_prompt,
    distinct,
    encode_steps,
    fitting,
    flag,
    is_made,
    is_rule,
    is_there,
    load_checker,
    load_examples,
    load_prm,
    once,
    open_run,
    problem_of,
    rank,
    read_image,
    read_json,
    read_jsonl,
    reward_pass_at_k,
    run_stage,
    score_steps,
    seed_of,
    stream_jsonl,
    top_k,
    user_text,
    vote,
    wait_for_ranks,
    write_atomic,
    write_chunks,
    write_json,
    write_jsonl,
)

M_STAR = {  # flags of stage 03 that make a run the paper's method
    "method": "continuous",
    "select": "top_k",
    "k": 2,
    "unlabeled": "none",
    "temperature": "adaptive",
    "objective": "reward_pass_at_2",
    "interval": 0.25,
    "aggregate": "min",
    "prm_refresh": 0,
}


@dataclass
class Args(ScoringArgs):
    """Flags of stage 04."""

    test: str = flag("", "in-domain test prompts; empty: test.jsonl beside the data of 03")
    ood: str = flag("", "out-of-domain test prompts; empty: ood.jsonl beside the data of 03")
    benchmarks: list[str] = flag(
        [], "also mathvista, m3cot, mmstar_r, mmbench_r, ai2d, and visualprocessbench for the PRM"
    )
    data_root: str = flag("data", "folder with a sub-folder per benchmark: its published files")
    model: str = flag("data/toy/base", "base model")
    samples: int = flag(8, "K = N: samples per prompt")
    temperature: float = flag(1.0, "sampling temperature")
    resamples: int = flag(2000, "bootstrap resamples")
    chain_checker: str = flag("tests/toy.py:judge", "FILE:FUNCTION that judges a right chain")

    @property
    def asked(self) -> list[str]:
        """The benchmarks that the policies are asked."""
        return [name for name in self.benchmarks if name != STEPS]


# ---- benchmarks: published records to our examples

MMBENCH = "opencompass.openxlab.space/utils/benchmarks/MMBench/MMBench_DEV_EN_V11.tsv"
NOT_AS_PUBLISHED = (LookupError, TypeError, ValueError, AttributeError, RecursionError)
STEPS = "visualprocessbench"  # a test of the PRM; the others ask the policies


def mathvista(row):
    r"""MathVista: the question is its own `query` up to the choices, so our prompt is its prompt.

    Of two equal choices (record 781) the first is the answer; `read_choice` takes either for it.

    >>> row = {"pid": "168", "query": "Hint: h\nQuestion: q\nChoices:\n(A) (c)\n(B) (a)",
    ...        "choices": ["(c)", "(a)"], "answer": "(a)", "answer_type": "text",
    ...        "precision": None, "metadata": {"task": "math word problem"}}
    >>> {key: mathvista(row)[key] for key in ("question", "answer", "category")}
    {'question': 'Hint: h\nQuestion: q', 'answer': 'B', 'category': 'MWP'}
    """
    if not row["query"]:
        raise ValueError("no query: the authors' query.json must lie beside their testmini.json")
    choices, answer, kind = row["choices"] or None, row["answer"], row["answer_type"]
    question = row["query"].strip().partition("\nChoices:\n")[0]
    example = {"id": row["pid"], "question": question, "choices": choices, "answer": answer}
    if user_text(example, "").split() != row["query"].split():
        raise ValueError(f"choices {choices} and query do not fit together")
    if choices:
        example["answer"] = LETTERS[choices.index(answer)]
    elif kind != "text":
        example["answer_type"] = kind
    if kind == "float":
        example["precision"] = int(row["precision"])
    initials = [word[0].upper() for word in row["metadata"]["task"].split()]  # FQA, GPS, ...
    return example | {"category": "".join(initials)}


def m3cot(row):
    """M3CoT: a context, if there is one, stands before the question; the domain is a category."""
    example = {key: row[key] for key in ("id", "question", "choices", "answer")}
    if context := (row["context"] or "").strip():
        example["question"] = f"Context: {context}\n{row['question']}"
    return example | {"category": row["domain"]}


def mmstar_r(row) -> dict | None:
    """MMStar-R: the options stand in the question, the answer is a letter; None for perception."""
    if "perception" in row["category"]:
        return None
    example = {key: row[key] for key in ("question", "answer", "category")}
    return example | {"id": str(row["index"]), "choices": None, "answer_type": "letter"}


def mmbench_r(row) -> dict | None:
    """MMBench-R: copies of a question share index % 1000000; None for a perception question."""
    if "perception" in row["l2-category"]:
        return None
    cells = [row[key].strip() for key in ("hint", "A", "B", "C", "D")]
    hint, *options = ["" if cell.lower() == "nan" else cell for cell in cells]
    choices = [text for text in options if text]
    if options[: len(choices)] != choices:
        raise ValueError("an option is missing between two others")
    example = {"id": row["index"], "question": row["question"], "answer": row["answer"]}
    if hint:
        example["question"] = f"Hint: {hint}\nQuestion: {row['question']}"
    group = int(row["index"]) % 1000000
    return example | {"choices": choices, "category": row["l2-category"], "group": group}


def ai2d(row):
    """AI2D: the answer is a position; it is stored as a letter, for option texts may be letters."""
    example = {"id": str(row["row"]), "question": row["question"], "choices": row["options"]}
    return example | {"answer": LETTERS[int(row["answer"])]}


def visualprocessbench(row):
    """VisualProcessBench: a response's steps and human labels: 1 right, 0 neutral, -1 wrong."""
    steps, labels = row["response"]["steps"], row["response"]["process_correctness"]
    texts = set(map(type, steps)) == {str}
    if not texts or len(steps) != len(labels) or not {1, 0, -1}.issuperset(labels):
        raise ValueError("steps and labels do not fit together")
    example = {"id": str(row["row"]), "category": row["data_source"], "choices": None}
    example["question"] = row["question"].replace("<image>", "").strip()
    return example | {"answer": "never asked", "steps": steps, "labels": labels}


class Benchmark(NamedTuple):
    """Where a benchmark is published, and what makes an example of a record."""

    load: Callable
    title: str
    source: str  # its name on the hub, or where to download it
    split: str  # of the hub; empty: it is not there, or without its images
    files: str  # pattern of its published files


BENCHMARKS = {
    "mathvista": Benchmark(mathvista, "MathVista", "AI4Math/MathVista", "testmini", "testmini*"),
    "m3cot": Benchmark(m3cot, "M3CoT", "LightChen2333/M3CoT", "test", "*test*"),
    "mmstar_r": Benchmark(mmstar_r, "MMStar-R", "Lin-Chen/MMStar", "val", "*mmstar*"),
    "mmbench_r": Benchmark(mmbench_r, "MMBench-R", MMBENCH, "", "*MMBench_DEV_EN_V11*"),
    "ai2d": Benchmark(ai2d, "AI2D", "lmms-lab/ai2d", "test", "*test*"),
    STEPS: Benchmark(
        visualprocessbench, "VisualProcessBench", "OpenGVLab/VisualProcessBench", "", "test*"
    ),
}


def published_files(name, folder):
    """The published files of a benchmark in its folder, those of the first format found."""
    for suffix in (".parquet", ".tsv", ".jsonl", ".json"):
        if files := sorted(folder.rglob(BENCHMARKS[name].files + suffix)):
            return files
    return []


def records(path):
    """The records of a published file; those of JSON are a list, or {key: record}.

    The latter is how MathVista's authors keep them, with the queries by key in query.json.
    """
    if path.suffix == ".parquet":
        batches = ParquetFile(path).iter_batches(64)
        return (row for batch in batches for row in batch.to_pylist())
    if path.suffix == ".tsv":  # every cell is a text: "2", "None" and "" stay what they are
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        holders = table.drop_duplicates("index").set_index("index")["image"]
        table["image"] = table["image"].map(holders).fillna(table["image"])  # of another row
        return table.to_dict("records")
    if path.suffix == ".jsonl":
        return stream_jsonl(path)
    whole = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(whole, list):
        return whole
    beside = path.with_name("query.json")
    queries = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    return ({"query": queries.get(key), **row} for key, row in whole.items())


def published_rows(name, folder):
    """(folder of its file, record) of every published record; InputError if none can be read."""
    from datasets import load_dataset

    files, benchmark = published_files(name, folder), BENCHMARKS[name]
    try:
        for path in files:
            for row in records(path):
                yield path.parent, row
        if not files:
            hub = load_dataset(benchmark.source, split=benchmark.split, streaming=True)
            for row in hub.decode(False):  # images stay {"bytes", "path"}
                yield folder, row
    except (OSError, *NOT_AS_PUBLISHED) as error:
        source = ", ".join(map(str, files)) or benchmark.source
        raise InputError(
            f"{source} cannot be read ({error!r}); put {benchmark.files} "
            f"(parquet, tsv, jsonl or json) into {folder} or name its parent by --data_root"
        ) from None


def save_image(cell, beside, folder):
    """The path in the folder of an image: a file beside the records, or {"bytes"} or base64.

    The latter two are written, named by their content. Raises ValueError unless it is one image.
    """
    if isinstance(cell, list):
        if len(cell) != 1:
            raise ValueError(f"{len(cell)} images where one is read")
        cell = cell[0]
    if isinstance(cell, str) and "." in cell:  # there is no dot in base64
        return str(Path(os.path.abspath(beside / cell)).relative_to(os.path.abspath(folder)))
    content = cell["bytes"] if isinstance(cell, dict) else base64.b64decode(cell, validate=True)
    name = f"images/{hashlib.sha256(content).hexdigest()[:20]}"
    if not (folder / name).exists():
        part = folder / f"{name}.part"
        part.write_bytes(content)
        part.replace(folder / name)
    return name


def make_benchmark(name, folder) -> Path:
    """Turn a benchmark's published records into image files and examples, <folder>/examples.jsonl.

    Made anew at every start (seconds) while the files are there, by one evaluation at a time.
    """
    with alone(folder):
        there = (folder / "left_out.json").exists() and not published_files(name, folder)
        if rank() == 0 and not there:
            convert(name, folder)
    wait_for_ranks()
    return folder / "examples.jsonl"


def convert(name, folder):
    """Write the examples of a benchmark, and then the list of records that are none, left_out.json.

    Raises InputError if those are more than a tenth.
    """
    (folder / "images").mkdir(exist_ok=True)
    examples, left_out, count = {}, [], 0
    for beside, row in published_rows(name, folder):
        count += 1
        where = f"{name} record {count}"
        try:
            if example := BENCHMARKS[name].load({"row": count - 1, **row}):
                image = save_image(row.get("decoded_image") or row["image"], beside, folder)
                example |= {"id": f"{name}-{example['id']}", "image": image, "source": name}
                problem = problem_of(example, False)
                if problem or example["id"] in examples:
                    raise ValueError(problem or f"id {example['id']} is there already")
                read_image({"image": folder / image, "where": where})
                examples[example["id"]] = example
        except (InputError, *NOT_AS_PUBLISHED) as error:
            left_out.append({"record": where, "reason": repr(error)})
    if 10 * len(left_out) > count:
        first = " is not as published: ".join(left_out[0].values())
        (folder / "left_out.json").unlink(missing_ok=True)
        raise InputError(
            f"{len(left_out)} of {count} records of {folder} cannot be used, more than a "
            f"tenth; {first}; put the files there as they are published"
        )
    write_jsonl(folder / "examples.jsonl", examples.values())
    share = len(left_out) / max(count, 1)
    found = {"records": count, "share": share, "left_out": left_out}
    write_json(folder / "left_out.json", found)


# ---- figures

VERIFIER = ["majority", "weighted", "best_of_n"]
TITLES = {
    "greedy": "greedy accuracy",
    "sample": "mean sample accuracy",
    "pass_at_k": "Pass@K",
    "reward_pass_at_2": "Reward-Pass@2",
    "majority": "majority vote",
    "best_of_n": "PRM best-of-N",
    "weighted": "PRM-weighted vote",
    "unparsable": "unparsable share",
    "greedy_gain": "greedy gain, paired",
    "right_chain": "right chains",
}


def prompts_of(folder, name):
    """(greedy row, K sample rows) of every prompt that `Sampler.look` left, one at a time."""
    greedy = stream_jsonl(folder / f"{name}_greedy.jsonl")
    samples = by_prompt(stream_jsonl(folder / f"{name}_samples.jsonl"))
    return zip(greedy, (rows for _, rows in samples), strict=True)


def prompt_figures(greedy, samples):
    """Every figure of a prompt, a truth value or a share, of its greedy response and K samples.

    >>> drawn = (("7", True, 0.2), ("8", False, 0.9))
    >>> samples = [{"answer": a, "correct": c, "reward": r} for a, c, r in drawn]
    >>> figures = prompt_figures({"correct": True}, samples)
    >>> figures["pass_at_k"], figures["majority"], figures["best_of_n"], figures["unparsable"]
    (True, True, False, 0.0)
    """
    keys = ("answer", "correct", "reward")
    answers, correct, rewards = ([row[key] for row in samples] for key in keys)
    weights = [max(reward, 0.0) for reward in rewards]  # the reward of a cut response is below 0
    right = dict(zip(reversed(answers), reversed(correct)))  # the first sample's verdict counts
    return {
        "greedy": greedy["correct"],
        "sample": np.mean(correct),
        "pass_at_k": any(correct),
        "reward_pass_at_2": reward_pass_at_k(rewards, correct, 2),
        "majority": right[vote(answers, [1.0] * len(samples))],
        "best_of_n": correct[top_k(rewards, 1)[0]],
        "weighted": right[vote(answers, weights)],
        "unparsable": answers.count(None) / len(samples),
    }


def figures_of(folder, name, n) -> pd.DataFrame:
    """A row of `prompt_figures` per prompt, of its first n samples."""
    rows = (prompt_figures(greedy, drawn[:n]) for greedy, drawn in prompts_of(folder, name))
    return pd.DataFrame(rows, dtype=float)


def interval(values: np.ndarray, figure, resamples):
    """A figure of n values, its count and 95 % bootstrap interval; figure: (R, n, ...) to (R,)."""
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))  # (R, n)
    low, high = np.percentile(figure(values[picks]), [2.5, 97.5])
    return {"mean": figure(values[None])[0], "low": low, "high": high, "n": len(values)}


def intervals(table: pd.DataFrame, resamples):
    """{figure: the interval of its mean} of (prompts, figures), without NaN."""
    columns = {name: column.dropna().to_numpy(float) for name, column in table.items()}
    mean = partial(np.mean, axis=1)
    return {name: interval(x, mean, resamples) for name, x in columns.items() if len(x)}


def summarize(folder, policies, split, args):
    """{policy: {figure: interval}} of a split, and each policy's paired gain on the one before."""
    report, before = {}, np.nan
    for policy in policies:
        table = figures_of(folder, f"{policy}_{split}", args.samples)
        table["greedy_gain"] = table["greedy"] - before
        before = table["greedy"]
        report[policy] = intervals(table, args.resamples)
    return report


def verifier(folder, name, args):
    """{n: {figure of VERIFIER: interval}} of the first n = 1, 2, 4, ..., K samples (figure 2)."""
    report, powers = {}, {2**i for i in range(args.samples.bit_length())}
    for n in sorted(powers | {args.samples}):
        report[n] = intervals(figures_of(folder, name, n)[VERIFIER], args.resamples)
    return report


def reranker(folder, name, by_id, args):
    """The PRM as a reranker of right responses: its Top-2 against the rest (paper, figure 2).

    Prompts with at most two distinct right samples are left out, and for right_chain those with a
    chain that --chain_checker cannot judge. "difference" is paired.
    """
    top, rest, checker = [], [], load_checker(args.chain_checker)
    for greedy, samples in prompts_of(folder, name):
        right = pd.DataFrame(distinct([row for row in samples if row["correct"]]))
        if len(right) > 2:
            right = right.sort_values("reward", ascending=False, kind="stable")
            chains = [checker(text, by_id[greedy["id"]]) for text in right["response"]]
            figures = pd.DataFrame({"steps": right["step_scores"].map(len)})
            if None not in chains:
                figures["right_chain"] = chains
            top.append(figures[:2].mean())
            rest.append(figures[2:].mean())
    tables = {"Top-2": pd.DataFrame(top), "rest": pd.DataFrame(rest)}
    tables["difference"] = tables["Top-2"] - tables["rest"]
    return {part: intervals(table, args.resamples) for part, table in tables.items()}


def average(figures):
    """The mean of figures, and of the ends of their intervals, which is rather too wide."""
    return pd.DataFrame(figures.values()).mean().to_dict() | {"n": len(figures)}


def benchmark_figures(rows, by_id, resamples=2000):
    """Figures of one policy on one benchmark: score, plain, unparsable share, score by category.

    Rows of one "group" are copies of a question: it is right if all are; plain looks at the base
    copy, which has the shortest id. macro is the mean over categories, score over questions.

    >>> examples = {f"m-{k}": {"group": k % 10, "category": "ab"[k % 10 - 1]} for k in (1, 11, 2)}
    >>> rows = [{"id": key, "correct": key != "m-11", "answer": "A"} for key in examples]
    >>> figures = benchmark_figures(rows, examples)
    >>> {key: float(figure["mean"]) for key, figure in figures.items()}
    {'score': 0.5, 'plain': 1.0, 'unparsable': 0.0, 'macro': 0.5, 'a': 0.0, 'b': 1.0}
    """
    table = pd.DataFrame(
        {"group": row["id"], "category": None, **by_id[row["id"]], **row} for row in rows
    )
    table["unparsable"] = table["answer"].isna()
    table = table.sort_values("id", key=lambda ids: ids.str.len(), kind="stable")
    copies = table.groupby("group")
    questions = copies[["category", "correct"]].first().rename(columns={"correct": "plain"})
    questions["score"] = copies["correct"].all()
    figures = intervals(questions[["score", "plain"]], resamples)
    figures |= intervals(table[["unparsable"]], resamples)
    known = questions.dropna(subset="category")
    categories = intervals(known.pivot(columns="category", values="score"), resamples)
    if categories:
        figures["macro"] = average(categories)
    return figures | categories


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """The mean of the F1 of right steps and that of wrong ones, (R,).

    counts: (R, n, 3) of n samples: steps that are right and called so, wrong and called so, others.

    >>> macro_f1(np.array([[[2, 1, 1], [1, 0, 1]]])).tolist()
    [0.625]
    """
    right, wrong, missed = np.moveaxis(counts.sum(1), -1, 0)  # (R,) each
    shares = (2 * hits / np.maximum(2 * hits + missed, 1) for hits in (right, wrong))
    return sum(shares) / 2


def step_counts(steps, threshold) -> pd.DataFrame:
    """What `macro_f1` counts, a row per sample, if a step is right from a threshold on."""
    right, called = steps["labels"] > 0, steps["scores"] >= threshold
    hits = {"right": right & called, "wrong": ~(right | called), "missed": right ^ called}
    return pd.DataFrame(hits).groupby([steps["source"], steps["id"]]).sum()


def step_figures(rows, resamples):
    """Macro F1 of the PRM's step verdicts by source, of the rows of `score_processes`.

    The threshold is the best of 101 on a fifth of the samples, drawn by id; the other four fifths
    are reported. Steps with the label 0 are ignored.
    """
    scored = [row for row in rows if row["scores"]]
    steps = pd.DataFrame(scored).explode(["labels", "scores"])
    steps = steps[steps["labels"] != 0].astype({"labels": int, "scores": float})
    drawn = steps["id"].map(lambda sample: seed_of(sample) % 5 == 0)
    tuned, kept = steps[drawn], steps[~drawn]
    thresholds = tuned["scores"].quantile(np.linspace(0, 1, 101))
    fitness = macro_f1(np.stack([step_counts(tuned, threshold) for threshold in thresholds]))
    threshold = thresholds.iloc[fitness.argmax()]
    figures = {}
    for source, counts in step_counts(kept, threshold).groupby("source"):
        figures[source] = interval(counts.to_numpy(), macro_f1, resamples)
    figures["macro"] = average(figures)
    report = {"threshold": threshold, "chosen_on": tuned["id"].nunique(), "macro_f1": figures}
    return report | {"reported": kept["id"].nunique(), "unscored": len(rows) - len(scored)}


# ---- tables and charts

STYLES = {"greedy_gain": ("+", 100), "steps": ("", 1)}  # sign and scale where not ("", 100)


def show(figure: dict | None, sign="", scale=100):
    """A mean and its interval as text, in percent unless scaled otherwise.

    >>> show({"mean": 0.5, "low": 0.25, "high": 0.75}), show(None)
    ('50.0 [25.0, 75.0]', '-')
    >>> show({"mean": 2.0, "low": -1.0, "high": 5.0}, "+", scale=1)
    '+2.0 [-1.0, +5.0]'
    """
    if figure is None:
        return "-"
    mean, low, high = (f"{scale * figure[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def figure_table(title, columns):
    """{column: {key: figure}} as a Markdown table: a row per key, and how many a figure is of."""
    lines = [["", *columns, "n"], ["---"] * (len(columns) + 2)]
    for key in {key: None for figures in columns.values() for key in figures}:
        row = [figures.get(key) for figures in columns.values()]
        cells = [show(figure, *STYLES.get(key, ())) for figure in row]
        lines.append([TITLES.get(key, key), *cells, *{figure["n"] for figure in row if figure}])
    text = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    return f"\n{title}\n\n{text}"


def table_4(report):
    """{benchmark: {policy: figures}} as {policy: {benchmark: score}}, the paper's Table 4.

    The average needs all five.
    """
    table = {policy: {} for policy in next(iter(report.values()))}
    for policy, scores in table.items():
        scores |= {BENCHMARKS[name].title: report[name][policy]["score"] for name in report}
        if len(scores) == len(BENCHMARKS) - 1:  # all but STEPS
            scores["average"] = average(scores)
    return table


def tabulate(report, args):
    """The whole report as Markdown, and what it depends on besides weights and data."""
    benchmarks = report.get("benchmarks", {})
    tables = {
        "## test": report["test"],
        "## ood": report["ood"],
        "## PRM on n samples of the policy that evolving starts from": report["prm"]["verifier"],
        "## PRM on its right responses": report["prm"]["reranker"],
    }
    if found := report["prm"].get(STEPS):
        tables[STEPS_TITLE.format(**found)] = {"macro F1": found["macro_f1"]}
    if benchmarks:
        tables["## Benchmarks (the paper's Table 4)"] = table_4(benchmarks)
    for name, policies in benchmarks.items():
        tables[f"### {BENCHMARKS[name].title}"] = policies
    text = "".join(figure_table(title, columns) for title, columns in tables.items())
    for name, found in report.get("left_out", {}).items():
        text += f"\n{found['share']:.1%} of {found['records']} records of {name} are left out\n\n"
        text += "".join(f"- {row['record']}: {row['reason']}\n" for row in found["left_out"])
    return REPORT.format(**vars(args), tables=text, torch=torch, transformers=transformers)


STEPS_TITLE = """## PRM against human verdicts on steps (VisualProcessBench)

Macro F1 if a step is right from the score {threshold:.6f} on, which was chosen on {chosen_on}
samples; reported are {reported} others. {unscored} had steps that are not apart in tokens."""

REPORT = """# Evaluation

K = N = {samples} samples at temperature {temperature}; percent, with 95 % bootstrap intervals over
n prompts or questions. The gain is that over the policy before; plain is the accuracy on the base
copies of questions, score that on all copies at once, macro its mean over categories.
{tables}
## Settings

Prompt: the processor's chat template around one user turn: the image, the question, where there
are choices the line "Choices:" and a line "(A) <choice>" for each, and: {instruction}
A response that is cut at {max_new_tokens} new tokens is wrong. Seed {seed}; versions:
torch {torch.__version__}, transformers {transformers.__version__}.
"""


def draw_dynamics(evolving, path):
    """The paper's figures: the dynamics over iterations, and Pass@K at fixed temperatures."""
    looks = (
        pd.DataFrame(read_jsonl(evolving / "metrics.jsonl"))
        .dropna(subset="pass_at_k")
        .set_index("iteration")
    )
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    shares = looks[["greedy_accuracy", "pass_at_k", "reward_pass_at_2"]]
    shares.plot(ax=left, style="o-", title="Dynamics on validation")
    looks.plot(y="temperature", ax=left, style="k:", drawstyle="steps-mid", secondary_y=True)
    if rows := read_jsonl(evolving / "temperature.jsonl"):
        points = pd.json_normalize(rows, "curve", ["iteration"])
        curves = points.pivot(index="iteration", columns="temperature", values="pass_at_k")
        curves.iloc[:, ::3].plot(ax=right, style="o-", title="Pass@K at fixed temperatures")
    figure.savefig(path, dpi=150)


# ---- the run


def origin_of(folder):
    """{"flags", "inputs"} of a run of stage 03; InputError for none, or one that was changed."""
    made = [is_made(folder / name) for name in ("run.json", "metrics.jsonl", "temperature.jsonl")]
    if not made[0]:
        raise InputError(f"{folder} holds no run; run 03_self_evolve.py first")
    return read_json(folder / "run.json")


def policies_of(runs, flags, base):
    """{name: folder}: the base, what 03 began with, what became of it; flags: those of stage 03.

    >>> flags = M_STAR | {"policy": "runs/a/01_warmup/model", "method": "rest_em"}
    >>> [f"{name}: {path}" for name, path in policies_of(Path("runs/b"), flags, "base").items()][1:]
    ['warm-up: runs/a/01_warmup/model', 'evolved: runs/b/03_self_evolve/model']
    """
    start = Path(flags["policy"] or runs / "01_warmup" / "model")
    policies = {"base": Path(base)}
    if start != Path(base):
        policies["warm-up" if start.parent.name == "01_warmup" else "start"] = start
    evolved = "M-STaR" if M_STAR.items() <= flags.items() else "evolved"
    return policies | {evolved: runs / "03_self_evolve" / "model"}


def predict(out, policies, prm, examples, args):
    """Every policy on every prompt: greedy, and but for benchmarks K samples; all are scored."""
    drawn = {"k": args.samples, "temperature": args.temperature, "purpose": "eval"}
    for policy, folder in policies.items():
        with Sampler(folder, args, prm=prm) as sampler:
            for split in ("test", "ood"):
                sampler.look(out / "predictions", f"{policy}_{split}", examples[split], **drawn)
            for name in args.asked:
                path = out / "benchmarks" / f"{policy}_{name}.jsonl"
                sampler.sample(path, examples[name], n=1, temperature=0.0, purpose="eval")
    if STEPS in args.benchmarks:
        score_processes(out / "benchmarks" / f"{STEPS}.jsonl", prm, examples[STEPS], args)


def score_processes(path, prm, examples, args):
    """Phase: the PRM's scores of the steps of VisualProcessBench's responses, a row each.

    They are None where steps cannot be told apart in tokens.
    """
    model = None if is_there(path) else load_prm(prm, args)

    def produce(chunk):
        """The rows of a chunk."""
        found = [encode_steps(example["steps"], model.tokenizer) for example in chunk]
        token_ids = [[pair[0]] if pair else [] for pair in found]
        for example, scores in zip(chunk, score_steps(model, chunk, token_ids, args)):
            row = {"id": example["id"], "source": example["category"], "labels": example["labels"]}
            yield row | {"scores": scores[0] if scores else None}

    write_chunks(path, examples, produce, args, path.stem)


def judge(out, policies, examples, args):
    """{split: {policy: figures}, "benchmarks": {benchmark: {policy: figures}}, "prm": figures}."""
    folder, start = out / "predictions", f"{policies[-2]}_test"
    report = {split: summarize(folder, policies, split, args) for split in ("test", "ood")}
    for name in args.benchmarks:
        listed = Path(args.data_root) / name / "left_out.json"
        report.setdefault("left_out", {})[name] = json.loads(listed.read_text("utf-8"))
    for name in args.asked:
        figures = report.setdefault("benchmarks", {}).setdefault(name, {})
        for policy in policies:
            rows = stream_jsonl(out / "benchmarks" / f"{policy}_{name}.jsonl")
            figures[policy] = benchmark_figures(rows, by_id_of(examples[name]), args.resamples)
    report["prm"] = {
        "verifier": verifier(folder, start, args),
        "reranker": reranker(folder, start, by_id_of(examples["test"]), args),
    }
    if STEPS in args.benchmarks:
        rows = read_jsonl(out / "benchmarks" / f"{STEPS}.jsonl")
        report["prm"][STEPS] = step_figures(rows, args.resamples)
    return report


def main(args):
    """Load, predict, judge, tabulate, draw."""
    if unknown := set(args.benchmarks) - set(BENCHMARKS):
        raise InputError(f"--benchmarks knows {', '.join(BENCHMARKS)}, not {', '.join(unknown)}")
    runs = Path(args.runs)
    evolving = runs / "03_self_evolve"
    trained = origin_of(evolving)["flags"]
    if (rule := trained["aggregate"]) != args.aggregate:
        raise InputError(f"stage 03 selected with --aggregate {rule}: give the same flag here")
    beside = Path(trained["data"]).with_name
    data = {"test": args.test or beside("test.jsonl"), "ood": args.ood or beside("ood.jsonl")}
    for name in args.benchmarks:
        data[name] = make_benchmark(name, Path(args.data_root) / name)
    policies = policies_of(runs, trained, args.model)
    prm = Path(trained["prm"] or runs / "02_train_prm" / "model")
    if STEPS in args.benchmarks and is_rule(prm):
        raise InputError(f"--benchmarks {STEPS} judges a PRM, and {prm} is a rule; leave it out")
    inputs = {**data, **policies, "prm": prm}
    inputs["model"] = inputs.pop("base")  # the one that may be a name on the hub
    out = open_run(args, "04_eval", inputs)
    load_checker(args.chain_checker)  # a wrong flag shows now, not after hours
    files = [load_examples(path) for path in data.values()]
    examples = dict(zip(data, fitting(out, evolving / "model", args, *files)))
    predict(out, policies, prm, examples, args)

    def write_report(part):
        """Judge, tabulate and draw; `part` becomes report.json, the last file."""
        report = judge(out, list(policies), examples, args)
        write_atomic(out / "report.md", [tabulate(report, args)])
        draw_dynamics(evolving, out / "dynamics.png")
        write_json(part, report)

    once(out / "report.json", write_report)
    print((out / "report.md").read_text())


if __name__ == "__main__":
    run_stage(Args, main)
