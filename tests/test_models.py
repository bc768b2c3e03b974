"""Generation, losses, PRM scores and training on tiny models: exact ids, exact positions."""

import json
import math
import shutil
import types
from dataclasses import replace
from pathlib import Path

import bench_gpu
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import READ_AS, ids_of, one_by_one, scores_by_hand, seeds_of, stage
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import common

# ---- generation


def until_eos(ids: list[int], eos: int) -> list[int]:
    """What stands before the first EOS."""
    return ids[: ids.index(eos)] if eos in ids else ids


def greedy_by_transformers(policy, examples, args) -> list[list[int]]:
    """The greedy responses of transformers' own `generate`, one prompt at a time."""
    found = []
    for example in examples:
        batch, start = one_by_one(policy, example, [], args)
        out = policy.model.generate(
            **batch,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            bad_words_ids=[[token] for token in policy.banned],
        )
        found.append(until_eos(out[0, start:].tolist(), policy.eos_ids[0]))
    return found


def last_logits(policy, example, ids, args) -> torch.Tensor:
    """Logits after prompt + ids, of one unpadded forward pass, without image placeholders."""
    batch, _ = one_by_one(policy, example, ids, args)
    with torch.no_grad():
        logits = policy.model(**batch).logits[0, -1]
    logits[policy.banned] = -torch.inf
    return logits


def test_greedy_generation_agrees_with_transformers_token_for_token(policy, examples, args):
    wanted = greedy_by_transformers(policy, examples[:6], args)
    for (mine,), theirs in zip(
        common.generate(policy, examples[:6], [[0]] * 6, 0.0, args), wanted, strict=True
    ):
        assert mine.token_ids == theirs
        assert mine.finished == (len(theirs) < 12)
        assert mine.text == policy.tokenizer.decode(theirs, skip_special_tokens=True)


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(policy, examples, args):
    five = examples[:5]

    def sampled(prompts, key):
        return ids_of(common.generate(policy, prompts, seeds_of(prompts, 4, key), 1.0, args))

    together = sampled(five, "x")
    assert sampled(five[::-1], "x")[::-1] == together
    assert sampled(five, "y") != together
    args.rows = 4
    assert sampled(five, "x") == together


def test_samples_follow_the_softmax_at_the_temperature(policy, examples, args):
    args.max_new_tokens, args.rows, n = 1, 4000, 4000
    (row,) = common.generate(policy, examples[:1], seeds_of(examples[:1], n, "freq"), 0.7, args)
    wanted = (last_logits(policy, examples[0], [], args) / 0.7).softmax(-1)
    first = [r.token_ids[0] if r.token_ids else policy.eos_ids[0] for r in row]
    counts = torch.bincount(torch.tensor(first), minlength=len(wanted)) / n
    # Four standard errors of the widest share.
    assert (counts - wanted).abs().max() < 4 * (0.25 / n) ** 0.5


def test_one_temperature_per_example_equals_separate_calls(policy, examples, args):
    heats = [0.0, 0.6, 1.5, 0.0, 1.0]
    seeds = seeds_of(examples[:5], 3, "h")
    mixed = ids_of(common.generate(policy, examples[:5], seeds, heats, args))
    for example, row, heat, got in zip(examples, seeds, heats, mixed):
        assert ids_of(common.generate(policy, [example], [row], heat, args)) == [got]
    greedy = greedy_by_transformers(policy, [examples[0], examples[3]], args)
    assert mixed[0] == [greedy[0]] * 3
    assert mixed[3] == [greedy[1]] * 3
    assert len({tuple(ids) for ids in mixed[2]}) > 1


def test_rollouts_start_at_the_exact_step_boundary(policy, examples, args):
    """The first new token of a rollout follows the distribution after exactly prompt + prefix."""
    prefix = policy.tokenizer("sum of row 1 : 1 2 3\n")["input_ids"]
    args.max_new_tokens = len(prefix) + 1
    ((response,),) = common.generate(policy, examples[:1], [[0]], 0.0, args, [prefix])
    wanted = int(last_logits(policy, examples[0], prefix, args).argmax())
    assert response.token_ids == [*prefix, wanted]


def test_prefixes_of_different_lengths_share_a_batch(policy, examples, args):
    texts = ("sum of", "", "maximum of row 2 : 1 2")
    prefixes = [policy.tokenizer(text)["input_ids"] for text in texts]
    seeds = seeds_of(examples[:3], 2, "p")
    together = ids_of(common.generate(policy, examples[:3], seeds, 1.0, args, prefixes))
    for example, row, prefix, got in zip(examples, seeds, prefixes, together):
        assert ids_of(common.generate(policy, [example], [row], 1.0, args, [prefix])) == [got]
        assert all(ids[: len(prefix)] == prefix for ids in got)


def test_a_prefix_counts_and_one_that_fills_the_room_is_the_whole_response(policy, examples, args):
    full, most = [9, 10] * 6, [9, 10] * 5 + [9]
    prefixes = [full, most, []]
    seeds = seeds_of(examples[:3], 2, "f")
    rows = common.generate(policy, examples[:3], seeds, 1.0, args, prefixes)
    assert ids_of(rows)[0] == [full, full]
    assert not any(response.finished for response in rows[0])
    assert all(len(ids) in (11, 12) and ids[:11] == most for ids in ids_of(rows)[1])
    assert all(len(ids) <= 12 for ids in ids_of(rows)[2])
    alone = common.generate(policy, examples[:1], seeds[:1], 1.0, args, [full])
    assert ids_of(alone) == [[full, full]]


def test_image_placeholders_are_never_sampled(policy, examples, args):
    policy.model.get_output_embeddings().weight.data[policy.banned[0]] *= 50
    rows = common.generate(policy, examples[:4], seeds_of(examples[:4], 4, "b"), 2.0, args)
    assert not [r for row in rows for r in row if policy.banned[0] in r.token_ids]


def test_special_tokens_in_a_users_text_stay_text(policy, examples, args):
    end, image = policy.tokenizer.eos_token, policy.processor.image_token
    tricky = dict(examples[0], question=f"sum {end} row {image} 1")
    plain = dict(examples[0], question="sum row 1")
    for token in (end, image):
        number = policy.tokenizer.convert_tokens_to_ids(token)
        counts = [
            (common.encode_prompts(policy, [example], args)["input_ids"] == number).sum()
            for example in (tricky, plain)
        ]
        assert counts[0] == counts[1]


def test_a_system_prompt_and_settings_reach_the_chat_template(policy, examples, args):
    args.system = "row"
    policy.processor.chat_template += "{{ more or '' }}"
    args.chat_template_kwargs = '{"more": "column"}'
    ids = common.encode_prompts(policy, examples[:1], args)["input_ids"][0]
    text = policy.tokenizer.decode(ids)
    assert text.count("row") == user_rows(examples[0]) + 1
    assert text.rstrip().endswith("column")


def user_rows(example) -> int:
    """How often a question says "row"."""
    return example["question"].split().count("row")


# ---- the self-test


