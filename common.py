"""What the stages share: flags, ranks, files, examples, answers, models, sampling, PRM, training.

Paper: "Diving into Self-Evolving Training for Multimodal Reasoning" (M-STaR, arXiv 2412.17451).
Its symbols stand in comments where the code meets them.

A stage is a row of phases. A phase is a function from files to files: it does nothing if its output
is there, and leaves nothing in memory. So a killed run, started again, walks through what is
finished and goes on the same way as an unbroken one, and the N ranks of torchrun share a phase by
its files. Plain `python` is one rank on the same path.
"""

import argparse
import ctypes
import errno
import fcntl
import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import struct
import sys
import time
import zlib
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError  # of a config.json
from jinja2 import TemplateError  # comes with transformers, for chat templates
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

if "__mp_main__" in sys.modules and sys.platform == "linux":
    # This is a process of vLLM, which reads the script again. PR_SET_PDEATHSIG: a killed stage
    # must not leave it holding the GPU.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class InputError(Exception):
    """Something the user can mend; its one sentence says what to do."""


# ---- flags


def flag(default, help, above=0, most=10**7):
    """A dataclass field with its meaning; a number must be above `above` and at most `most`."""
    metadata = {"help": help, "above": above, "most": most}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class CommonArgs:
    """Flags that mean the same in every stage."""

    runs: str = flag("runs/toy", "folder that holds one sub-folder per stage")
    instruction: str = flag(
        "Think step by step , then end with Answer :",
        "asks for a chain of thought; follows every question",
    )
    system: str = flag("", "system prompt; empty: none")
    chat_template_kwargs: str = flag(
        "{}", 'for the chat template, as JSON, such as {"enable_thinking": false}'
    )
    max_prompt_tokens: int = flag(2048, "longer prompts, their images included, are left out")
    max_new_tokens: int = flag(80, "a response that has not ended by then counts as wrong")
    rows: int = flag(1024, "responses decoded or scored at once; lower it when memory runs out")
    chunk: int = flag(256, "prompts between two writes, dealt to the ranks: what a kill may lose")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "of the computation; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    attention: str = flag("", "as transformers names it; empty: the model's own choice")
    gradient_checkpointing: bool = flag(False, "less memory in training, about a third more time")
    freeze_vision: bool = flag(False, "do not train the vision tower")
    processor: str = flag(
        "{}", 'settings of the processor as JSON, such as {"max_pixels": 1003520}'
    )
    engine: Literal["auto", "vllm", "transformers"] = flag(
        "auto", "what generates; auto: vLLM where it is installed for --device"
    )
    engine_memory: float = flag(0.45, "share of the GPU's (or the host's) memory that vLLM takes")
    micro_batch: int = flag(32, "responses in one forward and backward pass of a rank")
    save_every: int = flag(50, "optimizer steps between two checkpoints")
    seed: int = flag(0, "every random choice follows from it", above=-1, most=2**48)
    trust_remote_code: bool = flag(False, "run code that comes with a checkpoint")


# Memory, speed and place: at most rounding depends on them, so they may change between two starts.
HARMLESS = (
    *("runs", "device", "engine_memory", "gradient_checkpointing"),
    *("rows", "chunk", "micro_batch", "save_every", "report_to"),
)
# What a stage that is not given them takes from the stage before.
INHERITED = (
    *("data", "val", "model", "instruction", "system", "chat_template_kwargs", "processor"),
    *("max_prompt_tokens", "max_new_tokens", "trust_remote_code"),
)


@dataclass
class ScoringArgs(CommonArgs):
    """Flags that mean the same in every stage that has a PRM."""

    aggregate: Literal["min", "mean", "last", "product"] = flag(
        "min", "R_p: how the scores of a response's steps become its reward"
    )


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows a script's docstring as it is written, and every default."""


class Parser(HfArgumentParser):
    """A parser of flags whose metadata holds a range, which is for `check_ranges`."""

    def add_argument(self, *names, above=0, most=0, **settings):
        """A flag, as argparse knows it."""
        return super().add_argument(*names, **settings)


def parse_flags(args_class, argv=None):
    """Flags as an `args_class`, and the names of those that argv gives.

    argparse refuses an unknown or mistyped one with exit code 2.
    """
    doc = sys.modules["__main__"].__doc__
    parser = Parser(args_class, description=doc, formatter_class=Help, allow_abbrev=False)
    args = args_class(**vars(parser.parse_args(argv)))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return args, set(vars(parser.parse_args(argv)))


def check_ranges(args):
    """Raises InputError for a number out of its flag's range, or a text that is no JSON object."""
    for item in fields(args):
        value, low, most = getattr(args, item.name), item.metadata["above"], item.metadata["most"]
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and not low < number <= most:
                raise InputError(f"--{item.name}: {number} is not above {low} and at most {most}")
    for name in ("processor", "chat_template_kwargs"):
        value = getattr(args, name)
        try:
            dict(json.loads(value))
        except (ValueError, TypeError, RecursionError):
            raise InputError(f"--{name} must be a JSON object, found {value}") from None


def inherit(args, given, stage):
    """Take the flags of INHERITED that were not given from the stage before, and say so.

    What that was not given itself comes from the run of the policy that it began with.
    """
    runs = sorted(Path(args.runs).glob("0?_*/run.json"))
    runs = [path for path in runs if path.parent.name < stage]
    if getattr(args, "policy", ""):
        runs.append(Path(args.policy).parent / "run.json")
    found = {}  # of each flag the last stage's
    for path in filter(Path.exists, runs):
        flags = read_json(unchanged(path))["flags"]
        origin = Path(flags.get("policy") or path).parent / "run.json"
        if origin.exists():
            before = read_json(unchanged(origin))["flags"]
            found |= {name: (then, origin) for name, then in before.items()}
        found |= {name: (then, path) for name, then in flags.items()}
    for name in INHERITED:
        now = getattr(args, name, None)
        then, path = found.get(name, (now, None))
        if now is None or then == now:
            continue
        if name in given:
            print(f"--{name} is {now!r}, another than {then!r} in {path}")
        else:
            setattr(args, name, then)
            print(f"--{name} {then!r} is taken from {path}")


def run_stage(args_class, main):
    """Parse flags and call `main(args)`; an InputError becomes one sentence and exit code 1."""
    args, given = parse_flags(args_class)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        join_ranks(args.device)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all; errors go to stderr
        inherit(args, given, Path(sys.argv[0]).stem)
        check_ranges(args)
        gc.freeze()  # what was imported stays; looking through it takes longer than loading a model
        main(args)
        dist.destroy_process_group()
    except InputError as error:
        if rank() > 0:
            time.sleep(5)  # rank 0 says what all ranks see, and torchrun ends the others meanwhile
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        flags = "--rows, --micro_batch or --engine_memory"
        sys.exit(f"error: {error}; lower {flags} and run the same command again")
    except RuntimeError:
        if world_size() > 1:
            time.sleep(5)  # a rank that ended has said why, and torchrun ends this one meanwhile
        raise
    except KeyboardInterrupt:
        sys.exit("interrupted: what was written is whole; the same command continues")
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in (None, errno.ENOENT):
            raise  # no disk's fault but ours, which the traceback shows
        if rank() > 0:
            time.sleep(5)  # as above
        sys.exit(
            f"error: could not write or read a file ({error}); what was written is whole: "
            "mend that and run the same command to continue"
        )
    finally:
        if dist.is_initialized() and world_size() == 1:  # NCCL warns of it behind the sentence
            dist.destroy_process_group()


# ---- ranks


def join_ranks(device):
    """Make this process one of torchrun's ranks, or the only one; does nothing the second time.

    Waiting for another rank has no short limit, for a phase takes hours: a rank that dies is
    noticed by torchrun, which ends the others at once.
    """
    if dist.is_initialized():
        return
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if not match:
        raise InputError(f"--device must be cpu, cuda or cuda:N, found {device}")
    if match[1] and "RANK" in os.environ:
        raise InputError("--device: give cuda under torchrun; each rank takes its own GPU")
    backend = "gloo"
    if device != "cpu":
        backend = "cpu:gloo,cuda:nccl"
        number, count = int(match[1] or os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= count:
            raise InputError(f"--device {device}: GPU {number} is asked for, torch sees {count}")
        torch.cuda.set_device(number)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(days=7))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def rank() -> int:
    """The number of this process among the ranks; 0 writes what only one may write."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def quiet() -> bool:
    """Whether a progress bar would be one too many."""
    return rank() > 0 or bool(os.environ.get("TQDM_DISABLE"))


def sum_over_ranks(value) -> float:
    """The sum of a number over the ranks; all of them wait for it."""
    total = torch.tensor(float(value), dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


def wait_for_ranks():
    """Every rank goes on when all have come here; by gloo, for NCCL would take a GPU."""
    sum_over_ranks(0)


def is_there(path) -> bool:
    """Whether a file or folder exists, as rank 0 sees it, so that all ranks take the same way."""
    return bool(sum_over_ranks(rank() == 0 and Path(path).exists()))


def once(path, write):
    """Phase of one rank: rank 0 lets `write(part)` make `path` under another name; all wait."""
    if is_made(path):
        return
    if rank() == 0:
        part = Path(f"{path}.part")
        write(part)
        os.replace(part, path)
        seal(path)
    wait_for_ranks()


@contextmanager
def alone(folder):
    """Hold a data folder against other runs that make files in it; they wait, until `with` ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        if rank() == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_made(path) -> bool:
    """Whether the output of a phase is there, `unchanged`, as all ranks see it."""
    path = Path(path)
    if rank() == 0 and unchanged(path).exists() and path.name not in seals(path.parent):
        seal(path)  # killed between the two
    return is_there(path)


def unchanged(path) -> Path:
    """An output; raises InputError if it is not as it was made: changed, cut short, deleted."""
    path = Path(path)
    made = seals(path.parent).get(path.name)
    if made and not path.exists() and not path.suffix:  # a model; a file is made anew
        raise InputError(f"{path} was made and is gone; put it back or start in another --runs")
    if made and path.exists() and digest(path) != made:
        raise InputError(f"{path} was changed since it was made; start in another --runs")
    return path


def seals(folder) -> dict:
    """{name: digest} of the outputs in a folder when they were made."""
    path = folder / "digests.json"
    return read_json(path) if path.exists() else {}


def seal(path):
    """Note the digest of an output; one that is not noted yet, after a kill, is taken as it is."""
    path = Path(path)
    made = seals(path.parent) | {path.name: digest(path)}
    write_json(path.parent / "digests.json", made)


# ---- files


