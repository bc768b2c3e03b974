"""Stage 02: the process reward model (PRM), from Monte-Carlo rollouts (paper, section 2, appendix).

Reads   data/toy/train.jsonl, data/toy/val.jsonl, runs/toy/01_warmup/model/
Writes  runs/toy/02_train_prm/samples.jsonl      responses of the warm-up policy, checked
                              prefixes.jsonl     every distinct step prefix of the mixed prompts
                              rollouts.jsonl     completions of every prefix, checked
                              steps.jsonl        a row per response: its steps and their labels
                              held_out.jsonl     rows that it is not trained on, with scores
                              val_samples.jsonl  val prompts with step scores, to judge the PRM by
                              model/             a plain Hugging Face folder; prm.json: its marks
                              metrics.json       step AUC, calibration, label balance, reranking

A step's label comes from --rollouts completions that start at the step's exact end, inside the
assistant turn; the last step is judged by the answer check. The score of a step is
sigmoid(logit(good) - logit(bad)) of two ordinary tokens, read at the step's last token, so the PRM
has no extra head and any engine can serve it.

Departures from the paper:
1. Prompts whose samples are all right or all wrong get no rollouts: they tell no step from another.
2. Rollouts are drawn at --rollout_temperature 0.5 (the paper names none): at 1.0 a sound step often
   fails by a later slip.
3. About 10 K labelled steps here, 50 K items there.

    python 02_train_prm.py
    torchrun --nproc-per-node 8 02_train_prm.py --data my/train.jsonl --val my/val.jsonl
"""

import time
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer

from common import (
    InputError,
    Lines,
    Sampler,
    ScoringArgs,
    append_tokens,
    by_id_of,
    by_prompt,
    distinct,
    drop_states,
    encode_prompts,
    epoch_batches,
    fitting,
    flag,
    load_checker,
    load_examples,
    load_prm,
    once,
    open_run,
    run_stage,
    score_steps,
    step_ends,
    step_logits,
    stream_jsonl,
    train,
    write_chunks,
    write_json,
    write_jsonl,
)


@dataclass
class Args(ScoringArgs):
    """Flags of stage 02."""

    data: str = flag("data/toy/train.jsonl", "labelled prompts, JSONL")
    policy: str = flag(
        "", "policy that is judged and becomes the PRM; empty: the warm-up of --runs"
    )
    val: str = flag("data/toy/val.jsonl", "prompts on which the PRM is judged, never trained on")
    prompts: int = flag(1000, "labelled prompts to sample from, the first of the file")
    samples: int = flag(4, "responses sampled per prompt")
    rollouts: int = flag(4, "completions from every step prefix")
    temperature: float = flag(1.0, "sampling temperature of the responses")
    rollout_temperature: float = flag(
        0.5, "of the rollouts: lower asks if a careful policy succeeds"
    )
    labels: Literal["soft", "hard"] = flag("soft", "share of right completions, or whether any is")
    held_out: float = flag(0.15, "share of the prompts whose step labels only measure")
    val_samples: int = flag(8, "responses per val prompt")
    good: str = flag("+", "token whose logit says that a step is good")
    bad: str = flag("-", "token whose logit says that a step is bad")
    epochs: int = flag(2, "passes over the labelled responses")
    batch_size: int = flag(32, "responses per optimizer step")
    learning_rate: float = flag(5e-4, "peak learning rate")
    warmup_steps: int = flag(20, "steps of linear warm-up, then the rate is constant", above=-1)
    chain_checker: str = flag(
        "tests/toy.py:judge", "FILE:FUNCTION(response, example): chain right, or None; for reports"
    )


# ---- sample, cut, roll out, label


def mark_ids(tokenizer, good, bad) -> tuple[int, int]:
    """Ids of the mark tokens; raises InputError for a text that is not one token, or two alike."""
    ids = [tokenizer.encode(mark, add_special_tokens=False) for mark in (good, bad)]
    single = {mark[0] for mark in ids if len(mark) == 1} - {tokenizer.unk_token_id}
    if len(single) < 2:
        raise InputError(
            f"--good {good!r} and --bad {bad!r} must each be one token of the vocabulary, "
            f"and not the same; they are {ids}"
        )
    return ids[0][0], ids[1][0]


