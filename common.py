"""What the four stages share: data, prompts, generation, answer checking, PRM scores, selection, training, files.

Paper: "Diving into Self-Evolving Training for Multimodal Reasoning" (M-STaR, arXiv 2412.17451). Symbols stand in
comments where the code meets them. Every function can be lifted on its own; between calls only
LOCKS (open run folders) and ENGINES (a running vLLM) keep state.
"""

import argparse
import ctypes
import fcntl
import gc
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from transformers.cache_utils import DynamicLayer

LETTERS = "ABCDEFGHIJ"
ANSWER_TYPES = ("integer", "float", "list", "letter")  # letter: the options stand in the question or the image
NO_UNIT = ("or|and|to|not|nor|than|then|but|plus|minus|over|if|because|since|of|thousands?|[mbtr]+illions?|[bm]n|hundreds?|dozens?|lakhs?|crores?|"
           "hal(?:f|ves)|thirds?|quarters?|fourths?|squared|cubed|pi|[ap]m|[abdeiknopqrtuxyz]")  # words that change a number, and letters that are variables
UNIT = rf"(?:(?:square|cubic|sq\.?|cu\.?)\s+)?(?!(?:{NO_UNIT})(?![a-z]))[a-z]+(?:\s*\^\s*{{?[23]}}?|[²³23])?"
NUMBER = re.compile(r"(?:[a-z]\s*=\s*)?[€£¥]?\s*([+-]?)\s*(?:(\d{1,40})\s+(?=\d+\s*/))?(\d{1,40}\.?\d{0,40}|\.\d{1,40})(?:\s*/\s*(\d{1,40}))?"
                    rf"(?:\s*(?!e\d)({UNIT}(?:\s*(?:/|per\b)\s*{UNIT})?))?")  # sign, whole part of a mixed fraction, number, denominator, unit

if "__mp_main__" in sys.modules:  # this is one of vLLM's processes, which read the script again: a killed trainer must not leave it holding the GPU
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent


class InputError(Exception):
    """Something the user can mend; its one sentence says what to do."""


def flag(default, help: str):
    """A dataclass field that HfArgumentParser shows with its meaning; a list is copied for every use."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class CommonArgs:
    """Flags that mean the same in every stage."""

    runs: str = flag("runs/toy", "folder that holds one sub-folder per stage")
    instruction: str = flag("Think step by step , then end with Answer :", "asks for a chain of thought; follows every question")
    max_prompt_tokens: int = flag(2048, "a longer prompt (image tokens included) is refused")
    max_new_tokens: int = flag(80, "a response that has not ended by then is cut and counts as wrong")
    rows: int = flag(1024, "responses decoded or scored at once; lower it when memory runs out")
    chunk: int = flag(256, "prompts between two writes to disk: what a killed run may lose")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = flag("auto", "of the weights: float32, bfloat16, or auto: bfloat16 on a GPU, float32 on a CPU")
    attention: str = flag("auto", "attention implementation: a name transformers knows, or auto: flash_attention_2 where it is installed, else sdpa")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, about a third more time")
    freeze_vision: bool = flag(False, "do not train the vision tower")
    max_pixels: int = flag(0, "cap on the pixels of one image after the processor's resizing, thumbnail aside; 0 leaves the processor's own")
    engine: str = flag("auto", "what generates: vllm, transformers, or auto: vLLM where it is installed for --device, else transformers")
    engine_memory: float = flag(0.45, "share of the GPU's memory (on a CPU: of the host's) that vLLM takes while it runs")
    offload: bool = flag(False, "keep the trainer's weights and optimizer in host memory while vLLM runs")
    micro_batch: int = flag(32, "responses in one forward and backward pass; lower it when memory runs out")
    save_every: int = flag(50, "optimizer steps between two checkpoints")
    seed: int = flag(0, "every random choice follows from it")
    trust_remote_code: bool = flag(False, "run code that comes with a checkpoint")
    overwrite: bool = flag(False, "delete what this stage wrote before and start anew")


AGGREGATES = {"min": min, "mean": lambda scores: sum(scores) / len(scores), "last": lambda scores: scores[-1], "product": math.prod}


@dataclass
class ScoringArgs(CommonArgs):
    """Flags that mean the same in every stage that has a PRM."""

    aggregate: Literal["min", "mean", "last", "product"] = flag("min", "R_p: how the scores of a response's steps become its reward")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows a script's docstring as it is written, and every default."""


def run_stage(args_class, main) -> None:
    """Parse flags into `args_class` and call `main(args)`; an InputError becomes one sentence and exit code 1."""
    parser = HfArgumentParser(args_class, description=sys.modules["__main__"].__doc__, formatter_class=Help)
    args = parser.parse_args_into_dataclasses()[0]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        main(args)
    except InputError as error:
        sys.exit(f"error: {error}")
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", 0) is None or isinstance(error, FileNotFoundError):
            raise
        sys.exit(f"error: could not write or read a file ({error}); what was written is whole: mend that and run the same command to continue")


# ---------------------------------------------------------------- files: JSONL, run folders, checkpoints

def read_jsonl(path, lean=None) -> list[dict]:
    """All records of a JSONL file, in order; lean(record), if given, is what is kept of each. Raises InputError with file and line on the first bad one."""
    rows = []
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path} line {number}: not JSON ({error.msg}); mend or delete the line") from None
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number}: expected a JSON object, found {type(row).__name__}")
            rows.append(lean(row) if lean else row)
    return rows


def write_atomic(path, text: str) -> None:
    """Write a file so that a reader, or a killed run, sees the old text or the new text and nothing between."""
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path, value) -> None:
    """`value` as indented JSON, written atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def print_table(values: dict, indent: str = "") -> None:
    """Names and figures, one per line; nested ones indented, lists left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            print_table(value, indent + "  ")
        elif not isinstance(value, list):
            print(f"{indent}{name:<{32 - len(indent)}}{value:>10.4g}" if isinstance(value, float) else f"{indent}{name:<{32 - len(indent)}}{value!s:>10}")