def stream_jsonl(path):
    """The records of a JSONL file, one by one; raises InputError with the line of a bad one."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or too deep
                raise InputError(f"{where}: not JSON ({error}); mend or delete it") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
            yield row


def read_jsonl(path) -> list[dict]:
    """All records of a JSONL file."""
    return list(stream_jsonl(path))


def read_json(path) -> dict:
    """The object in a JSON file; raises InputError if it holds none."""
    try:
        return dict(json.loads(Path(path).read_text("utf-8")))
    except (ValueError, TypeError, RecursionError, FileNotFoundError) as error:
        raise InputError(f"{path} is not a whole JSON object ({error}); put it back") from None


class Lines:
    """The rows of a JSONL file by number, read when asked for: only their places are in memory."""

    def __init__(self, path):
        self.file = open(path, "rb")
        self.starts = array("q", itertools.accumulate(map(len, self.file), initial=0))

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, place):
        if not 0 <= place < len(self):
            raise IndexError(place)
        self.file.seek(self.starts[place])
        return json.loads(self.file.readline())


def by_prompt(rows):
    """(prompt id, its rows) of rows in which those of a prompt stand together.

    >>> rows = [{"id": "a"}, {"id": "a"}, {"id": "b"}]
    >>> [(prompt, len(group)) for prompt, group in by_prompt(rows)]
    [('a', 2), ('b', 1)]
    """
    for prompt, group in itertools.groupby(rows, key=lambda row: row["id"]):
        yield prompt, list(group)


def write_atomic(path, texts):
    """Write texts one after the other, so that a kill leaves the old file or the new one."""
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.writelines(texts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path, value):
    """`value` as indented JSON, written atomically."""
    write_atomic(path, [json.dumps(value, indent=1, ensure_ascii=False) + "\n"])


def write_jsonl(path, rows):
    """Rows, which may come from a generator, as JSONL, written atomically."""
    write_atomic(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_chunks(path, items, produce, args, label):
    """Phase: the rows of `produce(chunk)` for every chunk of a sequence, in order, as JSONL `path`.

    Chunk k belongs to rank k modulo N and becomes a file of its own in <path>.parts, so that a
    restart, on any number of ranks, makes only what is missing. Chunk borders, and with them every
    batch, are the same on any number. Rank 0 joins the chunks when all are there.
    """
    parts = Path(f"{path}.parts")
    if not is_made(path):
        parts.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(items), args.chunk)
        for start in tqdm(starts[rank() :: world_size()], label, disable=quiet()):
            name = parts / f"{start:09d}-{args.chunk}.jsonl"
            made = name.with_suffix(".digest")  # a chunk that was changed is made again
            both = name.exists() and made.exists()
            if not both or made.read_bytes() != digest(name).encode():
                write_jsonl(name, produce(items[start : start + args.chunk]))
                write_atomic(made, [digest(name)])
        wait_for_ranks()
        names = sorted(parts.glob(f"*-{args.chunk}.jsonl"))
        once(path, lambda part: write_atomic(part, (name.read_text("utf-8") for name in names)))
    if rank() == 0:
        shutil.rmtree(parts, ignore_errors=True)


def digest(path) -> str:
    """A short SHA-256 of a file, or of the JSON and safetensors files of a checkpoint folder."""
    path = Path(path)
    files = sorted(path.glob("*.[js]*")) if path.is_dir() else [path]  # json, jinja, safetensors
    sha = hashlib.sha256()
    for name in files:
        with open(name, "rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:16]


# ---- the run folder of a stage

# What a refused start may leave.
FREE = {".lock", "prompts", *("run.json", "run.json.part", "digests.json", "digests.json.part")}
LOCKS = []  # open lock files; the kernel frees a lock when its process ends, however it ends


def close_runs():
    """Free the locks of run folders, for a program that runs several stages in one process."""
    while LOCKS:
        LOCKS.pop().close()


def open_run(args, stage, inputs) -> Path:
    """Make, lock and fingerprint a stage's folder, <runs>/<stage>; settle --dtype and --engine.

    inputs: {name: file or checkpoint folder} that the results depend on. Raises InputError if one
    is missing, if another process holds the folder, or if its phases were made with other flags or
    inputs; a start that was refused before its first phase binds nothing.
    """
    check_ranges(args)
    join_ranks(args.device)
    args.dtype = str(dtype_of(args)).removeprefix("torch.")
    args.engine = choose_engine(args.engine, args.device)
    out = Path(args.runs) / stage
    if rank() == 0:
        flags = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in HARMLESS}
        found = {name: fingerprint(stage, name, path) for name, path in inputs.items()}
        now = {"flags": flags, "inputs": found}
        lock_folder(out)
        if {path.name for path in out.iterdir()} - FREE:
            refuse_other_settings(out, now)
        else:
            shutil.rmtree(out / "prompts", ignore_errors=True)
        write_json(out / "run.json", now)
        seal(out / "run.json")
    wait_for_ranks()
    return out


def fingerprint(stage, name, path):
    """The digest of an input, or a model's name on the hub; raises InputError if it is missing."""
    if is_rule(path):
        path = str(path).rpartition(":")[0]
    if Path(path).is_file() or Path(path).is_dir():  # a pipe would be waited for
        return digest(path)
    if name == "model" and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        return str(path)
    made = re.search(r"\b0[123]_[a-z_]+", str(path))
    first = f"{made[0]}.py" if made else "python tests/toy.py, or name your data,"
    raise InputError(f"{stage} needs {path} ({name}); run {first} first")


def lock_folder(out):
    """Make a folder and hold it until this process ends, or `close_runs`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        LOCKS.append(open(out / ".lock", "w"))
        fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process is writing {out}; wait for it to end") from None
    except OSError as error:
        why = error.strerror
        raise InputError(f"cannot write to {out} ({why}); choose another --runs") from None


def refuse_other_settings(out, now):
    """Raises InputError with what differs if a folder was made with other flags or inputs."""
    if not (out / "run.json").exists():
        raise InputError(f"{out} holds files but no run.json; choose another --runs")
    then, changed = read_json(unchanged(out / "run.json")), []
    for kind, mine in now.items():
        old = then[kind]
        for name in old | mine:
            if old.get(name) != mine.get(name):
                changed.append(f"{kind[:-1]} {name} was {old.get(name)!r}, now {mine.get(name)!r}")
    if changed:
        changes = "; ".join(changed)
        raise InputError(f"{out} was made otherwise: {changes}. Delete it or choose another --runs")


# ---- examples

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not EPS, which starts Ghostscript
DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, EOFError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
VISIBLE = ("id", "image", "question", "choices", "source", "answer_type", "precision")


def load_examples(path, hidden=False) -> list[dict]:
    """Read and check a data file; records get "where" (file and line) and an absolute "image".

    A record: {"id": "a1", "image": "images/a1.png", "question": "...", "answer": "7", "choices":
    null, "source": "toy"} and, if the answer is to be read as "integer", "float", "list" or
    "letter", "answer_type" and "precision" (decimals). hidden: for unlabelled prompts; only what a
    solver may see is kept, "answer" becomes None. Raises InputError with file and line on a bad
    field, an unreadable answer, a repeated id, or an image that is missing or outside the data
    folder; `fitting` reads the images.
    """
    rows = []
    folder = os.path.join(Path(path).resolve().parent, "")
    for number, row in enumerate(stream_jsonl(path), 1):
        if hidden:
            row = {name: row[name] for name in VISIBLE if name in row} | {"answer": None}
        row = {"choices": None} | row | {"where": f"{path} line {number}"}
        problem = problem_of(row, hidden)
        if problem:
            raise InputError(f"{row['where']}: {problem}")
        image = os.path.normpath(folder + row["image"])
        if not image.startswith(folder) or os.path.isabs(row["image"]):
            raise InputError(f"{row['where']}: image {row['image']!r} leaves the data folder")
        if not os.path.isfile(image):
            raise InputError(f"{row['where']}: image {image!r} does not exist, or is no file")
        row["image"] = image
        rows.append(row)
    if not rows:
        raise InputError(f"{path} is empty: it needs one JSON record per line")
    by_id_of(rows)
    return rows


def problem_of(row, hidden) -> str | None:
    """Why a record cannot be used; None if it can."""
    for name in ("id", "image", "question", "source", "answer"):
        text = row.get(name)
        if name == "answer" and hidden:
            continue
        if not is_text(text):
            return f'field "{name}" must be a text that is not empty, found {text!r}'
    choices, decimals = row["choices"], row.get("precision")
    if choices is not None:
        texts = isinstance(choices, list) and all(is_text(text) for text in choices)
        if not texts or not 2 <= len(choices) <= len(LETTERS):
            return 'field "choices" must be a list of 2 to 10 texts that are not empty, or null'
    if row.get("answer_type") not in (None, *ANSWER_TYPES):
        return f'"answer_type" must be one of {", ".join(ANSWER_TYPES)} or null'
    if decimals is not None and (type(decimals) is not int or not 0 <= decimals <= 15):
        return '"precision" must be a count of decimals, at most 15, or null'
    if not hidden and canonical(row["answer"], row) is None:
        return f"the answer {row['answer']!r} is none of the choices, or not of its type"
    return None


def is_text(value) -> bool:
    """Whether a value is a text that says something and that a UTF-8 file can hold."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not re.search("[\ud800-\udfff]", value)  # half a character


def by_id_of(*files) -> dict[str, dict]:
    """{id: example} over the examples of files; raises InputError if two of them share an id.

    >>> list(by_id_of([{"id": "a", "where": "x line 1"}], [{"id": "b", "where": "y line 1"}]))
    ['a', 'b']
    """
    found = {}
    for example in itertools.chain(*files):
        first = found.setdefault(example["id"], example)
        if first is not example:
            stands = f"id {example['id']!r} stands already in {first['where']}"
            raise InputError(f"{example['where']}: {stands}; rename one")
    return found


