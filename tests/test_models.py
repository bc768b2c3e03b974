"""Generation, losses, PRM positions and checkpoints on tiny models: exact ids, exact positions, to the bit where promised."""

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

import common
from conftest import stage


def seeds(examples, n, *key):
    return [[common.seed_of(0, *key, e["id"], k) for k in range(n)] for e in examples]


def ids_of(responses):
    return [[r.token_ids for r in row] for row in responses]


# ---- generation

def test_greedy_generation_agrees_with_transformers_token_for_token(policy, examples, args):
    batch = common.encode_prompts(policy, examples[:6], args)
    wanted = policy.model.generate(**batch, max_new_tokens=12, do_sample=False, bad_words_ids=[[i] for i in policy.banned])[:, batch["input_ids"].shape[1]:]
    for (mine,), theirs in zip(common.generate(policy, examples[:6], [[0]] * 6, 0.0, args), wanted.tolist()):
        theirs = theirs[:theirs.index(policy.eos_ids[0])] if policy.eos_ids[0] in theirs else theirs
        assert mine.token_ids == theirs and mine.finished == (len(theirs) < 12)


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(policy, examples, args):
    together = ids_of(common.generate(policy, examples[:5], seeds(examples[:5], 4, "x"), 1.0, args))
    backwards = ids_of(common.generate(policy, examples[4::-1], seeds(examples[4::-1], 4, "x"), 1.0, args))[::-1]
    args.rows = 4
    alone = ids_of(common.generate(policy, examples[:5], seeds(examples[:5], 4, "x"), 1.0, args))
    assert together == backwards == alone
    assert together != ids_of(common.generate(policy, examples[:5], seeds(examples[:5], 4, "y"), 1.0, args))


def test_samples_follow_the_softmax_at_the_temperature(policy, examples, args):
    args.max_new_tokens, args.rows, n = 1, 4000, 4000
    (row,) = common.generate(policy, examples[:1], seeds(examples[:1], n, "freq"), 0.7, args)
    logits = policy.model(**common.encode_prompts(policy, examples[:1], args)).logits[0, -1]
    logits[policy.banned] = -torch.inf
    wanted = (logits / 0.7).softmax(-1)
    first = torch.tensor([r.token_ids[0] if r.token_ids else policy.eos_ids[0] for r in row])
    counts = torch.bincount(first, minlength=len(wanted)) / n
    assert (counts - wanted).abs().max() < 4 * (0.25 / n) ** 0.5  # four standard errors of the widest share


def test_rollouts_start_at_the_exact_step_boundary(policy, examples, args):
    """The first new token of a rollout follows the distribution after exactly prompt + prefix."""
    prefix = policy.tokenizer("sum of row 1 : 1 2 3\n")["input_ids"]
    args.max_new_tokens = len(prefix) + 1
    (row,) = common.generate(policy, examples[:1], [[0]], 0.0, args, prefixes=[prefix])
    batch = common.encode_prompts(policy, examples[:1], args)
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([prefix])], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    logits = policy.model(**batch).logits[0, -1]
    logits[policy.banned] = -torch.inf
    assert row[0].token_ids[:len(prefix)] == prefix and row[0].token_ids[len(prefix):] == [int(logits.argmax())]


def test_prefixes_of_different_lengths_share_a_batch(policy, examples, args):
    prefixes = [policy.tokenizer(text)["input_ids"] for text in ("sum of", "", "maximum of row 2 : 1 2")]
    together = ids_of(common.generate(policy, examples[:3], seeds(examples[:3], 2, "p"), 1.0, args, prefixes))
    for example, prefix, got in zip(examples, prefixes, together):
        assert ids_of(common.generate(policy, [example], seeds([example], 2, "p"), 1.0, args, [prefix])) == [got]


def test_image_placeholders_are_never_sampled(policy, examples, args):
    policy.model.get_output_embeddings().weight.data[policy.banned[0]] *= 50
    rows = common.generate(policy, examples[:4], seeds(examples[:4], 4, "b"), 2.0, args)
    assert not any(policy.banned[0] in r.token_ids for row in rows for r in row)