def write_jsonl(path, rows) -> None:
    """Rows as JSONL, written atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_chunks(path, items: list, rows_per_item: int, chunk: int, produce, label: str, lean=None) -> list[dict]:
    """Write `produce(items[a:b])` to a JSONL file chunk by chunk, skipping the chunks that are already there.

    `produce` returns exactly rows_per_item rows per item. A run killed in a write leaves part of a chunk; that part is
    cut off and the whole chunk produced again, so chunk borders, and with them every batch, never depend on a kill.
    Returns all rows of the file, or what lean(row) keeps of each: a million rows take 13 GB as they are.
    """
    path = Path(path)
    whole = [len(items[a:a + chunk]) * rows_per_item for a in range(0, len(items), chunk)]  # rows of each chunk
    ends, done = [0], 0  # where each whole line ends
    with open(path, "ab+") as file:
        file.seek(0)
        ends += accumulate(len(line) for line in file if line.endswith(b"\n"))  # the last line may be torn
        while done < len(whole) and sum(whole[:done + 1]) < len(ends):
            done += 1
        file.truncate(ends[sum(whole[:done])])
        for k in tqdm(range(done, len(whole)), desc=label, initial=done, total=len(whole), disable=done == len(whole)):
            rows = produce(items[k * chunk:(k + 1) * chunk])
            assert len(rows) == whole[k], f"{label}: {len(rows)} rows for a chunk of {whole[k]}"
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
    return read_jsonl(path, lean)


def digest(path) -> str:
    """A short SHA-256 of a file, or of the configuration and weights of a checkpoint folder."""
    path, sha = Path(path), hashlib.sha256()
    files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".jinja")) if path.is_dir() else [path]
    for name in files:
        with open(name, "rb") as file:
            sha.update(name.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:16]


LOCKS = []  # open lock files; the kernel frees a lock when its process ends, however it ends


def open_run(args, stage: str, inputs: dict) -> Path:
    """Make, lock and fingerprint the folder of a stage: `<runs>/<stage>`.

    inputs: {name: file or checkpoint folder} the results depend on. Raises InputError if one is missing, if another
    process holds the folder, if it was made with other flags or inputs (unless args.overwrite), or if a number that must be
    positive is not.
    """
    positive = ("rows", "chunk", "micro_batch", "save_every", "max_prompt_tokens", "max_new_tokens", "batch_size", "steps", "learning_rate", "samples", "resamples",
                "keep", "rollouts", "val_samples", "epochs")
    if low := [name for name in positive if not getattr(args, name, 1) > 0]:
        raise InputError(f"--{low[0]} must be above 0, found {getattr(args, low[0])}")
    out = Path(args.runs) / stage
    hub = [n for n, p in inputs.items() if n == "model" and not Path(p).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(p))]
    for name, path in inputs.items():
        if name not in hub and not Path(path).exists():
            maker = next((s for s in ("01_warmup", "02_train_prm", "03_self_evolve") if s in Path(path).parts), None)
            raise InputError(f"{stage} needs {path} ({name}); run {f'{maker}.py' if maker else 'python tests/toy.py, or name your data,'} first")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as error:
        raise InputError(f"cannot write to {out} ({error.strerror}); choose another --runs") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process is writing {out}; wait for it or choose another --runs") from None
    LOCKS.append(lock)
    harmless = ("overwrite", "runs", "device", "engine_memory", "offload",  # and what sets memory and speed: at most rounding depends on it
                "rows", "chunk", "micro_batch", "save_every", "gradient_checkpointing", "max_prompt_tokens", "study", "against")
    now = {"flags": {k: v for k, v in asdict(args).items() if k not in harmless}
                     | {"dtype": str(dtype_of(args)).removeprefix("torch."), "engine": choose_engine(args.engine, args.device)},
           "inputs": {k: str(p) if k in hub else digest(p) for k, p in inputs.items()}}
    if args.overwrite:
        if any(out.iterdir()) and not (out / "run.json").exists() and set(os.listdir(out)) != {".lock"}:
            raise InputError(f"{out} holds files but no run.json, so --overwrite will not delete it; choose another --runs")
        for path in sorted(out.iterdir(), key=lambda p: p.name == "run.json"):  # run.json last: a killed deletion can go on
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif (out / "run.json").exists():
        then = json.loads((out / "run.json").read_text())
        changed = [f"{part[:-1]} {k} was {then[part].get(k)!r}, now {now[part].get(k)!r}"
                   for part in now for k in {**then[part], **now[part]} if then[part].get(k) != now[part].get(k)]
        if changed:
            raise InputError(f"{out} was made with other settings: {'; '.join(changed)}. Use --overwrite or another --runs")
    write_json(out / "run.json", now)
    return out


def save_checkpoint(folder: Path, policy, optimizer, state: dict) -> None:
    """Save policy (a Hugging Face folder), AdamW moments and masters (safetensors) and `state` (JSON, with "step") as one.

    Files go to a new folder first; replacing state.json is the one moment at which the new checkpoint counts.
    """
    if (folder / "state.json").exists() and json.loads((folder / "state.json").read_text()) == state:
        return  # it is this checkpoint already
    new = folder / f"step_{state['step']:06d}"
    shutil.rmtree(new, ignore_errors=True)
    save_model(policy, new / "policy")
    moments = {}
    for name, p in policy.model.named_parameters():
        master = masters_of(optimizer).get(p, p)
        moments |= {f"{name}.{key}": value.contiguous() for key, value in optimizer.state.get(master, {}).items()}
        moments |= {f"{name}.master": master.detach()} if master is not p else {}
    save_file(moments, new / "optimizer.safetensors")
    write_json(folder / "state.json", state)
    for old in folder.glob("step_*"):
        if old != new:
            shutil.rmtree(old)


def drop_checkpoint(folder: Path) -> None:
    """Delete the checkpoint of a finished training; state.json first, so that a killed deletion leaves none rather than half of one."""
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(folder: Path, policy, optimizer) -> dict | None:
    """Put the newest checkpoint of `save_checkpoint` into policy and optimizer; its state, or None if there is none."""
    if not (folder / "state.json").exists():
        return None
    state = json.loads((folder / "state.json").read_text())
    saved = folder / f"step_{state['step']:06d}"
    load_weights(policy, saved / "policy")
    with safe_open(saved / "optimizer.safetensors", "pt") as moments:
        keys = set(moments.keys())
        for name, p in policy.model.named_parameters():
            master = masters_of(optimizer).get(p, p)
            if f"{name}.step" in keys:  # the fused AdamW wants its step count beside the weight
                optimizer.state[master] = {k: moments.get_tensor(f"{name}.{k}").to(p.device) for k in ("step", "exp_avg", "exp_avg_sq")}
            if master is not p:
                master.data.copy_(moments.get_tensor(f"{name}.master"))
    return state


# ---------------------------------------------------------------- examples

def load_examples(path, hidden: bool = False) -> list[dict]:
    """Read and check a data file; every record gets "where" (file and line) and "image" becomes an absolute path.

    A record: {"id": "a1", "image": "images/a1.png", "question": "...", "answer": "7", "choices": null, "source": "toy"},
    and, if the answer is to be read as "integer", "float", "list" or "letter", "answer_type" and "precision" (decimals).
    Raises InputError with file and line on a missing or mistyped field, an unreadable answer, a repeated id, or an image
    that is missing, broken or outside the data folder (a link inside the folder may lead out of it: records make no links).
    Every image must open; of more than 4,096 only an even sample is read to its last byte, the others when they are used.
    hidden=True is for unlabelled prompts: only what a solver may see is kept, "answer" becomes None.
    """
    rows, folder, seen, images = read_jsonl(path), Path(path).resolve().parent, {}, {}
    if not rows:
        raise InputError(f"{path} is empty: it needs one JSON record per line")
    for number, row in enumerate(rows, 1):
        if hidden:
            row = rows[number - 1] = {k: row[k] for k in ("id", "image", "question", "choices", "source", "answer_type", "precision") if k in row} | {"answer": None}
        row["where"] = f"{path} line {number}"
        for name in ("id", "image", "question", *(() if hidden else ("answer",)), "source"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise InputError(f"{row['where']}: field \"{name}\" must be a text that is not empty, found {row.get(name)!r}")
        choices = row.setdefault("choices", None)
        if choices is not None and not (isinstance(choices, list) and 2 <= len(choices) <= len(LETTERS) and all(isinstance(c, str) for c in choices)):
            raise InputError(f"{row['where']}: field \"choices\" must be a list of 2 to {len(LETTERS)} texts, or null")
        if choices and not hidden and choice_index(row["answer"], choices) is None:
            raise InputError(f"{row['where']}: the answer {row['answer']!r} is none of the choices")
        kind, decimals = row.get("answer_type"), row.get("precision")
        if kind not in (None, *ANSWER_TYPES) or type(decimals) not in (int, type(None)) or (decimals or 0) < 0:
            raise InputError(f"{row['where']}: \"answer_type\" must be one of {', '.join(ANSWER_TYPES)} or null, \"precision\" a count of decimals or null")
        if kind and not hidden and canonical(row["answer"], choices, row) is None:
            raise InputError(f"{row['where']}: the answer {row['answer']!r} cannot be read as its answer_type {kind!r}")
        if row["id"] in seen:
            raise InputError(f"{row['where']}: id {row['id']!r} stands already in line {seen[row['id']]}")
        seen[row["id"]] = number
        image = os.path.normpath(folder / row["image"])
        if not image.startswith(os.path.join(folder, "")):
            raise InputError(f"{row['where']}: image {row['image']!r} leaves the data folder {folder}")
        row["image"] = image
        row["image"] = images.setdefault(image, row)["image"]  # one text in memory for all its records
    for k, row in enumerate(images.values()):
        read_image(row, check="bytes" if k % -(-len(images) // 4096) == 0 else "header")
    return rows


def by_id_of(*files: list[dict]) -> dict[str, dict]:
    """{id: example} over the examples of several files; raises InputError if two of them share an id, for one would stand for the other.

    >>> list(by_id_of([{"id": "a", "where": "x line 1"}], [{"id": "b", "where": "y line 1"}]))
    ['a', 'b']
    """
    found: dict = {}
    for example in chain(*files):
        if (first := found.setdefault(example["id"], example)) is not example:
            raise InputError(f"{example['where']}: id {example['id']!r} stands already in {first['where']}; rename one")
    return found


def read_image(example: dict, check: str = "") -> Image.Image | None:
    """The image of an example in RGB, or only a look at the "header" or all "bytes" of its file; raises InputError with the example's file and line.

    What is transparent becomes white, the paper under a drawing; 16-bit grey is scaled to 8 bits.
    """
    try:
        with Image.open(example["image"]) as image:
            if check == "bytes" and image.format == "PNG":
                image.verify()  # its checksums, without unpacking it
            elif check == "bytes":
                image.draft("L", (1, 1))  # an eighth of a JPEG's size takes all its bytes, and little time
                image.load()
            if check:
                return None
            if image.mode.startswith("I"):
                image = image.point(lambda grey: grey / 257).convert("L")
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{example['where']}: image {example['image']} does not exist") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, OSError) as error:
        raise InputError(f"{example['where']}: image {example['image']} cannot be read ({error}); put a whole file in its place") from None


# ---------------------------------------------------------------- answers

NAMES = r"\b(?:answer|correct\s+(?:option|choice))\**\s*(?:is\s*:?|:)\*{0,2}\s*"
LEAD = rf"{NAMES}(?:the\s+(?:(?:final|correct)\s+)?{NAMES})*"  # "**Answer:** The correct answer is"


def extract_answer(response: str, example: dict | None = None) -> str | None:
    r"""The final answer that a response names, or None: none, or two that differ (fails closed).

    Answers are what stands in \boxed{} and what follows "answer is" or "answer:" on its line. With an example, two that
    `canonical` reads alike are one answer: "(B) 12" and "B"; and where it has choices or an answer_type, one that cannot be
    read so ("the answer is the sum of both bars") is no answer, if another follows.

    >>> extract_answer("3 + 4 = 7\nAnswer : 7")
    '7'
    >>> extract_answer("So the answer is (B) 12.")
    '(B) 12'
    >>> extract_answer("Answer: 7\nAnswer: 8") is None
    True
    """
    boxed = [(m.start(), m[1]) for m in re.finditer(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", response)]
    lines = [(m.start(), m[1]) for m in re.finditer(LEAD + r"([^\n]*)", response, flags=re.IGNORECASE) if "\\boxed" not in m[1]]
    named = [a for _, a in sorted(boxed + [(at, a) for at, a in lines if normalize(a) or not boxed])]
    named = [re.sub(r"\*\*([^*]+)\*\*", r"\1", a).strip().strip("*").rstrip(".").strip() for a in named]
    read = [example and canonical(a, example["choices"], example) for a in named]
    typed = example and (example["choices"] or example.get("answer_type"))
    forms = {form or normalize(a) for a, form in zip(named, read) if form or not typed or a is named[-1]}
    return named[-1] if named and named[-1] and len(forms) == 1 else None


@lru_cache(maxsize=1 << 14)  # answers repeat
def undress(answer: str) -> str:
    r"""An answer without Markdown, quotes, LaTeX delimiters, spacing and text commands, degree and percent signs, final full stops.

    >>> undress("**(B)**."), undress("\\(\\text{Yes}\\)"), undress("$45^\\circ$")
    ('(B)', 'Yes', '45')
    """
    text = " ".join(answer.split()).replace("\u2212", "-").replace("{,}", ",")  # the minus sign is no hyphen
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\left|\\right|\\[,;:! $%()\[\]]|\^?\s*\{?\s*(?:\\circ(?![a-z])|\\degree|∘)\s*\}?|[$%°]", "", text)
    return text.strip(" \t\r\n*_`\"'“”‘’").rstrip(".").strip()


@lru_cache(maxsize=1 << 14)
def normalize(answer: str) -> str:
    r"""`undress`, and case, spaces, fractions, roots and thousands separators in one form.

    >>> normalize(" $1,250^\\circ$. "), normalize("2\\sqrt { 3 }"), normalize("1\\frac{1}{2}")
    ('1250', '2√3', '1 1/2')
    """
    text = re.sub(r"\s*([{}])\s*", r"\1", undress(answer).casefold())
    text = re.sub(r"\s*\\sqrt\{(\w+)\}", r"√\1", text).replace("\\pi", "π")
    text = re.sub(r"\\[dt]?frac(?:\{([^{}]+)\}\{([^{}]+)\}|(\d)(\d))", r" \1\3/\2\4", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return " ".join(text.split())


@lru_cache(maxsize=1 << 14)
def number(text: str) -> Fraction | None:
    """The exact number that a text is, or None: '1,250', '-3.50', '3/4', '1 1/2', '7 cm', 'x = 7' are, 'row 7', '7 or 8', '2x' are not.

    >>> number("-3.50"), number("3 / 4"), number("7 million"), number("seven")
    (Fraction(-7, 2), Fraction(3, 4), None, None)
    """
    match = NUMBER.fullmatch(normalize(text))
    if not match or (match[4] and int(match[4]) == 0):
        return None
    value = Fraction(match[3]) / int(match[4] or 1) + int(match[2] or 0)
    return -value if match[1] == "-" else value


def choice_index(answer: str, choices: list[str]) -> int | None:
    """The position of the one choice that an answer names, by letter first, then by text; None if none or several.

    >>> choice_index("(B) 12", ["9", "12"]), choice_index("12", ["9", "12"]), choice_index("A or B", ["9", "12"])
    (1, 1, None)
    """
    letter, rest = lettered(answer)
    reads_as = lambda i, text: is_correct(text, {"answer": choices[i], "choices": None})
    if letter and letter in LETTERS[:len(choices)] and (not rest or reads_as(LETTERS.index(letter), rest)):
        return LETTERS.index(letter)
    same = [i for i, c in enumerate(choices) if normalize(c) == normalize(answer)] or [i for i in range(len(choices)) if reads_as(i, answer)]
    return same[0] if len(same) == 1 else None


def lettered(answer: str) -> tuple[str, str]:
    """The option letter that an answer begins with and the text after it, or two empty texts.

    >>> lettered("(b)"), lettered("Option C: a cat"), lettered("a cat")
    (('B', ''), ('C', 'a cat'), ('', ''))
    """
    match = re.fullmatch(rf"(?:(?:option|choice)\s+)?[(\[]?\s*([{LETTERS}])\s*(?:[)\].:]+\s*(.*))?", undress(answer), flags=re.DOTALL | re.IGNORECASE)
    return (match[1].upper(), normalize(match[2] or "")) if match else ("", "")


def canonical(answer: str | None, choices: list[str] | None, example: dict | None = None) -> str | None:
    """An answer in the form in which two answers are compared and votes are counted; None if it cannot be read.

    example: where its optional fields stand, "answer_type" and "precision"; a letter may bring its option's text if the
    question has it so.

    >>> canonical("(B)", ["9", "12"]), canonical("7.0", None), canonical("A and B", ["9", "12"])
    ('B', '7', None)
    >>> canonical("3.14159", None, {"answer_type": "float", "precision": 2}), canonical("[1, 2.0]", None, {"answer_type": "list"})
    ('3.14', '[1, 2]')
    """
    if answer is None:
        return None
    if choices:
        index = choice_index(answer, choices)
        return None if index is None else LETTERS[index]
    kind, decimals = (example or {}).get("answer_type"), (example or {}).get("precision")
    if kind == "letter":
        letter, rest = lettered(answer)
        option = rf"(?<!\w)\(?{letter}\s*[).:]\s*{re.escape(rest)}\s*(?:[,;]|$|\(?[a-j]\s*[).:])"
        return letter or None if not rest or re.search(option, normalize(example["question"]), flags=re.IGNORECASE) else None
    if kind == "list":
        match = re.fullmatch(r"\[([^\[\]]*)\]|([^\[\]]*)", undress(answer))
        items = [number(item) for item in (match[1] or match[2] or "").split(",")] if match else [None]
        return None if None in items else f"[{', '.join(map(str, items))}]"
    value = number(answer)
    if kind == "float" and value is not None and decimals is not None:
        return f"{round(float(value), decimals) + 0.0:.{decimals}f}"  # + 0.0: there is no negative zero
    return str(value) if value is not None else None if kind else normalize(answer) or None


def is_correct(answer: str | None, example: dict) -> bool:
    """1(a* = a): exact match of canonical answers; one that cannot be read is wrong, and so is a number with another unit than the gold one's.

    >>> [is_correct(a, {"answer": "5 cm", "choices": None}) for a in ("5 cm", "5", "5 m", None)]
    [True, True, False, False]
    """
    mine, gold = (canonical(a, example["choices"], example) for a in (answer, example["answer"]))
    if mine is None or mine != gold or example["choices"]:
        return mine is not None and mine == gold
    numbers = [NUMBER.fullmatch(normalize(a)) for a in (answer, example["answer"])]
    return len({m[5] for m in numbers if m and m[5]}) < 2


# ---------------------------------------------------------------- models and prompts

@dataclass
class Policy:
    """A model with its processor; a PRM is one as well, read at the two tokens in `marks`."""

    model: torch.nn.Module
    processor: object
    eos_ids: list[int]
    pad_id: int
    banned: list[int] = field(default_factory=list)  # image placeholders: in a response they would ask for one more image
    marks: tuple[int, int] | None = None
    optimizer: object = None  # the one that trains it, so that --offload can move its state

    @property
    def tokenizer(self):
        """The tokenizer inside the processor."""
        return self.processor.tokenizer


def dtype_of(args) -> torch.dtype:
    """The dtype of the weights that --dtype asks for on --device."""
    names = {"auto": torch.float32 if args.device == "cpu" else torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if args.dtype not in names:
        raise InputError(f"--dtype {args.dtype} is not one of {', '.join(names)}")
    return names[args.dtype]


def vision_tower(model) -> torch.nn.Module:
    """The vision tower of any family, by the names it goes by; Qwen-VL's (`visual`) includes the projection to the language model.

    Raises InputError, with the names that are there, if the model has none of them.
    """
    for inner in (model, model.base_model):
        for name in ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "vpm", "img_processor"):
            if isinstance(getattr(inner, name, None), torch.nn.Module):
                return getattr(inner, name)
    raise InputError(f"--freeze_vision finds no vision tower in {type(model).__name__}, whose parts are {[n for n, _ in model.base_model.named_children()]}")


def cap_pixels(processor, config, pixels: int) -> None:
    """Cap the pixels of one image by the processor's own resolution settings, which are the families' one difference here.

    Training, scoring and vLLM all read these settings from the processor (and save_model writes them beside the weights).
    An image keeps at least one tile, so a cap below one tile is refused, as is any cap for a family without such a setting.
    """
    image, size = processor.image_processor, dict(processor.image_processor.size or {})

    def tiles(tile: int) -> int:  # how many tiles of so many pixels the cap allows
        if tile > pixels:
            raise InputError(f"--max_pixels {pixels} is below the {tile} pixels that {type(image).__name__} always makes of an image; raise it")
        return pixels // tile

    if hasattr(image, "merge_size"):  # Qwen-VL: "edges" that are areas
        tiles((image.patch_size * image.merge_size) ** 2)
        image.size = {"shortest_edge": min(size["shortest_edge"], pixels), "longest_edge": min(size["longest_edge"], pixels)}
    elif hasattr(image, "max_slice_nums"):  # MiniCPM-V
        image.max_slice_nums = min(image.max_slice_nums, tiles(image.scale_resolution ** 2))
    elif hasattr(image, "image_grid_pinpoints"):  # LLaVA: the model unpads by the same list
        tiles(min(height * width for height, width in image.image_grid_pinpoints))
        image.image_grid_pinpoints = config.image_grid_pinpoints = [[h, w] for h, w in image.image_grid_pinpoints if h * w <= pixels]
    elif hasattr(image, "max_image_size"):  # Idefics3, SmolVLM: the longest edge, a whole number of tiles
        tile = image.max_image_size["longest_edge"]
        image.size = {"longest_edge": min(size["longest_edge"], math.isqrt(tiles(tile * tile)) * tile)}
    elif hasattr(image, "max_patches"):  # InternVL
        image.max_patches = min(image.max_patches, tiles(size["height"] * size["width"]))
    elif {"height", "width"} <= size.keys():  # Gemma 3 and others of one fixed size
        tiles(size["height"] * size["width"])
    else:
        raise InputError(f"--max_pixels knows no resolution setting of {type(image).__name__}; leave it at 0 and set the checkpoint's preprocessor_config.json")


def load_policy(path, args) -> Policy:
    """Load a Hugging Face image-text-to-text checkpoint in the dtype that --dtype asks for, in eval mode.

    Raises InputError for a folder that is no checkpoint, or the checkpoint of a text-only model.
    """
    close_engine()
    dtype = dtype_of(args)
    flash = args.attention == "auto" and args.device != "cpu" and dtype == torch.bfloat16 and transformers.utils.is_flash_attn_2_available()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
        if type(config) not in AutoModelForImageTextToText._model_mapping and not hasattr(config, "auto_map"):
            raise InputError(f"{path} holds a {config.model_type} model, which takes no images; name a vision-language checkpoint")
        flash &= not config.model_type.startswith("gemma3")  # its image tokens see each other both ways, which flash attention leaves out
        attention = "flash_attention_2" if flash else None if args.attention == "auto" else args.attention  # None is sdpa where the model has it
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=args.trust_remote_code)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation=attention, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        hint = "; if you trust that code, pass --trust_remote_code" if "trust_remote_code" in str(error) else ""
        raise InputError(f"{path} cannot be loaded as a Hugging Face checkpoint: {str(error).strip().splitlines()[0]}{hint}") from None
    if args.max_pixels:
        cap_pixels(processor, model.config, args.max_pixels)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # acts in train mode only
        model.disable_input_require_grads()  # only the reentrant kind needs them; they would send gradients through a frozen vision tower
    if args.freeze_vision:
        vision_tower(model).requires_grad_(False)
    eos = model.generation_config.eos_token_id or processor.tokenizer.eos_token_id
    eos = closing_first(processor, eos if isinstance(eos, list) else [eos])
    pad = processor.tokenizer.pad_token_id
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    banned = sorted({i for i in (getattr(config, name, None) for name in names) if isinstance(i, int)})
    return Policy(model.to(args.device).eval(), processor, eos, eos[0] if pad is None else pad, banned)


def closing_first(processor, eos: list[int]) -> list[int]:
    """A model's end tokens, those first with which its chat template closes an assistant's turn: what training should end with."""
    if len(eos) == 1:
        return eos
    talk = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in (("user", "Q"), ("assistant", "@@"))]
    tail = processor.tokenizer(processor.apply_chat_template(talk, tokenize=False).rpartition("@@")[2], add_special_tokens=False)["input_ids"]
    return sorted(eos, key=lambda token: token not in tail)  # stable


def load_prm(path, args) -> Policy:
    """A PRM that stage 02 wrote: a policy whose prm.json names the tokens for a good and a bad step."""
    prm = load_policy(path, args)
    prm.marks = tuple(json.loads((Path(path) / "prm.json").read_text())["marks"])
    return prm


def save_model(policy: Policy, path) -> None:
    """Save model and processor as a plain Hugging Face folder; whole or not at all."""
    part = Path(f"{path}.part")
    shutil.rmtree(part, ignore_errors=True)
    policy.model.save_pretrained(part)
    policy.processor.save_pretrained(part)
    if policy.marks:
        write_json(part / "prm.json", {"marks": policy.marks})
    shutil.rmtree(path, ignore_errors=True)
    os.replace(part, path)


def load_weights(policy: Policy, path) -> None:
    """Copy the weights of a checkpoint folder into a model of the same shape."""
    close_engine()
    fresh = type(policy.model).from_pretrained(path, config=policy.model.config, dtype=policy.model.dtype)  # class and config are here: no remote code is looked up
    policy.model.load_state_dict(fresh.state_dict())
    for weight, master in masters_of(policy.optimizer).items():
        master.data.copy_(weight)  # else the next optimizer step would bring the old weights back


def user_text(example: dict, instruction: str) -> str:
    r"""What the user says beside the image: question, lettered choices, instruction.

    >>> user_text({"question": "How many?", "choices": ["7", "9"]}, "Think.")
    'How many?\nChoices:\n(A) 7\n(B) 9\nThink.'
    """
    options = [f"({letter}) {text}" for letter, text in zip(LETTERS, example["choices"] or [])]
    return "\n".join([example["question"], *(["Choices:", *options] if options else []), *([instruction] if instruction else [])])


def talk_of(example: dict, args) -> list[dict]:
    """The conversation that a chat template takes: one user turn of the image and the text."""
    return [{"role": "user", "content": [{"type": "image", "image": read_image(example)}, {"type": "text", "text": user_text(example, args.instruction)}]}]


def encode_prompts(policy: Policy, examples: list[dict], args) -> dict[str, torch.Tensor]:
    """Prompts by the processor's own chat template, left-padded: input_ids and attention_mask (B, L), and its image tensors.

    Raises InputError, naming file and line, for a prompt of more than args.max_prompt_tokens tokens.
    """
    talks = [talk_of(example, args) for example in examples]
    try:
        batch = policy.processor.apply_chat_template(talks, tokenize=True, add_generation_prompt=True, return_dict=True,
                                                     processor_kwargs=dict(padding=True, padding_side="left", return_tensors="pt"))
    except ValueError as error:  # such as an image 200 times wider than high
        raise InputError(f"{', '.join(e['where'] for e in examples[:8])}: the processor refuses one of these prompts ({error}); "
                         "put another image file in its place, or remove its record and start anew") from None
    for example, length in zip(examples, batch["attention_mask"].sum(1).tolist()):
        if length > args.max_prompt_tokens:
            raise InputError(f"{example['where']}: the prompt has {length} tokens, more than --max_prompt_tokens {args.max_prompt_tokens}; "
                             "raise the flag, or remove the record and start anew")
    return {k: v.to(policy.model.device) for k, v in batch.items()}


def check_longest_prompts(policy: Policy, examples: list[dict], args, how_many: int = 32) -> None:
    """Encode the prompts with the longest texts before hours are spent; raises what `encode_prompts` raises."""
    longest = sorted(examples, key=lambda e: -len(user_text(e, args.instruction)))[:how_many]
    encode_prompts(policy, longest, args)


def append_tokens(batch: dict, tails: list[list[int]], pad_id: int, left: bool = False) -> dict[str, torch.Tensor]:
    """Append token ids to every left-padded prompt; the rows stay left-padded (left=True) or become padded on both sides.

    >>> batch = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])}
    >>> append_tokens(batch, [[7, 8]], 0)["input_ids"].tolist()
    [[5, 6, 7, 8]]
    """
    width = max(map(len, tails))
    fill = [[pad_id] * (width - len(t)) for t in tails]
    ids = torch.tensor([t + f for t, f in zip(tails, fill)], dtype=torch.long).view(len(tails), width)  # (B, W)
    seen = torch.tensor([[1] * len(t) + [0] * len(f) for t, f in zip(tails, fill)], dtype=torch.long).view(len(tails), width)
    shape, joined = batch["input_ids"].shape, dict(batch)
    for name, value in batch.items():
        if value.shape == shape:  # every per-token tensor grows along: ids, mask, token types (text tokens are type 0)
            tail = {"input_ids": ids, "attention_mask": seen}.get(name, torch.zeros_like(ids)).to(value)
            joined[name] = torch.cat([value, tail], 1)  # (B, L + W)
    if left:  # move the padding between tail and edge to the front of the row
        order = joined["attention_mask"].argsort(dim=1, stable=True)  # zeros first, tokens in their order
        joined = {k: v.gather(1, order) if v.shape == order.shape else v for k, v in joined.items()}
    return joined


# ---------------------------------------------------------------- generation

@dataclass
class Response:
    """One sampled response: its token ids (closing EOS left out), their text, and whether it ended by itself."""

    token_ids: list[int]
    text: str
    finished: bool
    logprobs: list[float] | None = None  # on demand: of each sampled token, the closing EOS included, at temperature 1


def seed_of(*parts) -> int:
    """A 48-bit seed that belongs to exactly these parts, e.g. (seed, stage, iteration, prompt id, sample).

    >>> seed_of(0, "train", 1, "a7", 3) == seed_of(0, "train", 1, "a7", 3) != seed_of(0, "train", 1, "a7", 4)
    True
    """
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:6], "big")


def take_rows(policy: Policy, cache, mask: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Keep, repeat or reorder the rows of a cache, in place, and of its attention mask (B, L), returned."""
    for layer in cache.layers:  # the layers of linear attention (MiniCPM-V 4.6) hold a state, not keys and values, and have the second method only
        getattr(layer, "batch_select_indices", layer.reorder_cache)(index)
    inner = policy.model.base_model
    if getattr(inner, "rope_deltas", None) is not None:  # families with 3-D positions keep one offset per row
        inner.rope_deltas = inner.rope_deltas[index]
    return mask[index]


