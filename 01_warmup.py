"""Stage 01: warm-up. The base model learns to reason from its own right chains of thought (paper, section 3.1).

Reads   data/toy/train.jsonl (labelled prompts), data/toy/base/ (a Hugging Face vision-language checkpoint)
Writes  runs/toy/01_warmup/samples.jsonl  every sampled response, checked
                           sft.jsonl      the right ones, each once per prompt: the training data
                           model/         the warmed-up policy, a plain Hugging Face folder
                           metrics.json   what happened

--data mathv360k splits MathV360K once, in the paper's sizes: from --data_root/train_samples_all_tuning.json and
--data_root/data_images/, or the hub if they are not there, to train.jsonl (the labelled half), unlabeled.jsonl (the
rest), test.jsonl (750) and val.jsonl (250) beside them, with split.json, which says what was left out and why. 02, 03
and 04 take these files by path. No image and no question text is in two splits, so the split is not a plain draw:
records that share an image or a text with test or val are left out; records that hang together through images and texts
stay together; a group too large for that is cut between its images, and a text on both sides stays where it is asked
more. Answers stand in unlabeled.jsonl too: only the oracle experiment may read them.

Departures from the paper:
1. A prompt contributes at most --keep right responses, so that easy prompts do not crowd out hard ones.
2. Splits of MathV360K share no image and no question text; the paper does not say this of its own.

    python 01_warmup.py
    python 01_warmup.py --model Qwen/Qwen2.5-VL-3B-Instruct --data my/train.jsonl --runs runs/qwen
    python 01_warmup.py --model Qwen/Qwen2.5-VL-3B-Instruct --data mathv360k --runs runs/qwen
"""

import fcntl
import json
import os
import random
import re
import shutil
import time
import zipfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from common import (LETTERS, CommonArgs, InputError, append_chunks, by_id_of, canonical, check_longest_prompts, choice_index, digest, distinct,
                    drop_checkpoint, epoch_batches, fit, flag, grouped, load_checkpoint, load_examples, load_policy, make_optimizer, open_run, print_table,
                    run_stage, sample_rows, save_checkpoint, save_model, seed_of, sft_loss, verdict_if_wrong, write_json, write_jsonl)

DECODER = json.JSONDecoder()
HELD_OUT = {"test": 750, "val": 250}
LARGE = 40    # an image or question text of more records is not drawn for test or val: its other records would be lost to training
GIANT = 2000  # a group of more records is cut between its images


@dataclass
class Args(CommonArgs):
    """Flags of stage 01."""

    data: str = flag("data/toy/train.jsonl", "labelled prompts, JSONL, or mathv360k")
    data_root: str = flag("data/mathv360k", "folder of MathV360K and of its splits, for --data mathv360k")
    model: str = flag("data/toy/base", "base model: a Hugging Face folder or hub name")
    samples: int = flag(4, "responses sampled per prompt")
    keep: int = flag(2, "right responses kept per prompt, at most")
    temperature: float = flag(1.0, "sampling temperature")
    steps: int = flag(250, "optimizer steps")
    batch_size: int = flag(16, "responses per optimizer step")
    learning_rate: float = flag(1e-4, "peak learning rate")
    warmup_steps: int = flag(20, "steps of linear warm-up, then the rate is constant")


# ---------------------------------------------------------------- MathV360K

def stream_list(path, size: int = 1 << 16):
    """(number from 1, record) of a JSON list in a file of any length; raises InputError with file and record number."""
    number = 0
    with open(path, encoding="utf-8") as file:
        text = file.read(size).lstrip()
        if text[:1] != "[":
            raise InputError(f"{path}: expected a JSON list of records, found {text[:20]!r}")
        while text[0] in "[,":
            number, text, rest = number + 1, text[1:].lstrip(), ""
            while not rest:  # until a record and the sign behind it are in the buffer
                try:
                    record, end = DECODER.raw_decode(text)
                    rest = text[end:].lstrip()
                except json.JSONDecodeError:
                    pass
                if not rest:
                    more = file.read(size)
                    if not more or len(text) > 64 * size:
                        raise InputError(f"{path} record {number}: not JSON, or the file ends there; fetch it again")
                    text = (text + more).lstrip()
            text = rest
            yield number, record
        if text[0] != "]":
            raise InputError(f"{path} record {number + 1}: expected a comma, found {text[:20]!r}")