def mixed_responses(rows):
    """Per prompt that has right and wrong samples, its distinct finished responses.

    >>> rows = [{"id": p, "token_ids": [t], "correct": c, "finished": True}
    ...         for p, t, c in (("a", 1, True), ("a", 1, True), ("a", 2, False), ("b", 3, True))]
    >>> [[row["token_ids"] for row in group] for group in mixed_responses(rows)]
    [[[1], [2]]]
    """
    for _, samples in by_prompt(rows):
        if len({row["correct"] for row in samples}) == 2:
            yield [row for row in distinct(samples) if row["finished"]]


def step_prefixes(responses, tokenizer) -> list[dict]:
    """A prompt's distinct proper step prefixes; a whole response is judged by the answer check."""
    prefixes = {}
    for row in responses:
        ids = row["token_ids"]
        for end in step_ends(ids, tokenizer)[:-1]:
            prefixes[tuple(ids[:end])] = {"id": row["id"], "prefix": ids[:end]}
    return list(prefixes.values())


def label_steps(row, right: Counter, n, tokenizer) -> dict:
    """One response with its steps: where each ends, its text, its soft and its hard label.

    right: how many completions of each prefix are right. soft = right completions / n; hard = 1 if
    any is right (Math-Shepherd). The last step is judged by the answer check of the response.
    """
    ids = row["token_ids"]
    ends = step_ends(ids, tokenizer)
    shares = [right[tuple(ids[:end])] / n for end in ends[:-1]] + [float(row["correct"])]
    return {
        "id": row["id"],
        "sample": row["sample"],
        "steps": [tokenizer.decode(ids[a:b]).strip() for a, b in zip([0, *ends], ends)],
        "soft": shares,
        "hard": [float(share > 0) for share in shares],
        "ends": ends,
        "token_ids": ids,
    }


def labelled_responses(samples, rollouts, n, tokenizer, held):
    """Rows of steps.jsonl; the rollouts are n per prefix, in the order of the prefixes."""
    rollouts = iter(rollouts)
    for responses in mixed_responses(samples):
        own = islice(rollouts, n * len(step_prefixes(responses, tokenizer)))
        own = [row for row in own if row["correct"]]
        right = Counter(tuple(row["token_ids"][: row["prefix_length"]]) for row in own)
        for row in responses:
            if step_ends(row["token_ids"], tokenizer):
                yield label_steps(row, right, n, tokenizer) | {"held_out": row["id"] in held}


# ---- train


def prm_loss(prm, examples, rows, labels, args) -> tuple[torch.Tensor, int]:
    """Summed binary cross-entropy at the end of every step of the rows, and the number of steps."""
    prompts = encode_prompts(prm, examples, args)
    batch = append_tokens(prompts, [row["token_ids"] for row in rows], prm.pad_id)  # (B, L + W)
    ends = [row["ends"] for row in rows]
    width = prompts["input_ids"].shape[1]
    logits = step_logits(prm, batch | {"use_cache": False}, ends, width)  # (S,)
    wanted = torch.tensor([y for row in rows for y in row[labels]], device=logits.device)  # (S,)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum"), len(wanted)


# ---- judge


def auc(positive, scores):
    """ROC AUC; None if all are positive or none is."""
    return float(roc_auc_score(positive, scores)) if len(set(positive)) == 2 else None