def cached_positions(policy: Policy, mask: torch.Tensor, width: int) -> dict:
    """{"position_ids": (3, B, width)} of the last tokens of mask (B, L) behind a cache, for families with 3-D positions (Qwen-VL); else {}.

    Left to itself their forward pass would take the positions of the whole mask; the other families count on from their cache.
    """
    deltas = getattr(policy.model.base_model, "rope_deltas", None)  # (B, 1) next position minus tokens so far
    return {} if deltas is None else {"position_ids": (mask.cumsum(-1)[:, -width:] - 1 + deltas).expand(3, -1, -1)}


def slices_of_rows(groups: list[list], rows: int, prompts: int = 1 << 30) -> list[slice]:
    """Cut prompts into consecutive slices of at most `rows` responses and `prompts` prompts each; a prompt is never split.

    >>> slices_of_rows([[1, 2], [3], [4, 5, 6, 7], [8]], 3)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    slices, start = [], 0
    while start < len(groups):
        end = start + 1
        while end < len(groups) and end - start < prompts and sum(map(len, groups[start:end + 1])) <= rows:
            end += 1
        slices.append(slice(start, end))
        start = end
    return slices


def prompts_at_once(args) -> int:
    """How many prompts, images included, one forward pass may read: on a GPU four times what one training pass holds with its gradients."""
    return 1 << 30 if args.device == "cpu" else 4 * args.micro_batch


class RoomyLayer(DynamicLayer):
    """A key-value cache layer with free room at its end; DynamicLayer copies the whole cache for every token (measured: 37 % of the time)."""

    def __init__(self, layer: DynamicLayer):
        self.__dict__.update(layer.__dict__)
        self.rooms = [self.keys, self.values]

    def update(self, key_states, value_states, *args, **kwargs):
        """Write new states (b, heads, w, d) behind the cached ones; return all of them, (b, heads, L + w, d) each."""
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self.rooms[0].data_ptr() != self.keys.data_ptr() or self.rooms[0].shape[2] < end:  # rows were selected, or it is full
            self.rooms = [F.pad(x, (0, 0, 0, end - start + 32)) for x in (self.keys, self.values)]
        for room, states in zip(self.rooms, (key_states, value_states)):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)
        return self.keys, self.values


def generate(policy: Policy, examples: list[dict], seeds: list[list[int]], temperature: float, args,
             prefixes: list[list[int]] | None = None, logprobs: bool = False) -> list[list[Response]]:
    """Sample len(seeds[i]) responses to example i, each from its own seed; greedily at temperature 0.

    prefixes: token ids with which each response has already begun (a partial assistant turn); they are part of the
    returned token_ids. Every prompt is encoded once for all its samples, and rows that have ended leave the batch, so
    that no step is spent on them. A sample depends on its seed and its prompt, not on its neighbours. With --engine vllm a
    vLLM engine does all this; it starts when it is first needed and holds the policy's weights until they are trained on.
    """
    if choose_engine(args.engine, args.device) == "vllm":
        return engine_generate(policy, examples, seeds, temperature, args, prefixes, logprobs)
    threads, one_by_one = torch.get_num_threads(), args.device != "cpu" or hasattr(policy.model.base_model, "rope_deltas")
    workers = 1 if one_by_one else min(2, threads)  # two batches side by side: small matrices keep one core busy, not two
    parts = slices_of_rows(seeds, min(args.rows, -(-sum(map(len, seeds)) // workers)), prompts_at_once(args))
    prefixes = prefixes or [[] for _ in examples]
    jobs = ((append_tokens(encode_prompts(policy, examples[part], args), prefixes[part], policy.pad_id, left=True), seeds[part], prefixes[part])
            for part in parts)  # one by one on a GPU: the images of a whole chunk need not fit
    try:
        torch.set_num_threads(threads // workers)
        with ThreadPoolExecutor(workers) as pool:
            def run(job):
                return decode(policy, *job, temperature, args, logprobs)
            decoded = pool.map(run, jobs) if workers > 1 else map(run, jobs)
            decoded = [pair for part in decoded for pair in part]
    finally:
        torch.set_num_threads(threads)
    responses = iter([Response(ids, policy.tokenizer.decode(ids, skip_special_tokens=True), ended, chances) for ids, ended, chances in decoded])
    return [[next(responses) for _ in row] for row in seeds]


@torch.inference_mode()
def decode(policy: Policy, batch: dict, seeds, prefixes, temperature: float, args, logprobs: bool = False) -> list[tuple[list[int], bool, list | None]]:
    """One batch of `generate`: prefill the prompts, repeat their caches per sample, then one token per step and row.

    Returns (token ids, ended by itself?, logprobs or None) of every sample, prompt by prompt.
    """
    device, n = policy.model.device, sum(map(len, seeds))
    owner = torch.tensor([i for i, s in enumerate(seeds) for _ in s], device=device)  # (n,) prompt of each row
    uniform = torch.stack([torch.rand(args.max_new_tokens, generator=torch.Generator().manual_seed(s))
                           for row in seeds for s in row]).to(device)  # (n, T) one draw per row and step
    out = policy.model(**batch, use_cache=True, logits_to_keep=1)
    cache, logits = out.past_key_values, out.logits[:, -1].float()[owner]  # (n, V)
    mask = take_rows(policy, cache, batch["attention_mask"], owner)  # (n, L)
    cache.layers = [RoomyLayer(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    tokens = torch.full((n, args.max_new_tokens), policy.pad_id, device=device)  # (n, T)
    length = torch.full((n,), args.max_new_tokens, device=device)  # (n,) tokens before the EOS
    rows, ends = torch.arange(n, device=device), torch.tensor(policy.eos_ids, device=device)
    chances = torch.zeros(tokens.shape, device=device)  # (n, T) logprob of each token
    room = [args.max_new_tokens - len(p) for p in prefixes]
    budget = torch.tensor(room, device=device)[owner]  # (n,) a prefix counts towards the response's length
    finished = torch.zeros(n, dtype=torch.bool, device=device)
    alive = torch.ones(n, dtype=torch.bool, device=device)  # (b,) of the rows still in the batch
    for t in range(max(room)):
        raw = logits.log_softmax(-1) if logprobs else None  # (b, V)
        logits[:, policy.banned] = -torch.inf
        if temperature > 0:  # inverse of the cumulative distribution at the row's own draw
            cumulative = (logits / temperature).softmax(-1).cumsum(-1)  # (b, V)
            token = torch.searchsorted(cumulative, uniform[rows, t, None] * cumulative[:, -1:], right=True)[:, 0]
            token = token.clamp(max=logits.shape[1] - 1)
        else:
            token = logits.argmax(-1)  # (b,)
        tokens[rows, t] = token
        if logprobs:
            chances[rows, t] = raw.gather(1, token[:, None])[:, 0]
        ended = alive & torch.isin(token, ends)
        full = alive & ~ended & (t + 1 >= budget[rows])
        length[rows[ended]], finished[rows[ended]], length[rows[full]] = t, True, t + 1
        alive = alive & ~ended & ~full
        if not alive.any():
            break
        if alive.float().mean() < 0.8:  # rows that have ended leave; copying the cache costs about one step
            keep = alive.nonzero()[:, 0]
            rows, token, alive, mask = rows[keep], token[keep], alive[keep], take_rows(policy, cache, mask, keep)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits = policy.model(input_ids=token[:, None], attention_mask=mask, past_key_values=cache, use_cache=True,
                              **cached_positions(policy, mask, 1)).logits[:, -1].float()
    tokens, length = tokens.tolist(), length.tolist()
    return [(prefixes[i] + tokens[k][:length[k]], ended, chances[k, :length[k] + ended].tolist() if logprobs else None)
            for k, (i, ended) in enumerate(zip(owner.tolist(), finished.tolist()))]


# ---------------------------------------------------------------- generation by vLLM

ENGINES = []  # (policy, vLLM engine that holds its weights, the trainer's device): at most one; it lives from the first generation to the next training


@lru_cache(maxsize=None)
def choose_engine(wanted: str, device: str) -> str:
    """"vllm" or "transformers" for the flags --engine and --device; the choice and its reason are printed once.

    Raises InputError for an unknown name, and where vLLM is asked for and cannot run.
    """
    if wanted not in ("auto", "vllm", "transformers"):
        raise InputError(f"--engine {wanted} is not one of auto, vllm, transformers")
    lack = "asked for" if wanted == "transformers" else vllm_lacks(device)
    if lack and wanted == "vllm":
        raise InputError(f"--engine vllm cannot run: {lack}; see the README's GPU section, or use --engine transformers")
    print(f"engine: {'transformers' if lack else 'vllm'} ({lack or 'it is installed for ' + device})", flush=True)
    return "transformers" if lack else "vllm"


def vllm_lacks(device: str) -> str:
    """Why vLLM cannot generate on this device; an empty text if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a forked engine would inherit the lock of the run folder
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        return f"vLLM cannot be imported ({error})"
    if torch.device(device).index:
        return "vLLM takes the first visible GPU, so name another one by CUDA_VISIBLE_DEVICES, not by --device"
    return "" if current_platform.device_type == torch.device(device).type else f"vLLM is built for {current_platform.device_type or 'no device here'}, not for {device}"


