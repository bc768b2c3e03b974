"""Stage 01: warm-up. The base model learns to reason from its own right chains of thought (paper, section 3.1).

Reads   data/toy/train.jsonl (labelled prompts), data/toy/base/ (a Hugging Face vision-language checkpoint)
Writes  runs/toy/01_warmup/samples.jsonl  every sampled response, checked
                           sft.jsonl      the right ones, each once per prompt: the training data
                           model/         the warmed-up policy, a plain Hugging Face folder
                           metrics.json   what happened

Departures from the paper:
1. A prompt contributes at most --keep right responses, so that easy prompts do not crowd out hard ones.

    python 01_warmup.py
    python 01_warmup.py --model Qwen/Qwen2.5-VL-3B-Instruct --data my/train.jsonl --runs runs/qwen
"""

import json
import shutil
import time
from dataclasses import dataclass

from common import (CommonArgs, InputError, append_chunks, check_longest_prompts, distinct, epoch_batches, fit, flag, grouped, load_checkpoint,
                    load_examples, load_policy, make_optimizer, open_run, print_table, run_stage, sample_rows, save_checkpoint, save_model,
                    sft_loss, write_json, write_jsonl)


@dataclass
class Args(CommonArgs):
    """Flags of stage 01."""

    data: str = flag("data/toy/train.jsonl", "labelled prompts, JSONL")
    model: str = flag("data/toy/base", "base model: a Hugging Face folder or hub name")
    samples: int = flag(4, "responses sampled per prompt")
    keep: int = flag(2, "right responses kept per prompt, at most")
    temperature: float = flag(1.0, "sampling temperature")
    steps: int = flag(250, "optimizer steps")
    batch_size: int = flag(16, "responses per optimizer step")
    learning_rate: float = flag(1e-4, "peak learning rate")
    warmup_steps: int = flag(20, "steps of linear warm-up, then the rate is constant")


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
    out = open_run(args, "01_warmup", {"data": args.data, "model": args.model})
    if (out / "metrics.json").exists():
        return report(out)
    examples, clock = load_examples(args.data), time.time()
    policy = load_policy(args.model, args)  # pi_base
    check_longest_prompts(policy, examples, args)

    # Generate: chains of thought from the base model
    rows = append_chunks(out / "samples.jsonl", examples, args.samples, args.chunk,
                         lambda chunk: sample_rows(policy, chunk, args.samples, args.temperature, "train", 0, args), "01 sample")
    sampled = time.time()

    # Select: right final answers, binary reward 1(a* = a)
    kept = keep_right(rows, args.keep)
    if not kept:
        raise InputError(f"none of {len(rows)} sampled responses is right; see {out}/samples.jsonl: is the answer format what --instruction asks for?")
    write_jsonl(out / "sft.jsonl", kept)

    # Improve: SFT on the response tokens
    by_id, optimizer = {e["id"]: e for e in examples}, make_optimizer(policy)
    state = load_checkpoint(out / "checkpoint", policy, optimizer)
    batches = [[kept[i] for i in batch] for batch in epoch_batches(len(kept), args.batch_size, args.steps, args.seed, "warmup")]
    state = fit(policy, optimizer, batches, lambda batch: sft_loss(policy, [by_id[r["id"]] for r in batch], [r["token_ids"] for r in batch], args),
                args, "01 train", state, lambda s: save_checkpoint(out / "checkpoint", policy, optimizer, s))
    save_model(policy, out / "model")
    shutil.rmtree(out / "checkpoint", ignore_errors=True)  # the model is whole now
    right = sum(row["correct"] for row in rows)
    write_json(out / "metrics.json", {
        "prompts": len(examples), "samples": len(rows), "right": right / len(rows), "unparsable": sum(r["answer"] is None for r in rows) / len(rows),
        "prompts_with_a_right_sample": len({r["id"] for r in rows if r["correct"]}) / len(examples), "kept": len(kept),
        "steps": state["step"], "tokens": state["tokens"], "mean_loss": state["loss"] / max(state["batch"], 1),
        "seconds": {"sample": round(sampled - clock, 1), "train": round(time.time() - sampled, 1)}})
    report(out)


def report(out) -> None:
    """Print metrics.json as a table, and what to run next."""
    print_table(json.loads((out / "metrics.json").read_text()))
    print("next: python 02_train_prm.py")


if __name__ == "__main__":
    run_stage(Args, main)
