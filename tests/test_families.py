"""Seven families of vision-language models, tiny and random but of their real classes, through the real scripts.

Every family has its own model, processor, image processor, image placeholder and kind of cache; the tokenizer is a small
word-level one and the chat template a line. Families whose processor needs torchvision are skipped where it is missing;
the end of the test report names the environment of each.
"""

import importlib.metadata
import json
import shutil

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import common
import conftest
from conftest import ROOT, stage

WORDS = "User Assistant Answer Choices what is the of Think step by then end with plus : , . ? = + - ( ) A B C D 0 1 2 3 4 5 6 7 8 9".split()
RESPONSES = ["1 + 1 = 2\nAnswer : 2", "1 + 2 = 3\nAnswer : 3", "2 + 1 = 3\n3 + 0 = 3\nAnswer : 3", "1 + 1 = 3\n2 = 2\nAnswer : 2"]
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            initializer_range=0.2, max_position_embeddings=2048, tie_word_embeddings=True)
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2)


def template(before: str, image: str, after: str = "\nAssistant :") -> str:
    """A chat template with the family's image placeholder."""
    return ("{% for m in messages %}{% if m['role'] == 'user' %}" + before + "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image
            + "{% else %} {{ c['text'] }}{% endif %}{% endfor %}" + after.replace("\n", "{{ '\\n' }}")
            + "{% else %} {{ m['content'] }}<eos>{% endif %}{% endfor %}")


def tokenizer_of(special: list[str], **named) -> tf.PreTrainedTokenizerFast:
    """A word-level tokenizer that knows the family's special tokens; `named` become attributes such as image_token."""
    special = ["<pad>", "<unk>", "<bos>", "<eos>", *dict.fromkeys([*special, *named.values()])]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, "\n", *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\n|\d|\w+|[^\w\s]"), "isolated"),
                                                  pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed")])
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
                                      clean_up_tokenization_spaces=False, additional_special_tokens=special[4:], extra_special_tokens=named)


def ids(tokenizer, **names) -> dict:
    """Config fields that hold token ids."""
    text = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3)
    return {"text": TEXT | text, **{k: tokenizer.convert_tokens_to_ids(v) for k, v in names.items()}}


def idefics3():
    rows = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    tokenizer = tokenizer_of(["<image>", "<fake_token_around_image>", "<global-img>", *rows])
    t = ids(tokenizer, image_token_id="<image>")
    images = conftest.pil("Idefics3ImageProcessor")(size={"longest_edge": 48}, max_image_size={"longest_edge": 24})
    processor = tf.Idefics3Processor(images, tokenizer, image_seq_len=9, chat_template=template("User :", "<image>"))
    return tf.Idefics3ForConditionalGeneration(tf.Idefics3Config(
        image_token_id=t["image_token_id"], scale_factor=1, tie_word_embeddings=True, text_config={"model_type": "llama", **t["text"]},
        vision_config=VISION | dict(image_size=24, patch_size=8))), processor


def qwen(kind: str):
    tokenizer = tokenizer_of([], image_token="<|image_pad|>", video_token="<|video_pad|>", vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>")
    t = ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>", vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")
    patch, three = (16, True) if kind == "Qwen3VL" else (14, False)
    size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 8 * (2 * patch) ** 2}
    images = conftest.pil("Qwen2VLImageProcessor")(patch_size=patch, size=size)
    video = (tf.Qwen3VLVideoProcessor if three else tf.Qwen2VLVideoProcessor)(patch_size=patch)
    processor = getattr(tf, f"{kind}Processor")(images, tokenizer, video, chat_template=template("User :", "<|vision_start|><|image_pad|><|vision_end|>"))
    vision = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=patch, initializer_range=0.2)
    vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0]) if three else dict(window_size=56, fullatt_block_indexes=[1])
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2]) | (dict(mrope_interleaved=True) if three else {})
    text = {k: v for k, v in t.pop("text").items() if three or k != "head_dim"} | dict(rope_parameters=rope)
    config = getattr(tf, f"{kind}Config")(text_config=text, vision_config=vision, tie_word_embeddings=True, **t)
    return getattr(tf, f"{kind}ForConditionalGeneration")(config), processor


def internvl():
    tokenizer = tokenizer_of([], context_image_token="<IMG_CONTEXT>", start_image_token="<img>", end_image_token="</img>", video_token="<video>")
    t = ids(tokenizer, image_token_id="<IMG_CONTEXT>")
    images = conftest.pil("GotOcr2ImageProcessor")(size={"height": 56, "width": 56}, max_patches=4)
    processor = tf.InternVLProcessor(images, tokenizer, tf.InternVLVideoProcessor(), image_seq_length=4, chat_template=template("User :", "<IMG_CONTEXT>"))
    text = {"model_type": "qwen2", **{k: v for k, v in t.pop("text").items() if k != "head_dim"}}
    return tf.InternVLForConditionalGeneration(tf.InternVLConfig(
        text_config=text, vision_config=VISION | dict(image_size=56, patch_size=14), image_seq_length=4, tie_word_embeddings=True, **t)), processor