def convert(record, where: str) -> tuple[dict | None, str]:
    r"""A MathV360K record as our example and its bare question text, or (None, why it is skipped).

    The hint stays in the question, as in MathVista's prompts, and says how the answer is read. Raises InputError if the
    record has not the published form.

    >>> turns = [("human", "<image>\nHint: Give the correct option letter.\nQuestion: Find x.\nChoices:\n(A) 4\n(B) 5"), ("gpt", "The answer is B.")]
    >>> convert({"image": "GEOS/images/1.png", "conversations": [{"from": f, "value": v} for f, v in turns]}, "f record 1")[0]["choices"]
    ['4', '5']
    """
    try:
        (human, gpt), image = record["conversations"], record["image"]
        asked, said = human["value"].replace("<image>", "").strip(), gpt["value"].strip()
        fits = (human["from"], gpt["from"]) == ("human", "gpt") and isinstance(image, str)
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise InputError(f'{where}: expected {{"image": text, "conversations": [{{"from": "human", "value": text}}, {{"from": "gpt", "value": text}}]}}, '
                         f"found {json.dumps(record)[:200]}")
    path = os.path.normpath(image)
    if path.startswith(("..", "/")):
        raise InputError(f"{where}: image {image!r} leaves the data folder")
    question, _, options = asked.partition("\nChoices:")
    hint, _, bare = question.rpartition("Question:")
    answer = re.sub(r"^(?:the\s+answer\s+is|answer)\s*:?\s*", "", said, flags=re.IGNORECASE).rstrip(".").strip()
    example = {"image": f"data_images/{path}", "question": question, "answer": answer, "choices": None, "source": path.split("/")[0]}
    if not bare.strip() or not answer:
        return None, "no question" if answer else "no answer"
    bare = " ".join(bare.casefold().split())  # what counts as the same text
    if options:
        letters, texts = (re.split(r"\n\(([A-Z])\)", "\n" + options.strip())[k::2] for k in (1, 2))
        if len(texts) < 2 or "".join(letters) != LETTERS[:len(letters)]:
            return None, "choices that are not (A) ..., (B) ..., one a line"
        example["choices"] = [text.strip() for text in texts]
        index = choice_index(answer, example["choices"])
        return (None, "an answer that is none of the choices") if index is None else ({**example, "answer": LETTERS[index]}, bare)
    kind = next((kind for sign, kind in (("integer", "integer"), ("floating-point", "float"), ("Python list", "list"), ("option letter", "letter")) if sign in hint), None)
    example |= {"answer_type": kind} if kind else {}
    if kind == "float" and (decimals := re.search(r"\b(one|two|three)\s+decimal", hint)):
        example["precision"] = ("one", "two", "three").index(decimals[1]) + 1
    return (None, f"an answer that is no {kind}") if canonical(answer, None, example) is None else (example, bare)


def assign_splits(pairs: list[tuple[int, int]], held_out: dict[str, int], seed: int) -> list[str]:
    """The split of every record, given the numbers of its image and its text; "shared" is left out: another split has one of them.

    The docstring of this file says how. Raises InputError if there are too few records for test and val.

    >>> assign_splits([(0, 10), (0, 11), (1, 11), (2, 12), (3, 13)], {"test": 1}, 1)
    ['train', 'train', 'train', 'test', 'unlabeled']
    """
    order, split, rng = list(range(len(pairs))), ["shared"] * len(pairs), random.Random(seed_of(seed, "mathv360k"))
    rng.shuffle(order)
    sizes, owned, parent = Counter(node for pair in pairs for node in pair), set(), {}

    def root(node):
        """The node that stands for all that hang together with this one; shortens the way there."""
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    walk = iter(order)
    for name in (name for name, n in held_out.items() for _ in range(n)):
        i = next((i for i in walk if owned.isdisjoint(pairs[i]) and max(sizes[node] for node in pairs[i]) <= LARGE), None)
        if i is None:
            raise InputError(f"{len(pairs)} usable records are too few to draw {held_out} from them")
        split[i] = name
        owned.update(pairs[i])
    rest = [i for i in order if owned.isdisjoint(pairs[i])]
    for image, text in (pairs[i] for i in rest):
        parent[root(image)] = root(text)
    size, groups = Counter(root(pairs[i][0]) for i in rest), {}
    for i in rest:
        group = root(pairs[i][0])
        groups.setdefault(("image", pairs[i][0]) if size[group] > GIANT else group, []).append(i)
    filled, asked = {"train": 0, "unlabeled": sum(held_out.values())}, Counter()
    for members in groups.values():  # in the shuffled order, each to the emptier side
        side = min(filled, key=filled.get)
        filled[side] += len(members)
        for i in members:
            split[i] = side
            asked[side, pairs[i][1]] += 1
    for i in rest:  # a text on both sides of a cut group stays where it is asked more; of equals its number decides
        text, sides = pairs[i][1], ("train", "unlabeled")
        if split[i] != max(sides, key=lambda side: (asked[side, text], side == sides[text % 2])):
            split[i] = "shared"
    return split