def read_image(example) -> Image.Image:
    """The image of an example in RGB; raises InputError with the example's file and line.

    It is turned as its EXIF says. What is transparent becomes white, the paper under a drawing;
    16-bit grey is scaled to 8 bits.
    """
    try:
        with Image.open(example["image"], formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode == "F":
                raise ValueError("its pixels are floats")
            if image.mode.startswith("I"):
                image = image.point(lambda grey: grey / 257).convert("L")
            if image.has_transparency_data:
                paper = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(paper, image.convert("RGBA"))
            return image.convert("RGB")
    except DECODER_ERRORS as error:
        where = f"{example['where']}: image {example['image']}"
        raise InputError(
            f"{where} cannot be read ({error}); put a whole file there, {', '.join(FORMATS)}"
        ) from None


# ---- answers
LETTERS = "ABCDEFGHIJ"
ANSWER_TYPES = ("integer", "float", "list", "letter")  # letter: options stand in the question

LEAD = r"\b(?:answer|correct\s+(?:option|choice))\**\s*(?:is(?:\s*:)?|:)\*{0,2}\s*"
FINAL = re.compile(  # what stands in \boxed{}, or after the lead on a line without \boxed
    r"(?i)\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
    rf"|{LEAD}(?:the\s+(?:(?:final|correct)\s+)?{LEAD}){{0,2}}(?![^\n]*\\boxed)([^\n]*)"
)
LONGEST = 1000  # characters of an answer; a longer one is a response that does not end
REASON = r"(?:^| ?, )(?:because|since|as|so) (?!.*\banswer\b).*"  # not ", so the answer is 8"

QUOTES = " *_`\"'“”‘’"
CHARACTERS = str.maketrans({"\u2212": "-", "²": "^2", "³": "^3", "π": "pi"})  # \u2212: minus
SPELLINGS = [  # pattern and replacement, applied in this order
    (r"\*\*([^*]+)\*\*", r"\1"),
    (r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}", r"\1"),
    (r"\\(?:left|right)(?![a-z])|\\[,;:! $%()\[\]]|[$%°€£¥]|\\(?=pi\b)", ""),
    (r"\s+", " "),
    (r" ?\^? ?\{? ?(?:\\circ(?![a-z])|\\degree|∘)(?: ?\})?", ""),
    (r"(?<=[{/]) | (?=[{}/])|(?<=\}) (?=\{)", ""),
    (r"\^\{(\w)\}", r"^\1"),
    (r"(?:(?<=\d) )?(?:\\?sqrt|√) ?(?:[{(](\d+|[a-z])[)}](?!\d))?", r"√\1"),
    (r" ?\\[dt]?frac(?:\{([\w√.-]+)\}\{(√?[\d.]+|[a-z]+)\}|(\d)(\d))", r" \1\3/\2\4"),
    (r"(?<=[\w)]) ?(?:\*|\\cdot|·) ?(?=[a-z√(])", ""),  # 5*a is 5a, but 5*2 is not 52
    (r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", ""),
    (rf"^[{QUOTES}]*(?:\(([^()]*)\)|\[([^\[\](),]*)\])[{QUOTES}.]*$", r"\1\2"),  # [1, 2] stays
]
WORD = (  # of a unit: no word that changes the number, no letter that may be a variable
    r"(?!(?:and|or|nor|not|is|but|to|of|than|plus|minus|over|pi|squared|cubed|[bm]n|halves"
    r"|(?:half|third|quarter|hundred|thousand|dozen|\w+illion)s?)\b)"
    r"(?:[a-z]{2,}|[cfghjlmsvw])(?:\^?[23])?"
)
NUMBER = re.compile(  # "AB = 7", "about 7", "-1 1/2", "7 cm^2", "7 miles per hour", "7, as ..."
    r"(?:[a-z∠]* ?[=≈~] ?|(?:about|around|approximately|roughly) )?(?P<sign>[+-]?) ?"
    r"(?:(?P<whole>\d{1,40}) (?=\d+/))?(?P<top>\d{1,40}\.?\d{0,40}|\.\d{1,40})"
    rf"(?:/0*(?P<bottom>[1-9]\d{{0,40}}))? ?(?P<unit>(?:{WORD}(?:[ /]{WORD}){{0,2}})?)({REASON})?"
)
# clear: "B", "(B) t", "B. t", "B (t)"; not clear: "B, t", "B - t", "B t"
LETTER_FIRST = re.compile(
    r"(?:(?:option|choice) )?[(\[]?(?P<letter>[a-j])(?!\w)"
    r"(?:(?P<clear>[)\].:]+(?! ?[,-] )|(?= ?\()|$)"
    r"|[)\].:]*(?: ?,| -)? (?![(\[]?[a-j][)\]]?$)) ?(?P<text>.*)"
)
LETTER_LAST = re.compile(r"^(?!(?:option|choice)\b|[(\[]?[a-j](?:[)\].:]| ?\())(.+?) ?\(([a-j])\)$")
OPTION = re.compile(r"\b([a-j]) ?[).:] ?(.*?)[ ,;(]*(?=\b[a-j] ?[).:]|$)")  # in a question


class Answer(NamedTuple):
    """An answer that was read; value is its text in one form: "B", "3/4", "[1, 2]", "new york"."""

    kind: str  # "choice", "number", "list" or "text"
    value: str
    unit: str = ""


def agree(answers) -> bool:
    """Whether answers are one: one kind, one value and no two units (a missing unit fits any)."""
    units = {answer.unit for answer in answers} - {""}
    return len({answer[:2] for answer in answers}) == 1 and len(units) <= 1


def extract_answer(response: str, example: dict | None = None) -> str | None:
    r"""The final answer that a response names, or None: none, or two that differ (fails closed).

    One that cannot be read ("the answer is the sum of both") is prose, if one that can follows.

    >>> extract_answer("So the answer is (B) 12."), extract_answer("Answer: 7\nAnswer: 8")
    ('(B) 12.', None)
    """
    named = ["".join(groups).strip() for groups in FINAL.findall(response)]
    read = {text: read_answer(text, example or {}) for text in named}
    readable = [text for text in read if read[text]]
    if not agree([read[text] for text in readable]) or named[-1] not in readable:
        return None
    return max(readable, key=lambda text: read[text].unit)  # one with a unit, if there is one


def canonical(answer: str | None, example: dict) -> str | None:
    """The text in which votes are counted and rows store an answer, or None. It reads as itself.

    >>> canonical("(b)", {"choices": ["9", "12"]}), canonical("[1, 2.0]", {"answer_type": "list"})
    ('B', '[1, 2]')
    >>> canonical("x = -5.50 km / h", {}), canonical("New  York.", {})
    ('-11/2 km/h', 'new york')
    """
    read = read_answer(answer, example)
    return None if read is None else f"{read.value} {read.unit}".strip()


def is_correct(answer: str | None, example: dict) -> bool:
    """1(a* = a): the answer and the example's agree; one that cannot be read is wrong.

    >>> [is_correct(answer, {"answer": "5 cm"}) for answer in ("5 cm", "5", "5 m", None)]
    [True, True, False, False]
    """
    pair = [read_answer(answer, example), read_answer(example["answer"], example)]
    return None not in pair and agree(pair)


def read_answer(answer: str | None, example: dict) -> Answer | None:
    """An answer read by the example's "choices", else "answer_type" and "precision"; or None."""
    kind = example.get("answer_type")
    if answer is None or len(answer) > LONGEST:
        return None
    if example.get("choices") or kind == "letter":
        return read_choice(answer, example)
    if kind == "list":
        items = plain(answer.replace(",", ", ")).strip("[]").split(",")
        numbers = [canonical(item, {"answer_type": "integer"}) for item in items]
        return None if None in numbers else Answer("list", f"[{', '.join(numbers)}]")
    number = read_number(answer, example.get("precision") if kind == "float" else None)
    if number or kind or not plain(answer):
        return number
    return Answer("text", plain(answer))


@lru_cache(maxsize=1 << 14)  # answers repeat
def plain(answer: str) -> str:
    r"""An answer without quotes, Markdown, LaTeX dress, currency, degree and percent signs.

    >>> plain("**(B)**."), plain("$\\frac{\\sqrt { 3 }}{2}$"), plain("1,250^\\circ")
    ('b', '√3/2', '1250')
    """
    text = answer.casefold().translate(CHARACTERS)
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text.lstrip(QUOTES).rstrip(QUOTES + ".")


def read_number(answer: str, decimals: int | None = None) -> Answer | None:
    """The number that an answer is, exact or to some decimals, and its unit; or None."""
    match = NUMBER.fullmatch(plain(answer))
    if not match:
        return None
    size = Fraction(match["top"]) / int(match["bottom"] or 1) + int(match["whole"] or 0)
    value = int(match["sign"] + "1") * size
    text = str(value) if decimals is None else f"{float(value):z.{decimals}f}"  # z: no -0.0
    return Answer("number", text, match["unit"])


def read_choice(answer: str, example: dict) -> Answer | None:
    """The one option that an answer names: of "choices", or of those in the question, by letter."""
    listed = example.get("choices")
    options = dict(zip(LETTERS.lower(), listed or [""] * len(LETTERS)))
    if not listed:
        options |= OPTION.findall(plain(example.get("question", "")))
    named = named_options(plain(answer), options, bool(listed))
    if listed:  # of equal options the first stands for all
        named = {LETTERS[listed.index(options[letter])] for letter in named}
    return Answer("choice", named.pop().upper()) if len(named) == 1 else None


def named_options(text: str, options: dict[str, str], listed: bool) -> set[str]:
    """The letters of the options that a text names: two contradict; listed ones need no letter."""
    whole = with_text(text, options) if listed else set()
    match = LETTER_FIRST.fullmatch(LETTER_LAST.sub(r"\2, \1", text))
    if not match or match["letter"] not in options:
        return whole
    letter, rest = match["letter"], match["text"]
    same = with_text(rest, options) or with_text(rest.split(". ")[0], options)
    if letter in same or not re.sub(REASON, "", rest):
        return {letter}
    if whole or match["clear"] is None or not listed:
        return whole
    for other in options:  # the "a" of "a dog" is no letter
        words = re.escape(plain(options[other]))
        if re.search(rf"(?<!\w)(?:(?!a \w){other}|{words})(?!\w)", rest):
            same.add(other)
    return same | {letter}


def with_text(text: str, options: dict[str, str]) -> set[str]:
    """The letters of the options whose text this is, whole or before a reason."""
    same = {letter for letter in options if is_correct(text, {"answer": options[letter]})}
    short = re.sub(REASON, "", text)
    return same if same or short == text else with_text(short, options)


# ---- models and prompts


LOADING_ERRORS = (  # for a folder that is not whole, or a prompt that its chat template refuses
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError),
    *(ArithmeticError, SafetensorError, TemplateError, StrictDataclassError),
)


@contextmanager
def loading(path):
    """InputError in place of what is raised for a folder that is no whole checkpoint."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, LOADING_ERRORS) and type(error) is not Exception:
            raise  # tokenizers' errors are the ones of no kind
        why = first_line(error)
        if "trust_remote_code" in str(error):
            why += "; if you trust it, pass --trust_remote_code"
        raise InputError(
            f"{path} cannot be loaded as a vision-language checkpoint: {why}"
        ) from None


def first_line(error) -> str:
    """What an error says, as one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


@dataclass
class Policy:
    """A model with its processor."""

    model: torch.nn.Module
    processor: object
    eos_ids: list[int]  # the first is the one that training ends a response with
    pad_id: int
    banned: list[int]  # image placeholders: in a response they would ask for one more image

    @property
    def tokenizer(self):
        """The tokenizer inside the processor."""
        return self.processor.tokenizer


@dataclass
class Prm(Policy):
    """A process reward model f: a policy whose logits `step_logits` reads as scores of steps."""

    marks: tuple[int, int] | None  # two tokens, (good, bad)
    mark_weight: float  # of the marks
    likelihood: float  # weight of what the model itself finds likely


def dtype_of(args) -> torch.dtype:
    """The dtype that --dtype asks for on --device."""
    if args.dtype == "auto":
        return torch.float32 if args.device == "cpu" else torch.bfloat16
    return getattr(torch, args.dtype)


def load_policy(path, args, training=False) -> Policy:
    """A Hugging Face image-text-to-text checkpoint in the dtype of --dtype.

    For generation it comes to --device in eval mode; training takes it from the CPU. Raises
    InputError for a folder that is no whole checkpoint, or that of a model which is not supported.
    """
    code = {"trust_remote_code": args.trust_remote_code}
    free_memory()  # of a training phase: FSDP2's modules hold each other until they are collected
    with loading(path):
        config = AutoConfig.from_pretrained(path, **code)
        known = type(config) in AutoModelForImageTextToText._model_mapping
        if not known and not hasattr(config, "auto_map"):
            raise ValueError(f"a {config.model_type} model takes no images")
        if config.is_encoder_decoder:
            raise ValueError("it is an encoder-decoder, whose responses do not follow its prompts")
        processor = load_processor(path, config, args)
        ends = Path(path) / "generation_config.json"  # transformers passes over a broken one
        if ends.exists():
            read_json(ends)
        model, found = AutoModelForImageTextToText.from_pretrained(
            path,
            config=config,
            dtype=dtype_of(args),
            attn_implementation=args.attention or None,
            output_loading_info=True,
            **code,
        )
        eos = closing_first(processor, model.generation_config.eos_token_id)
        for problem in ("missing_keys", "mismatched_keys"):
            if found[problem]:
                names = ", ".join(map(str, sorted(found[problem])[:3]))
                raise ValueError(f"{problem.replace('_', ' ')} in its weights: {names}")
        for name, weight in model.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(f"its weight {name} holds NaN or infinity")
    if args.freeze_vision:
        tower = model.get_encoder(modality="image")
        if tower in (model, model.base_model):
            raise InputError(f"--freeze_vision finds no vision tower in {type(model).__name__}")
        tower.requires_grad_(False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # acts in train mode only
        # Only the reentrant kind needs these; they would send gradients through a frozen tower.
        model.disable_input_require_grads()
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    banned = sorted({getattr(config, name, None) for name in names} - {None})
    if not training:
        model = model.to(args.device).eval()
    return Policy(model, processor, eos, processor.tokenizer.pad_token_id, banned)


def load_processor(path, config, args):
    """A checkpoint's processor with the settings of --processor, which each family names its way.

    Training, scoring and vLLM read them from the processor, which is saved beside the weights.
    Raises InputError for settings that it does not have, ValueError if it is not whole.
    """
    load = partial(AutoProcessor.from_pretrained, path, trust_remote_code=args.trust_remote_code)
    settings = json.loads(args.processor)
    processor = load(**settings)
    if not hasattr(processor, "tokenizer") or not processor.chat_template:
        raise ValueError("it has no processor of images and text, or no chat template")
    if processor.tokenizer.pad_token is None:
        raise ValueError("its tokenizer has no padding token")
    closing_first(processor, None)  # shows whether template and tokenizer work
    known = json.dumps(load().to_dict())  # parts within parts
    unknown = [name for name in settings if f'"{name}": ' not in known]
    if unknown and processor.to_dict() == load().to_dict():
        raise InputError(f"--processor: this family's processor knows no {', '.join(unknown)}")
    if "image_grid_pinpoints" in settings:  # LLaVA's model cuts by the same list
        config.image_grid_pinpoints = settings["image_grid_pinpoints"]
    return processor


def closing_first(processor, eos):
    """End tokens, those first with which the chat template closes an assistant's turn."""
    content = [{"type": "text", "text": "@@"}]
    talk = [{"role": role, "content": content} for role in ("user", "assistant")]
    tail = processor.apply_chat_template(talk, tokenize=False).rpartition("@@")[2]
    closing = processor.tokenizer(tail, add_special_tokens=False)["input_ids"]
    eos = processor.tokenizer.eos_token_id if eos is None else eos
    eos = eos if isinstance(eos, list) else [eos]
    return sorted(eos, key=lambda token: token not in closing)  # stable


def load_prm(path, args) -> Prm:
    """A PRM that stage 02 wrote: a policy whose prm.json says how it is read.

    {"marks": two token ids, "mark_weight": number, "likelihood": number}; {"marks": null,
    "likelihood": 1} makes any policy a PRM that ranks by its own likelihood.
    """
    file = Path(path) / "prm.json"
    if not file.is_file():
        raise InputError(f"{path} is no PRM, it holds no prm.json; name a model/ that 02 wrote")
    prm = Prm(**vars(load_policy(path, args)), marks=None, mark_weight=0.0, likelihood=0.0)
    match read_json(file):
        case {
            "marks": [int(good), int(bad)],
            "mark_weight": int(weight) | float(weight),
            "likelihood": int(likelihood) | float(likelihood),
        }:
            prm.marks, prm.mark_weight = (good, bad), float(weight)
        case {"marks": None, "likelihood": int(likelihood) | float(likelihood)}:
            pass
        case _:
            raise InputError(f"{file}: marks must be two token ids; run 02 again")
    prm.likelihood = float(likelihood)
    ids, weights = set(prm.marks or ()), (prm.mark_weight, prm.likelihood)
    if ids - set(range(len(prm.tokenizer))) or len(ids) == 1:
        raise InputError(f"{file}: marks must be two token ids of the vocabulary; run 02 again")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise InputError(f"{file}: mark_weight and likelihood must be 0 or more, and not both 0")
    return prm


def save_policy(policy, path, args):
    """Phase: model and processor as a plain Hugging Face folder in the dtype of --dtype.

    The model is in that dtype afterwards. Weights that FSDP2 shards are gathered one by one on
    rank 0's CPU.
    """
    model = policy.model.to(dtype_of(args))
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)
    for name in model.all_tied_weights_keys:
        weights.pop(name, None)

    def write(part):
        """The whole folder; what an earlier start left of it goes."""
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part, state_dict=weights)
        if policy.tokenizer.is_fast:  # it remembers how the last batch was padded, if there was one
            policy.tokenizer.backend_tokenizer.no_padding()
        policy.processor.save_pretrained(part)
        if isinstance(policy, Prm):
            names = ("marks", "mark_weight", "likelihood")
            write_json(part / "prm.json", {name: getattr(policy, name) for name in names})
        for file in part.iterdir():  # safetensors writes for the user alone
            file.chmod(0o644)

    once(path, write)


