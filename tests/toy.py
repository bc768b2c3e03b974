"""The toy world: real handwriting, questions of several steps, a tiny model that is poor at them.

    python tests/toy.py                      # writes data/toy (about 15 seconds)
    python tests/toy.py --pretrain           # makes tests/toy_base.safetensors again (9 minutes)

Reads   scikit-learn's `load_digits` (1,797 handwritten digits, 8x8), tests/toy_base.safetensors
Writes  data/toy/{train,unlabeled,val,test,ood}.jsonl, data/toy/images/*.png and data/toy/base/, a
        plain Hugging Face checkpoint of the Idefics3 architecture. Nothing in 01-04 or common.py
        knows that this world is a toy.

An image is a 3x3 grid of digits, 24x24 pixels. A question combines two of its rows or columns:

    what is the sum of row 1 minus the maximum of column 2 ?

The handwriting is split four ways: `pretrain` (what the base model has seen), `train` (labelled and
unlabelled prompts), `val`, and `held` (test and ood), so every accuracy on val, test and ood is on
digits nobody trained on. In-domain questions use sums and maxima. Out-of-domain ones use a minimum:
the base model has met a few, neither warm-up nor self-evolving ever trains on one. Pre-training
also shows multiple choice, but so small a model does not learn to look its value up among the
choices, so the splits ask for numbers only.

One question allows many right chains: either line first, a sum in one step or in two or read off at
once, and lines read that nobody asked for. `check_chain` judges any of them, step by step, against
the true grid.
"""

import argparse
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

BASE_WEIGHTS = Path(__file__).parent / "toy_base.safetensors"
DIGITS = 6  # digits 0-5 only: small sums, which so small a model can learn to do
POOLS = {
    "pretrain": 90,
    "train": 600,
    "val": 150,
    "held": 243,
}  # handwritten digits in each, 1,083 in all
SPLITS = {
    "train": ("train", 2400),
    "unlabeled": ("train", 2400),
    "val": ("val", 256),
    "test": ("held", 500),
    "ood": ("held", 300),
}
LINES = ("row 1", "row 2", "row 3", "column 1", "column 2", "column 3")
IN_DOMAIN = (
    ("sum", "plus", "sum"),
    ("sum", "minus", "sum"),
    ("sum", "plus", "maximum"),
    ("sum", "minus", "maximum"),
    ("maximum", "plus", "sum"),
    ("maximum", "minus", "sum"),
)
OUT_OF_DOMAIN = (
    ("sum", "plus", "minimum"),
    ("sum", "minus", "minimum"),
    ("minimum", "plus", "sum"),
    ("minimum", "minus", "sum"),
    ("maximum", "minus", "minimum"),
    ("minimum", "plus", "maximum"),
)
PHASES = (
    (True, 250, 1e-3),
    (False, 900, 1.5e-3),
)  # of pre-training: (reading only?, steps, peak rate)
OPS = {"sum": sum, "maximum": max, "minimum": min}
LETTERS = "ABCD"
INSTRUCTION = "Think step by step , then end with Answer :"  # a flag of 01-04


# ---------------------------------------------------------------- images