def test_the_self_test_passes_and_says_so_once(policy, examples, args, monkeypatch, capsys):
    monkeypatch.setattr(common, "PROVED", set())
    common.prove_policy(policy, examples[0], args)
    common.prove_policy(policy, examples[0], args)
    assert capsys.readouterr().out.count("self-test of Idefics3ForConditionalGeneration") == 1


@pytest.mark.parametrize("fault", ["padded", "cached", "loss"])
def test_the_self_test_refuses_a_model_that_is_read_wrongly(
    policy, examples, args, monkeypatch, fault
):
    monkeypatch.setattr(common, "PROVED", set())
    forward = type(policy.model).forward

    def wrong(model, *given, **named):
        """A forward pass with one fault."""
        out = forward(model, *given, **named)
        mask, labels = named["attention_mask"], named.get("labels")
        padded = fault == "padded" and not mask.all()
        cached = fault == "cached" and named.get("past_key_values") is not None
        if padded or cached:
            out.logits = out.logits * 1.1
        if fault == "loss" and labels is not None:
            out.loss = out.loss * 1.1
        return out

    monkeypatch.setattr(type(policy.model), "forward", wrong)
    with pytest.raises(common.InputError, match="Idefics3.* is not supported: .*" + fault):
        common.prove_policy(policy, examples[0], args)


# ---- sampling as a phase

TEXTS = [
    "sum of row 1 : 1 2 3\n1 + 2 + 3 = 6\nAnswer : 6",
    "Answer : 3",
    "maximum of row 2 : 1 5 2\n\nmaximum = 5\nAnswer : 5\n",
    "\n",
]


def prm_of(policy, likelihood=0.5):
    """The random model as a PRM that is read at + and -, and at its own likelihood."""
    marks = policy.tokenizer.convert_tokens_to_ids(["+", "-"])
    return common.Prm(**vars(policy), marks=tuple(marks), mark_weight=0.5, likelihood=likelihood)


@pytest.fixture
def prm_folder(policy, args, tmp_path):
    """The random model as the folder of a PRM."""
    common.save_policy(prm_of(policy), tmp_path / "prm", args)
    return tmp_path / "prm"


def test_the_samples_of_a_phase_are_those_of_generate_and_are_checked(
    tiny, policy, examples, args, tmp_path
):
    args.chunk, heats = 3, [0.0, 1.0, 0.5, 1.0, 2.0]
    with common.Sampler(tiny, args) as sampler:
        sampler.sample(tmp_path / "a.jsonl", examples[:5], 2, heats, "t", iteration=4)
    rows = common.read_jsonl(tmp_path / "a.jsonl")
    wanted = [(e["id"], heat, k) for e, heat in zip(examples, heats) for k in range(2)]
    assert [(row["id"], row["temperature"], row["sample"]) for row in rows] == wanted
    assert {row["iteration"] for row in rows} == {4}
    assert len({row["seed"] for row in rows}) == 10
    for row, (example, heat) in zip(rows, [(e, h) for e, h in zip(examples, heats) for _ in "ab"]):
        ((again,),) = common.generate(policy, [example], [[row["seed"]]], heat, args)
        assert (row["token_ids"], row["finished"]) == (again.token_ids, again.finished)
        assert row["response"] == again.text


def test_samples_depend_on_purpose_iteration_and_prefix_and_not_on_chunks(
    tiny, policy, examples, args, tmp_path
):
    prefixes = [policy.tokenizer(text)["input_ids"] for text in ("1 +", "", "2")]

    def seeds(name, purpose, iteration, begun, chunk):
        args.chunk = chunk
        path = tmp_path / name
        with common.Sampler(tiny, args) as sampler:
            rows = begun and [{"token_ids": ids} for ids in begun]
            drawn = {"iteration": iteration, "prefixes": rows}
            sampler.sample(path, examples[:3], 2, 1.0, purpose, **drawn)
        return [(row["seed"], row["token_ids"]) for row in common.read_jsonl(path)]

    one = seeds("a", "p", 0, None, 3)
    assert seeds("b", "p", 0, None, 1) == one
    others = [seeds("c", "q", 0, None, 3), seeds("d", "p", 1, None, 3)]
    others += [seeds("e", "p", 0, prefixes, 3)[:2]]
    for other in others:
        assert not {seed for seed, _ in one} & {seed for seed, _ in other}
    begun = seeds("f", "p", 0, prefixes, 2)
    assert [ids[: len(p)] for (_, ids), p in zip(begun[::2], prefixes)] == prefixes


def test_a_phase_that_is_there_loads_no_model_and_one_sampler_loads_a_model_once(
    tiny, examples, args, tmp_path, monkeypatch
):
    loads, load = [], common.load_policy

    def counted(*given):
        loads.append(given)
        return load(*given)

    monkeypatch.setattr(common, "load_policy", counted)
    args.chunk = 2
    for _ in range(2):
        with common.Sampler(tiny, args) as sampler:
            sampler.look(tmp_path, "val", examples[:4], 2, 1.0, "v")
        assert sampler.policy is None
    assert len(loads) == 1
    greedy, samples = (
        common.read_jsonl(tmp_path / f"val_{kind}.jsonl") for kind in ("greedy", "samples")
    )
    assert [row["id"] for row in greedy] == [example["id"] for example in examples[:4]]
    assert {row["temperature"] for row in greedy} == {0.0}
    assert [row["token_ids"] for row in greedy] == greedy_by_transformers(
        load(tiny, args), examples[:4], args
    )
    assert len(samples) == 8
    assert {row["temperature"] for row in samples} == {1.0}


def test_a_response_that_did_not_end_is_wrong(tiny, policy, examples, args, tmp_path, monkeypatch):
    text = f"Answer : {examples[0]['answer']}"
    answer = policy.tokenizer(text)["input_ids"]
    made = [common.Response(answer, text, finished) for finished in (True, False)]
    monkeypatch.setattr(common, "generate", lambda *given: [made])
    with common.Sampler(tiny, args) as sampler:
        sampler.sample(tmp_path / "a.jsonl", examples[:1], 2, 1.0, "t")
    ended, cut = common.read_jsonl(tmp_path / "a.jsonl")
    assert (ended["correct"], ended["answer"]) == (True, examples[0]["answer"])
    assert (cut["correct"], cut["answer"]) == (False, None)