def move_trainer(policy: Policy, device) -> None:
    """Move a policy's weights and its optimizer's masters and moments to a device, in place."""
    policy.model.to(device)
    for p in (p for group in policy.optimizer.param_groups for p in group["params"]) if policy.optimizer else ():
        p.data = p.data.to(device)
        if p in policy.optimizer.state:
            policy.optimizer.state[p] = {k: v.to(device) for k, v in policy.optimizer.state[p].items()}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def close_engine() -> None:
    """End the engine's process, so that all its memory is free, and bring the trainer's tensors back."""
    while ENGINES:
        policy, engine, device = ENGINES.pop()
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        for child in multiprocessing.active_children():  # until its memory is really free
            child.join(30)
        move_trainer(policy, device)


def start_engine(policy: Policy, example: dict, args) -> None:
    """Start a vLLM engine with the policy's weights as they are now, and prove on one prompt that it is the same model.

    The policy is written as a checkpoint, processor included, and a new process reads it. Raises InputError if vLLM expands the
    prompt to other token ids than the trainer, or if its greedy logprobs differ by more than rounding.
    """
    import vllm
    close_engine()
    clock, device, text = time.time(), policy.model.device, policy.model.config.get_text_config()
    ids = encode_prompts(policy, [example], args)["input_ids"][0].tolist()
    probe = replace(args, engine="transformers", max_new_tokens=min(16, args.max_new_tokens))
    wanted = generate(policy, [example], [[0]], 0.0, probe, logprobs=True)[0][0]
    Path(args.runs).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="engine-", dir=args.runs) as folder:
        save_model(policy, Path(folder) / "policy")
        if args.offload:
            move_trainer(policy, "cpu")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what training left in the allocator counts as used memory for vLLM
        try:
            engine = vllm.LLM(f"{folder}/policy", dtype=str(policy.model.dtype).removeprefix("torch."), gpu_memory_utilization=args.engine_memory,
                              max_model_len=min(args.max_prompt_tokens + args.max_new_tokens, getattr(text, "max_position_embeddings", 1 << 20)), enable_prefix_caching=True,
                              limit_mm_per_prompt={"image": 1, "video": 0}, generation_config="vllm", trust_remote_code=args.trust_remote_code,
                              enforce_eager=args.device == "cpu", disable_log_stats=True,
                              **({"enable_chunked_prefill": False} if args.device == "cpu" else {}))  # a seeded prompt cut in two crashes its CPU sampler
        except (ValueError, RuntimeError) as error:
            raise InputError(f"vLLM did not start ({str(error).splitlines()[0]}); its own words stand above. If it lacks memory, change --engine_memory "
                             f"(now {args.engine_memory}) or use --offload; --engine transformers does without it") from None
        ENGINES.append((policy, engine, device))
        off = probe_engine(policy, engine, example, ids, wanted, probe)
    print(f"engine: vLLM started in {time.time() - clock:.0f} s; logprobs of {len(wanted.logprobs)} tokens within {off:.4f} of the trainer's", flush=True)


