"""Stage 04: base, warm-up and evolved policy side by side (paper, sections 5 and 6).

Reads   data/toy/{test,ood}.jsonl, data/toy/base/, runs/toy/01_warmup/model/,
        runs/toy/02_train_prm/model/, runs/toy/03_self_evolve/
        data/<benchmark>/ for --benchmarks: the published files (parquet, TSV or JSON), or the hub
Writes  runs/toy/04_eval/predictions/, benchmarks/  responses of every policy, checked and scored
                        report.json    every figure with its count and interval; written last
                        report.md      the same as tables
                        dynamics.png   accuracy, Pass@K, Reward-Pass@2, temperature over iterations
                        prm.png        the PRM as a verifier and as a reranker of right responses

Intervals are 95 % bootstrap intervals over prompts; gains are paired: the same prompts, resampled
together. Start policy and PRM are those of 03's run.json. tests/study.py compares several runs.

Benchmarks are asked in our one prompt form: question, lettered choices, --instruction, with the
dataset's own hint or context before the question. MMStar-R and MMBench-R leave out the perception
categories, as in the paper. MMBench asks a question several times with its choices rotated: it
counts if all copies are right; "plain" looks at the base copy.

    python 04_eval.py    (for benchmarks on a real model see the README's GPU section)
"""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd  # comes with datasets, as does pyarrow
import torch
import transformers
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from pyarrow.parquet import ParquetFile

