"""Stage 02: the process reward model (PRM), from Monte-Carlo rollouts (paper, section 2, appendix).

Reads   data/toy/train.jsonl, data/toy/val.jsonl, runs/toy/01_warmup/model/
Writes  runs/toy/02_train_prm/samples.jsonl      responses of the warm-up policy, checked
                              prefixes.jsonl     every distinct step prefix of the mixed prompts
                              rollouts.jsonl     completions of every prefix, checked
                              steps.jsonl        a row per response: its steps and their labels
                              held_out.jsonl     rows that it is not trained on, with scores
                              val_samples.jsonl  val prompts with step scores, to judge the PRM by
                              model/             a Hugging Face folder; prm.json: how it is read
                              metrics.json       step AUC, calibration, label balance, reranking

A step's label comes from --rollouts completions that start at the step's exact end, inside the
assistant turn; the last step is judged by the answer check. With --labels FILE the first three
files are not made: its records become steps.jsonl.

The score of a step is sigmoid(mark_weight x (logit(good) - logit(bad)) + likelihood x l): two
ordinary tokens, read at the step's last token, and l, the mean log-probability that the PRM itself
gives to the step's tokens. There is no extra head, so any engine can serve it.

Departures from the paper:
1. Prompts whose samples are all right or all wrong get no rollouts: they tell no step from another.
2. Rollouts are drawn at --rollout_temperature 0.5 (the paper names none): at 1.0 a sound step often
   fails by a later slip.
3. About 10 K labelled steps here, 50 K items there.
4. --likelihood, off unless asked for, is not the paper's. At a step's last token a small model no
   longer knows if it read a digit rightly; how sure it was of that digit it does know. Implicit
   process rewards rest on such log-probabilities too, there against a reference model ("Free
   Process Rewards without Process Labels", Yuan et al. 2024). The marks begin as noise, so beside
   it they want a small weight: --mark_weight 0.1 --likelihood 6 --epochs 1 --learning_rate 3e-4.

    python 02_train_prm.py
    torchrun --nproc-per-node 8 02_train_prm.py --data my/train.jsonl --val my/val.jsonl
"""

import os
import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer

import common
from common import InputError, Lines, flag, once, seed_of, step_ends, stream_jsonl, write_jsonl


@dataclass
class Args(common.ScoringArgs):
    """Flags of stage 02."""

    data: str = flag("data/toy/train.jsonl", "labelled prompts, JSONL")
    policy: str = flag(
        "", "policy that is judged and becomes the PRM; empty: the warm-up of --runs"
    )
    val: str = flag(
        "", "prompts on which the PRM is judged, never trained on; empty: val.jsonl beside --data"
    )
    prompts: int = flag(1000, "labelled prompts to sample from, drawn by seed")
    samples: int = flag(4, "responses sampled per prompt")
    rollouts: int = flag(4, "completions from every step prefix")
    temperature: float = flag(1.0, "sampling temperature of the responses")
    rollout_temperature: float = flag(
        0.5, "of the rollouts: lower asks if a careful policy succeeds"
    )
    labels: str = flag("", "step labels that are there: JSONL of VisualPRM400K or steps.jsonl")
    label_kind: Literal["soft", "hard"] = flag("soft", "share of right completions, or if any is")
    held_out: float = flag(
        0.15, "share of the prompts, drawn by seed, whose step labels only measure"
    )
    val_samples: int = flag(8, "responses per val prompt")
    good: str = flag("+", "token whose logit says that a step is good")
    bad: str = flag("-", "token whose logit says that a step is bad")
    mark_weight: float = flag(1.0, "weight of logit(good) - logit(bad) in a score", above=-1)
    likelihood: float = flag(
        0.0, "weight of the mean log-probability of a step's tokens in its score", above=-1
    )
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
    """The distinct finished responses to prompts that have right and wrong samples.

    >>> rows = [{"id": p, "token_ids": [t], "correct": c, "finished": True}
    ...         for p, t, c in (("a", 1, True), ("a", 1, True), ("a", 2, False), ("b", 3, True))]
    >>> [row["token_ids"] for row in mixed_responses(rows)]
    [[1], [2]]
    """
    for _, samples in common.by_prompt(rows):
        if len({row["correct"] for row in samples}) == 2:
            yield from (row for row in common.distinct(samples) if row["finished"])