def read_mathv360k(root: Path) -> tuple[list[tuple[int, int]], list[str], set[int], Counter]:
    """Write the usable records as our examples to examples.part, one by one; only numbers of images and texts stay in memory.

    Returns (image, text) numbers and the source of every record written, the places of those whose image and text have
    conflicting answers, and how many records were skipped for what. Raises InputError if more than a tenth were.
    """
    path, pairs, sources, nodes, answers, conflicts = root / "train_samples_all_tuning.json", [], [], {}, {}, set()
    there, skipped = {}, Counter()
    with open(root / "examples.part", "w", encoding="utf-8") as file:
        for number, record in stream_list(path):
            example, text = convert(record, f"{path} record {number}")
            if example and example["image"] not in there:
                there[example["image"]] = os.path.isfile(root / example["image"])  # looked for, not opened
            if not example or not there[example["image"]]:
                skipped["an image that is not there" if example else text] += 1
                continue
            pairs.append((nodes.setdefault((0, example["image"]), len(nodes)), nodes.setdefault((1, text), len(nodes))))
            sources.append(example["source"])
            answer = example["choices"][LETTERS.index(example["answer"])] if example["choices"] else example["answer"]
            if answers.setdefault(pairs[-1], canonical(answer, None)) != canonical(answer, None):
                conflicts.add(pairs[-1])
            file.write(json.dumps({"id": f"mathv360k-{number}", **example}, ensure_ascii=False) + "\n")
    if sum(skipped.values()) > 0.1 * (len(pairs) + sum(skipped.values())):
        raise InputError(f"{path}: of {len(pairs) + sum(skipped.values())} records too many cannot be used, {dict(skipped)}; is {root}/data_images whole?")
    return pairs, sources, {k for k, pair in enumerate(pairs) if pair in conflicts}, skipped


def split_mathv360k(root: Path, seed: int, held_out: dict[str, int] = HELD_OUT) -> Path:
    """Write the splits of MathV360K beside it, once; returns the path of train.jsonl. Raises InputError if they are of another file or seed."""
    source, report, names = root / "train_samples_all_tuning.json", root / "split.json", ("train", "unlabeled", *held_out)
    if not (source.exists() and (root / "data_images").is_dir()):
        fetch_mathv360k(root)
    made = {"seed": seed, "source": digest(source), "held_out": held_out}
    then = json.loads(report.read_text()) if report.exists() else made
    if changed := [f"{key} was {then.get(key)!r}, now {made[key]!r}" for key in made if then.get(key) != made[key]]:
        raise InputError(f"{report} is of another split: {'; '.join(changed)}. Use it by --data {root}/train.jsonl, or delete it to split anew")
    if report.exists():
        return root / "train.jsonl"
    pairs, sources, conflicting, skipped = read_mathv360k(root)
    clear = [k for k in range(len(pairs)) if k not in conflicting]
    split = dict.fromkeys(conflicting, "conflicting") | dict(zip(clear, assign_splits([pairs[k] for k in clear], held_out, seed)))
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(root / f"{name}.jsonl.part", "w", encoding="utf-8")) for name in names}
        for k, line in enumerate(stack.enter_context(open(root / "examples.part", encoding="utf-8"))):
            if split[k] in files:
                files[split[k]].write(line)
    for name in names:
        os.replace(root / f"{name}.jsonl.part", root / f"{name}.jsonl")
    (root / "examples.part").unlink()
    counts = Counter((split[k], source) for k, source in enumerate(sources))
    by_source = {name: {s: n for (of, s), n in sorted(counts.items()) if of == name} for name in (*names, "shared", "conflicting")}
    totals = {name: sum(row.values()) for name, row in by_source.items()} | {"skipped": dict(skipped)}
    write_json(report, {**made, "records": len(pairs) + sum(skipped.values()), **totals, "by_source": by_source})
    print_table(totals)
    return root / "train.jsonl"


