"""Seven families of vision-language models, tiny and random but of their real classes.

Every family has its own model, processor, image processor, image placeholder and kind of cache; the
tokenizer is a small word-level one and the chat template a line. Families whose processor needs
torchvision are skipped where it is missing; the report ends with the environment of each.
"""

import importlib.metadata
import importlib.util
import json
import shutil

import conftest
import numpy as np
import pytest
import torch
import transformers as tf
from conftest import ROOT, one_by_one, pil, scores_by_hand, seeds_of, stage
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import common

WORDS = "User Assistant Answer Choices what is the of Think step by then end with plus"
SIGNS = ": , . ? = + - ( ) A B C D 0 1 2 3 4 5 6 7 8 9"
RESPONSES = [
    "1 + 1 = 2\nAnswer : 2",
    "1 + 2 = 3\nAnswer : 3",
    "2 + 1 = 3\n3 + 0 = 3\nAnswer : 3",
    "1 + 1 = 3\n2 = 2\nAnswer : 2",
]
INITIAL = {"initializer_range": 0.2}
TEXT = INITIAL | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


# ---- the families


def template(before: str, image: str) -> str:
    """A chat template with the family's image placeholder."""
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        + before
        + "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        + image
        + "{% else %} {{ c['text'] }}{% endif %}{% endfor %}{{ '\\n' }}Assistant :"
        + "{% else %} {{ m['content'] }}<eos>{% endif %}{% endfor %}"
    )


def tokenizer_of(special: list[str], **named) -> tf.PreTrainedTokenizerFast:
    """A word-level tokenizer with the family's special tokens; `named` ones become attributes."""
    special = ["<pad>", "<unk>", "<bos>", "<eos>", *dict.fromkeys([*special, *named.values()])]
    vocabulary = {
        word: i for i, word in enumerate([*special, "\n", *WORDS.split(), *SIGNS.split()])
    }
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|\d|\w+|[^\w\s]"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
        ]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        additional_special_tokens=special[4:],
        extra_special_tokens=named,
    )


def text_config(tokenizer, **more) -> dict:
    """The configuration of the language model."""
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return TEXT | ids | more


def qwen2_text(tokenizer) -> dict:
    """Qwen 2's configuration has no head_dim."""
    config = text_config(tokenizer, model_type="qwen2")
    del config["head_dim"]
    return config


def ids(tokenizer, **names) -> dict:
    """Fields of a configuration that hold token ids; embeddings are tied."""
    found = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    return {"tie_word_embeddings": True} | found


def idefics3():
    rows = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    special = ["<image>", "<fake_token_around_image>", "<global-img>", *rows]
    tokenizer = tokenizer_of(special)
    sizes = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}}
    processor = tf.Idefics3Processor(
        pil("Idefics3ImageProcessor")(**sizes),
        tokenizer,
        image_seq_len=9,
        chat_template=template("User :", "<image>"),
    )
    config = tf.Idefics3Config(
        scale_factor=1,
        text_config=text_config(tokenizer, model_type="llama"),
        vision_config=VISION | INITIAL | {"image_size": 24, "patch_size": 8},
        **ids(tokenizer, image_token_id="<image>"),
    )
    return tf.Idefics3ForConditionalGeneration(config), processor