def step_prefixes(responses, tokenizer):
    """The distinct proper step prefixes of responses; a whole one is judged by the answer check."""
    prefixes = (
        {"id": row["id"], "token_ids": row["token_ids"][:end]}
        for row in responses
        for end in step_ends(row["token_ids"], tokenizer)[:-1]
    )
    for _, rows in common.by_prompt(prefixes):
        yield from common.distinct(rows)


def labelled_responses(samples, rollouts, by_id, tokenizer, args):
    """Rows of steps.jsonl; a step's score is the share of right completions that begin with it.

    The last step is judged by the answer check of the response.
    """
    right = Counter()
    for row in rollouts:
        right[seed_of(row["id"], row["token_ids"][: row["prefix_length"]])] += row["correct"]
    for row in mixed_responses(samples):
        ids, steps = row["token_ids"], []
        ends = step_ends(ids, tokenizer)
        for start, end in zip([0, *ends], ends):
            correct, total = right[seed_of(row["id"], ids[:end])], args.rollouts
            if end == ends[-1]:
                correct, total = int(row["correct"]), 1
            step = {"step": tokenizer.decode(ids[start:end]).strip(), "score": correct / total}
            steps.append(step | {"num_mc_correct": correct, "num_mc_total": total})
        if steps:
            yield step_row(by_id[row["id"]], row, steps, ids, ends, args)


def step_row(example, row, steps, token_ids, ends, args) -> dict:
    """A row of steps.jsonl: TRL's prompt, completions and labels, VisualPRM's steps_with_score.

    row: of the response. The score is the soft label; the hard one is 1 if any completion is right
    (Math-Shepherd). Whether a prompt is held out is a draw of its own by seed.
    """
    draw = random.Random(seed_of(args.seed, "held_out", example["id"])).random()
    labels = [step["score"] for step in steps]
    if args.label_kind == "hard":
        labels = [float(share > 0) for share in labels]
    return {
        "id": example["id"],
        "sample": row.get("sample", 0),
        "image": example["image"],
        "prompt": common.user_text(example, args.instruction),
        "completions": [step["step"] for step in steps],
        "labels": labels,
        "steps_with_score": steps,
        "ends": ends,
        "token_ids": token_ids,
        "held_out": draw < args.held_out,
    }


# ---- or labels from elsewhere


def outside_row(record, known, tokenizer, args) -> dict | None:
    """A record of --labels as a row of steps.jsonl, or None if it cannot be used.

    It is one of VisualPRM400K, image relative to the file, or names a prompt of --data by its id.
    """
    match record:
        case {"image": str(image), "question": str(question), "steps_with_score": [_, *_] as steps}:
            question = (record.get("question_orig") or question).replace("<image>", "").strip()
            path = Path(args.labels).resolve().parent / image
            example = {"id": f"{seed_of(image, question):012x}", "image": str(path)}
            example |= {"question": question, "choices": None}
        case {"id": str(prompt), "steps_with_score": [_, *_] as steps} if prompt in known:
            example = known[prompt]
        case _:
            return None
    if not all(map(is_step, steps)) or not os.path.isfile(example["image"]):
        return None
    encoded = common.encode_steps([step["step"] for step in steps], tokenizer)
    return encoded and step_row(example, record, steps, *encoded, args)


def is_step(step) -> bool:
    """Whether a step of --labels has a text and a score from 0 to 1."""
    match step:
        case {"step": text, "score": int(score) | float(score)}:
            return common.is_text(text) and 0 <= score <= 1
    return False


def read_labels(known, tokenizer, args, part):
    """Phase: the usable records of --labels; raises InputError if more than a tenth is not."""
    unusable = []  # their lines

    def rows():
        """The rows of the usable ones."""
        for number, record in enumerate(stream_jsonl(args.labels), 1):
            row = outside_row(record, known, tokenizer, args)
            if row:
                yield row
            else:
                unusable.append(number)

    write_jsonl(part, rows())
    total = len(Lines(args.labels))
    if len(unusable) > total / 10:
        raise InputError(
            f"{args.labels} line {unusable[0]}, and {len(unusable)} of {total} in all, cannot be "
            "used: needs a question and an image that is there, or the id of a prompt of --data, "
            "and steps_with_score with texts that are not empty and scores from 0 to 1"
        )


# ---- train