def fetch_mathv360k(root: Path) -> None:
    """Download MathV360K from the hub (Zhiqiang007/MathV360K) and unpack its images."""
    from huggingface_hub import snapshot_download
    try:
        snapshot_download("Zhiqiang007/MathV360K", repo_type="dataset", local_dir=root, allow_patterns=["*.json", "*.zip"])
    except OSError as error:
        raise InputError(f"{root} does not hold train_samples_all_tuning.json and data_images/, and the hub cannot be reached "
                         f"({str(error).splitlines()[0]}); put them there, or name their folder by --data_root") from None
    part = root / "images.part"
    shutil.rmtree(part, ignore_errors=True)
    with zipfile.ZipFile(root / "data_images.zip") as archive:
        archive.extractall(part)
    os.replace(part / "data_images" if (part / "data_images").is_dir() else part, root / "data_images")
    shutil.rmtree(part, ignore_errors=True)


# ---------------------------------------------------------------- the stage

def keep_right(rows: list[dict], keep: int) -> list[dict]:
    """Right responses, identical ones once, at most `keep` per prompt, in sampling order.

    >>> rows = [{"id": "p", "correct": c, "token_ids": t} for c, t in ((True, [1]), (True, [1]), (False, [2]), (True, [3]))]
    >>> [row["token_ids"] for row in keep_right(rows, 2)]
    [[1], [3]]
    """
    right = grouped(distinct([row for row in rows if row["correct"]]))
    return [row for samples in right.values() for row in samples[:keep]]


def main(args: Args) -> None:
    """Sample, keep what is right, fine-tune."""
    if args.data == "mathv360k":
        Path(args.data_root).mkdir(parents=True, exist_ok=True)
        with open(Path(args.data_root) / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits here and finds the splits made
            args.data = str(split_mathv360k(Path(args.data_root), args.seed))
    out = open_run(args, "01_warmup", {"data": args.data, "model": args.model})
    if (out / "metrics.json").exists():
        drop_checkpoint(out / "checkpoint")
        return report(out)
    examples, clock = load_examples(args.data), time.time()
    policy = load_policy(args.model, args)  # pi_base
    check_longest_prompts(policy, examples, args)

    # Generate: chains of thought from the base model
    rows = append_chunks(out / "samples.jsonl", examples, args.samples, args.chunk,
                         lambda chunk: sample_rows(policy, chunk, args.samples, args.temperature, "train", 0, args), "01 sample",
                         lean=verdict_if_wrong)
    sampled = time.time()

    # Select: right final answers, binary reward 1(a* = a)
    kept = keep_right(rows, args.keep)
    if not kept:
        raise InputError(f"none of {len(rows)} sampled responses is right; see {out}/samples.jsonl: is the answer format what --instruction asks for?")
    write_jsonl(out / "sft.jsonl", kept)

    # Improve: SFT on the response tokens
    by_id, optimizer = by_id_of(examples), make_optimizer(policy)
    state = load_checkpoint(out / "checkpoint", policy, optimizer)
    batches = [[kept[i] for i in batch] for batch in epoch_batches(len(kept), args.batch_size, args.steps, args.seed, "warmup")]
    state = fit(policy, optimizer, batches, lambda batch: sft_loss(policy, [by_id[r["id"]] for r in batch], [r["token_ids"] for r in batch], args),
                args, "01 train", state, lambda s: save_checkpoint(out / "checkpoint", policy, optimizer, s))
    save_model(policy, out / "model")
    right = sum(row["correct"] for row in rows)
    write_json(out / "metrics.json", {
        "prompts": len(examples), "samples": len(rows), "right": right / len(rows), "unparsable": sum(r["answer"] is None for r in rows) / len(rows),
        "prompts_with_a_right_sample": len({r["id"] for r in rows if r["correct"]}) / len(examples), "kept": len(kept),
        "steps": state["step"], "tokens": state["tokens"], "mean_loss": state["loss"] / max(state["batch"], 1),
        "seconds": {"sample": round(sampled - clock, 1), "train": round(time.time() - sampled, 1)}})
    drop_checkpoint(out / "checkpoint")  # the model is whole now
    report(out)


def report(out) -> None:
    """Print metrics.json as a table, and what to run next."""
    print_table(json.loads((out / "metrics.json").read_text()))
    print(f"next: python 02_train_prm.py --runs {out.parent}")


if __name__ == "__main__":
    run_stage(Args, main)