def test_a_response_that_did_not_end_is_wrong(policy, examples, args, monkeypatch):
    answer = policy.tokenizer(f"Answer : {examples[0]['answer']}")["input_ids"]
    for finished in (True, False):
        response = common.Response(answer, policy.tokenizer.decode(answer), finished)
        monkeypatch.setattr(common, "generate", lambda *a, **k: [[response]])
        (row,) = common.sample_rows(policy, examples[:1], 1, 1.0, "t", 0, args)
        assert row["correct"] is finished and (row["answer"] is None) is not finished


def test_an_over_long_prompt_is_refused_with_file_and_line(policy, examples, args):
    args.max_prompt_tokens = 20
    with pytest.raises(common.InputError, match=r"train.jsonl line \d+: the prompt has \d+ tokens, more than --max_prompt_tokens 20"):
        common.check_longest_prompts(policy, examples, args)


def test_logprobs_on_demand_are_those_of_an_uncached_forward_pass(policy, examples, args):
    prefixes = [policy.tokenizer("1 + 2 =")["input_ids"], [], []]
    rows = common.generate(policy, examples[:3], seeds(examples[:3], 2, "l"), 1.0, args, prefixes, logprobs=True)
    for example, prefix, row in zip(examples, prefixes, rows):
        for response in row:
            sampled = response.token_ids + [policy.eos_ids[0]] * response.finished
            batch = common.encode_prompts(policy, [example], args)
            start = batch["input_ids"].shape[1] + len(prefix)
            logits = policy.model(**common.append_tokens(batch, [sampled], policy.pad_id)).logits[0, start - 1:-1]
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(sampled[len(prefix):])[:, None])[:, 0]
            assert response.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
    assert common.generate(policy, examples[:1], [[0]], 1.0, args)[0][0].logprobs is None


# ---- the choice of the engine, and what stops a wrong one (test_vllm.py runs the engine itself)

def test_without_vllm_auto_is_transformers_and_says_why(monkeypatch, capsys):
    monkeypatch.setattr(common, "vllm_lacks", lambda device: "vLLM is not installed")
    choose = common.choose_engine.__wrapped__
    assert choose("auto", "cpu") == "transformers" and capsys.readouterr().out == "engine: transformers (vLLM is not installed)\n"
    with pytest.raises(common.InputError, match="--engine vllm cannot run: vLLM is not installed"):
        choose("vllm", "cpu")
    monkeypatch.setattr(common, "vllm_lacks", lambda device: "")
    assert choose("auto", "cuda") == choose("vllm", "cuda") == "vllm" and choose("transformers", "cuda") == "transformers"
    with pytest.raises(common.InputError, match="--engine vlm is not one of"):
        choose("vlm", "cpu")


class Engine:
    """Stands for vLLM's LLM object: notes that it was shut down."""

    def __init__(self):
        self.llm_engine, self.engine_core, self.closed = self, self, False

    def shutdown(self):
        self.closed = True


def test_an_engine_is_closed_before_its_weights_are_old(tiny, policy, examples, args, tmp_path):
    def alive():
        common.ENGINES.append((policy, Engine(), "cpu"))
        return common.ENGINES[0][1]
    optimizer, engine = common.make_optimizer(policy), alive()
    train(policy, optimizer, examples, args, batches=range(1), folder=tmp_path)
    assert engine.closed and not common.ENGINES
    engine = alive()
    common.load_checkpoint(tmp_path, policy, optimizer)
    assert engine.closed and not common.ENGINES
    engine = alive()
    common.load_policy(tiny, args)
    assert engine.closed and not common.ENGINES