def handwriting(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Digits below DIGITS in disjoint pools: {pool: (images (n, 8, 8) of 0..255, labels (n,))}."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(np.flatnonzero(digits.target < DIGITS))
    images = (digits.images[order] * 255 / 16).round().astype(np.uint8)  # (1083, 8, 8)
    ends = np.cumsum([0, *POOLS.values()])
    return {
        pool: (images[a:b], digits.target[order][a:b]) for pool, a, b in zip(POOLS, ends, ends[1:])
    }


def draw_grid(pool, rng) -> tuple[np.ndarray, list[list[int]]]:
    """A random 3x3 grid of a pool's digits: (pixels (24, 24) of 0..255, the digits, row by row)."""
    images, labels = pool
    pick = rng.integers(len(labels), size=9)
    pixels = images[pick].reshape(3, 3, 8, 8).transpose(0, 2, 1, 3).reshape(24, 24)
    return pixels, labels[pick].reshape(3, 3).tolist()


# ---------------------------------------------------------------- questions and chains


def read_line(grid, line: str) -> list[int]:
    """The digits of a line of the grid.

    >>> read_line([[1, 2, 3], [4, 5, 6], [7, 8, 9]], "column 2")
    [2, 5, 8]
    """
    kind, k = line.split()
    return list(grid[int(k) - 1]) if kind == "row" else [row[int(k) - 1] for row in grid]


def solve(grid, plan: dict) -> int:
    """The true value of a plan {"ops": (op, sign, op), "lines": (line, line)} on a grid.

    >>> plan = {"ops": ("sum", "minus", "maximum"), "lines": ("row 1", "column 2")}
    >>> solve([[1, 2, 3], [4, 5, 6], [7, 8, 9]], plan)
    -2
    """
    a, b = (OPS[op](read_line(grid, line)) for op, line in zip(plan["ops"][::2], plan["lines"]))
    return a + b if plan["ops"][1] == "plus" else a - b


def draw_question(families, grid, rng, choice_share: float = 0.5) -> dict:
    """A question about a grid: {"question", "answer", "choices" (four texts or None), "plan"}.

    Wrong choices are true values of the same question on other grids: as likely as the right one
    to whoever cannot read.
    """
    plan = {
        "ops": families[rng.integers(len(families))],
        "lines": tuple(LINES[i] for i in rng.choice(len(LINES), size=2, replace=False)),
    }
    (op_a, sign, op_b), (line_a, line_b) = plan["ops"], plan["lines"]
    answer, choices = solve(grid, plan), None
    if rng.random() < choice_share:
        values = {answer}
        while len(values) < 4:
            values.add(solve(rng.integers(DIGITS, size=(3, 3)).tolist(), plan))
        choices = [str(v) for v in rng.permutation(sorted(values))]
    return {
        "question": f"what is the {op_a} of {line_a} {sign} the {op_b} of {line_b} ?",
        "answer": LETTERS[choices.index(str(answer))] if choices else str(answer),
        "choices": choices,
        "plan": plan,
    }


def line_steps(line: str, op: str, digits: list[int], rng) -> list[str]:
    """Steps that read a line and apply an operation to it, in one of two or three ways."""
    read, value = f"{op} of {line} : {' '.join(map(str, digits))}", OPS[op](digits)
    way = rng.integers(3)
    if way == 0:
        return [f"{read} = {value}"]
    if op != "sum":
        return [read, f"{op} = {value}"]
    a, b, c = digits
    return (
        [read, f"{a} + {b} + {c} = {value}"]
        if way == 1
        else [read, f"{a} + {b} = {a + b}", f"{a + b} + {c} = {value}"]
    )


def write_chain(question: dict, grid, rng) -> str:
    """One of the many right chains of a question; a quarter also read a line nobody asked for."""
    (op_a, sign, op_b), lines = question["plan"]["ops"], question["plan"]["lines"]
    parts = [
        line_steps(line, op, read_line(grid, line), rng) for line, op in zip(lines, (op_a, op_b))
    ]
    if rng.random() < 0.5:
        parts.reverse()
    if rng.random() < 0.25:
        other = [line for line in LINES if line not in lines][rng.integers(4)]
        parts.insert(rng.integers(3), [f"{other} : {' '.join(map(str, read_line(grid, other)))}"])
    a, b = (OPS[op](read_line(grid, line)) for op, line in zip((op_a, op_b), lines))
    value = solve(grid, question["plan"])
    parts.append([f"{a} {'+' if sign == 'plus' else '-'} {b} = {value}"])
    if question["choices"]:
        parts.append([f"{value} is {question['answer']}"])
    return "\n".join([*sum(parts, []), f"Answer : {question['answer']}"])


def check_chain(response: str, question: dict, grid) -> tuple[list[bool], bool]:
    """Judge any chain: (is each step true?, is the whole chain right?).

    A step is true if it reads the grid rightly, or calculates rightly with numbers that stand in
    the chain before it. The chain is right if every step is, the two values asked for were derived,
    combined, and the answer follows.

    >>> plan = {"ops": ("sum", "minus", "maximum"), "lines": ("row 1", "column 2")}
    >>> q = {"plan": plan, "choices": None, "answer": "-2"}
    >>> grid = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    >>> read = "sum of row 1 : 1 2 3 = 6\\nmaximum of column 2 : 2 5 8\\nmaximum = 8\\n"
    >>> check_chain(read + "6 - 8 = -2\\nAnswer : -2", q, grid)
    ([True, True, True, True, True], True)
    >>> check_chain("sum of row 1 : 1 2 4 = 6\\nAnswer : -2", q, [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    ([False, True], False)
    """
    (op_a, sign, op_b), lines = question["plan"]["ops"], question["plan"]["lines"]
    verdicts, line, digits, known, derived, total = [], None, [], set(), {}, None

    def settle(op, value):  # a value claimed for the line that was read last
        if line is None or OPS[op](digits) != value:
            return False
        derived[line, op] = value
        known.add(value)
        return True

    for step in filter(None, (s.strip() for s in response.split("\n"))):
        ok = False
        if m := re.fullmatch(
            r"(?:(sum|maximum|minimum) of )?((?:row|column) [123]) : (\d) (\d) (\d)(?: = (-?\d+))?",
            step,
        ):
            line, digits = m[2], read_line(grid, m[2])
            ok = digits == [int(m[i]) for i in (3, 4, 5)]
            known.update(digits)
            if m[6]:
                ok = bool(m[1]) and settle(m[1], int(m[6])) and ok
        elif m := re.fullmatch(r"(maximum|minimum) = (-?\d+)", step):
            ok = settle(m[1], int(m[2]))
        elif m := re.fullmatch(r"(-?\d+(?: [+-] -?\d+)+) = (-?\d+)", step):
            words = m[1].split()
            signs, terms = ["+", *words[1::2]], [int(w) for w in words[::2]]
            ok = sum(n if s == "+" else -n for s, n in zip(signs, terms)) == int(
                m[2]
            ) and known.issuperset(terms)
            known.add(int(m[2]))
            if ok and digits and int(m[2]) == sum(digits) and "-" not in m[1]:
                derived.setdefault((line, "sum"), sum(digits))
            pair = derived.get((lines[0], op_a)), derived.get((lines[1], op_b))
            if (
                ok
                and None not in pair
                and m[1] == f"{pair[0]} {'+' if sign == 'plus' else '-'} {pair[1]}"
            ):
                total = int(m[2])
        elif m := re.fullmatch(r"(-?\d+) is ([A-D])", step):
            ok = (
                bool(question["choices"])
                and int(m[1]) in known
                and question["choices"][LETTERS.index(m[2])] == m[1]
            )
        elif m := re.fullmatch(r"Answer : (\S+)", step):
            ok = m[1] == question["answer"]
        verdicts.append(ok)
    answered = response.strip().split("\n")[-1].strip() == f"Answer : {question['answer']}"
    return verdicts, bool(verdicts) and all(verdicts) and answered and total == solve(
        grid, question["plan"]
    )


# ---------------------------------------------------------------- the base model

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}User : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '\\n' }}Assistant :"
    "{% else %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}"
    "<end_of_utterance>{% endif %}{% endfor %}"
)