def llava_onevision():
    tokenizer = tokenizer_of([], image_token="<image>", video_token="<video>")
    t = ids(tokenizer, image_token_index="<image>", video_token_index="<video>")
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    images = conftest.pil("LlavaOnevisionImageProcessor")(size={"height": 28, "width": 28}, image_grid_pinpoints=grid)
    processor = tf.LlavaOnevisionProcessor(images, tokenizer, tf.LlavaOnevisionVideoProcessor(), num_image_tokens=4, vision_feature_select_strategy="full",
                                           chat_template=template("User :", "<image>"))
    text = {"model_type": "qwen2", **{k: v for k, v in t.pop("text").items() if k != "head_dim"}}
    vision = VISION | dict(model_type="siglip_vision_model", image_size=28, patch_size=14, vision_use_head=False)
    return tf.LlavaOnevisionForConditionalGeneration(tf.LlavaOnevisionConfig(
        text_config=text, vision_config=vision, image_grid_pinpoints=grid, tie_word_embeddings=True, **t)), processor


def gemma3():
    tokenizer = tokenizer_of([], image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    t = ids(tokenizer, image_token_index="<image_soft_token>", boi_token_index="<start_of_image>", eoi_token_index="<end_of_image>")
    images = conftest.pil("Gemma3ImageProcessor")(size={"height": 28, "width": 28})
    processor = tf.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template("<bos>User :", "<start_of_image>"))
    text = t.pop("text") | dict(layer_types=["sliding_attention", "full_attention"], sliding_window=12, query_pre_attn_scalar=16)
    vision = {k: v for k, v in VISION.items() if k != "initializer_range"} | dict(image_size=28, patch_size=14, vision_use_head=False)
    return tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=True, **t)), processor


def minicpm():
    names = dict(image_start_token="<image>", image_end_token="</image>", slice_start_token="<slice>", slice_end_token="</slice>",
                 image_id_start_token="<image_id>", image_id_end_token="</image_id>")
    tokenizer = tokenizer_of([], image_token="<|image_pad|>", video_token="<|video_pad|>", **names)
    t = ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>")
    images = conftest.pil("MiniCPMV4_6ImageProcessor")(scale_resolution=112, max_slice_nums=4)
    processor = tf.MiniCPMV4_6Processor(images, tf.MiniCPMV4_6VideoProcessor(), tokenizer, chat_template=template("User :", "<|image_pad|>"))
    linear = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
    rope = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True)
    text = {"model_type": "qwen3_5_text", **t.pop("text"), **linear, "layer_types": ["linear_attention", "full_attention"], "rope_parameters": rope}
    vision = {k: v for k, v in VISION.items() if k != "initializer_range"} | dict(patch_size=14, image_size=112)
    return tf.MiniCPMV4_6ForConditionalGeneration(tf.MiniCPMV4_6Config(
        text_config=text, vision_config=vision, insert_layer_id=0, tie_word_embeddings=True, **t)), processor