def qwen(kind: str):
    tokens = {
        "video_token": "<|video_pad|>",
        "image_token": "<|image_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    tokenizer = tokenizer_of([], **tokens)
    three = kind == "Qwen3VL"
    patch = 16 if three else 14
    area = (2 * patch) ** 2
    size = {"shortest_edge": area, "longest_edge": 8 * area}
    video = tf.Qwen3VLVideoProcessor if three else tf.Qwen2VLVideoProcessor
    processor = getattr(tf, f"{kind}Processor")(
        pil("Qwen2VLImageProcessor")(patch_size=patch, size=size),
        tokenizer,
        video(patch_size=patch),
        chat_template=template("User :", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    vision = INITIAL | {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": patch,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    text = text_config(tokenizer, rope_parameters=rope)
    if three:
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        rope["mrope_interleaved"] = True
    else:
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        del text["head_dim"]
    config = getattr(tf, f"{kind}Config")(
        text_config=text,
        vision_config=vision,
        **ids(tokenizer, **{f"{name}_id": token for name, token in tokens.items()}),
    )
    return getattr(tf, f"{kind}ForConditionalGeneration")(config), processor


def qwen2_5():
    return qwen("Qwen2_5_VL")


def qwen3():
    return qwen("Qwen3VL")


def internvl():
    tokenizer = tokenizer_of(
        [],
        context_image_token="<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        video_token="<video>",
    )
    size = {"height": 56, "width": 56}
    processor = tf.InternVLProcessor(
        pil("GotOcr2ImageProcessor")(size=size, max_patches=4),
        tokenizer,
        tf.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=template("User :", "<IMG_CONTEXT>"),
    )
    config = tf.InternVLConfig(
        text_config=qwen2_text(tokenizer),
        vision_config=VISION | INITIAL | {"image_size": 56, "patch_size": 14},
        image_seq_length=4,
        **ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    return tf.InternVLForConditionalGeneration(config), processor


def llava_onevision():
    tokenizer = tokenizer_of([], image_token="<image>", video_token="<video>")
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    size = {"height": 28, "width": 28}
    processor = tf.LlavaOnevisionProcessor(
        pil("LlavaOnevisionImageProcessor")(size=size, image_grid_pinpoints=grid),
        tokenizer,
        tf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template("User :", "<image>"),
    )
    vision = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    config = tf.LlavaOnevisionConfig(
        text_config=qwen2_text(tokenizer),
        vision_config=VISION | INITIAL | vision | {"vision_use_head": False},
        image_grid_pinpoints=grid,
        **ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


def gemma3():
    tokenizer = tokenizer_of(
        [],
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    processor = tf.Gemma3Processor(
        pil("Gemma3ImageProcessor")(size={"height": 28, "width": 28}),
        tokenizer,
        image_seq_length=4,
        chat_template=template("<bos>User :", "<start_of_image>"),
    )
    layers = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 12,
        "query_pre_attn_scalar": 16,
    }
    tokens = {
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    }
    config = tf.Gemma3Config(
        text_config=text_config(tokenizer, **layers),
        vision_config=VISION | {"image_size": 28, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4,
        **ids(tokenizer, **tokens),
    )
    return tf.Gemma3ForConditionalGeneration(config), processor


def minicpm():
    marks = {
        f"{part}_{end}_token": f"<{slash}{part}>"
        for part in ("image", "slice", "image_id")
        for end, slash in (("start", ""), ("end", "/"))
    }
    tokens = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = tokenizer_of([], **tokens, **marks)
    processor = tf.MiniCPMV4_6Processor(
        pil("MiniCPMV4_6ImageProcessor")(scale_resolution=112, max_slice_nums=4),
        tf.MiniCPMV4_6VideoProcessor(),
        tokenizer,
        chat_template=template("User :", "<|image_pad|>"),
    )
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    }
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    text = {"model_type": "qwen3_5_text", "rope_parameters": rope} | linear
    config = tf.MiniCPMV4_6Config(
        text_config=text_config(tokenizer, **text),
        vision_config=VISION | {"patch_size": 14, "image_size": 112},
        insert_layer_id=0,
        **ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    return tf.MiniCPMV4_6ForConditionalGeneration(config), processor


FAMILIES = {
    "Idefics3 / SmolVLM": idefics3,
    "Qwen2.5-VL": qwen2_5,
    "Qwen3-VL": qwen3,
    "InternVL": internvl,
    "LLaVA-OneVision": llava_onevision,
    "Gemma 3": gemma3,
    "MiniCPM-V 4.6": minicpm,
}
# How a family says that an image takes fewer tokens; Gemma 3 cannot say it.
FEWER_TOKENS = {
    "Idefics3 / SmolVLM": {"size": {"longest_edge": 24}},
    "Qwen2.5-VL": {"size": {"shortest_edge": 784, "longest_edge": 2400}},
    "Qwen3-VL": {"size": {"shortest_edge": 1024, "longest_edge": 2400}},
    "InternVL": {"max_patches": 1},
    "LLaVA-OneVision": {"image_grid_pinpoints": [[28, 28]]},
    "MiniCPM-V 4.6": {"max_slice_nums": 1},
}


# ---- data, and a model of every family


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Data files whose images and questions have several sizes, so that every batch is padded."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, count in (("train", 10), ("val", 4)):
        rows = []
        for i in range(count):
            height, width = ((60, 60), (40, 110), (120, 50), (224, 230))[i % 4]
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
            row = {
                "id": f"{name}{i}",
                "image": f"{name}{i}.png",
                "question": f"what is 1 plus {' , '.join('1' * (1 + i % 3))} ?",
                "answer": "23"[i % 2],
                "choices": None,
                "source": "test",
            }
            rows.append(row)
        common.write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def flags(**changed):
    """The common flags at the size of these tests."""
    small = {"device": "cpu", "max_new_tokens": 24, "instruction": "Think step by step"}
    args = common.CommonArgs(**small | {"engine": "transformers"} | changed)
    args.learning_rate, args.warmup_steps = 1e-2, 0
    return args


def environment() -> str:
    """The versions that a family depends on."""
    names = ("torch", "transformers", "torchvision")
    there = [name for name in names if importlib.util.find_spec(name)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in there]
    return ", ".join(versions) + ("" if "torchvision" in there else ", no torchvision")


def build(name: str):
    """A family's random model and processor; skips a family that cannot be made here."""
    where = environment()
    try:
        torch.manual_seed(0)
        made = FAMILIES[name]()
    except ImportError as error:
        why = f"its processor cannot be made ({str(error).strip().splitlines()[0]})"
    else:
        older = tuple(map(int, tf.__version__.split(".")[:2])) < (5, 19)
        why = "images of different sizes in one batch" if older and name == "MiniCPM-V 4.6" else ""
    conftest.ENVIRONMENTS[name] = f"skipped in {where}" if why else where
    if why:
        pytest.skip(f"{name} with {where}: {why}")
    return made


def teach(start, out, examples, args) -> None:
    """Train a checkpoint for a moment, so that it speaks in steps; `out` is the new one."""
    tokenizer = tf.AutoTokenizer.from_pretrained(start)
    rows = [(e, tokenizer(r)["input_ids"]) for e in examples for r in RESPONSES]

    def loss_of(policy, part):
        return common.sft_loss(policy, [e for e, _ in part], [t for _, t in part], args)

    common.join_ranks("cpu")
    batches = common.epoch_batches(len(rows), 20, 24, 0)
    work = out.parent / "work"
    common.train(out, start, work, batches, rows, loss_of, lambda row: len(row[1]) + 1, args, "t")
    shutil.rmtree(work)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, prompts):
    """The name of a family, a checkpoint of it that has learned to speak in steps, and its data."""
    name, folder = request.param, tmp_path_factory.mktemp("family")
    model, processor = build(name)
    model.generation_config = tf.GenerationConfig(eos_token_id=3, pad_token_id=0, bos_token_id=2)
    model.save_pretrained(folder / "random")
    processor.save_pretrained(folder / "random")
    examples = common.load_examples(prompts / "train.jsonl")
    teach(folder / "random", folder / "model", examples, flags())
    return name, folder / "model", prompts


@pytest.fixture
def loaded(family):
    """(policy, its ten examples, flags)."""
    args = flags()
    return (
        common.load_policy(family[1], args),
        common.load_examples(family[2] / "train.jsonl"),
        args,
    )


def unpadded_logits(policy, example, ids, args):
    """A plain forward pass over prompt + ids, no cache, no padding, and where the ids begin."""
    batch, start = one_by_one(policy, example, ids, args)
    with torch.no_grad():
        return policy.model(**batch).logits[0], start


def test_greedy_generation_of_a_padded_batch_is_that_of_transformers_one_by_one(loaded):
    policy, examples, args = loaded
    together = common.generate(policy, examples, [[0]] * len(examples), 0.0, args)
    lengths = set()
    for example, (mine,) in zip(examples, together):
        batch, start = one_by_one(policy, example, [], args)
        lengths.add(start)
        out = policy.model.generate(
            **batch,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            bad_words_ids=[[token] for token in policy.banned],
        )
        wanted = out[0, start:].tolist()
        assert mine.token_ids == (wanted[: wanted.index(3)] if 3 in wanted else wanted)
    assert len(lengths) > 1  # some rows are padded


def test_samples_do_not_depend_on_the_batch_and_prefixes_are_continued(loaded):
    policy, examples, args = loaded
    texts = ("1 + 1 = 2\n", "", "1 +", "2") * 2
    begun = [policy.tokenizer(text)["input_ids"] for text in texts]
    heats = [1.0, 0.0, 0.7, 1.3] * 2
    seeds = seeds_of(examples[:8], 3)
    for prefixes in ([[]] * 8, begun):
        together = common.generate(policy, examples[:8], seeds, heats, args, prefixes)
        for example, row, heat, prefix, got in zip(examples, seeds, heats, prefixes, together):
            assert common.generate(policy, [example], [row], heat, args, [prefix]) == [got]
            assert all(response.token_ids[: len(prefix)] == prefix for response in got)


def test_the_next_token_is_that_of_an_uncached_forward_pass(loaded):
    policy, examples, args = loaded
    together = common.generate(policy, examples[:4], [[0]] * 4, 0.0, args)
    for example, (response,) in zip(examples, together):
        logits, start = unpadded_logits(policy, example, response.token_ids, args)
        logits[:, policy.banned] = -torch.inf
        assert logits[start - 1 : -1].argmax(-1).tolist() == response.token_ids


def test_cached_scores_are_those_of_an_uncached_forward_pass(loaded):
    policy, examples, args = loaded
    good, bad = policy.tokenizer.convert_tokens_to_ids(["+", "-"])
    prm = common.Prm(**vars(policy), marks=(good, bad), mark_weight=0.5, likelihood=0.5)
    tokens = [policy.tokenizer(text)["input_ids"] for text in RESPONSES]
    responses = [[tokens[i % 4], tokens[(i + 1) % 4]] for i in range(4)]
    found = common.score_steps(prm, examples[:4], responses, args)
    for example, row, scores in zip(examples, responses, found):
        for ids, mine in zip(row, scores):
            logits, start = unpadded_logits(policy, example, ids, args)
            ends = common.step_ends(ids, policy.tokenizer)
            wanted = scores_by_hand(prm, logits, start, ids, ends)
            assert len(mine) > 1
            assert mine == pytest.approx(wanted, abs=2e-4)


def test_the_loss_of_a_padded_batch_is_the_sum_of_the_losses_alone(loaded):
    policy, examples, args = loaded
    targets = [policy.tokenizer(text)["input_ids"] for text in RESPONSES]
    wanted = 0.0
    for example, target in zip(examples, targets):
        ids = [*target, policy.tokenizer.eos_token_id]
        logits, start = unpadded_logits(policy, example, ids, args)
        loss = torch.nn.functional.cross_entropy(
            logits[start - 1 : -1], torch.tensor(ids), reduction="sum"
        )
        wanted += loss.item()
    with torch.no_grad():
        loss, count = common.sft_loss(policy, examples[:4], targets, args)
    assert count == sum(map(len, targets)) + 4
    assert loss.item() == pytest.approx(wanted, rel=1e-4)


def test_the_familys_own_setting_shortens_prompts_and_travels_with_the_checkpoint(family, tmp_path):
    name, folder, prompts = family
    if name not in FEWER_TOKENS:
        pytest.skip(f"{name} has no such setting")
    example = common.load_examples(prompts / "train.jsonl")[3]  # the largest image
    whole = common.load_policy(folder, flags())
    args = flags(processor=json.dumps(FEWER_TOKENS[name]))
    fewer = common.load_policy(folder, args)
    common.join_ranks("cpu")
    common.save_policy(fewer, tmp_path / "fewer", args)
    again = common.load_policy(tmp_path / "fewer", flags())
    lengths = [one_by_one(policy, example, [], args)[1] for policy in (whole, fewer, again)]
    assert lengths[0] > lengths[1] == lengths[2]
    answers = [
        common.generate(policy, [example], [[0]], 0.0, flags())[0][0] for policy in (fewer, again)
    ]
    assert answers[0] == answers[1]
    assert answers[0].token_ids
    common.load_policy(tmp_path / "fewer", args)  # a later stage is given the same setting
    with pytest.raises(common.InputError, match="knows no no_such_setting"):
        common.load_policy(folder, flags(processor='{"no_such_setting": 3}'))


def test_the_vision_tower_is_found_and_frozen(family):
    policy = common.load_policy(family[1], flags(freeze_vision=True))
    weights = dict(policy.model.named_parameters())
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    towers = {"vision_tower", "visual", "vision_model"}
    assert frozen
    assert frozen == [name for name in weights if towers & set(name.split("."))]


def test_the_stages_run(family, tmp_path):
    """Warm-up, PRM and an iteration; the last computes in bfloat16 with gradient checkpointing."""
    _, folder, prompts = family
    shared = {
        "device": "cpu",
        "engine": "transformers",
        "runs": str(tmp_path),
        "data": str(prompts / "train.jsonl"),
        "max_new_tokens": 24,
        "instruction": "Think step by step",
        "batch_size": 8,
    }
    val = {"val": str(prompts / "val.jsonl")}
    warmup = {"model": str(folder), "samples": 6, "steps": 2}
    rollouts = {"prompts": 10, "samples": 6, "rollouts": 2, "held_out": 0.5, "epochs": 1}
    judge = {"val_samples": 4, "chain_checker": f"{ROOT}/tests/toy.py:judge"}
    evolve = {"passes": 0.5, "interval": 0.5, "samples": 4, "steps": 2, "temperature": "1.0"}
    memory = {"dtype": "bfloat16", "gradient_checkpointing": True}
    for script, own in (
        ("01_warmup", warmup),
        ("02_train_prm", val | rollouts | judge),
        ("03_self_evolve", val | evolve | memory),
    ):
        module = stage(script)
        try:
            module.main(module.Args(**shared, **own))
        finally:
            common.close_runs()
    _, end = common.read_jsonl(tmp_path / "03_self_evolve/metrics.jsonl")
    assert end["selected"] > 0
    assert end["steps"] == 2
    assert np.isfinite(end["loss"])
    assert 0 <= end["greedy_accuracy"] <= 1
    steps = common.read_jsonl(tmp_path / "02_train_prm/steps.jsonl")
    assert len({label for row in steps for label in row["labels"]}) > 1
    samples = common.read_jsonl(tmp_path / "03_self_evolve/iter_01/samples.jsonl")
    assert any(row["reward"] > 0 for row in samples)
    assert all(row["correct"] or row["reward"] == 0 for row in samples)
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "03_self_evolve/model")
    assert model.dtype == torch.bfloat16
    shutil.rmtree(tmp_path)
