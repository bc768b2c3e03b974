"""Stage 01: warm-up. The base model learns from its own right chains of thought (section 3.1).

Reads   data/toy/train.jsonl (labelled prompts), data/toy/base/ (a vision-language checkpoint)
Writes  runs/toy/01_warmup/samples.jsonl  every sampled response, checked
                           sft.jsonl      the right ones, each once per prompt: the training data,
                                          as TRL and ms-swift read it
                           model/         the warmed-up policy, a plain Hugging Face folder
                           metrics.json   what happened

--data mathv360k splits MathV360K once, in the paper's sizes: train_samples_all_tuning.json and
data_images/ in --data_root, downloaded if they are not there, become train.jsonl (half, labelled),
test.jsonl (750), val.jsonl (250), unlabeled.jsonl (the rest) and split.json (what was left out).

Departures from the paper:
1. A prompt gives at most --keep right responses, so that easy prompts do not crowd out hard ones.
2. No image is in two splits: a hash of its path decides. Test and val take one record of an image.

    python 01_warmup.py
    python 01_warmup.py --model Qwen/Qwen2.5-VL-3B-Instruct --data mathv360k --runs runs/qwen
"""

import json
import random
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import common
from common import CommonArgs, InputError, flag, once, user_text, write_json, write_jsonl

HELD_OUT = {"test": 750, "val": 250}
HINT = re.compile(r"(?:Hint:.*?(integer|float|list|letter))?(?:.*?(one|two|three) decimal)?")
DECIMALS = {"one": 1, "two": 2, "three": 3}


@dataclass
class Args(CommonArgs):
    """Flags of stage 01."""

    data: str = flag("data/toy/train.jsonl", "labelled prompts, JSONL, or mathv360k")
    data_root: str = flag("data/mathv360k", "folder of MathV360K and of its splits")
    model: str = flag("data/toy/base", "base model: a Hugging Face folder or hub name")
    samples: int = flag(4, "responses sampled per prompt")
    keep: int = flag(2, "right responses kept per prompt, at most")
    temperature: float = flag(1.0, "sampling temperature")
    steps: int = flag(250, "optimizer steps")
    batch_size: int = flag(16, "responses per optimizer step")
    learning_rate: float = flag(1e-4, "peak learning rate")
    warmup_steps: int = flag(20, "steps of linear warm-up, then the rate is constant", above=-1)


# ---- MathV360K


def convert(record, number: int) -> dict:
    r"""A published record as our example, its hint included; InputError says why it cannot be one.

    >>> turns = [{"value": "<image>\nQuestion: Find x.\nChoices:\n(A) 4\n(B) 5"}, {"value": "5."}]
    >>> example = convert({"image": "GEOS/1.png", "conversations": turns}, 7)
    >>> example["id"], example["source"], example["choices"], example["answer"]
    ('mathv360k-7', 'GEOS', ['4', '5'], 'B')
    """
    match record:
        case {"image": str(image), "conversations": [{"value": str(asked)}, {"value": str(said)}]}:
            question, _, options = asked.replace("<image>", "").strip().partition("\nChoices:")
        case _:
            raise InputError("not of the published form")
    answer = re.sub(r"(?i)^\s*((the answer is|answer)\b:?\s*)?", "", said).rstrip(" .\n")
    choices = re.findall(r"(?m)^\([A-Z]\)\s*(.*\S)", options)
    kind, decimals = HINT.match(question).groups()
    example = {"id": f"mathv360k-{number}", "image": f"data_images/{image}", "question": question}
    example |= {"answer": answer, "answer_type": kind, "precision": DECIMALS.get(decimals)}
    example |= {"choices": choices if len(choices) > 1 else None, "source": image.split("/")[0]}
    if ["<image>", *user_text(example, "").split()] != asked.split():
        raise InputError("not <image>, a question, and choices (A) ..., (B) ..., one a line")
    read = common.canonical(answer, example)
    if read is None:
        raise InputError("an answer that is not what the question asks for")
    if choices:
        example["answer"] = read  # a letter, whether the record names it or its text
    return example


def read_mathv360k(source: Path):
    """The usable records as our examples, and how many others are left out for which reason.

    Raises InputError for a file that is no JSON list, or of which more than a tenth is unusable.
    """
    try:
        records = json.loads(source.read_text("utf-8"))
    except (ValueError, RecursionError):
        records = None
    if not isinstance(records, list):
        raise InputError(f"{source} is not a whole JSON list of records; fetch it again")
    examples, left_out, by_question = [], Counter(), defaultdict(list)
    for number, record in enumerate(records, 1):
        try:
            row = convert(record, number)
            if not (source.parent / row["image"]).is_file():
                raise InputError("an image that is not there")
            by_question[row["image"], user_text(row, "")].append(row)
        except InputError as reason:
            left_out[str(reason)] += 1
    if left_out.total() > len(records) / 10:
        raise InputError(f"{source} or data_images/ is not whole; unusable: {dict(left_out)}")
    for rows in by_question.values():
        if all(common.is_correct(row["answer"], rows[0]) for row in rows[1:]):
            examples += rows
        else:
            left_out["conflicting answers"] += len(rows)
    return examples, left_out


