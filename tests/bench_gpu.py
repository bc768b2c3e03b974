"""The figures of one GPU, for `python tests/bench.py --gpu`: random weights in Qwen2.5-VL's shapes.

Tokens per second and MFU of fine-tuning and of PRM scoring, tokens per second of decoding, peak
memory, and whether batched paths give what unbatched ones give. Prompts are random tokens and an
image of random pixels, 500 to 1,000 tokens together; responses have 300. Nothing is downloaded.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

import common

PEAK = 989e12  # dense bfloat16 operations a second of an H100 or H200 (SXM)
PATCHES = 32  # an image is 32 x 32 patches of 14 pixels, 256 tokens
SHAPES = {  # hidden size, width of the MLP, layers, heads, key-value heads, vocabulary, tied
    "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "tiny": (64, 128, 2, 4, 2, 1000, False),
}


def shape_config(shape: str) -> Qwen2_5_VLConfig:
    """The published configuration of Qwen2.5-VL in a size; "tiny" is for a look at the code."""
    hidden, wide, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    half = hidden // heads // 2
    rope = {"rope_type": "default", "rope_theta": 1e6}
    rope["mrope_section"] = [half // 4, half * 3 // 8, half * 3 // 8]
    text = {
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": vocabulary - 4,
        "tie_word_embeddings": tied,
    }
    vision = {"out_hidden_size": hidden, "hidden_size": 1280}
    if shape == "tiny":
        vision |= {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2}
        vision["fullatt_block_indexes"] = [1]
    marks = {"image_token_id": vocabulary - 1, "video_token_id": vocabulary - 2}
    marks |= {"vision_start_token_id": vocabulary - 3, "tie_word_embeddings": tied}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)


class RandomPrompts:
    """Stands where a processor stands: prompts of random tokens and an image of random pixels.

    The question of an example is the number of its tokens. A tenth of the tokens below 1,000 break
    a line, so that responses have steps.
    """

    image_token = "<image>"
    added_tokens_decoder: dict = {}

    def __init__(self, config):
        self.tokenizer, self.config = self, config

    def decode(self, token_ids, **_) -> str:
        """A text with the line breaks of these tokens."""
        return "".join("\n" if token < 30 else "x" for token in token_ids)

    def apply_chat_template(self, talks, **_) -> dict[str, torch.Tensor]:
        """Left-padded prompts with their pixels, as the core takes them from a processor."""
        lengths = [int(talk[0]["content"][1]["text"]) for talk in talks]
        width, image = max(lengths), PATCHES**2 // 4
        batch = {"input_ids": torch.zeros(len(talks), width, dtype=torch.long)}
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        for row, length in enumerate(lengths):
            draws = torch.Generator().manual_seed(length)
            ids = torch.randint(30, 900, (length,), generator=draws)
            ids[0] = self.config.vision_start_token_id
            ids[1 : image + 1] = self.config.image_token_id
            batch["input_ids"][row, width - length :] = ids
            batch["attention_mask"][row, width - length :] = 1
        batch["mm_token_type_ids"] = (batch["input_ids"] == self.config.image_token_id).long()
        pixels = torch.Generator().manual_seed(0)
        one = torch.randn(PATCHES**2, 3 * 2 * 14 * 14, generator=pixels)
        batch["pixel_values"] = one.repeat(len(talks), 1)
        batch["image_grid_thw"] = torch.tensor([[1, PATCHES, PATCHES]] * len(talks))
        return batch


@dataclass
class Bench:
    """What the measurements of one shape share."""

    shape: str
    args: common.CommonArgs
    folder: Path  # of the one image

    def policy(self) -> common.Policy:
        """A new policy with random weights, made on the device."""
        config = shape_config(self.shape)
        torch.manual_seed(0)
        with torch.device(self.args.device):
            model = AutoModelForImageTextToText.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
        end = config.text_config.eos_token_id
        banned = [config.image_token_id, config.video_token_id, end]
        return common.Policy(model.eval(), RandomPrompts(config), [end], 0, banned)

    def examples(self, count: int) -> list[dict]:
        """Prompts of 500 to 1,000 tokens."""
        image = self.folder / "image.png"
        if not image.exists():
            Image.new("RGB", (8, 8)).save(image)
        lengths = [500 + 500 * i // max(count - 1, 1) for i in range(count)]
        same = {"image": str(image), "choices": None, "where": "bench"}
        return [{"id": str(i), "question": str(n), **same} for i, n in enumerate(lengths)]

    def responses(self, count: int) -> list[list[int]]:
        """Responses of 300 tokens (as many as --max_new_tokens says)."""
        draws = torch.Generator().manual_seed(1)
        shape = (count, self.args.max_new_tokens)
        return torch.randint(0, 900, shape, generator=draws).tolist()

    def seconds(self, work, repeats: int) -> list[float]:
        """Seconds of each call of `work`, after one that does not count."""
        found = []
        for _ in range(repeats + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - start)
        return found[1:]

    def wait(self) -> None:
        """Until the GPU has done what it was asked."""
        if self.args.device != "cpu":
            torch.cuda.synchronize()

    def peak_gib(self) -> float:
        """The largest memory since the last call; 0 on a CPU."""
        if self.args.device == "cpu":
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak


def operations(model, tokens: int, images: int, heads: int, pairs: float) -> float:
    """Floating-point operations of a forward pass: 2 per weight and token, and attention.

    The decoder's layers see `tokens`, the vision tower its patches, the head only the positions it
    is applied to. Attention of the decoder: 4 x layers x width per pair of a token and one it sees.
    Not counted: padding, the tower's attention, the second pass of gradient checkpointing.
    """
    text = model.config.text_config
    weights = {".language_model.layers.": 0, ".visual.": 0}
    for name, weight in model.named_parameters():
        for part in weights:
            weights[part] += weight.numel() * (part in f".{name}")
    layers, tower = weights.values()
    head = text.vocab_size * text.hidden_size
    dense = layers * tokens + tower * images * PATCHES**2 + head * heads
    return 2 * dense + 4 * text.num_hidden_layers * text.hidden_size * pairs


def fine_tuning(
    bench: Bench, optimizer: bool, frozen: bool, rows: int, checkpointing: bool
) -> dict:
    """SFT of `rows` responses, the passes of one optimizer step on one GPU.

    With an optimizer as stage 03 trains: float32 weights that compute in bfloat16. Without one only
    the passes, of bfloat16 weights. frozen: the vision tower, as --freeze_vision does.
    """
    policy, args = bench.policy(), bench.args
    examples, targets = bench.examples(rows), bench.responses(rows)
    lengths = [int(example["question"]) + args.max_new_tokens + 1 for example in examples]
    pairs = sum(length**2 / 2 for length in lengths)
    heads = rows * (args.max_new_tokens + 2)
    work = 3 * operations(policy.model, sum(lengths), rows, heads, pairs)
    steps = None
    if frozen:
        work -= 2 * operations(policy.model, 0, rows, 0, 0)
        policy.model.get_encoder(modality="image").requires_grad_(False)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    if optimizer:
        policy.model = common.shard(policy.model, args)
        steps = common.make_optimizer(policy.model)
    policy.model.train()

    def step() -> None:
        """One optimizer step, or its passes."""
        loss, count = common.sft_loss(policy, examples, targets, args)
        (loss / count).backward()
        if steps:
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
            steps.step()
        policy.model.zero_grad()

    bench.peak_gib()
    seconds = statistics.median(bench.seconds(step, 5))
    return {
        "optimizer": "AdamW, float32 weights" if steps else "none, bfloat16 weights: passes only",
        "vision tower": "frozen" if frozen else "trained",
        "responses a step": rows,
        "gradient checkpointing": checkpointing,
        "tokens per second": sum(lengths) / seconds,
        "supervised tokens per second": rows * (args.max_new_tokens + 1) / seconds,
        "MFU (goal at 7B: 0.45)": work / seconds / PEAK,
        "peak GiB": bench.peak_gib(),
    }


def first_that_fits(bench: Bench, optimizer: bool, frozen: bool) -> dict:
    """Fine-tuning at the largest of a few settings for which memory suffices."""
    for rows, checkpointing in [(8, False), (4, False), (2, False), (8, True), (2, True)]:
        try:
            return fine_tuning(bench, optimizer, frozen, rows, checkpointing)
        except torch.OutOfMemoryError:
            print(f"no memory for {rows} rows, optimizer {optimizer}", file=sys.stderr)
        common.free_memory()
    return {"skipped": "no setting fits into memory"}


def scoring(bench: Bench, policy) -> dict:
    """PRM scores of 8 responses to each of 8 prompts, every prompt read once."""
    prm = common.Prm(**vars(policy), marks=(0, 1), mark_weight=1.0, likelihood=0.0)
    examples, count = bench.examples(8), bench.args.max_new_tokens
    responses = [bench.responses(8)] * 8
    scores = common.score_steps(prm, examples, responses, bench.args)
    prompts = [int(example["question"]) for example in examples]
    tokens = sum(prompts) + 64 * count
    pairs = sum(p**2 / 2 + 8 * (p * count + count**2 / 2) for p in prompts)
    steps = sum(len(row) for group in scores for row in group)
    work = operations(policy.model, tokens, 8, steps, pairs)
    bench.peak_gib()
    again = bench.seconds(lambda: common.score_steps(prm, examples, responses, bench.args), 5)
    seconds = statistics.median(again)
    figures = {"steps": steps, "tokens per second": tokens / seconds}
    return figures | {"MFU": work / seconds / PEAK, "peak GiB": bench.peak_gib()}


def decoding(bench: Bench, policy) -> dict:
    """Our `generate`: 8 samples of each of 16 prompts, none of which ends early."""
    examples, args = bench.examples(16), bench.args
    seeds = [[8 * i + k for k in range(8)] for i in range(16)]
    bench.peak_gib()
    again = bench.seconds(lambda: common.generate(policy, examples, seeds, 1.0, args), 1)
    tokens = 128 * args.max_new_tokens
    return {
        "responses at once": 128,
        "tokens per second": tokens / statistics.median(again),
        "peak GiB": bench.peak_gib(),
    }


@torch.inference_mode()
def equality(bench: Bench, policy) -> dict:
    """Whether batched paths give what one row alone gives, within bfloat16's own rounding.

    Rounding is how far one row alone is from float32; a batch may differ from one row alone by
    twice that, on average. A greedy token of the batch must be the best of one row alone, up to
    the largest rounding of a logit. The policy is float32 afterwards.
    """
    args = replace(bench.args, max_new_tokens=min(64, bench.args.max_new_tokens))
    exact = replace(args, dtype="float32")
    examples, tails = bench.examples(4), [tail[:64] for tail in bench.responses(4)]
    prm = common.Prm(**vars(policy), marks=(0, 1), mark_weight=1.0, likelihood=0.0)
    greedy = common.generate(policy, examples, [[0]] * 4, 0.0, args)
    greedy = [row[0].token_ids for row in greedy]

    def read(settings, at_once: int) -> dict[str, torch.Tensor]:
        """Log-probabilities, scores and logits of the greedy tokens, some rows at a time."""
        found: dict = {"logprobs": [], "scores": [], "logits": []}
        for start in range(0, 4, at_once):
            part = slice(start, start + at_once)
            row = examples[part]
            found["logprobs"] += common.token_logprobs(policy, row, tails[part], settings)[0]
            scores = common.score_steps(prm, row, [[t] for t in tails[part]], settings)
            found["scores"] += [torch.tensor(steps[0]) for steps in scores]
            batch = common.encode_prompts(policy, row, settings)
            batch = common.append_tokens(batch, greedy[part], policy.pad_id)
            width = len(greedy[0]) + 1
            found["logits"] += policy.model(**batch, logits_to_keep=width).logits[:, :-1].float()
        return {name: torch.cat(list(values)).cpu() for name, values in found.items()}

    batch, alone = read(args, 4), read(args, 1)
    policy.model.float()
    reference = read(exact, 1)
    report, equal = {}, True
    for name in ("logprobs", "scores"):
        rounding = (alone[name] - reference[name]).abs().mean().item()
        difference = (batch[name] - alone[name]).abs().mean().item()
        report |= {f"{name}: difference": difference, f"{name}: rounding": rounding}
        equal = equal and difference <= 2 * rounding
    logits = alone["logits"]  # (4 x W, V)
    chosen = logits.gather(1, torch.tensor(greedy).view(-1, 1))[:, 0]
    gap = (logits.max(1).values - chosen).max().item()
    largest = (logits - reference["logits"]).abs().max().item()
    report |= {"greedy: largest gap to the best": gap, "greedy: largest rounding": largest}
    return report | {"equal within rounding": equal and gap <= 2 * largest}


def run_gpu(shapes: list[str], device: str, show) -> dict:
    """Every figure of the chosen shapes; show(name, values) prints each as it comes."""
    tiny = shapes == ["tiny"]
    common.join_ranks(device)
    name = torch.cuda.get_device_name() if device != "cpu" else "a CPU, to try the code"
    found: dict = {
        "device": name,
        "MFU": f"operations / seconds / {PEAK:.3g}, dense bfloat16 of an H100 or H200 SXM",
        "attention": "torch's own (sdpa)",
        "prompts": f"500 to 1,000 tokens, of them an image of {PATCHES**2 // 4}",
    }
    args = common.CommonArgs(device=device, dtype="bfloat16", instruction="")
    args.max_new_tokens = 16 if tiny else 300
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            bench = Bench(shape, args, Path(folder))
            found[shape] = {}
            for optimizer, frozen in ((True, False), (False, False), (False, True)):
                name = f"fine-tuning {len(found[shape]) + 1}"
                found[shape][name] = first_that_fits(bench, optimizer, frozen)
                show(f"{shape} {name}", found[shape][name])
                common.free_memory()
            policy = bench.policy()
            found[shape]["weights"] = sum(p.numel() for p in policy.model.parameters())
            for measure in (scoring, decoding, equality):
                found[shape][measure.__name__] = measure(bench, policy)
                common.free_memory()
                show(f"{shape} {measure.__name__}", found[shape][measure.__name__])
            del policy
            common.free_memory()
    return found