def probe_engine(policy: Policy, engine, example: dict, ids: list[int], wanted: Response, args) -> float:
    """Compare the engine with the trainer on one prompt; the largest difference of logprobs, or InputError if it is too large.

    ids: the trainer's prompt, expanded. wanted: its greedy response with logprobs. Where rounding lets the two choose another
    token, the comparison ends with that token.
    """
    (output,), (theirs,) = ask_engine(policy, engine, [example], [[0]], 0.0, args, [[]], True)
    for place, (a, b) in enumerate(zip([*ids, None], [*output.prompt_token_ids, None])):
        if a != b:
            raise InputError(f"vLLM and the trainer read {example['where']} differently, first at token {place} of the prompt: trainer {a}, vLLM {b}; "
                             "use --engine transformers for this model")
    exact, off = policy.model.dtype == torch.float32, []  # differences in nats; bfloat16 rounds a logit of 20 by 0.06
    for place, (a, b) in enumerate(zip(wanted.logprobs, theirs[0].logprobs)):
        off.append(abs(a - b))
        if wanted.token_ids[place:place + 1] != theirs[0].token_ids[place:place + 1]:
            break
    if max(off) > (0.02 if exact else 0.3) and (exact or len(off) < 5 or sum(off) / len(off) > 0.1):  # in bfloat16 one token of many may be far off
        place = off.index(max(off))
        raise InputError(f"vLLM does not hold the policy's weights: greedy logprob {place} of {example['where']} is {theirs[0].logprobs[place]:.4f} there, "
                         f"{wanted.logprobs[place]:.4f} in the trainer; use --engine transformers")
    return max(off)