def user_text(example, instruction) -> str:
    r"""What the user says beside the image: question, lettered choices, instruction.

    >>> user_text({"question": "How many?", "choices": ["7", "9"]}, "Think.")
    'How many?\nChoices:\n(A) 7\n(B) 9\nThink.'
    """
    lines = [example["question"]]
    if example["choices"]:
        lines += ["Choices:"]
        lines += [f"({letter}) {text}" for letter, text in zip(LETTERS, example["choices"])]
    if instruction:
        lines += [instruction]
    return "\n".join(lines)


def conversation(processor, example, args):
    """What a chat template takes: a user turn of the image and the text, after a system prompt.

    The name of a special token in the text is broken by a space, so that it stays text.
    """
    text = user_text(example, args.instruction)
    added = processor.tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special}
    for name in special | {getattr(processor, "image_token", None) or "<image>"}:
        text = text.replace(name, f"{name[0]} {name[1:]}")
    image = {"type": "image", "image": read_image(example)}
    talk = [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
    if args.system:
        system = {"type": "text", "text": args.system}
        talk.insert(0, {"role": "system", "content": [system]})
    return talk


def ask(processor, examples, args, **how):
    """Prompts of examples by the processor's own chat template, its settings and --system."""
    talks = [conversation(processor, example, args) for example in examples]
    settings = json.loads(args.chat_template_kwargs)
    return processor.apply_chat_template(talks, add_generation_prompt=True, **settings, **how)


def sft_row(row, example, args) -> dict:
    """A sampled row as SFT data that TRL and ms-swift read as it is: "messages" and "images".

    >>> example = {"question": "3 + 4 ?", "choices": None, "image": "/a.png"}
    >>> sft_row({"id": "p", "response": "7"}, example, CommonArgs(instruction=""))["messages"]
    [{'role': 'user', 'content': '3 + 4 ?'}, {'role': 'assistant', 'content': '7'}]
    """
    said = {"user": user_text(example, args.instruction), "assistant": row["response"]}
    messages = [{"role": role, "content": text} for role, text in said.items()]
    kept = {name: row[name] for name in row if name != "response"}
    return kept | {"messages": messages, "images": [example["image"]]}


def encode_prompts(policy, examples, args) -> dict[str, torch.Tensor]:
    """Prompts, left-padded, on the model's device.

    Gives input_ids and attention_mask (B, L) and what the family has for its images.
    """
    padding = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    how = {"tokenize": True, "return_dict": True, "processor_kwargs": padding}
    batch = dict(ask(policy.processor, examples, args, **how))
    batch.pop("labels", None)  # PaliGemma's, of the prompt
    for name, x in batch.items():
        dtype = dtype_of(args) if x.is_floating_point() else x.dtype
        batch[name] = x.to(policy.model.device, dtype)
    return batch


def prompt_length(processor, args, example):
    """How many tokens the prompt of an example has, or why it cannot be read, as a text."""
    try:
        batch = ask(processor, [example], args, tokenize=True, return_dict=True)
    except InputError as error:
        return str(error)
    except LOADING_ERRORS as error:  # such as an image 200 times wider than high
        return f"{example['where']}: the processor refuses this prompt ({first_line(error)})"
    return len(batch["input_ids"][0])


def fitting(out, folder, args, *files) -> list[list[dict]]:
    """Phase: the examples of each file whose prompts have at most --max_prompt_tokens tokens.

    Every image is read, in worker processes, by the processor of a policy folder; the lengths stay
    in <out>/prompts/lengths.jsonl. Raises InputError, with file and line, for a prompt that cannot
    be read, or if more than a tenth of a file is left out.
    """
    path, examples = out / "prompts" / "lengths.jsonl", list(itertools.chain(*files))
    code = {"trust_remote_code": args.trust_remote_code}
    with loading(folder):
        processor = load_processor(folder, AutoConfig.from_pretrained(folder, **code), args)
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    how = {"batch_size": None, "collate_fn": partial(prompt_length, processor, args)}
    most = args.max_prompt_tokens

    def produce(chunk):
        """The lengths of a chunk."""
        workers = min(cores, len(chunk) // 32)  # a few are not worth a process
        counts = DataLoader(chunk, num_workers=workers, **how)
        for example, count in zip(chunk, counts):
            if isinstance(count, str):
                raise InputError(count)
            yield {"id": example["id"], "tokens": count, "fits": count <= most}

    write_chunks(path, examples, produce, args, "prompts")
    for example, row in zip(examples, stream_jsonl(path)):
        example["tokens"] = row["tokens"]
    kept = [[example for example in file if example["tokens"] <= most] for file in files]
    for file, rest in zip(files, kept):
        left_out = f"{len(file) - len(rest)} of {len(file)} prompts have more than "
        left_out += f"--max_prompt_tokens {most} tokens; {path} lists them"
        if len(rest) < 0.9 * len(file):
            raise InputError(f"{left_out}: raise the flag or use smaller images")
        if len(rest) < len(file):
            print(f"left out: {left_out}")
    return kept


def pad_right(rows: list[list[int]], pad_id) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of different lengths as one tensor, and its attention mask; (B, W) each.

    >>> [part.tolist() for part in pad_right([[7, 8], [9]], 0)]
    [[[7, 8], [9, 0]], [[1, 1], [1, 0]]]
    """
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    ones = [torch.ones_like(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)  # (B, W)
    return ids, pad_sequence(ones, batch_first=True)  # (B, W)


def append_tokens(batch, tails: list[list[int]], pad_id, left=False) -> dict:
    """Append token ids to every left-padded prompt.

    The rows stay left-padded (left) or become padded on both sides; every per-token tensor grows
    along, of (B, L) to (B, L + W).

    >>> batch = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])}
    >>> append_tokens(batch, [[7, 8]], 0)["input_ids"].tolist()
    [[5, 6, 7, 8]]
    """
    ids, seen = pad_right(tails, pad_id)  # (B, W)
    order = torch.cat([batch["attention_mask"], seen.to(batch["attention_mask"])], 1)
    order = order.argsort(dim=1, stable=True)  # (B, L + W) what is padding first
    joined = dict(batch)
    for name, value in batch.items():
        if value.shape[:2] != batch["input_ids"].shape:
            continue
        tail = {"input_ids": ids, "attention_mask": seen}.get(name, torch.zeros_like(ids))
        if value.dim() > 2:  # what each token sees, such as Mllama's tiles: as the last one
            tail = value[:, -1:].expand(-1, ids.shape[1], *value.shape[2:])  # (B, W, ...)
        value = torch.cat([value, tail.to(value)], 1)  # (B, L + W, ...)
        joined[name] = value[torch.arange(len(order))[:, None], order] if left else value
    return joined


# ---- sampling


@dataclass
class Response:
    """One sampled response: token ids without the closing EOS, text, whether it ended by itself."""

    token_ids: list[int]
    text: str
    finished: bool


def seed_of(*parts) -> int:
    """A 48-bit seed that belongs to exactly these parts: (seed, purpose, iteration, prompt, k).

    >>> seed_of(0, "train", 1, "a7", 3) == seed_of(0, "train", 1, "a7", 3) != seed_of(0, "a7", 3)
    True
    """
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:6], "big")


def read_prompts(policy, batch) -> tuple:
    """Read prompts: their cache, their offset and the logits of their next token (B, V).

    The offset leads from the number of tokens to the next position (B, 1) in families with 3-D
    positions; else it is None.
    """
    out = policy.model(**batch, use_cache=True, logits_to_keep=1)
    offset = getattr(policy.model.base_model, "rope_deltas", None)
    return out.past_key_values, offset, out.logits[:, -1].float()


def take_rows(cache, index, *tensors) -> list:
    """Keep, repeat or reorder the rows of a cache, in place, and of what goes with it, returned."""
    cache.reorder_cache(index)
    return [x if x is None else x[index] for x in tensors]


def inputs_behind(cache, ids, mask, offset) -> dict:
    """What a model is given to read token ids (B, W) behind a cache; mask: (B, L + W)."""
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
    if offset is not None:  # left to itself it would take the positions of the whole mask
        places = mask.cumsum(-1)[:, -ids.shape[1] :] - 1 + offset  # (B, W)
        inputs["position_ids"] = places.expand(3, -1, -1)
    return inputs


def generate(
    policy, examples, seeds: list[list[int]], temperature, args, prefixes=None
) -> list[list[Response]]:
    """Sample len(seeds[i]) responses to example i, each from its own seed; greedily at T = 0.

    temperature: one number, or one per example. prefixes: token ids with which the responses to an
    example have already begun; they are part of token_ids. A prompt is read once for all its
    samples, and a sample depends on its prompt and its seed, not on its neighbours.
    """
    prefixes = prefixes or [[] for _ in examples]
    if not isinstance(temperature, list):
        temperature = [temperature] * len(examples)
    threads = torch.get_num_threads()
    # On a CPU two batches side by side: small matrices keep one core busy, not two. 3-D positions
    # are kept in the model, which two threads cannot share.
    alone = args.device != "cpu" or hasattr(policy.model.base_model, "rope_deltas")
    workers = 1 if alone else min(2, threads)

    def run(part):
        """The token ids of one batch."""
        batch = encode_prompts(policy, examples[part], args)
        batch = append_tokens(batch, prefixes[part], policy.pad_id, left=True)
        most = max(0, args.max_new_tokens - min(map(len, prefixes[part])))
        return decode(policy, batch, seeds[part], temperature[part], most)

    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            # A thread begins on the first GPU, whatever the rank's: one batch at a time needs none.
            spread = map if workers == 1 else pool.map
            tails = list(spread(run, slices_of(seeds, workers, args)))
    finally:
        torch.set_num_threads(threads)
    return to_responses(policy, itertools.chain(*tails), seeds, prefixes, args)


def slices_of(rows: list[list], workers, args) -> list[slice]:
    """Cut prompts into batches of about args.rows responses, no fewer batches than workers.

    >>> slices_of([[1, 2], [3, 4], [5, 6]], 1, CommonArgs(rows=4, device="cpu"))
    [slice(0, 2, None), slice(2, 4, None)]
    """
    size = args.rows // max(map(len, rows), default=1)
    size = min(size, -(-len(rows) // workers))
    if args.device != "cpu":  # images of a pass without gradients take a quarter of its memory
        size = min(size, 4 * args.micro_batch)
    size = max(size, 1)
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def to_responses(policy, tails, seeds, prefixes, args) -> list[list[Response]]:
    """Sampled token ids, one list per seed, as responses to each prompt; an EOS ends one."""
    owners = [i for i, row in enumerate(seeds) for _ in row]
    responses = [[] for _ in seeds]
    for i, ids in zip(owners, tails):
        ids = (prefixes[i] + ids)[: args.max_new_tokens]  # vLLM adds a token to a full prefix
        finished = len(ids) > 0 and ids[-1] in policy.eos_ids
        if finished:
            ids = ids[:-1]
        text = policy.tokenizer.decode(ids, skip_special_tokens=True)
        responses[i].append(Response(ids, text, finished))
    return responses


def draw(logits, temperature, uniform) -> torch.Tensor:
    """One token per row of logits (b, V) at its T (b,) and draw in [0, 1) (b,); greedy at T = 0.

    The inverse of the cumulative distribution, summed in float64: in float32 a token near a border
    would now and then depend on the other rows of the batch.
    """
    if not temperature.any():
        return logits.argmax(-1)
    heat = temperature.clamp(min=1e-6)[:, None]
    cumulative = (logits / heat).softmax(-1).cumsum(-1, dtype=torch.float64)  # (b, V)
    point = uniform[:, None].double() * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return torch.where(temperature > 0, token, logits.argmax(-1))


@torch.inference_mode()
def decode(policy, batch, seeds, temperatures, most) -> list[list[int]]:
    """One batch of `generate`: read the prompts, repeat their caches per sample, then step by step.

    Rows that have ended leave the batch, so that no step is spent on them. Returns at most `most`
    token ids of every sample, its EOS included, prompt by prompt.
    """
    # What belongs to a row: its prompt, its temperature and a draw for each of its tokens.
    device = policy.model.device
    owner = torch.tensor([i for i, row in enumerate(seeds) for _ in row], device=device)  # (n,)
    heat = torch.tensor(temperatures, device=device)[owner]  # (n,)
    draws = [torch.Generator().manual_seed(seed) for row in seeds for seed in row]
    uniform = torch.stack([torch.rand(most, generator=g) for g in draws]).to(device)  # (n, T)

    # Every prompt is read once.
    cache, *read = read_prompts(policy, batch)
    mask, offset, logits = take_rows(cache, owner, batch["attention_mask"], *read)  # (n, L), (n, V)

    # Token by token, until all rows have ended.
    tokens = torch.full_like(uniform, -1, dtype=torch.long)  # (n, T)
    rows = torch.arange(len(owner), device=device)  # (b,) those that are still in the batch
    alive, ends = rows >= 0, torch.tensor(policy.eos_ids, device=device)  # (b,)
    for t in range(most):
        logits[:, policy.banned] = -torch.inf
        token = draw(logits, heat[rows], uniform[rows, t])  # (b,)
        tokens[rows[alive], t] = token[alive]
        alive = alive & ~torch.isin(token, ends)
        if not alive.any():
            break
        if alive.float().mean() < 0.8:  # copying the cache costs about one step
            left = (mask, offset, rows, token, alive)
            mask, offset, rows, token, alive = take_rows(cache, alive.nonzero()[:, 0], *left)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)  # (b, L + t)
        inputs = inputs_behind(cache, token[:, None], mask, offset)
        logits = policy.model(**inputs).logits[:, -1].float()  # (b, V)
    return [[token for token in row if token >= 0] for row in tokens.tolist()]


class Sampler:
    """A policy folder (and a PRM folder) that samples; loaded when first needed, gone after `with`.

    With --engine vllm a vLLM process holds the policy; it starts and ends with this object.
    """

    def __init__(self, policy, args, prm=None):
        self.folders = (policy, prm)
        self.args = args
        self.policy = self.prm = self.engine = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.engine:
            self.engine.llm_engine.engine_core.shutdown()
            for child in multiprocessing.active_children():
                child.join(30)  # its memory is free when it has ended
        self.policy = self.prm = self.engine = None
        free_memory()

    def start(self, example):
        """Load both folders; the example is what model and engine are proved on."""
        policy, prm = self.folders
        if self.args.engine == "vllm":
            self.engine = start_engine(policy, self.args)
        self.policy = load_policy(policy, self.args)
        prove_policy(self.policy, example, self.args)
        if self.engine:
            prove_engine(self.engine, self.policy, example, self.args)
            self.policy.model = None  # the engine has it
            free_memory()
        if prm:
            self.prm = load_rule(prm) if is_rule(prm) else load_prm(prm, self.args)
            if (
                not is_rule(prm)
                and self.prm.tokenizer.get_vocab() != self.policy.tokenizer.get_vocab()
            ):
                raise InputError(
                    f"{prm} numbers tokens otherwise than {policy}; use a PRM made of it"
                )

    def sample(
        self, path, examples, n, temperature, purpose, iteration=0, right_only=False, prefixes=None
    ):
        """Phase: n checked samples per example as JSONL rows, in the order of the examples.

        Each is seeded by (purpose, iteration, prompt, sample), or by its prefix in place of the
        iteration; prefixes: rows whose token_ids the responses begin with. temperature: a number or
        one per example. With a PRM a row gets its step scores and R_p; right_only: R = 1(a = a*) x
        R_p instead, for examples whose answer is known: wrong samples have R = 0 and are not
        scored.
        """
        heats = temperature if isinstance(temperature, list) else [temperature] * len(examples)

        def produce(places):
            """The rows of a chunk."""
            chunk = [examples[i] for i in places]
            heat = [heats[i] for i in places]
            begun = [prefixes[i]["token_ids"] for i in places] if prefixes else [[]] * len(chunk)
            seeds = []
            for example, prefix in zip(chunk, begun):
                key = (example["id"], prefix) if prefix else (iteration, example["id"])
                seeds.append([seed_of(self.args.seed, purpose, *key, k) for k in range(n)])
            if self.policy is None:
                self.start(chunk[0])
            given = (self.policy, chunk, seeds, heat, self.args, begun)
            responses = engine_generate(self.engine, *given) if self.engine else generate(*given)
            groups = []
            for i, example in enumerate(chunk):
                groups.append([])
                for k, response in enumerate(responses[i]):
                    row = {
                        "id": example["id"],
                        "iteration": iteration,
                        "sample": k,
                        "seed": seeds[i][k],
                        "temperature": heat[i],
                        "prefix_length": len(begun[i]),
                    }
                    groups[-1].append(row | check(response, example))
            if self.prm:
                self.score(groups, chunk, right_only)
            return itertools.chain(*groups)

        write_chunks(path, range(len(examples)), produce, self.args, Path(path).stem)

    def score(self, groups, examples, right_only):
        """Give every row of each example its step scores and reward; a cut response has none."""
        known = [right_only and example["answer"] is not None for example in examples]
        token_ids = []
        for group, judged in zip(groups, known):
            token_ids.append([])
            for row in group:
                wanted = row["finished"] and (row["correct"] or not judged)
                token_ids[-1].append(row["token_ids"] if wanted else [])
        if callable(self.prm):  # a rule
            scores = []
            for group, example, wanted in zip(groups, examples, token_ids):
                texts = [row["response"] if ids else "" for row, ids in zip(group, wanted)]
                scores.append([self.prm(text, example) if text else [] for text in texts])
        else:
            scores = score_steps(self.prm, examples, token_ids, self.args)
        for group, judged, found in zip(groups, known, scores):
            for row, steps in zip(group, found):
                reward = round(response_reward(steps, self.args.aggregate), 6)  # -1: no step
                row["step_scores"] = [round(score, 6) for score in steps]
                row["reward"] = max(reward, 0.0) if judged else reward

    def look(self, folder, name, examples, k, temperature, purpose, iteration=0):
        """Two phases: a greedy response each, <name>_greedy.jsonl, and k, <name>_samples.jsonl."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for kind, n, heat in (("greedy", 1, 0.0), ("samples", k, temperature)):
            self.sample(f"{folder}/{name}_{kind}.jsonl", examples, n, heat, purpose, iteration)