FAMILIES = {"Idefics3 / SmolVLM": idefics3, "Qwen2.5-VL": lambda: qwen("Qwen2_5_VL"), "Qwen3-VL": lambda: qwen("Qwen3VL"), "InternVL": internvl,
            "LLaVA-OneVision": llava_onevision, "Gemma 3": gemma3, "MiniCPM-V 4.6": minicpm}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Data files whose images have several sizes and whose questions have several lengths, so that every batch is padded."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, count in (("train", 10), ("val", 4)):
        rows = []
        for i in range(count):
            height, width = ((60, 60), (40, 110), (120, 50), (224, 230))[i % 4]
            Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}{i}.png")
            rows.append({"id": f"{name}{i}", "image": f"{name}{i}.png", "question": "what is 1 plus " + " , ".join("1" * (1 + i % 3)) + " ?",
                         "answer": "23"[i % 2], "choices": None, "source": "test"})
        common.write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, prompts):
    """A checkpoint of the family, taught for a moment to speak in steps, its name and its data."""
    name, folder = request.param, tmp_path_factory.mktemp("family") / "model"
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "torchvision") if importlib.util.find_spec(p)}
    environment = ", ".join(f"{p} {v}" for p, v in versions.items()) + ("" if "torchvision" in versions else ", no torchvision")
    try:
        torch.manual_seed(0)
        model, processor = FAMILIES[name]()
    except ImportError as error:
        conftest.ENVIRONMENTS[name] = f"skipped in {environment}"
        pytest.skip(f"{name}: its processor cannot be made with {environment} ({str(error).strip().splitlines()[0]})")
    if name == "MiniCPM-V 4.6" and tf.__version__ < "5.19":
        conftest.ENVIRONMENTS[name] = f"skipped in {environment}"
        pytest.skip(f"{name}: transformers {tf.__version__} cannot take images of different sizes in one batch of this family; 5.19 can")
    conftest.ENVIRONMENTS[name] = environment
    model.generation_config = tf.GenerationConfig(eos_token_id=3, pad_token_id=0, bos_token_id=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    args = flags()
    policy, examples = common.load_policy(folder, args), common.load_examples(prompts / "train.jsonl")
    pairs = [(e, policy.tokenizer(r)["input_ids"]) for e in examples for r in RESPONSES]
    batches = [[pairs[i] for i in b] for b in common.epoch_batches(len(pairs), 20, 24, 0)]
    common.fit(policy, common.make_optimizer(policy), batches, lambda b: common.sft_loss(policy, [e for e, _ in b], [r for _, r in b], args), args, "teach")
    common.save_model(policy, folder)
    return name, folder, prompts


def flags(**changed):
    """The common flags at the size of these tests."""
    args = common.CommonArgs(**{"device": "cpu", "max_new_tokens": 24, "instruction": "Think step by step", **changed})
    args.learning_rate, args.warmup_steps = 1e-2, 0
    return args


@pytest.fixture
def loaded(family):
    """(policy, its ten examples, flags)."""
    args = flags()
    return common.load_policy(family[1], args), common.load_examples(family[2] / "train.jsonl"), args


def seeds(examples, n):
    return [[common.seed_of(e["id"], k) for k in range(n)] for e in examples]


def unpadded_logits(policy, example, ids, args):
    """The reference: one plain forward pass over prompt + ids without cache or padding; (1, L, V), and where the ids begin."""
    batch = common.encode_prompts(policy, [example], args)
    start = batch["input_ids"].shape[1]
    with torch.no_grad():
        return policy.model(**common.append_tokens(batch, [ids], policy.pad_id)).logits, start


def test_greedy_generation_of_a_padded_batch_is_that_of_transformers_one_by_one(loaded):
    policy, examples, args = loaded
    together = common.generate(policy, examples, [[0]] * len(examples), 0.0, args)
    assert len({common.encode_prompts(policy, [e], args)["input_ids"].shape[1] for e in examples}) > 1  # some rows are padded
    for example, (mine,) in zip(examples, together):
        batch = common.encode_prompts(policy, [example], args)
        wanted = policy.model.generate(**batch, max_new_tokens=args.max_new_tokens, do_sample=False,
                                       bad_words_ids=[[i] for i in policy.banned])[0, batch["input_ids"].shape[1]:].tolist()
        assert mine.token_ids == (wanted[:wanted.index(3)] if 3 in wanted else wanted)


def test_samples_do_not_depend_on_the_batch_and_prefixes_are_continued(loaded):
    policy, examples, args = loaded
    prefixes = [policy.tokenizer(text)["input_ids"] for text in ("1 + 1 = 2\n", "", "1 +", "2")] * 2
    for begun in (None, prefixes):
        together = common.generate(policy, examples[:8], seeds(examples[:8], 3), 1.0, args, begun)
        alone = [common.generate(policy, [e], seeds([e], 3), 1.0, args, begun and [begun[i]])[0] for i, e in enumerate(examples[:8])]
        assert together == alone
        assert begun is None or all(r.token_ids[:len(p)] == p for p, row in zip(prefixes, together) for r in row)


def test_the_token_after_a_prefix_is_that_of_an_uncached_forward_pass(loaded):
    policy, examples, args = loaded
    for example, (response,) in zip(examples[:4], common.generate(policy, examples[:4], [[0]] * 4, 0.0, args)):
        logits, start = unpadded_logits(policy, example, response.token_ids, args)
        logits[..., policy.banned] = -torch.inf
        assert logits[0, start - 1:-1].argmax(-1).tolist() == response.token_ids


def test_cached_scores_are_those_of_an_uncached_forward_pass(loaded):
    policy, examples, args = loaded
    policy.marks = tuple(policy.tokenizer.convert_tokens_to_ids(["+", "-"]))
    responses = [[policy.tokenizer(r)["input_ids"] for r in (RESPONSES[i % 4], RESPONSES[(i + 1) % 4])] for i in range(4)]
    for example, row, scores in zip(examples, responses, common.score_steps(policy, examples[:4], responses, args)):
        for ids, mine in zip(row, scores):
            logits, start = unpadded_logits(policy, example, ids, args)
            at = [start + end - 1 for end in common.step_ends(ids, policy.tokenizer)]
            assert mine == pytest.approx((logits[0, at, policy.marks[0]] - logits[0, at, policy.marks[1]]).sigmoid().tolist(), abs=2e-4)


def test_the_loss_of_a_padded_batch_is_the_sum_of_the_losses_alone(loaded):
    policy, examples, args = loaded
    targets = [policy.tokenizer(RESPONSES[i % 4])["input_ids"] for i in range(4)]
    with torch.no_grad():
        loss, count = common.sft_loss(policy, examples[:4], targets, args)
        alone = [common.sft_loss(policy, [e], [t], args) for e, t in zip(examples, targets)]
    assert count == sum(n for _, n in alone) and loss.item() == pytest.approx(sum(part.item() for part, _ in alone), rel=1e-4)


def test_a_pixel_cap_shortens_prompts_and_travels_with_the_checkpoint(family, tmp_path):
    name, folder, prompts = family
    example = common.load_examples(prompts / "train.jsonl")[3]  # the largest image
    args = flags()
    whole = common.load_policy(folder, args)
    args.max_pixels = {"Idefics3 / SmolVLM": 24 * 24, "InternVL": 56 * 56, "LLaVA-OneVision": 28 * 28, "Gemma 3": 28 * 28, "MiniCPM-V 4.6": 112 * 112}.get(name, 2400)
    capped = common.load_policy(folder, args)
    common.save_model(capped, tmp_path / "capped")
    args.max_pixels = 0
    again = common.load_policy(tmp_path / "capped", args)
    lengths = [common.encode_prompts(p, [example], args)["input_ids"].shape[1] for p in (whole, capped, again)]
    assert lengths[1] == lengths[2] and (lengths[1] < lengths[0] or name == "Gemma 3")  # Gemma 3 has one size
    for policy in (capped, again):
        assert common.generate(policy, [example], [[0]], 0.0, args)[0][0].token_ids
    args.max_pixels = 100
    with pytest.raises(common.InputError, match="--max_pixels 100 is below the"):
        common.load_policy(folder, args)


def test_the_vision_tower_is_found_and_frozen(family):
    policy = common.load_policy(family[1], flags(freeze_vision=True))
    frozen = [n for n, p in policy.model.named_parameters() if not p.requires_grad]
    assert frozen and not [n for n in frozen if "language_model" in n or "text_model" in n or "lm_head" in n]
    assert frozen == [n for n, _ in policy.model.named_parameters() if any(f".{part}." in f".{n}" for part in ("vision_tower", "visual", "vision_model"))]


def test_the_stages_run(family, tmp_path, monkeypatch):
    """Warm-up, PRM and one self-evolving iteration, in float32 and, for the last, with bfloat16 weights and checkpointing."""
    name, folder, prompts = family
    monkeypatch.setattr(common, "LOCKS", [])
    shared = dict(device="cpu", runs=str(tmp_path), data=str(prompts / "train.jsonl"), max_new_tokens=24, instruction="Think step by step", batch_size=8)
    for script, own in (("01_warmup", dict(model=str(folder), samples=6, steps=2)),
                        ("02_train_prm", dict(val=str(prompts / "val.jsonl"), prompts=10, samples=6, rollouts=2, held_out=0.5, epochs=1, val_samples=4,
                                              chain_checker=f"{ROOT}/tests/toy.py:judge")),
                        ("03_self_evolve", dict(val=str(prompts / "val.jsonl"), passes=0.5, interval=0.5, samples=4, steps=2, temperature="1.0", dtype="bfloat16",
                                                gradient_checkpointing=True))):
        module = stage(script)
        module.main(module.Args(**shared, **own))
    (start, end) = common.read_jsonl(tmp_path / "03_self_evolve/metrics.jsonl")
    assert end["selected"] > 0 and end["steps"] == 2 and np.isfinite(end["loss"]) and 0 <= end["greedy_accuracy"] <= 1
    steps = common.read_jsonl(tmp_path / "02_train_prm/steps.jsonl")
    assert len({s["soft"] for s in steps}) > 1
    samples = common.read_jsonl(tmp_path / "03_self_evolve/iter_01/samples.jsonl")
    assert any(s["reward"] > 0 for s in samples) and all(s["correct"] or s["reward"] == 0 for s in samples)
    assert tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "03_self_evolve/model").dtype == torch.bfloat16
    shutil.rmtree(tmp_path)
