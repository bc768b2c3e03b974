"""Stage 02: the process reward model (PRM), trained on Monte-Carlo rollouts of the warm-up policy (paper, section 3.3).

Reads   data/toy/train.jsonl, data/toy/val.jsonl, runs/toy/01_warmup/model/
Writes  runs/toy/02_train_prm/samples.jsonl   responses of the warm-up policy, checked
                              rollouts.jsonl  completions from every step prefix, checked
                              steps.jsonl     one label per step: hard (any completion right) and soft (share right)
                              val.jsonl       samples for val prompts with step scores: what the PRM is judged on
                              model/          the PRM, a plain Hugging Face folder; prm.json names its two mark tokens
                              metrics.json    step AUC, calibration, label balance, PRM as a reranker

A step's label comes from --rollouts completions that start at the step's exact end, inside the assistant turn; the last
step is judged by the answer check. The score of a step is sigmoid(logit(good) - logit(bad)) of two ordinary tokens, read
at the step's last token, so the PRM has no extra head and any engine can serve it.

Departures from the paper:
1. Prompts whose samples are all right or all wrong get no rollouts: their steps say little about which step went wrong.
2. Rollouts are drawn at --rollout_temperature 0.5 (the paper names none): at 1.0 a sound step often fails by a later slip.
3. About 10 K labelled steps here, 50 K items there.

    python 02_train_prm.py
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from common import (InputError, ScoringArgs, append_chunks, append_tokens, by_id_of, checked, check_longest_prompts, distinct, drop_checkpoint, encode_prompts,
                    epoch_batches, fit, flag, generate, grouped, load_checker, load_checkpoint, load_examples, load_policy, make_optimizer,
                    open_run, print_table, run_stage, sample_rows, save_checkpoint, save_model, score_steps, seed_of, step_ends, step_logits, write_json, write_jsonl)


@dataclass
class Args(ScoringArgs):
    """Flags of stage 02."""

    data: str = flag("data/toy/train.jsonl", "labelled prompts, JSONL")
    policy: str = flag("", "policy whose steps are judged, and from which the PRM starts; empty: the warm-up policy of --runs")
    val: str = flag("data/toy/val.jsonl", "prompts on which the PRM is judged, never trained on")
    prompts: int = flag(1000, "labelled prompts to sample from, the first of the file")
    samples: int = flag(4, "responses sampled per prompt")
    rollouts: int = flag(4, "completions from every step prefix")
    temperature: float = flag(1.0, "sampling temperature of the responses")
    rollout_temperature: float = flag(0.5, "sampling temperature of the rollouts: lower asks whether a careful policy gets there from here")
    labels: Literal["soft", "hard"] = flag("soft", "train on soft labels (share of right completions) or hard ones (any right)")
    held_out: float = flag(0.15, "share of the prompts whose step labels only measure")
    val_samples: int = flag(8, "responses per val prompt")
    good: str = flag("+", "token whose logit says that a step is good")
    bad: str = flag("-", "token whose logit says that a step is bad")
    epochs: int = flag(2, "passes over the labelled responses")
    batch_size: int = flag(32, "responses per optimizer step")
    learning_rate: float = flag(5e-4, "peak learning rate")
    warmup_steps: int = flag(20, "steps of linear warm-up, then the rate is constant")
    chain_checker: str = flag("tests/toy.py:judge", "FILE:FUNCTION(response, example) that knows whether a chain is right, or None; "
                                                    "only reports use it")


def mark_ids(tokenizer, *marks: str) -> tuple[int, ...]:
    """Ids of the mark tokens; raises InputError for a text that is not one token of the vocabulary."""
    ids = [tokenizer.encode(mark, add_special_tokens=False) for mark in marks]
    if any(len(i) != 1 for i in ids) or tokenizer.unk_token_id in sum(ids, []):
        raise InputError(f"--good {marks[0]!r} and --bad {marks[1]!r} must each be one token of the vocabulary; they are {ids}")
    return tuple(i[0] for i in ids)


def mixed_responses(rows: list[dict]) -> list[dict]:
    """The distinct finished responses of prompts that have right and wrong samples: those that get rollouts.

    >>> rows = [{"id": p, "token_ids": [t], "correct": c, "finished": True} for p, t, c in (("a", 1, True), ("a", 1, True), ("a", 2, False), ("b", 3, True))]
    >>> [(row["id"], row["token_ids"]) for row in mixed_responses(rows)]
    [('a', [1]), ('a', [2])]
    """
    mixed = {prompt for prompt, samples in grouped(rows).items() if len({row["correct"] for row in samples}) == 2}
    return [row for row in distinct(rows) if row["id"] in mixed and row["finished"]]


def step_prefixes(responses: list[dict], tokenizer) -> list[dict]:
    """Every distinct proper step prefix: {"id", "prefix"}; the whole response is none, the answer check judges it."""
    prefixes = {(row["id"], tuple(row["token_ids"][:end])): None for row in responses for end in step_ends(row["token_ids"], tokenizer)[:-1]}
    return [{"id": prompt, "prefix": list(ids)} for prompt, ids in prefixes]


def rollout_rows(policy, items: list[dict], by_id: dict, args: Args) -> list[dict]:
    """args.rollouts checked completions of every prefix, as JSON rows."""
    examples = [by_id[item["id"]] for item in items]
    seeds = [[seed_of(args.seed, "rollout", item["id"], item["prefix"], k) for k in range(args.rollouts)] for item in items]
    responses = generate(policy, examples, seeds, args.rollout_temperature, args, prefixes=[item["prefix"] for item in items])
    rows = []
    for item, example, row_seeds, row in zip(items, examples, seeds, responses):
        for k, response in enumerate(row):
            rows.append({"id": item["id"], "iteration": 0, "prefix_length": len(item["prefix"]), "rollout": k, "temperature": args.rollout_temperature,
                         "seed": row_seeds[k], **checked(response, example)})
    return rows


def label_steps(responses: list[dict], prefixes: list[dict], rollouts: list[dict], n: int, tokenizer) -> list[dict]:
    """One row per step of every response: its place, and its soft and hard label with the counts behind them.

    soft = right completions / completions; hard = 1 if any is right (Math-Shepherd). The last step is judged by the
    answer check of its response.
    """
    right_of = {(p["id"], tuple(p["prefix"])): sum(r["correct"] for r in rollouts[i * n:(i + 1) * n]) for i, p in enumerate(prefixes)}
    steps = []
    for row in responses:
        ids, ends = row["token_ids"], step_ends(row["token_ids"], tokenizer)
        for j, (start, end) in enumerate(zip([0, *ends], ends)):
            right, total = (int(row["correct"]), 1) if end == ends[-1] else (right_of[row["id"], tuple(ids[:end])], n)
            steps.append({"id": row["id"], "iteration": 0, "sample": row["sample"], "step": j, "text": tokenizer.decode(ids[start:end]).strip(),
                          "end": end, "rollouts": total, "right": right, "soft": right / total, "hard": float(right > 0)})
    return steps


def prm_loss(prm, examples: list[dict], targets: list[list[int]], steps: list[list[dict]], labels: str, args) -> tuple[torch.Tensor, int]:
    """Summed binary cross-entropy at the end of every labelled step, and the number of steps (0 gives loss 0)."""
    prompts = encode_prompts(prm, examples, args)
    batch, width = append_tokens(prompts, targets, prm.pad_id), prompts["input_ids"].shape[1]
    hidden = prm.model.base_model(**batch, use_cache=False).last_hidden_state  # (B, L + W, H)
    logits = step_logits(prm, hidden, [[s["end"] for s in row] for row in steps], width)  # (S,)
    wanted = torch.tensor([s[labels] for row in steps for s in row], device=logits.device)  # (S,) in [0, 1]
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum"), len(wanted)


def auc(positive: list, scores: list[float]) -> float | None:
    """ROC AUC; None if all are positive or none is."""
    return roc_auc_score(positive, scores) if len(set(positive)) == 2 else None


def step_report(rows: list[dict]) -> dict:
    """How the PRM does on held-out step labels; rows: {"soft", "hard", "score"}.

    step_auc: chance that a step from which most completions are right outscores one from which most are wrong.
    An AUC of steps that are all good or all bad is None.
    calibration: mean label in each tenth of the score range; their weighted distance is calibration_error.
    """
    good, score = [row["soft"] >= 0.5 for row in rows], [row["score"] for row in rows]
    bins = [[r for r in rows if min(int(r["score"] * 10), 9) == b] for b in range(10)]
    table = [{"score": round(sum(r["score"] for r in b) / len(b), 3), "soft": round(sum(r["soft"] for r in b) / len(b), 3), "steps": len(b)} for b in bins if b]
    return {"steps": len(rows), "share_good": sum(good) / max(len(rows), 1), "step_auc": auc(good, score), "step_auc_hard": auc([r["hard"] > 0 for r in rows], score),
            "calibration_error": sum(abs(b["score"] - b["soft"]) * b["steps"] for b in table) / max(len(rows), 1), "calibration": table}


def chain_report(rows: list[dict], by_id: dict, checker) -> dict:
    """How often R_p ranks a right chain above a wrong chain with the same right answer to the same prompt.

    Ties count half. Prompts or data that the checker cannot judge (it returns None) are left out.
    """
    wins = pairs = right_chains = right_answers = 0
    for prompt, samples in grouped(rows).items():
        judged = [(r, checker(r["response"], by_id[prompt])) for r in distinct(samples) if r["correct"]]
        judged = [(r, ok) for r, ok in judged if ok is not None]
        right_answers, right_chains = right_answers + len(judged), right_chains + sum(ok for _, ok in judged)
        good = [r["reward"] for r, ok in judged if ok]
        bad = [r["reward"] for r, ok in judged if not ok]
        pairs += len(good) * len(bad)
        wins += sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
    return {"right_answers_judged": right_answers, "of_them_right_chains": right_chains, "pairs": pairs,
            "right_chain_above_wrong_chain": wins / pairs if pairs else None}


def main(args: Args) -> None:
    """Sample, roll out, label, train, report."""
    start_from = args.policy or Path(args.runs) / "01_warmup" / "model"
    out = open_run(args, "02_train_prm", {"data": args.data, "val": args.val, "policy": start_from})
    if (out / "metrics.json").exists():
        drop_checkpoint(out / "checkpoint")
        return report(out)
    examples, val, clock = load_examples(args.data)[:args.prompts], load_examples(args.val), time.time()
    checker, policy = load_checker(args.chain_checker), load_policy(start_from, args)  # pi_warmup
    marks = mark_ids(policy.tokenizer, args.good, args.bad)
    check_longest_prompts(policy, examples + val, args)
    by_id, held = by_id_of(examples, val), {e["id"] for e in examples[:int(len(examples) * args.held_out)]}
    if not 0 < len(held) < len(examples):
        raise InputError(f"--held_out {args.held_out} of {len(examples)} prompts holds {len(held)} out; some must be held out and some trained on")

    # Sample responses, cut them into steps, complete every step prefix
    rows = append_chunks(out / "samples.jsonl", examples, args.samples, args.chunk,
                         lambda chunk: sample_rows(policy, chunk, args.samples, args.temperature, "prm", 0, args), "02 sample")
    responses = mixed_responses(rows)
    prefixes = step_prefixes(responses, policy.tokenizer)
    if not prefixes:
        raise InputError("no prompt has both right and wrong samples, so no step can be labelled; raise --prompts, --samples or --temperature")
    rollouts = append_chunks(out / "rollouts.jsonl", prefixes, args.rollouts, args.chunk,
                             lambda chunk: rollout_rows(policy, chunk, by_id, args), "02 rollouts")
    steps = label_steps(responses, prefixes, rollouts, args.rollouts, policy.tokenizer)
    write_jsonl(out / "steps.jsonl", [{**s, "held_out": s["id"] in held} for s in steps])
    sampled = time.time()

    # Train: the PRM f starts from the policy
    steps_of: dict = {}
    for step in steps:
        steps_of.setdefault((step["id"], step["sample"]), []).append(step)
    train = [row for row in responses if row["id"] not in held and (row["id"], row["sample"]) in steps_of]
    prm, optimizer = policy, make_optimizer(policy)
    prm.marks = marks
    state = load_checkpoint(out / "checkpoint", prm, optimizer)
    per_epoch = -(-len(train) // args.batch_size)
    batches = [[train[i] for i in b] for b in epoch_batches(len(train), args.batch_size, per_epoch * args.epochs, args.seed, "prm")]
    state = fit(prm, optimizer, batches, lambda batch: prm_loss(prm, [by_id[r["id"]] for r in batch], [r["token_ids"] for r in batch],
                                                                [steps_of[r["id"], r["sample"]] for r in batch], args.labels, args),
                args, "02 train", state, lambda s: save_checkpoint(out / "checkpoint", prm, optimizer, s))
    save_checkpoint(out / "checkpoint", prm, optimizer, state)
    save_model(prm, out / "model")
    optimizer = prm.optimizer = None  # its memory is needed for what follows
    trained = time.time()

    # Report, on prompts it was not trained on
    judged = grouped([row for row in responses if row["id"] in held])
    scores = score_steps(prm, [by_id[prompt] for prompt in judged], [[r["token_ids"] for r in rows] for rows in judged.values()], args)
    measured = [{**s, "score": f} for rows, row_scores in zip(judged.values(), scores) for r, fs in zip(rows, row_scores)
                for s, f in zip(steps_of.get((r["id"], r["sample"]), []), fs)]
    warmup = load_policy(start_from, args)
    val_rows = append_chunks(out / "val.jsonl", val, args.val_samples, args.chunk,
                             lambda chunk: sample_rows(warmup, chunk, args.val_samples, args.temperature, "prm-val", 0, args, prm), "02 judge")
    correct, reward = [r["correct"] for r in val_rows], [r["reward"] for r in val_rows]
    write_json(out / "metrics.json", {
        "prompts": len(examples), "mixed_prompts": len({r["id"] for r in responses}), "responses": len(responses), "prefixes": len(prefixes),
        "rollouts": len(rollouts), "step_labels": len(steps), "mean_soft": sum(s["soft"] for s in steps) / len(steps),
        "mean_hard": sum(s["hard"] for s in steps) / len(steps), "steps": state["step"], "mean_loss": state["loss"] / max(state["batch"], 1),
        "held_out": step_report(measured), "response_auc": auc(correct, reward), "chains": chain_report(val_rows, by_id, checker),
        "seconds": {"sample": round(sampled - clock, 1), "train": round(trained - sampled, 1), "report": round(time.time() - trained, 1)}})
    drop_checkpoint(out / "checkpoint")  # the model is whole and judged now
    report(out)


def report(out) -> None:
    """Print metrics.json as a table, and what to run next."""
    print_table(json.loads((out / "metrics.json").read_text()))
    print(f"next: python 03_self_evolve.py --runs {out.parent}")


if __name__ == "__main__":
    run_stage(Args, main)