from common import (
    LETTERS,
    InputError,
    Sampler,
    ScoringArgs,
    by_id_of,
    by_prompt,
    distinct,
    fitting,
    flag,
    load_checker,
    load_examples,
    once,
    open_run,
    rank,
    read_jsonl,
    reward_pass_at_k,
    run_stage,
    stream_jsonl,
    top_k,
    user_text,
    vote,
    write_atomic,
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

    test: str = flag("data/toy/test.jsonl", "in-domain test prompts")
    ood: str = flag("data/toy/ood.jsonl", "out-of-domain test prompts")
    benchmarks: list[str] = flag([], "also mathvista, m3cot, mmstar_r, mmbench_r, ai2d")
    data_root: str = flag("data", "folder with a sub-folder per benchmark: its published files")
    model: str = flag("data/toy/base", "base model")
    samples: int = flag(8, "K = N: samples per prompt")
    temperature: float = flag(1.0, "sampling temperature")
    resamples: int = flag(2000, "bootstrap resamples")
    chain_checker: str = flag("tests/toy.py:judge", "FILE:FUNCTION that judges a right chain")


# ---- benchmarks: published records to our examples

TASKS = {
    "figure question answering": "FQA",
    "geometry problem solving": "GPS",
    "math word problem": "MWP",
    "textbook question answering": "TQA",
    "visual question answering": "VQA",
}
MMSTAR_R = ("instance reasoning", "logical reasoning", "math", "science & technology")
MMBENCH_R = ("attribute_reasoning", "relation_reasoning", "logic_reasoning")
MMBENCH = "opencompass.openxlab.space/utils/benchmarks/MMBench/MMBench_DEV_EN_V11.tsv"
FORMATS = (".parquet", ".tsv", ".json", ".jsonl")
LONGEST_PATH = 64  # characters; an image cell that is a longer text is an image in base64


def mathvista(row: dict) -> dict:
    r"""MathVista: the question is its own `query` up to the choices, so our prompt is its prompt.

    >>> row = {"pid": "168", "query": "Hint: h\nQuestion: q\nChoices:\n(A) (c)\n(B) (a)",
    ...        "choices": ["(c)", "(a)"], "answer": "(a)", "answer_type": "text",
    ...        "precision": None, "metadata": {"task": "math word problem"}}
    >>> {key: mathvista(row)[key] for key in ("question", "answer", "category")}
    {'question': 'Hint: h\nQuestion: q', 'answer': 'B', 'category': 'MWP'}
    """
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
    return example | {"category": TASKS[row["metadata"]["task"]]}


def m3cot(row: dict) -> dict:
    """M3CoT: a context, if there is one, stands before the question; the domain is a category."""
    example = {key: row[key] for key in ("id", "question", "choices", "answer")}
    if context := (row["context"] or "").strip():
        example["question"] = f"Context: {context}\n{row['question']}"
    return example | {"category": row["domain"]}


def is_reasoning(category: str, known: tuple) -> bool:
    """Whether a category is not perception; raises ValueError for one that is not known."""
    if "perception" not in category and category not in known:
        raise ValueError(f"unknown category {category!r}")
    return category in known


def mmstar_r(row: dict) -> dict | None:
    """MMStar-R: the options stand in the question, the answer is a letter; None for perception."""
    if not is_reasoning(row["category"], MMSTAR_R):
        return None
    example = {key: row[key] for key in ("question", "answer", "category")}
    return example | {"id": str(row["index"]), "choices": None, "answer_type": "letter"}


def mmbench_r(row: dict) -> dict | None:
    """MMBench-R: copies of a question share index % 1000000; None for a perception question."""
    if not is_reasoning(row["l2-category"], MMBENCH_R):
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


def ai2d(row: dict) -> dict:
    """AI2D: the answer is a position; it is stored as a letter, for option texts may be letters."""
    example = {"id": str(row["row"]), "question": row["question"], "choices": row["options"]}
    return example | {"answer": LETTERS[int(row["answer"])]}


class Benchmark(NamedTuple):
    """Where a benchmark is published, and what makes an example of a record."""

    load: Callable
    title: str
    source: str  # its name on the hub, or where to download it
    split: str  # of the hub; empty: it is not there
    files: str  # pattern of its published files


BENCHMARKS = {
    "mathvista": Benchmark(mathvista, "MathVista", "AI4Math/MathVista", "testmini", "*testmini*"),
    "m3cot": Benchmark(m3cot, "M3CoT", "LightChen2333/M3CoT", "test", "*test*"),
    "mmstar_r": Benchmark(mmstar_r, "MMStar-R", "Lin-Chen/MMStar", "val", "*mmstar*"),
    "mmbench_r": Benchmark(mmbench_r, "MMBench-R", MMBENCH, "", "*MMBench_DEV_EN_V11*"),
    "ai2d": Benchmark(ai2d, "AI2D", "lmms-lab/ai2d", "test", "*test*"),
}


def published_files(name: str, folder: Path) -> list:
    """The published files of a benchmark in its folder; InputError if they are of two formats."""
    files = sorted(path for path in folder.rglob(BENCHMARKS[name].files) if path.suffix in FORMATS)
    if len({path.suffix for path in files}) > 1:
        raise InputError(f"{folder} holds {', '.join(map(str, files))}: keep one format")
    return files


def records(path: Path) -> Iterable:
    """The records of a published file; those of JSON are a list, {key: record} or lines."""
    if path.suffix == ".parquet":
        batches = ParquetFile(path).iter_batches(64)
        return (row for batch in batches for row in batch.to_pylist())
    if path.suffix == ".tsv":  # every cell is a text: "2", "None" and "" stay what they are
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        holders = table.set_index("index")["image"]  # a cell may be the index of another row
        table["image"] = table["image"].map(holders).fillna(table["image"])
        return table.to_dict("records")
    if path.suffix == ".jsonl":
        return stream_jsonl(path)
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return stream_jsonl(path)
    return whole.values() if isinstance(whole, dict) else whole


def published_rows(name: str, folder: Path) -> Iterator:
    """The published records, from the folder or the hub; InputError if none can be read."""
    from datasets import load_dataset

    files, benchmark = published_files(name, folder), BENCHMARKS[name]
    try:
        for path in files:
            yield from records(path)
        if not files:
            hub = load_dataset(benchmark.source, split=benchmark.split, streaming=True)
            yield from hub.decode(False)  # images stay {"bytes", "path"}
    except (OSError, ValueError) as error:
        source = ", ".join(map(str, files)) or benchmark.source
        raise InputError(
            f"{source} cannot be read ({error!r}); put {benchmark.files} "
            f"(parquet, tsv, json or jsonl) into {folder} or name its parent by --data_root"
        ) from None


def save_image(cell, folder: Path) -> str:
    """The path in the folder of an image; {"bytes"} or base64 is written, named by its content."""
    if isinstance(cell, str) and len(cell) <= LONGEST_PATH:
        return cell
    content = cell["bytes"] if isinstance(cell, dict) else base64.b64decode(cell, validate=True)
    kind = Image.open(io.BytesIO(content)).format.lower()
    name = f"images/{hashlib.sha256(content).hexdigest()[:20]}.{kind}"
    if not (folder / name).exists():
        part = folder / f"{name}.part"
        part.write_bytes(content)
        part.replace(folder / name)
    return name


def make_benchmark(name: str, folder: Path) -> Path:
    """Turn a benchmark's published records into image files and examples, <folder>/examples.jsonl.

    It is made anew at every start (seconds) while the published files are there.
    """
    out, benchmark = folder / "examples.jsonl", BENCHMARKS[name]
    if rank() == 0 and published_files(name, folder):
        out.unlink(missing_ok=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    wrong = (LookupError, TypeError, ValueError, AttributeError, UnidentifiedImageError)

    def write(part: Path) -> None:
        """Write the examples."""
        examples = []
        for number, row in enumerate(published_rows(name, folder), 1):
            try:
                if example := benchmark.load({"row": number - 1, **row}):
                    image = save_image(row.get("decoded_image") or row["image"], folder)
                    example |= {"id": f"{name}-{example['id']}", "image": image, "source": name}
                    examples.append(example)
            except wrong as error:
                where = f"{name} record {number}"
                raise InputError(f"{where} is not as published ({error!r})") from None
        write_jsonl(part, examples)

    once(out, write)
    return out


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


def prompts_of(folder: Path, name: str) -> Iterator:
    """(greedy row, K sample rows) of every prompt that `Sampler.look` left, one at a time."""
    greedy = stream_jsonl(folder / f"{name}_greedy.jsonl")
    samples = by_prompt(stream_jsonl(folder / f"{name}_samples.jsonl"))
    return zip(greedy, (rows for _, rows in samples), strict=True)


def prompt_figures(greedy: dict, samples: list) -> dict:
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


def figures_of(folder: Path, name: str, n: int) -> pd.DataFrame:
    """A row of `prompt_figures` per prompt, of its first n samples."""
    rows = (prompt_figures(greedy, drawn[:n]) for greedy, drawn in prompts_of(folder, name))
    return pd.DataFrame(rows, dtype=float)


def intervals(table: pd.DataFrame, resamples: int) -> dict:
    """{figure: its mean, count and 95 % bootstrap interval} of (prompts, figures), without NaN."""
    report = {}
    for name, column in table.items():
        values = column.dropna().to_numpy(float)
        if n := len(values):
            picks = np.random.default_rng(0).integers(n, size=(resamples, n))  # (R, n)
            low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
            report[name] = {"mean": values.mean(), "low": low, "high": high, "n": n}
    return report


def summarize(folder: Path, policies: list, split: str, args: Args) -> dict:
    """{policy: {figure: interval}} of a split, and each policy's paired gain on the one before."""
    report, before = {}, np.nan
    for policy in policies:
        table = figures_of(folder, f"{policy}_{split}", args.samples)
        table["greedy_gain"] = table["greedy"] - before
        before = table["greedy"]
        report[policy] = intervals(table, args.resamples)
    return report


def verifier(folder: Path, name: str, args: Args) -> dict:
    """{n: {figure of VERIFIER: interval}} of the first n = 1, 2, 4, ..., K samples (figure 2)."""
    report, powers = {}, {2**i for i in range(args.samples.bit_length())}
    for n in sorted(powers | {args.samples}):
        report[n] = intervals(figures_of(folder, name, n)[VERIFIER], args.resamples)
    return report


def reranker(folder: Path, name: str, by_id: dict, args: Args) -> dict:
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


def average(figures: dict) -> dict:
    """The mean of figures, and of the ends of their intervals, which is rather too wide."""
    return pd.DataFrame(figures.values()).mean().to_dict() | {"n": len(figures)}


def benchmark_figures(rows: Iterable, by_id: dict, resamples: int = 2000) -> dict:
    """Figures of one policy on one benchmark: score, plain, unparsable share, score by category.

    Rows of one "group" are copies of a question: it is right if all are; plain looks at the base
    copy, which has the shortest id. macro is the mean over categories, score over questions.

    >>> examples = {f"m-{k}": {"group": k % 10, "category": "ab"[k % 10 - 1]} for k in (1, 11, 2)}
    >>> rows = [{"id": key, "correct": key != "m-11", "answer": "A"} for key in examples]
    >>> figures = benchmark_figures(rows, examples)
    >>> {key: float(figure["mean"]) for key, figure in figures.items()}
    {'score': 0.5, 'plain': 1.0, 'unparsable': 0.0, 'macro': 0.5, 'a': 0.0, 'b': 1.0}
    """
    verdicts = []
    for row in rows:
        example, key = by_id[row["id"]], row["id"]
        group, category = example.get("group", key), example.get("category")
        verdicts.append((len(key), group, category, row["correct"], row["answer"] is None))
    names = ["length", "group", "category", "plain", "unparsable"]
    table = pd.DataFrame(verdicts, columns=names).sort_values("length", kind="stable")
    questions = table.groupby("group").first()
    questions["score"] = table.groupby("group")["plain"].all()
    figures = intervals(questions[["score", "plain"]], resamples)
    figures |= intervals(table[["unparsable"]], resamples)
    categories = {}
    for category, scores in questions.groupby("category")["score"]:
        categories |= intervals(scores.to_frame(category), resamples)
    if categories:
        figures["macro"] = average(categories)
    return figures | categories


# ---- tables and charts

STYLES = {"greedy_gain": ("+", 100), "steps": ("", 1)}  # sign and scale where not ("", 100)


def show(figure: dict | None, sign: str = "", scale: float = 100) -> str:
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


def figure_table(title: str, columns: dict):
    """{column: {key: figure}} as a Markdown table: a row per key, and how many a figure is of."""
    lines = [["", *columns, "n"], ["---"] * (len(columns) + 2)]
    for key in {key: None for figures in columns.values() for key in figures}:
        row = [figures.get(key) for figures in columns.values()]
        cells = [show(figure, *STYLES.get(key, ())) for figure in row]
        lines.append([TITLES.get(key, key), *cells, *{figure["n"] for figure in row if figure}])
    text = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    return f"\n{title}\n\n{text}"


def table_4(report: dict) -> dict:
    """{benchmark: {policy: figures}} as {policy: {benchmark: score}}, the paper's Table 4.

    The average needs all five.
    """
    table = {policy: {} for policy in next(iter(report.values()))}
    for policy, scores in table.items():
        scores |= {BENCHMARKS[name].title: report[name][policy]["score"] for name in report}
        if len(scores) == len(BENCHMARKS):
            scores["average"] = average(scores)
    return table


def tabulate(report: dict, args: Args) -> str:
    """The whole report as Markdown, and what it depends on besides weights and data."""
    benchmarks = report.get("benchmarks", {})
    tables = {
        "## test": report["test"],
        "## ood": report["ood"],
        "## PRM on n samples of the policy that evolving starts from": report["prm"]["verifier"],
        "## PRM on its right responses": report["prm"]["reranker"],
    }
    if benchmarks:
        tables["## Benchmarks (the paper's Table 4)"] = table_4(benchmarks)
    for name, policies in benchmarks.items():
        tables[f"### {BENCHMARKS[name].title}"] = policies
    text = "".join(figure_table(title, columns) for title, columns in tables.items())
    return REPORT.format(**vars(args), tables=text, torch=torch, transformers=transformers)


REPORT = """# Evaluation

K = N = {samples} samples at temperature {temperature}; percent, with 95 % bootstrap intervals over
n prompts or questions. The gain is that over the policy before; plain is the accuracy on the base
copies of questions, score that on all copies at once, macro its mean over categories.
{tables}
## Settings

Prompt: the processor's chat template around one user turn, the image and then

```
<question>
Choices: (these lines where there are choices)
(A) <choice>
{instruction}
```

A response that is cut at {max_new_tokens} new tokens is wrong. Seed {seed}; versions:
torch {torch.__version__}, transformers {transformers.__version__}.
"""


def draw_dynamics(evolving: Path, path: Path) -> None:
    """The paper's figures: the dynamics over iterations, and Pass@K at fixed temperatures."""
    metrics, searches = evolving / "metrics.jsonl", evolving / "temperature.jsonl"
    looks = pd.DataFrame(read_jsonl(metrics)).dropna(subset="pass_at_k").set_index("iteration")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    shares = looks[["greedy_accuracy", "pass_at_k", "reward_pass_at_2"]]
    shares.plot(ax=left, style="o-", title="Dynamics on validation")
    looks.plot(y="temperature", ax=left, style="k:", drawstyle="steps-mid", secondary_y=True)
    if searches.exists() and (rows := read_jsonl(searches)):
        points = pd.json_normalize(rows, "curve", ["iteration"])
        curves = points.pivot(index="iteration", columns="temperature", values="pass_at_k")
        curves.iloc[:, ::3].plot(ax=right, style="o-", title="Pass@K at fixed temperatures")
    figure.savefig(path, dpi=150)


def draw_intervals(axis, report: dict, key: str, style: str) -> None:
    """{x: {key: interval}} as points with error bars."""
    rows = pd.DataFrame({x: figures[key] for x, figures in report.items() if key in figures}).T
    if len(rows):
        errors = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
        axis.errorbar(rows.index, rows["mean"], errors, fmt=style, capsize=4, label=key)
        axis.legend(frameon=False)


def draw_prm(report: dict, path: Path) -> None:
    """The paper's figure 2: votes and best-of-n over n, the PRM's Top-2 against the rest."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, *others = figure.subplots(1, 3)
    left.set_xlabel("n samples of the start policy")
    for key in VERIFIER:
        draw_intervals(left, report["verifier"], key, "o-")
    parts = {part: report["reranker"][part] for part in ("Top-2", "rest")}
    for axis, key in zip(others, ("steps", "right_chain")):
        draw_intervals(axis, parts, key, "o")
    figure.savefig(path, dpi=150)


# ---- the run


def origin_of(folder: Path) -> dict:
    """{"flags", "inputs"} of a run of stage 03; raises InputError where there is none."""
    if not (folder / "run.json").exists():
        raise InputError(f"{folder} holds no run; run 03_self_evolve.py first")
    return json.loads((folder / "run.json").read_text())


def policies_of(runs: Path, flags: dict, base: str) -> dict:
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


def predict(out: Path, policies: dict, prm: Path, examples: dict, args: Args) -> None:
    """Every policy on every prompt: greedy, and but for benchmarks K samples; all are scored."""
    drawn = {"k": args.samples, "temperature": args.temperature, "purpose": "eval"}
    for policy, folder in policies.items():
        with Sampler(folder, args, prm=prm) as sampler:
            for split in ("test", "ood"):
                sampler.look(out / "predictions", f"{policy}_{split}", examples[split], **drawn)
            for name in args.benchmarks:
                path = out / "benchmarks" / f"{policy}_{name}.jsonl"
                sampler.sample(path, examples[name], n=1, temperature=0.0, purpose="eval")


def judge(out: Path, policies: list, examples: dict, args: Args) -> dict:
    """{split: {policy: figures}, "benchmarks": {benchmark: {policy: figures}}, "prm": figures}."""
    folder, start = out / "predictions", f"{policies[-2]}_test"
    report = {split: summarize(folder, policies, split, args) for split in ("test", "ood")}
    for name in args.benchmarks:
        figures = report.setdefault("benchmarks", {}).setdefault(name, {})
        for policy in policies:
            rows = stream_jsonl(out / "benchmarks" / f"{policy}_{name}.jsonl")
            figures[policy] = benchmark_figures(rows, by_id_of(examples[name]), args.resamples)
    report["prm"] = {
        "verifier": verifier(folder, start, args),
        "reranker": reranker(folder, start, by_id_of(examples["test"]), args),
    }
    return report


def main(args: Args) -> None:
    """Load, predict, judge, tabulate, draw."""
    if unknown := set(args.benchmarks) - set(BENCHMARKS):
        raise InputError(f"--benchmarks knows {', '.join(BENCHMARKS)}, not {', '.join(unknown)}")
    runs = Path(args.runs)
    evolving = runs / "03_self_evolve"
    trained = origin_of(evolving)["flags"]
    if (rule := trained["aggregate"]) != args.aggregate:
        raise InputError(f"stage 03 selected with --aggregate {rule}: give the same flag here")
    data = {"test": args.test, "ood": args.ood}
    for name in args.benchmarks:
        data[name] = make_benchmark(name, Path(args.data_root) / name)
    policies = policies_of(runs, trained, args.model)
    prm = Path(trained["prm"] or runs / "02_train_prm" / "model")
    inputs = {**data, **policies, "prm": prm}
    inputs["model"] = inputs.pop("base")  # the one that may be a name on the hub
    out = open_run(args, "04_eval", inputs)
    load_checker(args.chain_checker)  # a wrong flag shows now, not after hours
    files = [load_examples(path) for path in data.values()]
    examples = dict(zip(data, fitting(out, prm, args, *files)))
    predict(out, policies, prm, examples, args)

    def write_report(part: Path) -> None:
        """Judge, tabulate and draw; `part` becomes report.json, the last file."""
        report = judge(out, list(policies), examples, args)
        write_atomic(out / "report.md", [tabulate(report, args)])
        draw_dynamics(evolving, out / "dynamics.png")
        draw_prm(report["prm"], out / "prm.png")
        write_json(part, report)

    once(out / "report.json", write_report)
    print((out / "report.md").read_text())


if __name__ == "__main__":
    run_stage(Args, main)