def build_processor() -> Idefics3Processor:
    """A word-level tokenizer, an image processor that leaves 24x24 pixels, a chat template."""
    words = [
        "<pad>",
        "<unk>",
        "<end_of_utterance>",
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "\n",
        *("User Assistant Answer Choices what is the of plus minus sum maximum minimum").split(),
        *("row column read Think step by then end with : , . ? = + - ( )").split(),
        *LETTERS,
        *map(str, range(-15, 31)),
    ]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|-?\d+|\w+|[^\w\s]"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end_of_utterance>",
        clean_up_tokenization_spaces=False,
        additional_special_tokens=["<image>", "<fake_token_around_image>", "<global-img>"],
    )
    image_processor = Idefics3ImageProcessorPil(
        do_resize=False,
        do_image_splitting=False,
        max_image_size={"longest_edge": 24},
        size={"longest_edge": 24},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Idefics3Processor(
        image_processor, tokenizer, image_seq_len=9, chat_template=CHAT_TEMPLATE
    )


def build_model(processor, hidden: int = 128, layers: int = 4) -> Idefics3ForConditionalGeneration:
    """A random Idefics3 of about 1 M parameters; one 8x8 patch, so one image token, per digit."""
    tokenizer = processor.tokenizer
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=1,
        tie_word_embeddings=True,
        initializer_range=0.08,
        vision_config=dict(
            initializer_range=0.08,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=hidden // 64,
            image_size=24,
            patch_size=8,
        ),
        text_config=dict(
            model_type="llama",
            initializer_range=0.08,
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        ),
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def user_text(question: str, choices, instruction: str = INSTRUCTION) -> str:
    """The words 01-04 ask with, built here again for pre-training; a test holds the two equal."""
    options = "".join(f"\n({letter}) {text}" for letter, text in zip(LETTERS, choices or []))
    return (
        question
        + (f"\nChoices:{options}" if options else "")
        + (f"\n{instruction}" if instruction else "")
    )


def pretraining_item(grid, rng, mix, reading: bool) -> tuple[str, str]:
    """(user text, response): single skills, and questions over two lines, most without a chain.

    In the first, short phase (reading) every item asks to read two lines: without it the model long
    ignores the image.
    """
    composed, skills = (0.0, [0]) if reading else (mix.composed, range(4))
    instruction = INSTRUCTION if rng.random() < 0.7 else ""
    if rng.random() < composed:
        q = draw_question(OUT_OF_DOMAIN if rng.random() < mix.ood else IN_DOMAIN, grid, rng)
        response = (
            f"Answer : {q['answer']}" if rng.random() < mix.direct else write_chain(q, grid, rng)
        )
        return user_text(q["question"], q["choices"], instruction), response
    skill, line = skills[rng.integers(len(skills))], LINES[rng.integers(6)]
    digits = read_line(grid, line)
    if skill == 0:
        lines = [LINES[i] for i in rng.choice(6, size=2, replace=False)]
        steps = [f"{x} : {' '.join(map(str, read_line(grid, x)))}" for x in lines]
        return user_text(f"read {lines[0]} , {lines[1]}", None, instruction), "\n".join(steps)
    if skill == 1:
        op = ("sum", "sum", "maximum", "minimum")[rng.integers(4)]
        steps = line_steps(line, op, digits, rng)
        return user_text(f"what is the {op} of {line} ?", None, instruction), "\n".join(
            [*steps, f"Answer : {OPS[op](digits)}"]
        )
    a, b = int(rng.integers(16)), int(rng.integers(16))
    sign = "+-"[rng.integers(2)]
    value = a + b if sign == "+" else a - b
    if skill == 2:
        return user_text(
            f"what is {a} {sign} {b} ?", None, instruction
        ), f"{a} {sign} {b} = {value}\nAnswer : {value}"
    values = {value}
    while len(values) < 4:
        values.add(int(rng.integers(-15, 31)))
    choices = [str(v) for v in rng.permutation(sorted(values))]
    letter = LETTERS[choices.index(str(value))]
    return user_text(
        f"what is {a} {sign} {b} ?", choices, instruction
    ), f"{a} {sign} {b} = {value}\n{value} is {letter}\nAnswer : {letter}"


def pretraining_batches(processor, pool, rng, size: int, mix, reading: bool, group: int = 4):
    """Endless batches of fresh grids and questions, right-padded, labels on the responses only.

    `group` batches are drawn at a time and cut from their items in order of length, so that little
    is padding.
    """
    tokenizer = processor.tokenizer
    image = "<fake_token_around_image><global-img>" + "<image>" * 9 + "<fake_token_around_image>"
    while True:
        items = []
        for _ in range(size * group):
            pixels, grid = draw_grid(pool, rng)
            user, response = pretraining_item(grid, rng, mix, reading)
            prompt = tokenizer(f"User : {image} {user}\nAssistant :")["input_ids"]
            items.append(
                (prompt, tokenizer(response)["input_ids"] + [tokenizer.eos_token_id], pixels)
            )
        items.sort(key=lambda item: len(item[0]) + len(item[1]))
        for k in rng.permutation(group):
            yield collate(items[k * size : (k + 1) * size], tokenizer.pad_token_id)


def collate(items, pad_id: int) -> dict[str, torch.Tensor]:
    """Pad (prompt ids, response ids, pixels) on the right; labels stand on the response only."""
    size, width = len(items), max(len(p) + len(r) for p, r, _ in items)
    ids = torch.full((size, width), pad_id)  # (B, L)
    labels, mask = (
        torch.full((size, width), -100),
        torch.zeros(size, width, dtype=torch.long),
    )  # (B, L) each
    for i, (p, r, _) in enumerate(items):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
        mask[i, : len(p) + len(r)] = 1
    pixels = (
        torch.tensor(np.stack([px for _, _, px in items])).float()[:, None, None] / 127.5 - 1
    )  # (B, 1, 1, 24, 24)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": pixels.expand(-1, -1, 3, -1, -1),
    }