def ask_engine(policy: Policy, engine, examples, seeds, temperature: float, args, prefixes, logprobs: bool) -> tuple[list, list[list[Response]]]:
    """vLLM's raw outputs, one per sample, and the responses by prompt. Every sample is a request of its own, with its own seed.

    Prompts go in as token ids with unexpanded image placeholders, so that a prefix is continued exactly where it ends.
    """
    from vllm import SamplingParams
    prompts, settings = [], []
    for example, row, prefix in zip(examples, seeds, prefixes):
        talk, bos = talk_of(example, args), policy.tokenizer.bos_token
        text = policy.processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ids = policy.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
        prompts += [{"prompt_token_ids": ids + prefix, "multi_modal_data": {"image": talk[0]["content"][0]["image"]}}] * len(row)
        settings += [SamplingParams(temperature=temperature, seed=seed, max_tokens=max(1, args.max_new_tokens - len(prefix)), stop_token_ids=policy.eos_ids,
                                    logit_bias={i: -100.0 for i in policy.banned}, logprobs=0 if logprobs else None, detokenize=False) for seed in row]
    try:
        outputs, responses = engine.generate(prompts, settings, use_tqdm=False), []
    except ValueError as error:
        raise InputError(f"vLLM refuses a prompt ({str(error).splitlines()[0]}); raise --max_prompt_tokens, or remove its record and start anew") from None
    for output, (example, prefix) in zip(outputs, ((e, p) for e, p, row in zip(examples, prefixes, seeds) for _ in row)):
        if (length := len(output.prompt_token_ids) - len(prefix)) > args.max_prompt_tokens:
            raise InputError(f"{example['where']}: the prompt has {length} tokens, more than --max_prompt_tokens {args.max_prompt_tokens}; "
                             "raise the flag, or remove the record and start anew")
        sampled = output.outputs[0]
        tokens, ended = list(sampled.token_ids), sampled.finish_reason == "stop"
        chances = [step[token].logprob for step, token in zip(sampled.logprobs, tokens)] if logprobs else None
        ids = prefix + (tokens[:-1] if ended and tokens[-1] in policy.eos_ids else tokens)
        responses.append(Response(ids, policy.tokenizer.decode(ids, skip_special_tokens=True), ended, chances))
    flat = iter(responses)
    return outputs, [[next(flat) for _ in row] for row in seeds]