def step_report(rows):
    """How the PRM does on held-out step labels; rows: {"soft", "hard", "score"}.

    step_auc: chance that a step from which most completions are right outscores one from which most
    are wrong; None if all are good or all bad. calibration: mean label in each tenth of the score
    range; their weighted distance is calibration_error.
    """
    good = [row["soft"] >= 0.5 for row in rows]
    scores = [row["score"] for row in rows]
    table = []
    error = 0.0
    for tenth in range(10):
        inside = [row for row in rows if min(int(row["score"] * 10), 9) == tenth]
        if inside:
            n = len(inside)
            score, soft = (sum(row[key] for row in inside) / n for key in ("score", "soft"))
            table.append({"score": round(score, 3), "soft": round(soft, 3), "steps": n})
            error += abs(score - soft) * n / len(rows)
    return {
        "steps": len(rows),
        "share_good": sum(good) / max(len(rows), 1),
        "step_auc": auc(good, scores),
        "step_auc_hard": auc([row["hard"] > 0 for row in rows], scores),
        "calibration_error": error,
        "calibration": table,
    }


def chain_report(rows, by_id, checker):
    """How often R_p ranks a right chain above a wrong one with the same right answer to a prompt.

    Ties count half. Prompts that the checker cannot judge (it returns None) are left out.
    """
    judged = 0
    sound = 0
    wins = []  # 1 of a pair that is ranked as it should be, 0.5 of a tie
    for prompt, samples in by_prompt(rows):
        rewards = {True: [], False: [], None: []}
        for row in distinct(samples):
            if row["correct"]:
                rewards[checker(row["response"], by_id[prompt])].append(row["reward"])
        right, wrong = rewards[True], rewards[False]
        judged += len(right) + len(wrong)
        sound += len(right)
        wins += [(r > w) + 0.5 * (r == w) for r in right for w in wrong]
    return {
        "right_answers_judged": judged,
        "of_them_right_chains": sound,
        "pairs": len(wins),
        "right_chain_above_wrong_chain": sum(wins) / len(wins) if wins else None,
    }


def judge(out, by_id, checker):
    """The figures of the labels and of the PRM, from the files of the phases."""
    rows = Lines(out / "steps.jsonl")
    soft = [share for row in rows for share in row["soft"]]
    hard = [any_right for row in rows for any_right in row["hard"]]
    measured = []
    for row in stream_jsonl(out / "held_out.jsonl"):
        for step in zip(row["soft"], row["hard"], row["scores"]):
            measured.append(dict(zip(("soft", "hard", "score"), step)))
    val = [(row["correct"], row["reward"]) for row in stream_jsonl(out / "val_samples.jsonl")]
    return {
        "mixed_prompts": len({row["id"] for row in rows}),
        "responses": len(rows),
        "prefixes": len(Lines(out / "prefixes.jsonl")),
        "step_labels": len(soft),
        "mean_soft": sum(soft) / len(soft),
        "mean_hard": sum(hard) / len(hard),
        "held_out": step_report(measured),
        "response_auc": auc(*zip(*val)),
        "chains": chain_report(stream_jsonl(out / "val_samples.jsonl"), by_id, checker),
    }


# ---- the stage