def test_the_probe_stops_at_other_logprobs_and_at_other_prompt_ids_and_passes_a_near_tie(policy, examples, args, monkeypatch):
    def probe(ids, tokens, logprobs):
        outputs = [type("Output", (), {"prompt_token_ids": ids})]
        monkeypatch.setattr(common, "ask_engine", lambda *a: (outputs, [[common.Response(tokens, "", True, logprobs)]]))
        return common.probe_engine(policy, None, examples[0], [5, 6], common.Response([1, 2], "", True, [-0.5, -1.0, -0.1]), args)
    assert probe([5, 6], [1, 2], [-0.51, -1.0, -0.1]) == pytest.approx(0.01)
    assert probe([5, 6], [1, 3], [-0.5, -1.001, -9.0]) == pytest.approx(0.001)  # another token of the same logprob: the rest is not comparable
    with pytest.raises(common.InputError, match="greedy logprob 1 of .* is -1.5000 there, -1.0000 in the trainer"):
        probe([5, 6], [1, 2], [-0.5, -1.5, -0.1])
    for other, place in (([5, 7], "token 1 of the prompt: trainer 6, vLLM 7"), ([5], "token 1 of the prompt: trainer 6, vLLM None"),
                         ([2, 5, 6], "token 0 of the prompt: trainer 5, vLLM 2"), ([5, 6, 6], "token 2 of the prompt: trainer None, vLLM 6")):
        with pytest.raises(common.InputError, match=place):
            probe(other, [1, 2], [-0.5, -1.0, -0.1])


def test_in_bfloat16_the_probe_forgives_one_token_of_many_and_no_other_weights(policy, examples, args, monkeypatch):
    def probe(logprobs):
        outputs, tokens = [type("Output", (), {"prompt_token_ids": [5]})], list(range(len(logprobs)))
        monkeypatch.setattr(common, "ask_engine", lambda *a: (outputs, [[common.Response(tokens, "", True, logprobs)]]))
        return common.probe_engine(policy, None, examples[0], [5], common.Response(tokens, "", True, [-1.0] * len(logprobs)), args)
    with pytest.raises(common.InputError, match="-1.4000 there"):
        probe([-1.0] * 7 + [-1.4])  # float32
    policy.model.bfloat16()
    assert probe([-1.0] * 7 + [-1.4]) == pytest.approx(0.4) and probe([-1.25] * 8) == pytest.approx(0.25)
    for other in ([-1.4] * 8, [-1.0, -1.4]):
        with pytest.raises(common.InputError, match="does not hold the policy's weights"):
            probe(other)


# ---- SFT

def test_loss_falls_on_the_response_and_its_closing_eos_only(policy, examples, args):
    """Against cross-entropy computed one unpadded sequence at a time."""
    texts = ["Answer : 3", "sum of row 1 : 1 2 3 = 6\nAnswer : 6"]
    targets, wanted, count = [policy.tokenizer(t)["input_ids"] for t in texts], 0.0, 0
    for example, ids in zip(examples, targets):
        batch = common.encode_prompts(policy, [example], args)
        start, ids = batch["input_ids"].shape[1], ids + [policy.tokenizer.eos_token_id]
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([ids])], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        logits = policy.model(**batch).logits[0, start - 1:-1]
        wanted, count = wanted + F.cross_entropy(logits, torch.tensor(ids), reduction="sum").item(), count + len(ids)
    loss, tokens = common.sft_loss(policy, examples[:2], targets, args)
    assert tokens == count == 3 + 1 + len(targets[1]) + 1 and loss.item() == pytest.approx(wanted, rel=1e-5)


def test_the_loss_of_thousands_of_tokens_is_made_in_pieces_and_stays_the_same(policy, examples, args):
    targets = [[9 + i % 5 for i in range(700)]] * 4  # 4 x 701 tokens: two pieces
    grads, losses = [], []
    for together in (False, True):
        policy.model.zero_grad()
        parts = [(examples[:4], targets)] if together else [([e], [t]) for e, t in zip(examples[:4], targets)]
        loss = sum(common.sft_loss(policy, *part, args)[0] for part in parts)
        loss.backward()
        losses.append(loss.item())
        grads.append({n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None})
    assert common.sft_loss(policy, examples[:4], targets, args)[1] == 4 * 701 > 2048 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    largest = max(g.abs().max().item() for g in grads[0].values())
    assert grads[0].keys() == grads[1].keys() and all(torch.allclose(grads[0][n], grads[1][n], rtol=1e-3, atol=1e-5 * largest) for n in grads[0])