def engine_generate(policy: Policy, examples, seeds, temperature: float, args, prefixes=None, logprobs: bool = False) -> list[list[Response]]:
    """`generate` by vLLM, on an engine that holds this policy's weights."""
    if not (ENGINES and ENGINES[0][0] is policy):
        start_engine(policy, examples[0], args)
    return ask_engine(policy, ENGINES[0][1], examples, seeds, temperature, args, prefixes or [[] for _ in examples], logprobs)[1]


# ---------------------------------------------------------------- steps and PRM scores

@lru_cache(maxsize=None)
def token_text(tokenizer, token: int) -> str:
    """The text of one token; decoding is slow and a response has many tokens."""
    return tokenizer.decode([token])


def step_ends(token_ids: list[int], tokenizer) -> list[int]:
    r"""Where each step of a response ends: exclusive indices into its token ids; the last is the response's length.

    A step is a line that holds more than white space and ends with the token that holds its line break; blank lines
    belong to the step before them. A response without a step gives an empty list.

    >>> class Words:
    ...     def decode(self, ids): return {1: "3 + 4 = 7", 2: "\n", 3: "Answer : 7"}[ids[0]]
    >>> step_ends([1, 2, 2, 3], Words())
    [3, 4]
    """
    ends, content = [], False
    for i, token in enumerate(token_ids):
        text = token_text(tokenizer, token)
        if "\n" in text:
            if content or text.split("\n")[0].strip():
                ends.append(i + 1)
            elif ends:
                ends[-1] = i + 1
            content = bool(text.rsplit("\n", 1)[1].strip())
        else:
            content = content or bool(text.strip())
    if content:
        ends.append(len(token_ids))
    elif ends:
        ends[-1] = len(token_ids)
    return ends


def step_logits(prm: Policy, hidden: torch.Tensor, ends: list[list[int]], offset: int) -> torch.Tensor:
    """Logit of "this step is good" for every step of a batch: the ONE place where a step's score is read.

    hidden: (B, L, H) last hidden states; a step that ends at `end` is read at position offset + end - 1, its own last
    token. Good and bad are two tokens of the vocabulary (prm.marks), so a PRM stays a plain language-model checkpoint.
    Returns (number of steps in the batch,), row by row.
    """
    row = torch.tensor([i for i, e in enumerate(ends) for _ in e], dtype=torch.long, device=hidden.device)
    position = torch.tensor([offset + end - 1 for e in ends for end in e], dtype=torch.long, device=hidden.device)
    good, bad = prm.model.get_output_embeddings().weight[list(prm.marks)].float()  # (H,) each
    return hidden[row, position].float() @ (good - bad)  # (S,)


@torch.inference_mode()
def score_steps(prm: Policy, examples: list[dict], responses: list[list[list[int]]], args) -> list[list[list[float]]]:
    """f(s_j): the PRM's score in [0, 1] of every step of responses[i][k] to example i, in one forward pass per batch.

    The prompt, image included, runs once for all responses to it. A response without a step gets an empty list.
    """
    scores: list[list[list[float]]] = [[] for _ in responses]
    full = [i for i, row in enumerate(responses) if row]  # a prompt without a response is not even read
    for part in slices_of_rows([responses[i] for i in full], args.rows, prompts_at_once(args)):
        for i, row in zip(full[part], score_batch(prm, [examples[i] for i in full[part]], [responses[i] for i in full[part]], args)):
            scores[i] = row
    return scores


def score_batch(prm: Policy, examples, responses, args) -> list[list[list[float]]]:
    """One batch of `score_steps`."""
    flat = [ids for row in responses for ids in row]
    ends = [step_ends(ids, prm.tokenizer) for ids in flat]
    if not any(ends):
        return [[[] for _ in row] for row in responses]
    device, inner = prm.model.device, prm.model.base_model
    owner = torch.tensor([i for i, row in enumerate(responses) for _ in row], device=device)  # (n,)
    batch = encode_prompts(prm, examples, args)
    prompts = inner(**batch, use_cache=True).past_key_values
    deltas, scores = getattr(inner, "rope_deltas", None), [[] for _ in flat]
    parts, length = [], batch["input_ids"].shape[1]
    for k in sorted((k for k in range(len(flat)) if ends[k]), key=lambda k: len(flat[k])):  # responses of like length together: little is spent on padding
        if parts and len(parts[-1]) < 128 and (len(parts[-1]) + 1) * (length + len(flat[k])) <= 1 << 16:
            parts[-1].append(k)
        else:
            parts.append([k])
    for part in parts:
        cache = copy(prompts)  # choosing rows makes new keys and values, so these can be shared
        cache.layers = [copy(layer) if type(layer) is DynamicLayer else deepcopy(layer) for layer in prompts.layers]
        if deltas is not None:
            inner.rope_deltas = deltas
        mask = take_rows(prm, cache, batch["attention_mask"], owner[part])  # (b, L)
        tails = append_tokens({"input_ids": mask[:, :0], "attention_mask": mask[:, :0]}, [flat[k] for k in part], prm.pad_id)
        mask = torch.cat([mask, tails["attention_mask"]], 1)  # (b, L + W)
        hidden = inner(input_ids=tails["input_ids"], attention_mask=mask, past_key_values=cache, use_cache=True,
                       **cached_positions(prm, mask, tails["input_ids"].shape[1])).last_hidden_state  # (b, W, H)
        good = iter(step_logits(prm, hidden, [ends[k] for k in part], 0).sigmoid().tolist())
        for k in part:
            scores[k] = [next(good) for _ in ends[k]]
    by_row = iter(scores)
    return [[next(by_row) for _ in row] for row in responses]


def response_reward(scores: list[float], aggregate: str = "min") -> float:
    """R_p(y) = min_j f(s_j), or another aggregate, and -1, below every score, for a response without a step (paper, section 2).

    >>> response_reward([0.9, 0.2, 0.7]), response_reward([]), response_reward([0.5, 0.5], "product")
    (0.2, -1.0, 0.25)
    """
    return AGGREGATES[aggregate](scores) if scores else -1.0


# ---------------------------------------------------------------- selection and metrics