def check(response, example):
    """What a row says of a response and whether it is right; a cut one has no final answer."""
    answer = extract_answer(response.text, example) if response.finished else None
    return {
        "response": response.text,
        "token_ids": response.token_ids,
        "finished": response.finished,
        "answer": canonical(answer, example),
        "correct": example["answer"] is not None and is_correct(answer, example),
    }


def free_memory():
    """Give back what is no longer used, so that another process may take it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PROVED = set()  # model classes that passed `prove_policy` in this process


@torch.inference_mode()
def prove_policy(policy, example, args):
    """Raises InputError unless padded batches, caches and our loss do what plain passes do.

    Two prompts of unequal length with three tokens after each: the tokens' log-probabilities in a
    padded batch and from the cache must be those of each prompt alone, and our loss the model's
    own, on average to 0.001 nats in float32 and 0.25 in bfloat16. A family for which they are not
    would be sampled, scored or trained wrongly without a word.
    """
    name = type(policy.model).__name__
    if name in PROVED:
        return
    pair = [example, example | {"question": f"{example['question']} {example['question']}"}]
    tails = [policy.tokenizer.encode("7 8 9 10", add_special_tokens=False)[:3]] * 2
    width = len(tails[0])
    alone = [token_logprobs(policy, [each], tails[:1], args)[0] for each in pair]
    together, _ = token_logprobs(policy, pair, tails, args)  # (2, W)

    prompts = encode_prompts(policy, pair, args)
    batch = append_tokens(prompts, tails, policy.pad_id)  # (2, L + W)
    labels = batch["input_ids"].clone()
    labels[:, :-width] = -100
    loss = policy.model(**batch, labels=labels, use_cache=False).loss

    cache, offset, first = read_prompts(policy, prompts)
    ids = batch["input_ids"][:, -width:]  # (2, W)
    later = policy.model(**inputs_behind(cache, ids, batch["attention_mask"], offset)).logits
    logits = torch.cat([first[:, None], later[:, :-1]], 1)  # (2, W, V)
    cached = -F.cross_entropy(logits.mT, ids, reduction="none")  # (2, W)

    off = {"padded": together - torch.cat(alone), "cached": cached - together}
    off["loss"] = loss + together.mean()
    off = {way: difference.abs().mean().item() for way, difference in off.items()}
    figures = ", ".join(f"{way} {nats:.1e}" for way, nats in off.items())
    if not max(off.values()) < (1e-3 if args.dtype == "float32" else 0.25):
        raise InputError(f"{name} is not supported: its own forward pass differs, nats: {figures}")
    PROVED.add(name)
    print(f"self-test of {name}, nats off a plain forward pass: {figures}", flush=True)


# ---- sampling by vLLM


def choose_engine(wanted, device) -> str:
    """What --engine asks for on a device, "vllm" or "transformers"; says which and why.

    Raises InputError where vLLM is asked for and cannot run.
    """
    lack = "asked for" if wanted == "transformers" else vllm_lacks(device)
    if lack and wanted == "vllm":
        raise InputError(f"--engine vllm cannot run: {lack}; or use --engine transformers")
    chosen = "transformers" if lack else "vllm"
    print(f"engine: {chosen} ({lack or 'it is installed for ' + device})", flush=True)
    return chosen


def vllm_lacks(device):
    """Why vLLM cannot generate on this device; an empty text if it can."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # A forked engine would inherit the lock of the run folder.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        return f"vLLM is not installed, or broken: {error}"
    wanted, built = torch.device(device), current_platform.device_type
    if wanted.index:
        return "vLLM takes the first visible GPU: name another by CUDA_VISIBLE_DEVICES"
    return "" if built == wanted.type else f"vLLM is built for {built}, not for {device}"