def test_an_eos_that_is_also_the_pad_token_is_still_learned(policy, examples, args):
    before = common.sft_loss(policy, examples[:2], [[9], [9, 9, 9]], args)
    policy.pad_id = policy.eos_ids[0]
    after = common.sft_loss(policy, examples[:2], [[9], [9, 9, 9]], args)
    assert after[1] == before[1] == 6 and after[0].item() == pytest.approx(before[0].item(), rel=1e-5)


def test_micro_batches_give_the_gradient_of_the_whole_batch(policy, examples, args):
    rows = [(e, [5 + i] * (i + 1)) for i, e in enumerate(examples[:4])]
    weights = []
    for size in (4, 1):
        args.micro_batch, mine = size, copy.deepcopy(policy)
        optimizer = torch.optim.SGD(mine.model.parameters(), lr=0.0)
        common.fit(mine, optimizer, [rows], lambda part: common.sft_loss(mine, [e for e, _ in part], [t for _, t in part], args), args, "t")
        weights.append(torch.cat([p.detach().flatten() for p in mine.model.parameters()]))
    assert torch.allclose(*weights, atol=1e-6) and not torch.allclose(weights[0], torch.cat([p.detach().flatten() for p in policy.model.parameters()]))


def test_a_loss_that_is_not_finite_stops_the_run(policy, args):
    with pytest.raises(common.InputError, match="the loss is nan at step 0; lower --learning_rate"):
        common.fit(policy, common.make_optimizer(policy), [[0]], lambda b: (torch.tensor(float("nan"), requires_grad=True), 1), args, "t")


# ---- the one optimisation

def train(policy, optimizer, examples, args, state=None, batches=range(6), stop=None, folder=None):
    """Six deterministic SFT steps in two 'iterations' of three; optionally saved after every step."""
    def loss_of(batch):
        return common.sft_loss(policy, [examples[i] for i in batch], [[5 + i, 6] for i in batch], args)
    args.save_every = 1
    save = (lambda s: common.save_checkpoint(folder, policy, optimizer, s)) if folder else None
    return common.fit(policy, optimizer, [[i, i + 1] for i in batches][:stop], loss_of, args, "t", state, save)


def snapshot(policy, optimizer):
    names = {p: n for n, p in policy.model.named_parameters()}
    return {**{n: p.detach().clone() for n, p in policy.model.named_parameters()},
            **{f"{names[p]}.{k}": v.clone() for p, s in optimizer.state.items() for k, v in s.items()}}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_moments_and_rate_are_continuous_across_an_iteration_boundary_and_a_restart(tiny, examples, args, tmp_path):
    """Six steps in one go, in two iterations, and with a restart from disk in the middle: equal to the bit."""
    policy = common.load_policy(tiny, args)
    optimizer = common.make_optimizer(policy)
    state = train(policy, optimizer, examples, args)
    unbroken, rate = snapshot(policy, optimizer), optimizer.param_groups[0]["lr"]

    policy = common.load_policy(tiny, args)
    optimizer = common.make_optimizer(policy)
    first = train(policy, optimizer, examples, args, batches=range(3), folder=tmp_path)
    boundary = snapshot(policy, optimizer)
    second = train(policy, optimizer, examples, args, {**first, "batch": 0}, batches=range(3, 6))
    assert same(snapshot(policy, optimizer), unbroken) and optimizer.param_groups[0]["lr"] == rate and second["step"] == state["step"] == 6

    policy = common.load_policy(tiny, args)
    optimizer = common.make_optimizer(policy)
    restored = common.load_checkpoint(tmp_path, policy, optimizer)
    assert same(snapshot(policy, optimizer), boundary) and restored == first
    train(policy, optimizer, examples, args, {**restored, "batch": 0}, batches=range(3, 6))
    assert same(snapshot(policy, optimizer), unbroken)