def top_k(rewards: list[float], k: int) -> list[int]:
    """Indices of the k largest rewards, largest first; of equal ones the earlier sample wins.

    >>> top_k([0.2, 0.9, 0.9, 0.5], 2)
    [1, 2]
    """
    return sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))[:k]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    >>> round(pass_at_k(4, 1, 2), 6)
    0.5
    """
    if not 0 < k <= n:
        raise ValueError(f"Pass@{k} needs at least {k} samples, found {n}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def reward_pass_at_k(rewards: list[float], correct: list[bool], k: int) -> bool:
    """Whether one of the k samples that the reward ranks first, of all samples, is right (paper, section 5).

    >>> reward_pass_at_k([0.9, 0.1, 0.8], [False, True, False], 2)
    False
    """
    return any(correct[i] for i in top_k(rewards, k))


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


def load_checker(spec: str):
    """The function FILE:FUNCTION(response, example) that knows whether a chain is right, or None; only reports use it."""
    path, name = spec.rsplit(":", 1)
    if not Path(path).is_file():
        raise InputError(f"--chain_checker names {path}, which does not exist")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("chain_checker", path))
    module.__spec__.loader.exec_module(module)
    return getattr(module, name)


def search_temperature(grid: list[float], objective, current: float) -> tuple[float, list[dict]]:
    """T <- argmax of objective(T) over the grid; of equal ones the nearest to the current T, then the lower.

    Returns (best temperature, the whole curve as [{"temperature", "objective"}, ...]) (paper, section 5).
    """
    curve = [{"temperature": t, "objective": objective(t)} for t in grid]
    best = min(curve, key=lambda row: (-row["objective"], round(abs(row["temperature"] - current), 6), row["temperature"]))
    return best["temperature"], curve


def checked(response: Response, example: dict) -> dict:
    """The part of a JSON row that says what a response is and whether it is right; a cut response has no final answer."""
    answer = extract_answer(response.text, example) if response.finished else None
    return {"response": response.text, "token_ids": response.token_ids, "finished": response.finished,
            "answer": canonical(answer, example["choices"], example), "correct": is_correct(answer, example)}


def verdict_if_wrong(row: dict) -> dict:
    """What is kept in memory of a row that nothing trains on: see `append_chunks`."""
    return row if row["correct"] else {key: row[key] for key in ("id", "answer", "correct")}


def sample_rows(policy: Policy, examples: list[dict], n: int, temperature: float, purpose: str, iteration: int, args,
                prm: Policy | None = None, right_only: bool = False) -> list[dict]:
    """n checked samples per prompt as JSON rows, each seeded by (purpose, iteration, prompt, sample).

    With a PRM also step scores and reward: R_p of every sample, or (right_only) R = 1(a = a*) x R_p, whose wrong
    samples have reward 0 and need no scoring.
    """
    seeds = [[seed_of(args.seed, purpose, iteration, e["id"], k) for k in range(n)] for e in examples]
    responses = generate(policy, examples, seeds, temperature, args)
    rows = []
    for i, example in enumerate(examples):
        for k, response in enumerate(responses[i]):
            rows.append({"id": example["id"], "iteration": iteration, "sample": k, "temperature": temperature, "seed": seeds[i][k], **checked(response, example)})
    if prm:
        wanted = [[row for row in rows[i * n:(i + 1) * n] if row["finished"] and (row["correct"] or not right_only)] for i in range(len(examples))]
        scores = score_steps(prm, examples, [[row["token_ids"] for row in group] for group in wanted], args)
        for row in rows:  # a cut response is below every score; a wrong one has R = 0
            row |= {"step_scores": [], "reward": 0.0 if right_only else -1.0}
        for row, steps in zip(sum(wanted, []), sum(scores, [])):
            row |= {"step_scores": [round(f, 6) for f in steps], "reward": round(response_reward(steps, args.aggregate), 6)}
    return rows


def distinct(rows: list[dict]) -> list[dict]:
    """Identical responses to one prompt once, the first of them, in file order.

    >>> [row["n"] for row in distinct([{"id": p, "token_ids": t, "n": n} for n, (p, t) in enumerate((("a", [1]), ("a", [1]), ("b", [1]), ("a", [2])))])]
    [0, 2, 3]
    """
    first: dict = {}
    for row in rows:
        first.setdefault((row["id"], tuple(row["token_ids"])), row)
    return list(first.values())


def grouped(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by prompt id, in file order."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return groups


# ---------------------------------------------------------------- training

def sft_loss(policy: Policy, examples: list[dict], targets: list[list[int]], args) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of the responses and their closing EOS, nothing else; and the number of those tokens.

    targets: response token ids without EOS, one list per example.
    """
    prompts = encode_prompts(policy, examples, args)
    tails = [ids + [policy.eos_ids[0]] for ids in targets]
    batch, width = append_tokens(prompts, tails, policy.pad_id), prompts["input_ids"].shape[1]
    hidden = policy.model.base_model(**batch, use_cache=False).last_hidden_state  # (B, L + W, H)
    chosen = batch["attention_mask"][:, width:].bool()  # (B, W) by position, so an EOS that is also the pad counts

    def loss_of(states, wanted):
        """Summed cross-entropy of states (n, H), each of which predicts the next token, wanted (n,)."""
        return F.cross_entropy(policy.model.get_output_embeddings()(states).float(), wanted, reduction="sum")

    states, wanted = hidden[:, width - 1:-1][chosen], batch["input_ids"][:, width:][chosen]
    if len(wanted) <= 2048:
        return loss_of(states, wanted), len(wanted)
    pieces = zip(states.split(2048), wanted.split(2048))  # logits over a large vocabulary are the largest tensor: piece by piece, made again in the backward pass
    return sum(checkpoint(loss_of, *piece, use_reentrant=False) for piece in pieces), len(wanted)


def epoch_batches(n: int, size: int, steps: int, *key) -> list[list[int]]:
    """`steps` batches of indices below n: epoch after epoch, each in its own order, the short last batch kept.

    >>> [sorted(b) for b in epoch_batches(3, 4, 2, 0)]
    [[0, 1, 2], [0, 1, 2]]
    """
    batches, epoch = [], 0
    while len(batches) < steps:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(*key, epoch))).tolist()
        batches += [order[a:a + size] for a in range(0, n, size)]
        epoch += 1
    return batches[:steps]


class MasterAdamW(torch.optim.AdamW):
    """AdamW for bfloat16 weights: moments, gradients and a master copy of every weight in float32, 18 bytes per weight in all.

    bfloat16 has 8 significant bits, so a step of lr 1e-6 on a weight of 0.01 would be rounded away; the master gathers such
    steps until they show. `fit` moves a gradient to the master as soon as it is whole, so micro-batches add up in float32 too.
    """

    def __init__(self, weights, **settings):
        self.masters = {w: torch.nn.Parameter(w.detach().float()) for w in weights}
        super().__init__(self.masters.values(), **settings)

    def gather(self, weight):
        """Move a weight's gradient to its master."""
        master = self.masters[weight]
        master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
        weight.grad = None

    @torch.no_grad()
    def step(self):
        """One AdamW step of the masters, then the weights are the masters, rounded."""
        super().step()
        for weight, master in self.masters.items():
            weight.copy_(master)


def masters_of(optimizer) -> dict:
    """{weight: float32 master} of an optimizer; empty where the weights are float32 and need none."""
    return getattr(optimizer, "masters", {})


def make_optimizer(policy: Policy) -> torch.optim.AdamW:
    """AdamW over every weight that is trained, its state in float32; its rate is set before every step by `fit`."""
    close_engine()  # masters are made where the weights are trained
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    kind = torch.optim.AdamW if policy.model.dtype == torch.float32 else MasterAdamW
    policy.optimizer = kind(weights, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    return policy.optimizer


def learning_rate(step: int, peak: float, warmup: int) -> float:
    """Rate of the step-th optimizer step (from 0): linear warm-up over `warmup` steps, then constant (paper, appendix).

    >>> [learning_rate(s, 1.0, 4) for s in (0, 3, 9)]
    [0.25, 1.0, 1.0]
    """
    return peak * min(1.0, (step + 1) / max(warmup, 1))


def fit(policy: Policy, optimizer, batches: list, loss_of, args, label: str, state: dict | None = None, save=None) -> dict:
    """Train on `batches` and return the updated state {"step", "batch", "tokens", "loss"}.

    loss_of(batch) -> (summed loss, count); the gradient is that of the mean over the batch's true count. state["step"]
    counts optimizer steps over the whole run, so that the rate continues where it was, unless state["reset"] names the step
    at which a schedule began anew; state["batch"] counts those of this call that are done, so that a restart skips them. save(state) is called every args.save_every steps.
    Raises InputError if the loss is not finite.
    """
    close_engine()  # its weights are about to be old
    state = state or {"step": 0, "batch": 0, "tokens": 0, "loss": 0.0}
    weights, attention = [p for group in optimizer.param_groups for p in group["params"]], policy.model.config._attn_implementation
    hooks = [weight.register_post_accumulate_grad_hook(optimizer.gather) for weight in masters_of(optimizer)]
    policy.model.train()
    eager = args.device == "cpu" and args.attention == "auto"
    if eager:
        policy.model.set_attn_implementation("eager")  # measured: the masked backward pass of SDPA is slower on a CPU
    for batch in tqdm(batches[state["batch"]:], desc=label, initial=state["batch"], total=len(batches)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state["step"] - state.get("reset", 0), args.learning_rate, args.warmup_steps)
        loss, count = 0.0, 0
        for a in range(0, len(batch), args.micro_batch):
            part, tokens = loss_of(batch[a:a + args.micro_batch])
            part.backward()
            loss, count = loss + part.item(), count + tokens
        if not math.isfinite(loss):
            raise InputError(f"{label}: the loss is {loss} at step {state['step']}; lower --learning_rate or look at the data of this step")
        for p in weights:
            if p.grad is not None:
                p.grad /= max(count, 1)  # the mean over the tokens of the whole batch, however it was cut
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state = {**state, "step": state["step"] + 1, "batch": state["batch"] + 1, "tokens": state["tokens"] + count,
                 "loss": state["loss"] + loss / max(count, 1)}
        if save and state["batch"] % args.save_every == 0:
            save(state)
    for hook in hooks:
        hook.remove()
    if eager:
        policy.model.set_attn_implementation(attention)
    policy.model.eval()
    return state