@pytest.mark.parametrize("right_only", [False, True])
def test_a_cut_response_is_below_every_score_and_a_wrong_one_has_no_reward(
    tiny, policy, prm_folder, examples, args, tmp_path, monkeypatch, right_only
):
    ids = [policy.tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    made = [common.Response(ids[0], TEXTS[0], False), common.Response(ids[0], TEXTS[0], True)]
    made += [common.Response(ids[1], TEXTS[1], True)]
    monkeypatch.setattr(common, "generate", lambda *given: [made, made])
    known = examples[0] | {"answer": "3", "choices": None}
    hidden = examples[1] | {"answer": None, "choices": None}
    with common.Sampler(tiny, args, prm_folder) as sampler:
        path = tmp_path / "a.jsonl"
        sampler.sample(path, [known, hidden], 3, 1.0, "t", right_only=right_only)
    rows = common.read_jsonl(tmp_path / "a.jsonl")
    scores = common.score_steps(prm_of(policy), [known, hidden], [ids, ids], args)
    rewards = [[-1.0, min(row[0]), row[1][0]] for row in scores]
    if right_only:  # R = 1(a = a*) x R_p where a* is known
        rewards[0][:2] = [0.0, 0.0]
    assert [row["reward"] for row in rows] == pytest.approx(rewards[0] + rewards[1], abs=1e-5)
    assert [len(row["step_scores"]) for row in rows] == [0, 0 if right_only else 3, 1, 0, 3, 1]
    assert [row["correct"] for row in rows] == [False, False, True, False, False, False]


# ---- the choice of the engine, and what stops a wrong one (test_vllm.py runs the engine itself)


def test_without_vllm_auto_is_transformers_and_says_why(monkeypatch, capsys):
    choose = common.choose_engine
    monkeypatch.setattr(common, "vllm_lacks", lambda device: "vLLM is not installed")
    assert choose("auto", "cpu") == "transformers"
    assert capsys.readouterr().out == "engine: transformers (vLLM is not installed)\n"
    with pytest.raises(common.InputError, match="--engine vllm cannot run: vLLM is not installed"):
        choose("vllm", "cpu")
    monkeypatch.setattr(common, "vllm_lacks", lambda device: "")
    assert choose("auto", "cuda") == choose("vllm", "cuda") == "vllm"
    assert choose("transformers", "cuda") == "transformers"


def output_of(prompt, tokens, logprobs, reason="stop"):
    """What vLLM gives for one request."""
    steps = [{token: types.SimpleNamespace(logprob=p)} for token, p in zip(tokens, logprobs)]
    sampled = {"token_ids": tokens, "logprobs": steps, "finish_reason": reason}
    outputs = [types.SimpleNamespace(**sampled)]
    return types.SimpleNamespace(prompt_token_ids=prompt, outputs=outputs)


def true_logprobs(policy, example, tokens, args) -> list[float]:
    """Log-probabilities of tokens after the prompt, of one unpadded forward pass."""
    batch, start = one_by_one(policy, example, tokens, args)
    with torch.no_grad():
        found = policy.model(**batch).logits[0, start - 1 : -1].log_softmax(-1)
    return found[range(len(tokens)), tokens].tolist()


@pytest.fixture
def probe(policy, examples, args, monkeypatch):
    """Prove an engine that answers with changed prompt ids or logprobs."""

    def prove(change_ids=list, change_logprobs=list):
        batch, _ = one_by_one(policy, examples[0], [], args)
        prompt, tokens = batch["input_ids"][0].tolist(), [9, 12, 30, 31, 7, 8, 9, 10]
        logprobs = true_logprobs(policy, examples[0], tokens, args)
        output = output_of(change_ids(prompt), tokens, change_logprobs(logprobs))
        monkeypatch.setattr(common, "ask_engine", lambda *given: [output])
        common.prove_engine(None, policy, examples[0], args)

    return prove


def test_an_engine_with_the_policys_prompt_and_weights_passes(probe, capsys):
    probe()
    probe(change_logprobs=lambda logprobs: [p + 0.01 for p in logprobs])
    assert capsys.readouterr().out.count("vLLM") == 2


def test_an_engine_with_other_weights_is_stopped(probe):
    for off in (0.05, -0.05, float("nan")):
        with pytest.raises(common.InputError, match="vLLM does not hold the policy's weights"):
            probe(change_logprobs=lambda logprobs, off=off: [p + off for p in logprobs])
    with pytest.raises(common.InputError, match="vLLM does not hold the policy's weights"):
        probe(change_logprobs=lambda logprobs: [*logprobs[:-1], logprobs[-1] - 1.0])


@pytest.mark.parametrize("change", [lambda p: p[1:], lambda p: [*p, 9], lambda p: [*p[:-1], 9]])
def test_an_engine_that_reads_a_prompt_otherwise_is_stopped(probe, change):
    with pytest.raises(common.InputError, match=r"train.jsonl line 1\b.*prompt"):
        probe(change_ids=change)


def test_in_bfloat16_an_engine_may_round_and_not_hold_other_weights(probe, args):
    args.dtype = "bfloat16"
    probe(change_logprobs=lambda logprobs: [*logprobs[:-1], logprobs[-1] - 0.4])  # one of many
    probe(change_logprobs=lambda logprobs: [p - 0.06 for p in logprobs])
    with pytest.raises(common.InputError, match="vLLM does not hold the policy's weights"):
        probe(change_logprobs=lambda logprobs: [p - 0.25 for p in logprobs])


class Engine:
    """Stands for vLLM's LLM object: notes that it was shut down."""

    def __init__(self):
        self.llm_engine = self.engine_core = self
        self.closed = False

    def shutdown(self):
        self.closed = True


@pytest.fixture
def fake_engine(args, monkeypatch):
    """Engines that are never asked; the list of those that were started."""
    started = []

    def start(folder, args):
        started.append(Engine())
        return started[-1]

    args.engine = "vllm"
    monkeypatch.setattr(common, "start_engine", start)
    monkeypatch.setattr(common, "prove_engine", lambda *given: None)
    return started


def test_what_an_engine_says_becomes_responses(
    tiny, policy, examples, args, tmp_path, monkeypatch, fake_engine
):
    eos, prefixes = policy.eos_ids[0], [{"token_ids": [7]}, {"token_ids": []}]
    outputs = [output_of([5], [9, eos], [0, 0], "stop"), output_of([5], [9, 9], [0, 0], "length")]
    outputs += [output_of([5], [eos], [0], "stop"), output_of([5], [8], [0], "length")]
    monkeypatch.setattr(common, "ask_engine", lambda *given: outputs)
    with common.Sampler(tiny, args) as sampler:
        sampler.sample(tmp_path / "a.jsonl", examples[:2], 2, 1.0, "t", prefixes=prefixes)
    rows = common.read_jsonl(tmp_path / "a.jsonl")
    assert [row["token_ids"] for row in rows] == [[7, 9], [7, 9, 9], [], [8]]
    assert [row["finished"] for row in rows] == [True, False, True, False]
    assert rows[1]["response"] == policy.tokenizer.decode([7, 9, 9])


def test_a_prefix_that_fills_the_room_is_the_whole_response_of_an_engine_too(
    tiny, examples, args, tmp_path, monkeypatch, fake_engine
):
    """An engine always makes one token at least."""
    full = [9, 10] * 6
    outputs = [output_of([5], [8], [0], "length"), output_of([5], [1], [0], "stop")]
    monkeypatch.setattr(common, "ask_engine", lambda *given: outputs)
    with common.Sampler(tiny, args) as sampler:
        prefixes = [{"token_ids": full}]
        sampler.sample(tmp_path / "a.jsonl", examples[:1], 2, 1.0, "t", prefixes=prefixes)
    rows = common.read_jsonl(tmp_path / "a.jsonl")
    assert [(row["token_ids"], row["finished"]) for row in rows] == [(full, False)] * 2


def test_an_engine_ends_with_its_sampler_even_if_a_phase_fails(
    tiny, examples, args, tmp_path, monkeypatch, fake_engine
):
    def refuse(*given):
        raise common.InputError("too long")

    monkeypatch.setattr(common, "ask_engine", refuse)
    with pytest.raises(common.InputError, match="too long"), common.Sampler(tiny, args) as sampler:
        sampler.sample(tmp_path / "a.jsonl", examples[:1], 1, 1.0, "t")
    assert [engine.closed for engine in fake_engine] == [True]
    with common.Sampler(tiny, args):
        pass  # nothing is sampled, so nothing is started
    assert len(fake_engine) == 1


# ---- the loss of a response


def reference_loss(policy, examples, targets, args) -> tuple[float, int]:
    """Summed loss and tokens by transformers' own labels, one unpadded sequence at a time."""
    total, count = 0.0, 0
    for example, ids in zip(examples, targets):
        ids = [*ids, policy.tokenizer.eos_token_id]
        batch, start = one_by_one(policy, example, ids, args)
        labels = batch["input_ids"].clone()
        labels[:, :start] = -100
        with torch.no_grad():
            total += policy.model(**batch, labels=labels).loss.item() * len(ids)
        count += len(ids)
    return total, count


def test_loss_falls_on_the_response_and_its_closing_eos_only(policy, examples, args):
    texts = ["Answer : 3", TEXTS[0], "", "1"]
    targets = [policy.tokenizer(text)["input_ids"] for text in texts]
    wanted, count = reference_loss(policy, examples, targets, args)
    loss, tokens = common.sft_loss(policy, examples[:4], targets, args)
    assert tokens == count == sum(map(len, targets)) + 4
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_token_logprobs_are_those_of_unpadded_passes(policy, examples, args):
    tails = [[9], policy.tokenizer(TEXTS[0])["input_ids"], [30, 31, 7]]
    logprobs, counted = common.token_logprobs(policy, examples[:3], tails, args)
    assert counted.sum(1).tolist() == [len(tail) for tail in tails]
    for example, tail, found, counts in zip(examples, tails, logprobs, counted):
        wanted = true_logprobs(policy, example, tail, args)
        assert found[counts].tolist() == pytest.approx(wanted, abs=1e-4)


def test_an_eos_that_is_also_the_pad_token_is_still_learned(policy, examples, args):
    targets = [[9], [9, 9, 9]]
    before, tokens = common.sft_loss(policy, examples[:2], targets, args)
    policy.pad_id = policy.eos_ids[0]
    after, tokens_after = common.sft_loss(policy, examples[:2], targets, args)
    assert tokens == tokens_after == 6
    assert after.item() == pytest.approx(before.item(), rel=1e-5)


class Capped(transformers.Idefics3ForConditionalGeneration):
    """A model that changes its logits after the head, as Gemma 2 does."""

    def forward(self, *given, **named):
        out = super().forward(*given, **named)
        out.logits = 5 * torch.tanh(out.logits / 5)
        return out


def test_logits_that_the_model_caps_after_its_head_are_the_ones_that_count(policy, examples, args):
    ids = [policy.tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    prm = prm_of(policy)
    wanted, scores = 0.0, []
    for example, response in zip(examples, ids):
        tail = [*response, policy.tokenizer.eos_token_id]
        batch, start = one_by_one(policy, example, tail, args)
        with torch.no_grad():
            capped = 5 * torch.tanh(policy.model(**batch).logits[0] / 5)
        wanted += F.cross_entropy(capped[start - 1 : -1], torch.tensor(tail), reduction="sum")
        ends = common.step_ends(response, policy.tokenizer)
        scores.append(scores_by_hand(prm, capped, start, response, ends))
    plain = common.sft_loss(policy, examples[:2], ids, args)[0].item()
    policy.model.__class__ = Capped
    capped = common.sft_loss(policy, examples[:2], ids, args)[0].item()
    assert capped == pytest.approx(wanted.item(), rel=1e-5)
    assert abs(plain - capped) > 0.1
    found = common.score_steps(prm, examples[:2], [[response] for response in ids], args)
    assert [row[0] for row in found] == [pytest.approx(row, abs=1e-5) for row in scores]


class Whole(transformers.Idefics3ForConditionalGeneration):
    """A model that gives the logits of all positions whatever is asked, as MiniCPM-V 4.6 does."""

    def forward(self, *given, logits_to_keep=0, **named):
        return super().forward(*given, **named)


def test_a_model_that_always_gives_all_logits_is_read_at_the_same_positions(policy, examples, args):
    prm, ids = prm_of(policy), [policy.tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    responses = [[response] for response in ids]
    loss, tokens = common.sft_loss(policy, examples[:2], ids, args)
    scores = common.score_steps(prm, examples[:2], responses, args)
    sampled = common.generate(policy, examples[:2], [[1], [2]], 1.0, args)
    policy.model.__class__ = Whole
    again, tokens_again = common.sft_loss(policy, examples[:2], ids, args)
    assert tokens_again == tokens
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)
    for found, wanted in zip(common.score_steps(prm, examples[:2], responses, args), scores):
        assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    assert common.generate(policy, examples[:2], [[1], [2]], 1.0, args) == sampled


# ---- the PRM


def reference_scores(prm, example, ids, args) -> list[float]:
    """The scores of a response's steps by one plain forward pass without padding or cache."""
    batch, start = one_by_one(prm, example, ids, args)
    with torch.no_grad():
        logits = prm.model(**batch).logits[0]
    return scores_by_hand(prm, logits, start, ids, common.step_ends(ids, prm.tokenizer))


def test_scores_do_not_depend_on_batch_or_padding(policy, examples, args):
    prm = prm_of(policy)
    ids = [policy.tokenizer(text)["input_ids"] for text in TEXTS]
    responses = [ids, [], ids[::-1], [[]], [ids[3]], [[], ids[1]]]
    for args.rows in (1024, 1, 6):
        together = common.score_steps(prm, examples[:6], responses, args)
        assert [[len(scores) for scores in row] for row in together] == [
            [3, 1, 3, 0],
            [],
            [0, 3, 1, 3],
            [0],
            [0],
            [0, 1],
        ]
        for example, row, found in zip(examples, responses, together):
            for response, scores in zip(row, found):
                if scores:
                    wanted = reference_scores(prm, example, response, args)
                    assert scores == pytest.approx(wanted, abs=1e-5)
    assert common.score_steps(prm, examples[:2], [[], []], args) == [[], []]


@pytest.mark.parametrize("read_as", [(None, 0.0, 1.0), ((3, 4), 1.0, 0.0), ((3, 4), 0.5, 3.0)])
def test_a_prm_is_read_at_its_marks_at_its_likelihood_or_at_both(policy, examples, args, read_as):
    prm = common.Prm(
        **vars(policy), marks=read_as[0], mark_weight=read_as[1], likelihood=read_as[2]
    )
    ids = [policy.tokenizer(text)["input_ids"] for text in TEXTS]
    (found,) = common.score_steps(prm, examples[:1], [ids], args)
    for response, scores in zip(ids, found):
        wanted = reference_scores(prm, examples[0], response, args)
        assert scores == pytest.approx(wanted, abs=1e-5)


def test_a_rule_scores_in_place_of_a_prm(policy, tiny, examples, args, tmp_path):
    (tmp_path / "rule.py").write_text(
        "def score(response, example):\n    return [len(response) / 1000, 0.5]\n"
    )
    known = examples[0] | {"answer": "3", "choices": None}
    with common.Sampler(tiny, args, prm=f"{tmp_path}/rule.py:score") as sampler:
        sampler.sample(tmp_path / "all.jsonl", [known], 6, 1.0, "rule")
        sampler.sample(tmp_path / "right.jsonl", [known], 6, 1.0, "rule", right_only=True)
    for name, right_only in (("all", False), ("right", True)):
        for row in common.read_jsonl(tmp_path / f"{name}.jsonl"):
            scored = row["finished"] and (row["correct"] or not right_only)
            wanted = [round(len(row["response"]) / 1000, 6), 0.5] if scored else []
            assert row["step_scores"] == wanted
            least = min(wanted) if wanted else -1.0
            assert row["reward"] == (max(least, 0.0) if right_only else least)


@pytest.mark.parametrize("scores", ["0.5", "[1.5]", "['x']", "None", "[float('nan')]"])
def test_a_rule_that_gives_no_step_scores_is_refused(tmp_path, scores):
    (tmp_path / "rule.py").write_text(f"def score(response, example):\n    return {scores}\n")
    rule = common.load_rule(f"{tmp_path}/rule.py:score")
    with pytest.raises(common.InputError, match="--prm .*rule.py:score fails: "):
        rule("7", {})


def test_long_and_short_responses_are_scored_together(policy, examples, args):
    prm = prm_of(policy)
    step = policy.tokenizer("1 + 2 = 3\n")["input_ids"]
    long = [step * n for n in (40, 1, 20)]
    (found,) = common.score_steps(prm, examples[:1], [long * 5], args)
    wanted = [reference_scores(prm, examples[0], ids, args) for ids in long]
    assert [len(scores) for scores in wanted] == [40, 1, 20]
    for k, scores in enumerate(found):
        assert scores == pytest.approx(wanted[k % 3], abs=1e-5)


def test_prm_loss_is_cross_entropy_at_the_scored_positions(policy, examples, args):
    prm = prm_of(policy)
    # Scores away from 0 and 1, where a logarithm is exact enough.
    policy.model.get_output_embeddings().weight.data *= 0.05
    ids = [policy.tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    labels = [[0.25, 0.5, 1.0], [0.0]]
    rows = [
        {"token_ids": i, "ends": common.step_ends(i, policy.tokenizer), "labels": soft}
        for i, soft in zip(ids, labels)
    ]
    for row, example in zip(rows, examples):
        prompt = common.user_text(example, args.instruction)
        row |= {"id": example["id"], "image": example["image"], "prompt": prompt}
    bare = replace(args, instruction="")  # it stands in the prompt
    loss, count = stage("02_train_prm").prm_loss(prm, rows, bare)
    wanted = 0.0
    for example, response, soft in zip(examples, ids, labels):
        for f, y in zip(reference_scores(prm, example, response, args), soft, strict=True):
            wanted -= y * math.log(f) + (1 - y) * math.log(1 - f)
    assert count == 4
    assert loss.item() == pytest.approx(wanted, rel=1e-4)


def test_marks_that_are_not_one_token_are_refused(policy):
    mark_ids = stage("02_train_prm").mark_ids
    wanted = policy.tokenizer.convert_tokens_to_ids(["+", "-"])
    assert list(mark_ids(policy.tokenizer, "+", "-")) == wanted
    for good, bad in (("+", "bad step"), ("+", "unheard"), ("+", "+")):
        with pytest.raises(common.InputError, match="must each be one token"):
            mark_ids(policy.tokenizer, good, bad)


# ---- a training phase


@pytest.fixture
def teach(tiny, examples, args, tmp_path):
    """Train on some of eight deterministic batches of two."""
    common.join_ranks("cpu")
    rows = [
        {"example": examples[i], "token_ids": [(5 + 3 * i + k) % 40 for k in range(1 + i % 4)]}
        for i in range(9)
    ]

    def sft_of(policy, part):
        targets = [row["token_ids"] for row in part]
        return common.sft_loss(policy, [row["example"] for row in part], targets, args)

    def count_of(row):
        return len(row["token_ids"]) + 1

    def run(name, batches=range(6), loss_of=sft_of, start=tiny, **more):
        """Write <name>/model and <name>/work; the progress."""
        folder, pairs = tmp_path / name, [[i, i + 1] for i in batches]
        return common.train(
            folder / "model",
            start,
            folder / "work",
            more.pop("pairs", pairs),
            rows,
            loss_of,
            count_of,
            args,
            "t",
            **more,
        )

    run.rows, run.sft_of, run.folder = rows, sft_of, tmp_path
    return run


def state_of(work: Path) -> dict[str, torch.Tensor]:
    """The newest saved weights and moments of a training phase."""
    progress = json.loads((work / "progress.json").read_text())
    tensors = {}
    for path in sorted((work / f"batch_{progress['batch']:06d}").glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def weights_of(state: dict) -> dict[str, torch.Tensor]:
    """Without the moments."""
    ends = (".exp_avg", ".exp_avg_sq", ".step")
    return {name: tensor for name, tensor in state.items() if not name.endswith(ends)}


def same(a: dict, b: dict) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    assert a
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flat(tensors: dict) -> torch.Tensor:
    """All tensors as one vector in float32."""
    return torch.cat([tensor.float().flatten() for _, tensor in sorted(tensors.items())])


def test_weights_moments_and_rate_are_continuous_across_a_phase_boundary(teach, args):
    """Six steps in one phase and in two: equal to the bit."""
    whole = teach("whole")
    first = teach("first", range(3))
    start, state = teach.folder / "first/model", teach.folder / "first/work"
    second = teach("second", range(3, 6), start=start, state=state)
    assert (first["step"], second["step"], whole["step"]) == (3, 6, 6)
    assert (first["batch"], second["batch"], whole["batch"]) == (3, 3, 6)
    assert first["tokens"] + second["tokens"] == whole["tokens"]
    assert first["loss"] + second["loss"] == pytest.approx(whole["loss"], abs=1e-9)
    states = [state_of(teach.folder / name / "work") for name in ("whole", "second")]
    assert same(*states)
    models = [load_file(teach.folder / f"{n}/model/model.safetensors") for n in ("whole", "second")]
    assert same(*models)


def test_the_rate_rises_over_the_boundary_and_without_state_all_begins_anew(teach, monkeypatch):
    rates, rate = [], common.learning_rate

    def noted(*given):
        rates.append(rate(*given))
        return rates[-1]

    monkeypatch.setattr(common, "learning_rate", noted)
    teach("first", range(3))
    start, state = teach.folder / "first/model", teach.folder / "first/work"
    teach("on", range(3, 6), start=start, state=state)
    anew = teach("anew", range(3, 6), start=start)
    first = [2.5e-4, 5e-4, 7.5e-4]
    assert rates == pytest.approx(first + [1e-3] * 3 + first)
    assert anew["step"] == 3
    counts = {}
    for name in ("on", "anew"):
        found = state_of(teach.folder / name / "work")
        counts[name] = {t.item() for n, t in found.items() if n.endswith(".step")}
    assert counts == {"on": {6.0}, "anew": {3.0}}
    moments = [
        {n: t for n, t in state_of(teach.folder / name / "work").items() if n.endswith("exp_avg")}
        for name in ("on", "anew")
    ]
    assert not same(*moments)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_after(monkeypatch, n: int, function="save_state"):
    """Let the n-th call of one of common's functions be the last thing that happens."""
    calls, real = [], getattr(common, function)

    def dying(*given, **named):
        found = real(*given, **named)
        calls.append(found)
        if len(calls) == n:
            raise Killed
        return found

    monkeypatch.setattr(common, function, dying)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_phase_that_is_killed_after_any_save_goes_on_to_the_bit(teach, args, monkeypatch, dtype):
    args.dtype, args.save_every = dtype, 1
    whole = teach("whole", range(4))
    model = load_file(teach.folder / "whole/model/model.safetensors")
    for n in (1, 2, 3, 4) if dtype == "float32" else (2,):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_after(patch, n)
            teach(f"broken{n}", range(4))
        assert not (teach.folder / f"broken{n}/model").exists()
        asked = []

        def counted(policy, part, asked=asked):
            asked.append(part)
            return teach.sft_of(policy, part)

        assert teach(f"broken{n}", range(4), loss_of=counted) == whole
        assert len(asked) == 4 - n
        found = [state_of(teach.folder / name / "work") for name in ("whole", f"broken{n}")]
        assert same(*found)
        assert same(load_file(teach.folder / f"broken{n}/model/model.safetensors"), model)


def test_a_state_that_is_half_written_does_not_count(teach, args, monkeypatch):
    args.save_every = 2
    whole = teach("whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 1)
        teach("broken")
    work = teach.folder / "broken/work"
    shutil.copytree(work / "batch_000002", work / "batch_000004")
    for path in (work / "batch_000004").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert teach("broken") == whole
    assert same(state_of(work), state_of(teach.folder / "whole/work"))
    assert sorted(path.name for path in work.iterdir()) == ["batch_000006", "progress.json"]


def test_a_phase_that_is_killed_twice_before_its_model_is_there_goes_on(teach, monkeypatch):
    """The second time while it saves, or is about to save, what was saved already."""
    whole = teach("whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 1)
        teach("broken")

    def dying(*given, **named):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.dcp, "save", dying)
        patch.setattr(common, "save_policy", dying)
        teach("broken")
    assert teach("broken") == whole
    states = [state_of(teach.folder / f"{name}/work") for name in ("whole", "broken")]
    assert same(*states)


def test_a_finished_phase_is_not_run_again(teach):
    progress = teach("once", range(2))
    written = (teach.folder / "once/model/model.safetensors").stat().st_mtime_ns
    common.drop_states(teach.folder / "once/work")
    assert [path.name for path in (teach.folder / "once/work").iterdir()] == ["progress.json"]
    assert teach("once", range(2), loss_of=pytest.fail) == progress
    assert (teach.folder / "once/model/model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_is_safetensors_and_json_only_and_in_float32(teach, args, dtype):
    args.dtype, args.save_every = dtype, 1
    teach("a", range(2))
    files = [path for path in (teach.folder / "a").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}
    tensors = state_of(teach.folder / "a/work")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    model = load_file(teach.folder / "a/model/model.safetensors")
    assert weights_of(tensors).keys() == model.keys()
    for name in model:
        assert tensors[f"{name}.exp_avg"].shape == tensors[name].shape == model[name].shape


# ---- gradients, dtypes, memory, the vision tower, attention


def gradient_of(work: Path) -> dict[str, torch.Tensor]:
    """The gradient of a phase of one step: its first moment is a tenth of it."""
    tensors = state_of(work)
    names = [name for name in tensors if name.endswith(".exp_avg")]
    return {name.removesuffix(".exp_avg"): 10 * tensors[name] for name in names}


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 32])
def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny, teach, args, micro_batch):
    args.micro_batch, batch = micro_batch, [0, 3, 6, 1, 7]
    progress = teach("a", pairs=[batch])
    policy = common.load_policy(tiny, args, training=True)
    total, count = 0.0, 0
    for row in (teach.rows[place] for place in batch):  # transformers' own mean over labels
        ids = [*row["token_ids"], policy.tokenizer.eos_token_id]
        inputs, start = one_by_one(policy, row["example"], ids, args)
        labels = inputs["input_ids"].clone()
        labels[:, :start] = -100
        total = total + policy.model(**inputs, labels=labels).loss * len(ids)
        count += len(ids)
    (total / count).backward()
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    assert progress["tokens"] == count
    assert progress["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    found = gradient_of(teach.folder / "a/work")
    wanted = {name: p.grad for name, p in policy.model.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-3, atol=1e-6), name


def test_a_loss_that_is_not_finite_stops_the_run(teach):
    calls = []

    def spoiled(policy, part):
        calls.append(part)
        loss, count = teach.sft_of(policy, part)
        return loss * (float("nan") if len(calls) == 3 else 1.0), count

    with pytest.raises(common.InputError, match="the loss is nan at step 2; lower --learning_rate"):
        teach("a", loss_of=spoiled)
    assert not (teach.folder / "a/model").exists()


def test_updates_below_bfloat16_rounding_add_up(args):
    """500 AdamW steps of 4e-6 against a constant gradient move a weight of 0.1 by 0.002.

    In bfloat16, whose grid is 0.0005 there, none of them moves it.
    """
    common.join_ranks("cpu")
    args.dtype, start = "bfloat16", torch.tensor(0.1).bfloat16().item()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((4,), start, dtype=torch.bfloat16))

        def forward(self):
            assert self.weight.dtype == torch.bfloat16
            return self.weight.sum()

    plain, sharded = Model(), common.shard(Model(), args)
    for model, optimizer in (
        (plain, torch.optim.AdamW(plain.parameters(), weight_decay=0.0)),
        (sharded, common.make_optimizer(sharded)),
    ):
        optimizer.param_groups[0]["lr"] = 4e-6
        for _ in range(500):
            model().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert plain.weight.tolist() == [start] * 4
    moved = sharded.state_dict()["weight"].full_tensor()
    assert moved.dtype == torch.float32
    assert moved.tolist() == pytest.approx([start - 0.002] * 4, abs=1e-5)


def test_a_bfloat16_policy_is_trained_along_the_path_of_a_float32_one(tiny, teach, args):
    args.learning_rate, args.warmup_steps, args.attention, moved = 1e-6, 0, "eager", []
    before = load_file(tiny / "model.safetensors")
    for args.dtype in ("bfloat16", "float32"):
        teach(args.dtype)
        after = weights_of(state_of(teach.folder / args.dtype / "work"))
        dtype = getattr(torch, args.dtype)
        moved.append(flat(after) - flat({n: w.to(dtype) for n, w in before.items() if n in after}))
    # Six steps of about 1e-6, in the same direction.
    assert 2e-6 < moved[0].abs().mean() < 7e-6
    assert F.cosine_similarity(*moved, dim=0) > 0.7


def test_a_bfloat16_model_is_saved_and_loaded_as_bfloat16(tiny, teach, args):
    args.dtype = "bfloat16"
    teach("a", range(3))
    folder = teach.folder / "a/model"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["Idefics3ForConditionalGeneration"]
    state = weights_of(state_of(teach.folder / "a/work"))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is transformers.Idefics3ForConditionalGeneration
    assert model.dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(folder).chat_template
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == load_file(tiny / "model.safetensors").keys()
    loaded = model.state_dict()
    for name, weight in saved.items():
        assert torch.equal(weight, state[name].bfloat16())
        assert torch.equal(weight, loaded[name])


def test_gradient_checkpointing_changes_no_gradient(teach, args):
    used = []

    def watched(policy, part):
        layers = policy.model.modules()
        used.append(any(getattr(m, "gradient_checkpointing", False) for m in layers))
        return teach.sft_of(policy, part)

    for args.gradient_checkpointing in (False, True):
        teach(f"{args.gradient_checkpointing}", loss_of=watched)
    assert used == [False] * 6 + [True] * 6
    states = [state_of(teach.folder / name / "work") for name in ("False", "True")]
    assert same(*states)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_vision_tower_stays_and_the_rest_learns(tiny, teach, args, dtype):
    args.freeze_vision, args.dtype = True, dtype
    teach("a")
    before = load_file(tiny / "model.safetensors")
    before = {name: weight.to(common.dtype_of(args)) for name, weight in before.items()}
    after = load_file(teach.folder / "a/model/model.safetensors")
    assert after.keys() == before.keys()
    tower = [name for name in after if "vision_model" in name]
    assert len(tower) > 10
    assert all(torch.equal(after[name], before[name]) for name in tower)
    state = weights_of(state_of(teach.folder / "a/work"))
    assert state.keys() == before.keys() - set(tower)
    learned = {name for name in state if not torch.equal(state[name], before[name].float())}
    assert {"model.connector.modality_projection.proj.weight", "model.text_model.norm.weight"} <= (
        learned
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_flows_through_a_frozen_vision_tower(teach, args, checkpointing):
    args.freeze_vision, args.gradient_checkpointing, seen = True, checkpointing, []

    def watched(policy, part):
        def note(module, given, out):
            seen.append(out[0].requires_grad)

        hook = policy.model.model.vision_model.register_forward_hook(note)
        found = teach.sft_of(policy, part)
        hook.remove()
        return found

    teach("a", range(1), loss_of=watched)
    assert seen == [False]


def test_a_model_without_a_vision_tower_cannot_be_frozen(tiny, args, monkeypatch):
    args.freeze_vision = True
    kind = transformers.Idefics3ForConditionalGeneration
    monkeypatch.setattr(kind, "get_encoder", lambda self, modality=None: self)
    with pytest.raises(common.InputError, match="--freeze_vision .*Idefics3"):
        common.load_policy(tiny, args)


def test_training_ends_a_response_with_the_token_that_closes_the_templates_turn(policy):
    eos, plus = policy.tokenizer.eos_token_id, policy.tokenizer.convert_tokens_to_ids("+")
    first = common.closing_first
    assert first(policy.processor, [plus, eos]) == [eos, plus]  # as Gemma 3
    assert first(policy.processor, [eos, plus]) == [eos, plus]
    assert first(policy.processor, [plus]) == [plus]
    assert first(policy.processor, plus) == [plus]
    assert first(policy.processor, None) == [eos]


@pytest.mark.parametrize(
    "asked, sampling, training",
    [("", "sdpa", "sdpa"), ("sdpa", "sdpa", "sdpa"), ("eager", "eager", "eager")],
)
def test_the_attention_that_was_asked_for_is_used(tiny, teach, args, asked, sampling, training):
    args.attention, used = asked, []

    def watched(policy, part):
        used.append(policy.model.config.text_config._attn_implementation)
        return teach.sft_of(policy, part)

    policy = common.load_policy(tiny, args)
    assert policy.model.config.text_config._attn_implementation == sampling
    teach("a", range(1), loss_of=watched)
    assert used == [training]
    again = common.load_policy(teach.folder / "a/model", args)
    assert again.model.config.text_config._attn_implementation == sampling


def test_an_attention_that_there_is_not_is_refused(tiny, args):
    args.attention = "no_such"
    with pytest.raises(common.InputError, match="cannot be loaded .*no_such"):
        common.load_policy(tiny, args)


# ---- checkpoints


def test_remote_code_runs_only_when_it_is_asked_for(tiny, teach, args, tmp_path):
    """A checkpoint whose classes come with it, as those of the paper's three models do."""
    mine = shutil.copytree(tiny, tmp_path / "mine")
    (mine / "mine.py").write_text(
        "from transformers import Idefics3Config, Idefics3ForConditionalGeneration\n"
        "class MineConfig(Idefics3Config):\n    model_type = 'mine'\n"
        "class Mine(Idefics3ForConditionalGeneration):\n    config_class = MineConfig\n"
    )
    config = json.loads((mine / "config.json").read_text())
    classes = {
        "AutoConfig": "mine.MineConfig",
        "AutoModelForImageTextToText": "mine.Mine",
    }
    config |= {"model_type": "mine", "architectures": ["Mine"], "auto_map": classes}
    (mine / "config.json").write_text(json.dumps(config))
    with pytest.raises(common.InputError, match="cannot be loaded .*--trust_remote_code"):
        common.load_policy(mine, args)
    args.trust_remote_code = True
    assert type(common.load_policy(mine, args).model).__name__ == "Mine"
    teach("a", range(1), start=mine)
    again = common.load_policy(teach.folder / "a/model", args)
    assert type(again.model).__name__ == "Mine"
    state = weights_of(state_of(teach.folder / "a/work"))
    loaded = again.model.state_dict()
    assert same(state, {name: loaded[name] for name in state})


def test_a_text_only_checkpoint_is_refused(tmp_path, args):
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(common.InputError, match="a llama model.* takes no images"):
        common.load_policy(tmp_path, args)


def test_a_broken_checkpoint_is_refused(tiny, tmp_path, args):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    half = (broken / "model.safetensors").read_bytes()[:1000]
    (broken / "model.safetensors").write_bytes(half)
    for path in (broken, tmp_path / "empty"):
        with pytest.raises(common.InputError, match="cannot be loaded as a .* checkpoint"):
            common.load_policy(path, args)


def test_saved_policies_and_prms_are_plain_hugging_face_folders(tiny, policy, args, tmp_path):
    prm = common.Prm(**vars(policy), marks=(3, 4), mark_weight=0.5, likelihood=2.5)
    common.save_policy(prm, tmp_path / "m", args)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    processor = AutoProcessor.from_pretrained(tmp_path / "m")
    assert processor.chat_template == policy.processor.chat_template
    assert same(again.state_dict(), policy.model.state_dict())
    assert load_file(tmp_path / "m/model.safetensors").keys() == (
        load_file(tiny / "model.safetensors").keys()
    )
    with safe_open(tmp_path / "m/model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    loaded = common.load_prm(tmp_path / "m", args)
    assert (loaded.marks, loaded.mark_weight, loaded.likelihood) == ((3, 4), 0.5, 2.5)
    common.save_policy(policy, tmp_path / "p", args)
    assert not (tmp_path / "p/prm.json").exists()


def test_a_killed_save_leaves_no_folder(policy, args, tmp_path, monkeypatch):
    def dying(*given):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(policy.processor), "save_pretrained", dying)
        common.save_policy(policy, tmp_path / "m", args)
    assert not (tmp_path / "m").exists()
    common.save_policy(policy, tmp_path / "m", args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digests.json", "m"]
    assert all(path.stat().st_mode & 0o044 for path in (tmp_path / "m").iterdir())
    common.load_policy(tmp_path / "m", args)


def spoiled(tiny, folder, change):
    """A copy of a checkpoint whose tensors `change` has seen."""
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


NAME = "model.text_model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda tensors: tensors.pop(NAME), "missing keys in its weights: " + NAME),
        (lambda tensors: tensors.update({NAME: torch.zeros(3, 3)}), "cannot be loaded"),
        (lambda tensors: tensors[NAME].fill_(float("nan")), "holds NaN"),
    ],
)
def test_weights_that_are_missing_or_of_another_shape_or_no_numbers_are_refused(
    tiny, args, tmp_path, change, says
):
    with pytest.raises(common.InputError, match=says):
        common.load_policy(spoiled(tiny, tmp_path / "m", change), args)


def test_a_checkpoint_without_chat_template_or_processor_is_refused(tiny, args, tmp_path):
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").unlink()
    with pytest.raises(common.InputError, match="no chat template"):
        common.load_policy(tmp_path / "m", args)
    (tmp_path / "m/chat_template.jinja").write_text("{% for %}")
    with pytest.raises(common.InputError, match="cannot be loaded"):
        common.load_policy(tmp_path / "m", args)


@pytest.mark.parametrize(
    "marks", [[3], [3, 3], [3, 10**6], "ab", [3, 4, 5], [3, 4.5], [3, -1], {"a": 3}]
)
def test_a_prm_whose_marks_are_not_two_tokens_is_refused(tiny, args, tmp_path, marks):
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m/prm.json").write_text(json.dumps(READ_AS | {"marks": marks}))
    with pytest.raises(common.InputError, match="marks.* two token ids"):
        common.load_prm(tmp_path / "m", args)


@pytest.mark.parametrize("likelihood", [-1, "3", None, [1.0], float("nan"), float("inf"), 0])
def test_a_prm_that_nothing_is_read_at_is_refused(tiny, args, tmp_path, likelihood):
    shutil.copytree(tiny, tmp_path / "m")
    file = tmp_path / "m/prm.json"
    file.write_text(json.dumps({"marks": None, "likelihood": likelihood}))
    with pytest.raises(common.InputError, match="prm.json: ma"):
        common.load_prm(tmp_path / "m", args)
    for weight in (-1, "3", None, float("nan")):
        file.write_text(json.dumps(READ_AS | {"mark_weight": weight}))
        with pytest.raises(common.InputError, match="prm.json: ma"):
            common.load_prm(tmp_path / "m", args)


# ---- settings of the processor


@pytest.mark.parametrize("text", ["{", "3", "", "[1]", '"a"'])
def test_settings_of_the_processor_that_are_no_json_object_are_refused(args, text):
    args.processor = text
    with pytest.raises(common.InputError, match="--processor must be a JSON object, found"):
        common.check_ranges(args)


def test_a_setting_that_the_processor_does_not_know_is_refused(tiny, args):
    args.processor = '{"max_pixels": 1003520}'
    with pytest.raises(common.InputError, match="--processor: .* knows no max_pixels"):
        common.load_policy(tiny, args)
    args.processor = '{"size": {"longest_edge": 24}}'  # as it is anyway
    common.load_policy(tiny, args)


def test_settings_of_the_processor_change_prompts_and_travel_with_the_checkpoint(
    tiny, examples, args, tmp_path
):
    plain = common.load_policy(tiny, args)
    tiles = {"do_resize": True, "size": {"longest_edge": 48}, "do_image_splitting": True}
    args.processor = json.dumps(tiles)
    split = common.load_policy(tiny, args)
    common.save_policy(split, tmp_path / "m", args)
    args.processor = "{}"
    again = common.load_policy(tmp_path / "m", args)
    images = [
        common.encode_prompts(policy, examples[:1], args)["pixel_values"].shape[1]
        for policy in (plain, split, again)
    ]
    assert images == [1, 5, 5]  # four tiles of 24 x 24 and the whole image
    assert ids_of(common.generate(split, examples[:1], [[1]], 1.0, args)) == (
        ids_of(common.generate(again, examples[:1], [[1]], 1.0, args))
    )


def test_the_gpu_figures_come_whole_at_the_smallest_shapes_on_a_cpu(args):
    shown = {}
    found = bench_gpu.run_gpu(["tiny"], "cpu", shown.__setitem__)["tiny"]
    rates = [found[name]["tokens per second"] for name in found if "fine-tuning" in name]
    rates += [found[name]["tokens per second"] for name in ("scoring", "decoding")]
    assert len(rates) == 5
    assert min(rates) > 0
    assert found["equality"]["equal within rounding"]
    assert len(shown) == 6


def test_rows_of_like_length_share_a_pass(policy, examples, args, tmp_path, tiny):
    common.join_ranks("cpu")
    args.micro_batch = 2
    rows = [{"id": n, "token_ids": [5] * n} for n in (9, 1, 8, 2)]
    seen = []

    def loss_of(policy, part):
        """The SFT loss, after noting whose it is."""
        seen.append([row["id"] for row in part])
        return common.sft_loss(policy, examples[:2], [row["token_ids"] for row in part], args)

    work = tmp_path / "work"
    common.train(
        tmp_path / "out",
        tiny,
        work,
        [[0, 1, 2, 3]],
        rows,
        loss_of,
        lambda row: row["id"],
        args,
        "t",
    )
    assert seen == [[1, 2], [8, 9]]