def test_a_restart_inside_an_iteration_skips_exactly_what_was_done(tiny, examples, args, tmp_path):
    policy = common.load_policy(tiny, args)
    optimizer = common.make_optimizer(policy)
    train(policy, optimizer, examples, args)
    unbroken = snapshot(policy, optimizer)
    policy = common.load_policy(tiny, args)
    train(policy, common.make_optimizer(policy), examples, args, stop=4, folder=tmp_path)
    policy = common.load_policy(tiny, args)
    optimizer = common.make_optimizer(policy)
    train(policy, optimizer, examples, args, common.load_checkpoint(tmp_path, policy, optimizer))
    assert same(snapshot(policy, optimizer), unbroken)


def test_a_checkpoint_is_safetensors_and_json_and_a_half_written_one_does_not_count(tiny, examples, args, tmp_path):
    policy = common.load_policy(tiny, args)
    optimizer = common.make_optimizer(policy)
    train(policy, optimizer, examples, args, stop=2, folder=tmp_path)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".jinja"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.json", "step_000002"]
    shutil.copytree(tmp_path / "step_000002", tmp_path / "step_000003")
    (tmp_path / "step_000003/optimizer.safetensors").write_bytes(b"half")
    assert common.load_checkpoint(tmp_path, policy, optimizer)["step"] == 2


# ---- dtypes, memory, vision tower, attention

def test_updates_below_bfloat16_rounding_add_up_in_the_master():
    """2,000 AdamW steps of lr 1e-6 against a constant gradient move a weight of 0.1 by 0.002; bfloat16 alone, whose grid is 0.0005 there, by nothing."""
    ends = []
    for kind in (torch.optim.AdamW, common.MasterAdamW):
        weight = torch.nn.Parameter(torch.full((4,), 0.1, dtype=torch.bfloat16))
        optimizer = kind([weight], lr=1e-6, weight_decay=0.0)
        for _ in range(2000):
            weight.sum().backward()
            if kind is common.MasterAdamW:
                optimizer.gather(weight)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            weight.grad = None
        ends.append(weight.tolist()[0])
    start = torch.tensor(0.1).bfloat16().item()
    assert ends[0] == start and ends[1] == pytest.approx(start - 0.002, abs=0.0003)


def test_a_bfloat16_policy_is_trained_along_the_path_of_a_float32_one(tiny, examples, args):
    args.learning_rate, args.warmup_steps, moved = 1e-6, 0, []
    for args.dtype in ("bfloat16", "float32"):
        policy = common.load_policy(tiny, args)
        optimizer = common.make_optimizer(policy)
        before = [w.detach().clone() for group in optimizer.param_groups for w in group["params"]]
        train(policy, optimizer, examples, args)
        after = [w for group in optimizer.param_groups for w in group["params"]]
        moved.append(torch.cat([(a - b).detach().flatten() for a, b in zip(after, before)]))
        assert {w.dtype for w in after} == {torch.float32} and {w.dtype for w in policy.model.parameters()} == {common.dtype_of(args)}
        assert all(torch.equal(p, common.masters_of(optimizer).get(p, p).to(p.dtype)) for p in policy.model.parameters())
    assert 2e-6 < moved[0].abs().mean() < 7e-6 and F.cosine_similarity(*moved, dim=0) > 0.7  # six steps of about 1e-6, in the same direction


def test_bfloat16_training_continues_to_the_bit_after_a_restart(tiny, examples, args, tmp_path):
    args.dtype = "bfloat16"
    policy = common.load_policy(tiny, args)
    optimizer = common.make_optimizer(policy)
    train(policy, optimizer, examples, args)
    policy_two = common.load_policy(tiny, args)
    train(policy_two, common.make_optimizer(policy_two), examples, args, stop=4, folder=tmp_path)
    policy_two = common.load_policy(tiny, args)
    again = common.make_optimizer(policy_two)
    train(policy_two, again, examples, args, common.load_checkpoint(tmp_path, policy_two, again))
    masters = [dict(zip(p.model.state_dict(), [*o.masters.values()])) for p, o in ((policy, optimizer), (policy_two, again))]
    assert same(*masters) and same(policy.model.state_dict(), policy_two.model.state_dict())
    moments = [[s[k] for s in o.state.values() for k in s] for o in (optimizer, again)]
    assert len(moments[0]) == len(moments[1]) > 0 and all(map(torch.equal, *moments))