def split_by_image(examples: list, held_out: dict, seed: int):
    """Examples by split, in the order of a hash of their images: no image is in two splits.

    The first half of the records is "train"; test and val take one record of each next image; the
    rest is "unlabeled". Raises InputError for too few images.

    >>> splits = split_by_image([{"image": image} for image in "aabbccdd"], {"test": 1}, 0)
    >>> {name: len(rows) for name, rows in splits.items()}
    {'train': 4, 'test': 1, 'unlabeled': 2}
    """
    by_image = defaultdict(list)
    for row in examples:
        by_image[row["image"]].append(row)
    images = iter(sorted(by_image, key=lambda image: common.seed_of(seed, "mathv360k", image)))
    splits = {"train": []}
    while len(splits["train"]) < len(examples) / 2:
        splits["train"] += by_image[next(images)]
    for name, size in held_out.items():
        drawn = islice(images, size)
        splits[name] = [random.Random(image).choice(by_image[image]) for image in drawn]
    splits["unlabeled"] = [row for image in images for row in by_image[image]]
    if not splits["unlabeled"]:
        raise InputError(f"{len(by_image)} images with usable records are too few for {held_out}")
    return splits


def split_mathv360k(root: Path, seed: int) -> Path:
    """Write the splits of MathV360K beside it, once, split.json last; the path of train.jsonl.

    Raises InputError if the ones that are there are of another file, seed or sizes.
    """
    source, report = root / "train_samples_all_tuning.json", root / "split.json"
    with common.alone(root):
        if not common.is_there(source):
            once(source, fetch_mathv360k)
    made = {"seed": seed, "source": common.digest(source), "held_out": HELD_OUT}

    def write(part):
        """Write every split, then the report, which says that they are whole."""
        examples, left_out = read_mathv360k(source)
        counts = {"left_out": left_out}
        left_out["of an image in test or val"] = len(examples)
        for name, rows in split_by_image(examples, HELD_OUT, seed).items():
            write_jsonl(root / f"{name}.jsonl", rows)
            counts[name] = {"records": len(rows), **Counter(row["source"] for row in rows)}
            left_out["of an image in test or val"] -= len(rows)
        write_json(part, made | counts)

    with common.alone(root):
        once(report, write)
    old = json.loads(report.read_text())
    for name, value in made.items():
        if old[name] != value:
            raise InputError(f"{report}: {name} was {old[name]}, now {value}; delete it to redo it")
    return root / "train.jsonl"


def fetch_mathv360k(part: Path):
    """Download MathV360K; its images go beside `part`, the list of records, which comes last."""
    from huggingface_hub import snapshot_download

    try:
        hub = Path(snapshot_download("Zhiqiang007/MathV360K", repo_type="dataset"))
    except OSError as error:
        what = f"{part.stem} and data_images/ into {part.parent}, or name another --data_root"
        raise InputError(f"the hub fails ({error}): put {what}") from None
    shutil.unpack_archive(hub / "data_images.zip", part.parent)
    shutil.copy(hub / part.stem, part)


# ---- the stage


def keep_right(samples, keep):
    """Right responses, identical ones once, at most `keep` per prompt, in sampling order.

    >>> rows = [{"id": "p", "correct": n != 2, "token_ids": [n]} for n in (1, 1, 2, 3, 4)]
    >>> [row["token_ids"] for row in keep_right(rows, 2)]
    [[1], [3]]
    """
    for _, rows in common.by_prompt(samples):
        right = [row for row in common.distinct(rows) if row["correct"]]
        yield from right[:keep]


def main(args: Args) -> None:
    """Sample, keep what is right, fine-tune."""
    if args.data == "mathv360k":
        args.data = str(split_mathv360k(Path(args.data_root), args.seed))
    out = common.open_run(args, "01_warmup", {"data": args.data, "model": args.model})
    (prompts,) = common.fitting(out, args.model, args, common.load_examples(args.data))
    by_id = common.by_id_of(prompts)

    # Generate: chains of thought from the base model
    samples, total = out / "samples.jsonl", len(prompts) * args.samples
    with common.Sampler(args.model, args) as base:  # pi_base
        base.sample(samples, prompts, n=args.samples, temperature=args.temperature, purpose="train")

    # Select: right final answers, binary reward 1(a* = a)
    best = keep_right(common.stream_jsonl(samples), args.keep)
    selected = (common.sft_row(row, by_id[row["id"]], args) for row in best)
    once(out / "sft.jsonl", lambda part: write_jsonl(part, selected))
    kept = common.Lines(out / "sft.jsonl")
    right = sum(row["correct"] for row in common.stream_jsonl(samples))
    if not right:
        raise InputError(f"none of {total} sampled responses is right; see {samples}")

    # Improve: SFT on the response tokens
    batches = common.epoch_batches(len(kept), args.batch_size, args.steps, args.seed, "warmup")
    work, how = out / "training", common.sft(by_id, args) | {"args": args, "label": "01 train"}
    trained = common.train(out / "model", args.model, work, batches, kept, **how)
    common.drop_states(work)

    metrics = {"prompts": len(prompts), "samples": total, "right": right / total}
    metrics["prompts_with_a_right_sample"] = len({row["id"] for row in kept}) / len(prompts)
    metrics |= {"kept": len(kept), "steps": args.steps, "mean_loss": trained["loss"] / args.steps}
    once(out / "metrics.json", lambda part: write_json(part, metrics))
    report(out)


def report(out: Path):
    """Print metrics.json, and what to run next."""
    print((out / "metrics.json").read_text() + f"next: python 02_train_prm.py --runs {out.parent}")


if __name__ == "__main__":
    common.run_stage(Args, main)