def start_engine(folder, args):
    """A vLLM engine, in a process of its own, that holds a policy folder's weights."""
    import vllm

    free_memory()  # vLLM counts what this process still holds, and refuses to start
    code = {"trust_remote_code": args.trust_remote_code}
    context = args.max_prompt_tokens + args.max_new_tokens
    text = AutoConfig.from_pretrained(folder, **code).get_text_config()
    settings = {
        "dtype": args.dtype,
        "gpu_memory_utilization": args.engine_memory,
        "max_model_len": min(context, getattr(text, "max_position_embeddings", context)),
        "enable_prefix_caching": True,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "mm_processor_kwargs": json.loads(args.processor),
        "generation_config": "vllm",
        "disable_log_stats": True,
        "enforce_eager": args.device == "cpu",
    }
    if args.device == "cpu":  # a seeded prompt that is cut in two crashes vLLM's CPU sampler
        settings["enable_chunked_prefill"] = False
    before, local = dict(os.environ), os.environ.get("LOCAL_RANK")
    if local and torch.cuda.is_available():  # this rank's GPU
        visible = before.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(64)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(local)]
    for name in before:  # torchrun's: the engine is none of its ranks and has a store of its own
        if re.fullmatch(r"(\w+_)?(RANK|WORLD_SIZE)|(MASTER|TORCHELASTIC)_\w+", name):
            del os.environ[name]
    try:
        return vllm.LLM(str(folder), **settings, **code)
    except (ValueError, RuntimeError) as error:
        why = first_line(error)
        raise InputError(
            f"vLLM did not start ({why}); its own words stand above. If it lacks memory, change "
            "--engine_memory; --engine transformers does without it"
        ) from None
    finally:
        os.environ.clear()
        os.environ.update(before)


def ask_engine(engine, policy, examples, seeds, temperatures, args, prefixes) -> list:
    """vLLM's outputs, one per sample, prompt by prompt; each is a request with a seed of its own.

    Prompts go in as token ids with unexpanded image placeholders, so that a prefix is continued
    exactly where it ends.
    """
    from vllm import SamplingParams

    tokenizer, prompts, settings = policy.tokenizer, [], []
    for i, example in enumerate(examples):
        (text,) = ask(policy.processor, [example], args, tokenize=False)
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not begun)["input_ids"] + prefixes[i]
        image = {"image": read_image(example)}
        for seed in seeds[i]:
            prompts.append({"prompt_token_ids": ids, "multi_modal_data": image})
            asked = SamplingParams(
                temperature=temperatures[i],
                seed=seed,
                max_tokens=max(1, args.max_new_tokens - len(prefixes[i])),
                stop_token_ids=policy.eos_ids,
                logit_bias={token: -100.0 for token in policy.banned},
                logprobs=0,
                detokenize=False,
            )
            settings.append(asked)
    try:
        return engine.generate(prompts, settings, use_tqdm=False)
    except ValueError as error:
        why = first_line(error)
        raise InputError(f"vLLM refuses a prompt ({why}); use --engine transformers") from None