def test_a_new_optimizer_on_the_same_bfloat16_policy_trains_it(tiny, examples, args):
    args.dtype = "bfloat16"
    policy = common.load_policy(tiny, args)
    for _ in range(2):
        before = copy.deepcopy(policy.model.state_dict())
        train(policy, common.make_optimizer(policy), examples, args, batches=range(2))
        assert not same(before, policy.model.state_dict())


def test_gradient_checkpointing_changes_no_gradient(tiny, examples, args):
    weights = []
    for args.gradient_checkpointing in (False, True):
        policy = common.load_policy(tiny, args)
        train(policy, common.make_optimizer(policy), examples, args)
        weights.append(policy.model.state_dict())
    assert same(*weights) and any(getattr(m, "gradient_checkpointing", False) for m in policy.model.modules())


def test_a_frozen_vision_tower_stays_and_the_rest_learns(tiny, examples, args):
    args.freeze_vision = True
    policy = common.load_policy(tiny, args)
    before = copy.deepcopy(policy.model.state_dict())
    train(policy, common.make_optimizer(policy), examples, args)
    moved = {n for n, w in policy.model.state_dict().items() if not torch.equal(w, before[n])}
    assert not [n for n in moved if "vision_model" in n] and {"model.connector.modality_projection.proj.weight", "model.text_model.norm.weight"} <= moved


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_flows_through_a_frozen_vision_tower(tiny, examples, args, checkpointing):
    args.freeze_vision, args.gradient_checkpointing = True, checkpointing
    policy, seen = common.load_policy(tiny, args), []
    policy.model.train()
    common.vision_tower(policy.model).register_forward_hook(lambda module, given, out: seen.append(out[0].requires_grad))
    common.sft_loss(policy, examples[:2], [[9, 9]] * 2, args)[0].backward()
    assert seen == [False] and policy.model.get_input_embeddings().weight.grad is not None


def test_training_ends_a_response_with_the_token_that_closes_the_templates_turn(policy):
    eos, plus = policy.tokenizer.eos_token_id, policy.tokenizer.convert_tokens_to_ids("+")
    assert common.closing_first(policy.processor, [plus, eos]) == [eos, plus]  # as Gemma 3: the template closes with the second
    assert common.closing_first(policy.processor, [eos, plus]) == [eos, plus] and common.closing_first(policy.processor, [plus]) == [plus]


def test_the_attention_that_was_asked_for_is_used_and_stays_after_training(tiny, examples, args, monkeypatch):
    for args.attention, chosen, trained in (("auto", "sdpa", "eager"), ("sdpa", "sdpa", "sdpa"), ("eager", "eager", "eager")):
        policy, used = common.load_policy(tiny, args), []
        loss = common.sft_loss
        monkeypatch.setattr(common, "sft_loss", lambda p, *a: (used.append(p.model.config.text_config._attn_implementation), loss(p, *a))[1])
        assert policy.model.config.text_config._attn_implementation == chosen
        train(policy, common.make_optimizer(policy), examples, args, batches=range(1))
        assert policy.model.config.text_config._attn_implementation == chosen and used == [trained]
        monkeypatch.undo()
    args.attention = "no_such"
    with pytest.raises(common.InputError, match="cannot be loaded .*no_such"):
        common.load_policy(tiny, args)