def prompt_of(row) -> dict:
    """The prompt of a row of steps.jsonl as an example: its text holds choices and instruction."""
    example = {"id": row["id"], "where": f"steps.jsonl, prompt {row['id']}", "choices": None}
    return example | {"image": row["image"], "question": row["prompt"]}


def prm_loss(prm, rows, args) -> tuple[torch.Tensor, int]:
    """Summed binary cross-entropy at the end of every step of the rows, and the number of steps."""
    prompts = common.encode_prompts(prm, [prompt_of(row) for row in rows], args)
    tails = [row["token_ids"] for row in rows]
    batch = common.append_tokens(prompts, tails, prm.pad_id)  # (B, L + W)
    ends = [row["ends"] for row in rows]
    width = prompts["input_ids"].shape[1]
    logits = common.step_logits(prm, batch | {"use_cache": False}, ends, width)  # (S,)
    wanted = torch.tensor([y for row in rows for y in row["labels"]], device=logits.device)  # (S,)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum"), len(wanted)


def step_count(row) -> int:
    """The labelled steps of a row."""
    return len(row["ends"])


# ---- judge


def auc(positive, scores):
    """ROC AUC; None if all are positive or none is."""
    return float(roc_auc_score(positive, scores)) if len(set(positive)) == 2 else None


def step_report(steps):
    """How the PRM does on held-out step labels; steps: (soft label, score) pairs.

    step_auc: chance that a step from which most completions are right outscores one from which most
    are wrong; None if all are good or all bad. calibration: by mean score in each tenth of the
    range, the share of good steps. brier: mean squared distance of score and soft label.
    """
    soft, scores = np.array(steps).T  # (S,) each
    good = soft >= 0.5  # (S,)
    shares, means = calibration_curve(good, scores, n_bins=10)
    return {
        "steps": len(steps),
        "share_good": good.mean(),
        "step_auc": auc(good, scores),
        "step_auc_hard": auc(soft > 0, scores),
        "brier": ((scores - soft) ** 2).mean(),
        "calibration": {f"{mean:.2f}": share for mean, share in zip(means, shares)},
    }


def chain_report(rows, by_id, checker):
    """How often R_p ranks a right chain above a wrong one with the same right answer to a prompt.

    Ties count half. Prompts that the checker cannot judge (it returns None) are left out.
    """
    judged = 0
    sound = 0
    wins = []  # 1 of a pair that is ranked as it should be, 0.5 of a tie
    for prompt, samples in common.by_prompt(rows):
        rewards = {True: [], False: [], None: []}
        for row in common.distinct(samples):
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
    soft = np.array([step["score"] for row in rows for step in row["steps_with_score"]])
    measured = []
    for row in stream_jsonl(out / "held_out.jsonl"):
        measured += zip([step["score"] for step in row["steps_with_score"]], row["scores"])
    val = [(row["correct"], row["reward"]) for row in stream_jsonl(out / "val_samples.jsonl")]
    return {
        "labelled_prompts": len({row["id"] for row in rows}),
        "responses": len(rows),
        "step_labels": len(soft),
        "mean_soft": soft.mean(),
        "mean_hard": (soft > 0).mean(),
        "held_out": step_report(measured),
        "response_auc": auc(*zip(*val)),
        "chains": chain_report(stream_jsonl(out / "val_samples.jsonl"), by_id, checker),
    }


# ---- the stage