def engine_generate(engine, policy, examples, seeds, temperatures, args, prefixes):
    """`generate` by vLLM."""
    outputs = ask_engine(engine, policy, examples, seeds, temperatures, args, prefixes)
    tails = [list(output.outputs[0].token_ids) for output in outputs]
    return to_responses(policy, tails, seeds, prefixes, args)


def prove_engine(engine, policy, example, args):
    """Raises InputError unless vLLM reads one prompt, and holds the weights, as transformers does.

    Its greedy tokens are scored by the policy's own forward pass. Their logprobs differ by
    rounding, on average by less than 0.02 nats in float32 and 0.1 in bfloat16, which rounds a logit
    of 20 by 0.06; wrong weights are off by far more, and vLLM raises nothing.
    """
    short = replace(args, max_new_tokens=min(16, args.max_new_tokens))
    (output,) = ask_engine(engine, policy, [example], [[0]], [0.0], short, [[]])
    mine = encode_prompts(policy, [example], args)["input_ids"][0].tolist()
    theirs, sampled = list(output.prompt_token_ids), output.outputs[0]
    advice = "use --engine transformers for this model"
    if mine != theirs:
        ids = f"transformers {mine}, vLLM {theirs}"
        raise InputError(f"{example['where']}: the prompt's token ids differ, {ids}; {advice}")
    tokens = list(sampled.token_ids)
    steps = zip(sampled.logprobs, tokens)
    there = torch.tensor([step[token].logprob for step, token in steps])  # (W,)
    with torch.inference_mode():
        here = token_logprobs(policy, [example], [tokens], args)[0][0].cpu()  # (W,)
    off = (here - there).abs().mean().item()
    figures = f"{len(tokens)} greedy logprobs are {off:.4f} apart on average"
    if not off < (0.02 if args.dtype == "float32" else 0.1):
        raise InputError(f"vLLM does not hold the policy's weights: {figures}; {advice}")
    print(f"engine: vLLM started and holds the policy's weights: {figures}", flush=True)


# ---- steps and PRM scores


def step_ends(token_ids: list[int], tokenizer) -> list[int]:
    r"""Where each step of a response ends: exclusive indices into its token ids.

    A step is a line that holds more than white space and ends with the token that holds its line
    break; blank lines belong to the step before them. Without a step the list is empty.

    >>> class Words:
    ...     def decode(self, ids): return {1: "3 + 4 = 7", 2: "\n", 3: "Answer : 7"}[ids[0]]
    >>> step_ends([1, 2, 2, 3], Words())
    [3, 4]
    """
    texts = {token: tokenizer.decode([token]) for token in set(token_ids)}
    ends, content = [], False
    for end, token in enumerate(token_ids, 1):
        lines = texts[token].split("\n")
        content = content or bool(lines[0].strip())
        if len(lines) == 1 and end < len(token_ids):
            continue
        if content:
            ends.append(end)
        elif ends:
            ends[-1] = end
        content = bool(lines[-1].strip())
    return ends


def encode_steps(steps: list[str], tokenizer) -> tuple[list[int], list[int]] | None:
    """Token ids of a response of these steps, a line each, and their ends as `step_ends` finds.

    None if they cannot be told apart again, such as a step of white space alone.
    """
    lines = [" ".join(step.split()) for step in steps]
    token_ids = tokenizer.encode("\n".join(lines), add_special_tokens=False)
    ends = step_ends(token_ids, tokenizer)
    return (token_ids, ends) if len(ends) == len(steps) else None


def step_logits(prm, inputs, ends: list[list[int]], offset, first=None) -> torch.Tensor:
    """Logit of "this step is good" for every step of a batch: the ONE place a step's score is read.

    mark_weight x (logit(good) - logit(bad)), two tokens of the vocabulary read behind the step's
    last token, plus likelihood x the mean log-probability of the step's own tokens under the PRM.
    So a PRM stays a plain language-model checkpoint. The second part is not the paper's (stage 02
    says why).

    inputs: of the model's forward pass; its input_ids hold the responses from column `offset` on,
    (B, offset + W). first: logits of their first tokens where a cache holds the prompts, (B, V).
    ends: where each response's steps end. Returns (steps of the batch,), row by row.
    """
    rows = [i for i, row in enumerate(ends) for _ in row]  # (S,)
    stops = torch.tensor([end for row in ends for end in row], device=prm.model.device).long()
    if not prm.likelihood:  # the ends of steps are all that is read
        places = offset + stops - 1  # (S,)
        kept, columns = places.unique(return_inverse=True)
        logits = prm.model(**inputs, logits_to_keep=kept).logits  # (B, kept, V)
        if logits.shape[1] > len(kept):  # a model that gives all positions
            columns = places
        return mark_logits(prm, logits[rows, columns])

    ids = inputs["input_ids"][:, offset:]  # (B, W)
    kept = ids.shape[1] + (first is None)
    logits = prm.model(**inputs, logits_to_keep=kept).logits[:, -kept:].float()  # (B, kept, V)
    if first is not None:
        logits = torch.cat([first[:, None], logits], 1)  # (B, W + 1, V): behind 0, 1, ... W tokens
    starts = [start for row in ends for start in [0, *row][: len(row)]]
    starts = torch.tensor(starts, device=prm.model.device).long()  # (S,)
    logprobs = -F.cross_entropy(logits[:, :-1].mT, ids, reduction="none")  # (B, W)
    sums = F.pad(logprobs.double().cumsum(1), (1, 0))  # (B, W + 1)
    mean = (sums[rows, stops] - sums[rows, starts]) / (stops - starts)  # (S,)
    return mark_logits(prm, logits[rows, stops]) + prm.likelihood * mean.float()


def mark_logits(prm, logits) -> torch.Tensor:
    """The marks' part of the scores of steps, from the logits behind each step, (S, V) -> (S,)."""
    if not prm.marks:
        return torch.zeros_like(logits[:, 0])
    good, bad = prm.marks
    return prm.mark_weight * (logits[:, good].float() - logits[:, bad].float())