def pretrain(
    mix, phases=PHASES, start: str | None = None, log_every: int = 50
) -> dict[str, torch.Tensor]:
    """Train the base model from scratch (or from the weights `start`); weights rounded to bf16.

    mix: the namespace of flags that `main` parses. AdamW; in each phase the rate falls linearly to
    a twentieth.
    """
    torch.manual_seed(mix.seed)
    processor, pool, clock = build_processor(), handwriting()["pretrain"], time.time()
    model = build_model(processor)
    if start:
        model.load_state_dict(
            {name: w.float() for name, w in load_file(start).items()}, strict=False
        )
    model.set_attn_implementation(
        "eager"
    )  # the backward pass of masked SDPA is slow on a CPU at this size
    for phase, (reading, steps, peak) in enumerate(phases):
        batches = pretraining_batches(
            processor, pool, np.random.default_rng([mix.seed, phase]), mix.batch_size, mix, reading
        )
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01
        )
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 50, 1 - 0.95 * step / steps)
            batch = next(batches)
            tokens = int((batch["labels"] != -100).sum())
            loss = (
                model(**batch).loss * tokens / (16 * mix.batch_size)
            )  # a token weighs the same in batches of short and of long items
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % log_every == 0:
                print(
                    f"phase {phase}, step {step + 1}/{steps}: loss {loss.item():.3f}, "
                    f"{time.time() - clock:.0f} s",
                    flush=True,
                )
    return {
        name: w.to(torch.bfloat16).contiguous()
        for name, w in model.state_dict().items()
        if name != "lm_head.weight"
    }