def make_prm(out, policy, args):
    """The phases of the stage, in folder `out`: sample, cut, roll out, label, train, judge."""
    checker = common.load_checker(args.chain_checker)
    files = common.load_examples(args.data), common.load_examples(args.val)
    by_id = common.by_id_of(*files)
    examples, val = common.fitting(out, policy, args, *files)
    # A published file is grouped by source.
    examples.sort(key=lambda example: seed_of(args.seed, "prm-prompts", example["id"]))
    drawn = examples[: args.prompts]
    tokenizer = AutoTokenizer.from_pretrained(policy, trust_remote_code=args.trust_remote_code)
    marks = mark_ids(tokenizer, args.good, args.bad)
    if args.labels:
        known = common.by_id_of(examples)
        once(out / "steps.jsonl", partial(read_labels, known, tokenizer, args))
    else:
        label_rollouts(out, policy, drawn, by_id, tokenizer, args)

    # Train: the PRM f starts from the policy
    rows = Lines(out / "steps.jsonl")
    bare = replace(args, instruction="")  # which stands in the prompts of the rows
    if args.labels:  # an image that cannot be read shows now, not in the middle
        prompts = {row["id"]: prompt_of(row) for row in rows}
        common.fitting(out / "labels", policy, bare, list(prompts.values()))
    held = [i for i, row in enumerate(rows) if row["held_out"]]
    fit = sorted(set(range(len(rows))) - set(held))
    if not held or not fit:
        raise InputError(
            f"--held_out {args.held_out} holds {len(held)} of {len(rows)} labelled responses out; "
            "change it, or raise --prompts or --samples, in another --runs"
        )
    steps = -(-len(fit) // args.batch_size) * args.epochs
    order = common.epoch_batches(len(fit), args.batch_size, steps, args.seed, "prm")
    batches = [[fit[i] for i in batch] for batch in order]
    model, work = out / "model", out / "training"
    how = (partial(prm_loss, args=bare), step_count, args, "02 train")
    weights = {"mark_weight": args.mark_weight, "likelihood": args.likelihood}
    trained = common.train(
        model, policy, work, batches, rows, *how, prm={"marks": marks, **weights}
    )
    common.drop_states(work)

    # Judge, on prompts it was not trained on
    score_held_out(out, rows, held, bare)
    with common.Sampler(policy, args, prm=model) as sampler:
        path = out / "val_samples.jsonl"
        sampler.sample(path, val, args.val_samples, args.temperature, "prm-val")
    found = judge(out, by_id, checker)
    found |= {"steps": trained["batch"], "mean_loss": trained["loss"] / len(batches)}
    if args.labels:
        found["left_out"] = len(Lines(args.labels)) - len(rows)
    once(out / "metrics.json", lambda part: common.write_json(part, found))


def label_rollouts(out, policy, examples, by_id, tokenizer, args):
    """Phases: sample responses, cut them, complete every step prefix, label the steps."""
    samples, prefixes, rollouts = (
        out / f"{name}.jsonl" for name in ("samples", "prefixes", "rollouts")
    )
    with common.Sampler(policy, args) as sampler:
        sampler.sample(samples, examples, args.samples, args.temperature, "prm")
        once(prefixes, partial(cut, samples, tokenizer))
        begun = [by_id[row["id"]] for row in stream_jsonl(prefixes)]
        n, heat = args.rollouts, args.rollout_temperature
        sampler.sample(rollouts, begun, n, heat, "rollout", prefixes=Lines(prefixes))
    both = stream_jsonl(samples), stream_jsonl(rollouts)
    rows = labelled_responses(*both, by_id, tokenizer, args)
    once(out / "steps.jsonl", lambda part: write_jsonl(part, rows))


def cut(samples, tokenizer, part):
    """Phase: the distinct step prefixes of the mixed prompts."""
    responses = mixed_responses(stream_jsonl(samples))
    write_jsonl(part, step_prefixes(responses, tokenizer))
    if len(Lines(part)) == 0:
        raise InputError(
            "no prompt has both right and wrong samples, so no step can be labelled; "
            "raise --prompts, --samples or --temperature"
        )


def score_held_out(out, rows, held, args):
    """Phase: the PRM's scores of the steps of held-out responses; held: places in the rows."""
    prm = cache(partial(common.load_prm, out / "model", args))  # loaded when first called

    def produce(places):
        """Rows of steps.jsonl with their scores."""
        part = [rows[i] for i in places]
        token_ids = [[row["token_ids"]] for row in part]
        scores = common.score_steps(prm(), [prompt_of(row) for row in part], token_ids, args)
        return [row | {"scores": found} for row, (found,) in zip(part, scores)]

    common.write_chunks(out / "held_out.jsonl", held, produce, args, "held_out")


def main(args):
    """Sample, roll out, label, train, judge."""
    policy = args.policy or Path(args.runs) / "01_warmup" / "model"
    args.val = args.val or str(Path(args.data).with_name("val.jsonl"))
    inputs = {"data": args.data, "val": args.val, "policy": policy}
    if args.labels:
        inputs["labels"] = args.labels
    out = common.open_run(args, "02_train_prm", inputs)
    make_prm(out, policy, args)
    print(
        (out / "metrics.json").read_text() + f"next: python 03_self_evolve.py --runs {out.parent}"
    )


if __name__ == "__main__":
    common.run_stage(Args, main)