@torch.inference_mode()
def score_steps(prm, examples, responses: list[list[list[int]]], args) -> list:
    """f(s_j) in [0, 1] of every step of responses[i][k] to example i: [i][k][j]; no step, no score.

    A prompt, its image included, is read once for all responses to it; one without a response is
    not read.
    """
    scores = [[[] for _ in row] for row in responses]
    asked = [i for i, row in enumerate(responses) if any(row)]
    few = replace(args, rows=min(args.rows, 256))  # bounds the memory of the prompts' cache
    for part in slices_of([responses[i] for i in asked], 1, few):
        batch = asked[part]
        prompts = encode_prompts(prm, [examples[i] for i in batch], args)
        read, offset, first = read_prompts(prm, prompts)
        places = [(i, k) for i in batch for k, tail in enumerate(responses[i]) if tail]
        # Responses of like length together: little is spent on padding.
        places.sort(key=lambda place: len(responses[place[0]][place[1]]))
        longest = max(len(responses[i][k]) for i, k in places)
        # The logits of a sub-batch take 2 GB in float32 at most.
        size = min(max(2**29 // (longest * first.shape[1]), 1), 32)
        for start in range(0, len(places), size):
            some = places[start : start + size]
            tails = [responses[i][k] for i, k in some]
            ids, seen = pad_right(tails, prm.pad_id)  # (n, W)
            owner = torch.tensor([batch.index(i) for i, _ in some], device=prm.model.device)  # (n,)
            cache = deepcopy(read)
            given = take_rows(cache, owner, prompts["attention_mask"], offset)  # (n, L), (n, 1)
            mask = torch.cat([given[0], seen.to(given[0])], 1)  # (n, L + W)
            inputs = inputs_behind(cache, ids.to(mask), mask, given[1])
            ends = [step_ends(tail, prm.tokenizer) for tail in tails]
            found = step_logits(prm, inputs, ends, 0, first[owner]).sigmoid().tolist()
            found = iter(found)
            for (i, k), row in zip(some, ends):
                scores[i][k] = list(itertools.islice(found, len(row)))
    return scores


def response_reward(scores, aggregate="min") -> float:
    """R_p(y) = min_j f(s_j), or another aggregate; -1, below all, without a step (paper, 2).

    >>> response_reward([0.9, 0.2]), response_reward([]), response_reward([0.5, 0.5], "product")
    (0.2, -1.0, 0.25)
    """
    if not scores:
        return -1.0
    if aggregate == "mean":
        return sum(scores) / len(scores)
    if aggregate == "last":
        return scores[-1]
    return min(scores) if aggregate == "min" else math.prod(scores)


# ---- selection and metrics


def top_k(rewards, k) -> list[int]:
    """Indices of the k largest rewards, largest first; of equal ones the earlier sample wins.

    >>> top_k([0.2, 0.9, 0.9, 0.5], 2)
    [1, 2]
    """
    return sorted(range(len(rewards)), key=lambda i: -rewards[i])[:k]  # stable


def reward_pass_at_k(rewards, correct, k) -> bool:
    """Whether one of the k samples that the reward ranks first, of all, is right (paper, 5).

    >>> reward_pass_at_k([0.9, 0.1, 0.8], [False, True, False], 2)
    False
    """
    return any(correct[i] for i in top_k(rewards, k))


def vote(answers, weights) -> str | None:
    """The answer with the largest total weight, of equal ones the first; None has no vote.

    >>> vote(["7", "8", None, "8"], [1.0, 0.6, 9.0, 0.6])
    '8'
    """
    totals = Counter()
    for answer, weight in zip(answers, weights):
        if answer is not None:
            totals[answer] += weight
    return max(totals, key=totals.get, default=None)  # max keeps the first of equals


def distinct(rows) -> list[dict]:
    """Identical responses to one prompt once, the first of them, in their order.

    >>> rows = [{"id": p, "token_ids": t} for p, t in (("a", [1]), ("a", [1]), ("b", [1]))]
    >>> [row["id"] for row in distinct(rows)]
    ['a', 'b']
    """
    first = {}
    for row in rows:
        first.setdefault((row["id"], tuple(row["token_ids"])), row)
    return list(first.values())


def load_checker(spec):
    """The function FILE:FUNCTION(response, example) that knows if a chain is right, or None."""
    if not spec:
        return lambda response, example: None
    meaning = "True, False or None"
    return load_function("--chain_checker", spec, meaning, lambda v: v in (True, False, None))


def is_rule(prm) -> bool:
    """Whether --prm names no folder but a function.

    >>> is_rule("tests/toy.py:step_scores"), is_rule("runs/toy/02_train_prm/model")
    (True, False)
    """
    return re.fullmatch(r".+\.py:\w+", str(prm)) is not None


def load_rule(spec):
    """A rule-based process reward, FILE:FUNCTION(response, example) -> step scores in [0, 1]."""

    def fits(scores):
        """Whether the function gave step scores."""
        return isinstance(scores, list) and all(0 <= float(score) <= 1 for score in scores)

    return load_function("--prm", str(spec), "a list of step scores from 0 to 1", fits)


def load_function(name, spec, meaning, fits):
    """The function FILE:FUNCTION(response, example) of a flag; `fits` knows its results.

    What the user's code raises becomes an InputError, as does a result that does not fit.
    """
    path, _, function = spec.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"{name} {spec}: {path!r} is not a file; give FILE:FUNCTION")

    @contextmanager
    def named():
        """A sentence in place of what the user's code raises."""
        try:
            yield
        except (*LOADING_ERRORS, SyntaxError, NameError, AssertionError) as error:
            raise InputError(f"{name} {spec} fails: {error!r}") from None

    with named():
        call = runpy.run_path(path)[function]

    @named()
    def checked(response, example):
        """What the user's function says of a response."""
        found = call(response, example)
        if not fits(found):
            raise TypeError(f"it must give {meaning}, not {found!r}")
        return found

    return checked


# ---- training


def token_logprobs(policy, examples, tails: list[list[int]], args):
    """Log-probability of every token of tails[i] after prompt i, and which count; (B, W) each."""
    batch = encode_prompts(policy, examples, args)
    batch = append_tokens(batch, tails, policy.pad_id)  # (B, L + W)
    width = max(map(len, tails))
    out = policy.model(**batch, use_cache=False, logits_to_keep=width + 1)
    logits = out.logits[:, -width - 1 : -1].float()  # (B, W, V) some models give all positions
    wanted = batch["input_ids"][:, -width:]  # (B, W)
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    # By position, so that an EOS that is also the pad counts.
    return -loss.view_as(wanted), batch["attention_mask"][:, -width:].bool()


def sft_loss(policy, examples, targets: list[list[int]], args) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of the responses and their closing EOS, nothing else; and their tokens.

    targets: response token ids without EOS, one list per example.
    """
    tails = [ids + [policy.eos_ids[0]] for ids in targets]
    logprobs, counted = token_logprobs(policy, examples, tails, args)  # (B, W) each
    return -(logprobs * counted).sum(), sum(map(len, tails))


def sft(by_id, args):
    """What `train` is given to learn the responses of {"id", "token_ids"} rows."""

    def loss_of(policy, rows):
        """The SFT loss of a few rows."""
        examples = [by_id[row["id"]] for row in rows]
        return sft_loss(policy, examples, [row["token_ids"] for row in rows], args)

    def count_of(row):
        """The tokens of a response and its closing EOS."""
        return len(row["token_ids"]) + 1

    def length_of(row):
        """The tokens of its prompt, as `fitting` counted them, and of the response."""
        return by_id[row["id"]].get("tokens", 0) + len(row["token_ids"])

    return {"loss_of": loss_of, "count_of": count_of, "length_of": length_of}


def epoch_batches(n, size, steps, *key) -> list[list[int]]:
    """`steps` batches of indices below n: epoch after epoch in a new order, the short rest kept.

    >>> [sorted(b) for b in epoch_batches(3, 4, 2, 0)]
    [[0, 1, 2], [0, 1, 2]]
    """
    batches, epoch = [], 0
    while len(batches) < steps:
        draws = torch.Generator().manual_seed(seed_of(*key, epoch))
        batches += BatchSampler(RandomSampler(range(n), generator=draws), size, drop_last=False)
        epoch += 1
    return batches[:steps]


def learning_rate(step, peak, warmup) -> float:
    """Rate of the step-th step (from 0): linear warm-up, then constant (paper, appendix).

    >>> [learning_rate(s, 1.0, 4) for s in (0, 3, 9)]
    [0.25, 1.0, 1.0]
    """
    return peak * min(1.0, (step + 1) / max(warmup, 1))


def passes_of(batch: list, micro_batch, rank, ranks) -> list[list]:
    """A rank's share of a batch, in passes; as many on every rank, so that one may be empty.

    >>> [passes_of([5, 6, 7], 1, rank, 2) for rank in (0, 1)]
    [[[5], [7]], [[6], []]]
    """
    mine = batch[rank::ranks]
    largest = -(-len(batch) // ranks)
    return [mine[start : start + micro_batch] for start in range(0, largest, micro_batch)]


def shard(model, args) -> torch.nn.Module:
    """The model on --device with float32 weights that compute in --dtype (FSDP2).

    It comes in --dtype, on the CPU, and only a rank's shards become float32: a large model never
    is whole in float32 anywhere. One float32 rank has nothing to shard and nothing to cast.
    """
    dtype = dtype_of(args)
    if world_size() == 1 and dtype == torch.float32:
        return model.to(args.device)
    mesh = dist.init_device_mesh(torch.device(args.device).type, (world_size(),))
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = getattr(model, "_no_split_modules", None) or ()  # those of the vision tower too
    for module in reversed(list(model.modules())):  # inner ones first
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, mp_policy=mixed)
    return fully_shard(model, mesh=mesh, mp_policy=mixed).float()


def make_optimizer(model) -> torch.optim.AdamW:
    """AdamW over every weight that is trained; its rate is set before every step.

    Its moments are there from the start, so that a saved state can be loaded into them.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0, fused=True)
    for p in weights:
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments
    return optimizer


def training_tensors(model, optimizer):
    """By name, every trained weight in float32 and its moments: what a training state holds."""
    tensors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors[name] = p.data
            for key, value in optimizer.state[p].items():
                tensors[f"{name}.{key}"] = value
    return tensors


def cause_of(report) -> Exception:
    """The error itself, such as a full disk, in a report of the checkpoint library."""
    return next(iter(report.failures.values()))[0]


def save_state(work, model, optimizer, progress):
    """Save weights and moments, every rank its shards, as safetensors; progress.json names them.

    The folder it names is whole, the one before goes after it.
    """
    new = work / f"batch_{progress['batch']:06d}"
    if rank() == 0:
        shutil.rmtree(new, ignore_errors=True)
    wait_for_ranks()
    writer = dcp.HuggingFaceStorageWriter(str(new), save_distributed=True)
    try:
        dcp.save(training_tensors(model, optimizer), storage_writer=writer)
    except dcp.CheckpointException as report:
        raise cause_of(report) from None
    if rank() == 0:
        write_json(work / "progress.json", progress | {"check": seed_of(progress)})
        drop_states(work, keep=new.name)
    wait_for_ranks()


def drop_states(work, keep=""):
    """Delete the saved states of a training phase but one; progress.json stays."""
    for old in work.glob("batch_*"):
        if old.name != keep:
            shutil.rmtree(old, ignore_errors=True)


def load_state(work, model, optimizer) -> dict:
    """Put the newest saved state into model and optimizer, on any number of ranks; its progress.

    Raises InputError if it is not whole.
    """
    progress = read_progress(work)
    folder = work / f"batch_{progress['batch']:06d}"
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(training_tensors(model, optimizer), storage_reader=reader)
    except dcp.CheckpointException as report:
        why = first_line(cause_of(report))
        raise InputError(f"{folder} is not whole ({why}); delete {work} to begin anew") from None
    return progress


def read_progress(work) -> dict:
    """The progress that `save_state` wrote; raises InputError if it was changed."""
    progress = read_json(work / "progress.json")
    if progress.pop("check", None) != seed_of(progress):
        raise InputError(f"{work}/progress.json was changed since it was made; put it back")
    return progress


def backward(policy, rows, loss_of, count, args) -> float:
    """The mean loss over a batch, whose gradient every rank gets in passes over its share.

    count: of the whole batch. A rank without a row takes a pass that weighs nothing.
    """
    loss = 0.0
    for part in passes_of(rows, args.micro_batch, rank(), world_size()):
        summed = loss_of(policy, part or rows[:1])[0] * bool(part)
        (summed * world_size() / count).backward()  # FSDP2 takes the mean over ranks
        loss += summed.item()
    return sum_over_ranks(loss) / count


def train(
    model_out,
    policy_folder,
    work,
    batches,
    rows,
    loss_of,
    count_of,
    args,
    label,
    length_of=None,
    state=None,
    prm=None,
) -> dict:
    """Phase: train a policy folder on batches of row numbers; writes model_out, returns progress.

    loss_of(policy, rows) -> (summed loss, count) and count_of(row) -> count; the gradient is that
    of the mean over the true count of the whole batch, however ranks and passes cut it. Rows of
    like length_of(row) share a pass, and every rank gets short and long ones. state: the
    `work` of an earlier phase, whose weights, moments and rate schedule go on here; without it they
    begin anew. prm: what makes the policy a PRM, as in prm.json. progress: {"step" of the
    schedule, "batch" of this phase, "tokens", "loss" (summed over batches)}; saved in `work` every
    args.save_every steps. Raises InputError if the loss is not finite.
    """
    if is_made(model_out):
        return read_progress(work)
    work.mkdir(parents=True, exist_ok=True)
    policy = load_policy(policy_folder, args, training=True)
    if prm:
        policy = Prm(**vars(policy), **prm)
    policy.model = shard(policy.model, args).train()
    optimizer = make_optimizer(policy.model)
    progress = {"step": 0, "batch": 0, "tokens": 0, "loss": 0.0}
    if is_there(work / "progress.json"):
        progress = load_state(work, policy.model, optimizer)
    elif state:
        progress["step"] = load_state(state, policy.model, optimizer)["step"]
    done = progress["batch"]
    for batch in tqdm(batches[done:], label, len(batches), initial=done, disable=quiet()):
        rate = learning_rate(progress["step"], args.learning_rate, args.warmup_steps)
        optimizer.param_groups[0]["lr"] = rate
        chosen = sorted((rows[i] for i in batch), key=length_of or count_of)  # little padding
        count = max(1, sum(map(count_of, chosen)))
        loss = backward(policy, chosen, loss_of, count, args)
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not math.isfinite(loss + norm.item()):
            raise InputError(
                f"{label}: the loss is {loss} at step {progress['step']}; lower --learning_rate or "
                f"look at the data of this step, whose gradient has the norm {norm.item()}"
            )
        optimizer.step()
        optimizer.zero_grad()
        for name, more in {"step": 1, "batch": 1, "tokens": count, "loss": loss}.items():
            progress[name] += more
        if progress["batch"] % args.save_every == 0 and progress["batch"] < len(batches):
            save_state(work, policy.model, optimizer, progress)
    if progress["batch"] > done:  # else progress.json names this very state, which must stay
        save_state(work, policy.model, optimizer, progress)
    save_policy(policy, model_out, args)
    return progress