def test_remote_code_runs_only_when_it_is_asked_for(tiny, examples, args, tmp_path):
    """A checkpoint whose classes come with it, as those of the paper's three models do."""
    mine = shutil.copytree(tiny, tmp_path / "mine")
    (mine / "mine.py").write_text("from transformers import Idefics3Config, Idefics3ForConditionalGeneration\n"
                                  "class MineConfig(Idefics3Config):\n    model_type = 'mine'\n"
                                  "class Mine(Idefics3ForConditionalGeneration):\n    config_class = MineConfig\n")
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps({**config, "model_type": "mine", "architectures": ["Mine"],
                                                  "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForImageTextToText": "mine.Mine"}}))
    with pytest.raises(common.InputError, match="custom code .* pass --trust_remote_code"):
        common.load_policy(mine, args)
    args.trust_remote_code = True
    policy = common.load_policy(mine, args)
    assert type(policy.model).__name__ == "Mine"
    train(policy, common.make_optimizer(policy), examples, args, batches=range(1), folder=tmp_path / "c")
    again = common.load_policy(mine, args)
    common.load_checkpoint(tmp_path / "c", again, common.make_optimizer(again))
    assert same(again.model.state_dict(), policy.model.state_dict())


def test_a_dtype_that_is_neither_is_refused(tiny, args):
    args.dtype = "int8"
    with pytest.raises(common.InputError, match="--dtype int8 is not one of auto, float32, bfloat16"):
        common.load_policy(tiny, args)


# ---- the PRM

def hand_made(policy):
    """A PRM whose score at a position is known from the token there: +1 x the token's id as a logit."""
    vocabulary, width = policy.model.get_output_embeddings().weight.shape
    hidden = torch.zeros(width)
    policy.marks = (0, 1)
    weight = torch.zeros(vocabulary, width)
    weight[0, 0] = 1.0  # logit(good) - logit(bad) = hidden[0]
    policy.model.get_output_embeddings().weight = torch.nn.Parameter(weight)
    return policy


def test_a_step_is_read_at_its_own_last_token(policy):
    prm = hand_made(policy)
    hidden = torch.zeros(2, 9, prm.model.config.text_config.hidden_size)
    hidden[:, :, 0] = torch.arange(9.0)  # the score of a position is its index
    hidden[1, :, 0] += 100
    got = common.step_logits(prm, hidden, [[2, 5], [3]], offset=3)  # responses begin at position 3
    assert got.tolist() == [3 + 2 - 1, 3 + 5 - 1, 100 + 3 + 3 - 1]


def responses_for(policy, texts):
    return [policy.tokenizer(text)["input_ids"] for text in texts]


TEXTS = ["sum of row 1 : 1 2 3\n1 + 2 + 3 = 6\nAnswer : 6", "Answer : 3", "maximum of row 2 : 1 5 2\n\nmaximum = 5\nAnswer : 5\n", "\n"]


def test_scores_do_not_depend_on_batch_or_padding_and_training_reads_the_same_logits(policy, examples, args):
    policy.marks = (policy.tokenizer.convert_tokens_to_ids("+"), policy.tokenizer.convert_tokens_to_ids("-"))
    ids = responses_for(policy, TEXTS)
    together = common.score_steps(policy, examples[:2], [ids, ids[::-1]], args)
    assert [len(s) for s in together[0]] == [3, 1, 3, 0]
    for example, row, responses in zip(examples, together, (ids, ids[::-1])):
        for mine, response in zip(row, responses):
            (alone,), = common.score_steps(policy, [example], [[response]], args)
            assert mine == pytest.approx(alone, abs=1e-5)
            if not mine:
                continue
            batch = common.encode_prompts(policy, [example], args)  # the reference: one plain forward pass, full logits
            start = batch["input_ids"].shape[1]
            batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([response])], 1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            logits = policy.model(**batch).logits[0]
            at = [start + e - 1 for e in common.step_ends(response, policy.tokenizer)]
            assert mine == pytest.approx((logits[at, policy.marks[0]] - logits[at, policy.marks[1]]).sigmoid().tolist(), abs=1e-5)