def make_prm(out, policy, args):
    """The phases of the stage, in folder `out`: sample, cut, roll out, label, train, judge."""
    clock = time.time()
    checker = load_checker(args.chain_checker)
    files = load_examples(args.data), load_examples(args.val)
    examples, val = fitting(out, policy, args, *files)
    examples = examples[: args.prompts]
    by_id = by_id_of(examples, val)
    held = {example["id"] for example in examples[: int(len(examples) * args.held_out)]}
    if not 0 < len(held) < len(examples):
        raise InputError(
            f"--held_out {args.held_out} of {len(examples)} prompts holds {len(held)} out; "
            "some must be held out and some trained on"
        )
    tokenizer = AutoTokenizer.from_pretrained(policy, trust_remote_code=args.trust_remote_code)
    marks = mark_ids(tokenizer, args.good, args.bad)

    # Sample responses, cut them into steps, complete every step prefix, label the steps
    with Sampler(policy, args) as sampler:
        sampler.sample(out / "samples.jsonl", examples, args.samples, args.temperature, "prm")
        once(out / "prefixes.jsonl", partial(cut, out, tokenizer))
        prefixes = Lines(out / "prefixes.jsonl", "prefix")
        begun = [by_id[row["id"]] for row in stream_jsonl(out / "prefixes.jsonl")]
        n, heat = args.rollouts, args.rollout_temperature
        sampler.sample(out / "rollouts.jsonl", begun, n, heat, "rollout", prefixes=prefixes)
    once(out / "steps.jsonl", partial(label, out, tokenizer, held, args.rollouts))

    # Train: the PRM f starts from the policy
    rows = Lines(out / "steps.jsonl")
    fit = [i for i, row in enumerate(rows) if not row["held_out"]]
    if not fit:
        raise InputError(
            "every prompt with right and wrong samples is held out, so nothing can be trained on; "
            "lower --held_out or raise --prompts or --samples, in another --runs"
        )
    steps = -(-len(fit) // args.batch_size) * args.epochs
    order = epoch_batches(len(fit), args.batch_size, steps, args.seed, "prm")
    batches = [[fit[i] for i in batch] for batch in order]

    def loss_of(prm, part):
        """The PRM's loss of a few labelled responses."""
        return prm_loss(prm, [by_id[row["id"]] for row in part], part, args.labels, args)

    def count_of(row):
        """The labelled steps of a response."""
        return len(row["ends"])

    model, work = out / "model", out / "training"
    progress = train(
        model, policy, work, batches, rows, loss_of, count_of, args, "02 train", marks=marks
    )
    drop_states(work)

    # Judge, on prompts it was not trained on
    score_held_out(out, rows, by_id, args)
    with Sampler(policy, args, prm=model) as sampler:
        path = out / "val_samples.jsonl"
        sampler.sample(path, val, args.val_samples, args.temperature, "prm-val")

    def report(part):
        """Every figure, and the seconds since this start."""
        spent = {"steps": progress["batch"], "mean_loss": progress["loss"] / len(batches)}
        spent["seconds"] = round(time.time() - clock, 1)
        write_json(part, {"prompts": len(examples)} | judge(out, by_id, checker) | spent)

    once(out / "metrics.json", report)


def cut(out, tokenizer, part):
    """Phase: the distinct step prefixes of the mixed prompts."""
    groups = mixed_responses(stream_jsonl(out / "samples.jsonl"))
    write_jsonl(part, (row for group in groups for row in step_prefixes(group, tokenizer)))
    if len(Lines(part)) == 0:
        raise InputError(
            "no prompt has both right and wrong samples, so no step can be labelled; "
            "raise --prompts, --samples or --temperature"
        )


def label(out, tokenizer, held, n, part):
    """Phase: the steps of the mixed prompts' responses, with their labels."""
    samples = stream_jsonl(out / "samples.jsonl")
    rollouts = stream_jsonl(out / "rollouts.jsonl")
    write_jsonl(part, labelled_responses(samples, rollouts, n, tokenizer, held))


def score_held_out(out, rows, by_id, args):
    """Phase: the PRM's scores of the steps of held-out responses; rows: of steps.jsonl."""
    held = [i for i, row in enumerate(rows) if row["held_out"]]
    prm = cache(partial(load_prm, out / "model", args))  # loaded when first called

    def produce(places):
        """Rows of steps.jsonl with their scores."""
        part = [rows[i] for i in places]
        token_ids = [[row["token_ids"]] for row in part]
        scores = score_steps(prm(), [by_id[row["id"]] for row in part], token_ids, args)
        return [row | {"scores": found} for row, (found,) in zip(part, scores)]

    write_chunks(out / "held_out.jsonl", held, produce, args, "held_out")


def main(args):
    """Sample, roll out, label, train, judge."""
    policy = args.policy or Path(args.runs) / "01_warmup" / "model"
    inputs = {"data": args.data, "val": args.val, "policy": policy}
    out = open_run(args, "02_train_prm", inputs)
    make_prm(out, policy, args)
    print(
        (out / "metrics.json").read_text() + f"next: python 03_self_evolve.py --runs {out.parent}"
    )


if __name__ == "__main__":
    run_stage(Args, main)