# ---------------------------------------------------------------- writing it all


def write_split(out: Path, name: str, pool, count: int, families, seed: int) -> None:
    """<name>.jsonl and its images. Reports alone, never training, read "grid" and "plan"."""
    rng, rows = np.random.default_rng([seed, *name.encode()]), []
    for i in range(count):
        pixels, grid = draw_grid(pool, rng)
        question = draw_question(families, grid, rng, choice_share=0.0)
        image = f"images/{name}_{i:05d}.png"
        Image.fromarray(pixels).save(out / image)
        rows.append(
            {
                "id": f"{name}-{i:05d}",
                "image": image,
                "source": "toy-ood" if name == "ood" else "toy",
                **question,
                "grid": grid,
            }
        )
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_base(out: Path, weights: dict) -> None:
    """The base model as a Hugging Face checkpoint folder."""
    processor = build_processor()
    model = build_model(processor)
    model.load_state_dict({name: w.float() for name, w in weights.items()}, strict=False)
    model.tie_weights()
    model.save_pretrained(out)
    processor.save_pretrained(out)


def write_world(out: Path, scale: float = 1.0, seed: int = 0, weights: dict | None = None) -> None:
    """The whole toy world in a folder; `scale` shrinks every split, for tests."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "images").mkdir(parents=True)
    pools = handwriting()
    for name, (pool, count) in SPLITS.items():
        write_split(
            out,
            name,
            pools[pool],
            max(4, int(count * scale)),
            OUT_OF_DOMAIN if name == "ood" else IN_DOMAIN,
            seed,
        )
    write_base(out / "base", weights or load_file(BASE_WEIGHTS))


def judge(response: str, example: dict) -> bool | None:
    """Whether a response's chain is right; None for an example without its true grid."""
    return (
        check_chain(response, example, example["grid"])[1]
        if "grid" in example and "plan" in example
        else None
    )


def step_scores(response: str, example: dict) -> list[float]:
    """A perfect process reward, for `--prm tests/toy.py:step_scores`: 1 for a true step, else 0.

    The last step of a chain that is not right is 0, though it may be the answer.
    """
    verdicts, right = check_chain(response, example, example["grid"])
    return [float(verdict) for verdict in verdicts[:-1]] + [float(right)] * bool(verdicts)


def main() -> None:
    """Write the world, or pre-train its base model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="data/toy")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="shrinks every split, for a quick look"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pretrain",
        action="store_true",
        help="train the base model anew and replace tests/toy_base.safetensors (about 9 minutes)",
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--composed", type=float, default=0.65, help="share of questions over two lines"
    )
    parser.add_argument(
        "--ood", type=float, default=0.3, help="share of those from the out-of-domain families"
    )
    parser.add_argument(
        "--direct", type=float, default=0.58, help="share of those answered without a chain"
    )
    args = parser.parse_args()
    if args.pretrain:
        save_file(pretrain(args), BASE_WEIGHTS)
    start = time.time()
    write_world(Path(args.out), args.scale, args.seed)
    sizes = ", ".join(f"{name} {max(4, int(n * args.scale))}" for name, (_, n) in SPLITS.items())
    print(
        f"{args.out}: {sizes} prompts, "
        f"base model in {args.out}/base, {time.time() - start:.0f} s. next: python 01_warmup.py"
    )


if __name__ == "__main__":
    main()