def test_long_responses_are_scored_in_small_parts_with_the_same_result(policy, examples, args):
    policy.marks = (policy.tokenizer.convert_tokens_to_ids("+"), policy.tokenizer.convert_tokens_to_ids("-"))
    step = policy.tokenizer("1 + 2 = 3\n")["input_ids"]
    long = [step * n for n in (90, 30, 60)]
    widths, inner = [], policy.model.base_model
    inner.register_forward_pre_hook(lambda module, given, named: widths.append(tuple(named["input_ids"].shape)), with_kwargs=True)
    many = common.score_steps(policy, examples[:1], [long * 60], args)[0]
    prompt, *parts = widths
    assert prompt[1] == 42 and parts == [(120, 360), (60, 540)]  # sorted by length; a 121st row of 42 + 540 tokens would make 70,422 > 65,536 positions
    alone = common.score_steps(policy, examples[:1], [long], args)[0]
    for k, scores in enumerate(many):
        assert scores == pytest.approx(alone[k % 3], abs=1e-5)


def test_prm_loss_is_cross_entropy_at_the_scored_positions_and_zero_without_labels(policy, examples, args):
    policy.marks = (policy.tokenizer.convert_tokens_to_ids("+"), policy.tokenizer.convert_tokens_to_ids("-"))
    prm, ids = stage("02_train_prm"), responses_for(policy, TEXTS[:2])
    policy.model.get_output_embeddings().weight.data *= 0.05  # scores away from 0 and 1, where a logarithm is exact enough
    ends = [common.step_ends(i, policy.tokenizer) for i in ids]
    steps = [[{"end": e, "soft": s} for e, s in zip(row, labels)] for row, labels in zip(ends, ([0.25, 0.5, 1.0], [0.0]))]
    loss, count = prm.prm_loss(policy, examples[:2], ids, steps, "soft", args)
    scores = [f for (row,) in common.score_steps(policy, examples[:2], [[i] for i in ids], args) for f in row]
    wanted = -sum(y * torch.log(torch.tensor(f)) + (1 - y) * torch.log(torch.tensor(1 - f)) for y, f in zip((0.25, 0.5, 1.0, 0.0), scores))
    assert count == 4 and loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    loss, count = prm.prm_loss(policy, examples[:2], ids, [[], []], "soft", args)
    assert count == 0 and loss.item() == 0.0


def test_a_cut_response_ranks_below_every_scored_one(policy, examples, args, monkeypatch):
    policy.marks = (policy.tokenizer.convert_tokens_to_ids("+"), policy.tokenizer.convert_tokens_to_ids("-"))
    ids = responses_for(policy, TEXTS[:2])
    made = [common.Response(ids[0], TEXTS[0], False), common.Response(ids[1], TEXTS[1], True)]
    monkeypatch.setattr(common, "generate", lambda *a, **k: [made])
    cut, whole = common.sample_rows(policy, examples[:1], 2, 1.0, "t", 0, args, policy)
    assert cut["reward"] == -1.0 and cut["step_scores"] == [] and 0 <= whole["reward"] <= 1
    right_only = common.sample_rows(policy, [{**examples[0], "answer": "3", "choices": None}], 2, 1.0, "t", 0, args, policy, True)
    assert [r["reward"] > 0 for r in right_only] == [False, True]


def test_marks_that_are_not_one_token_are_refused(policy):
    with pytest.raises(common.InputError, match="must each be one token"):
        stage("02_train_prm").mark_ids(policy.tokenizer, "+", "bad step")


# ---- checkpoints

def test_a_text_only_checkpoint_is_refused(tmp_path, args):
    from transformers import LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    with pytest.raises(common.InputError, match="holds a llama model, which takes no images"):
        common.load_policy(tmp_path, args)


def test_a_broken_checkpoint_is_refused(tiny, tmp_path, args):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    for path in (broken, tmp_path / "empty"):
        with pytest.raises(common.InputError, match="cannot be loaded as a Hugging Face checkpoint"):
            common.load_policy(path, args)


def test_saved_policies_and_prms_are_plain_hugging_face_folders(policy, args, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    policy.marks = (3, 4)
    common.save_model(policy, tmp_path / "m")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    assert AutoProcessor.from_pretrained(tmp_path / "m").chat_template == policy.processor.chat_template
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), policy.model.state_dict().values()))
    assert common.load_prm(tmp_path / "m", args).marks == (3, 4)
