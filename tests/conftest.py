"""Paths, one thread (many small tensors), and what several test files need."""

import importlib
import importlib.util
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import pytest
import torch
import toy
import transformers

import common

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
# Of a script that a test starts as a user would.
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
READ_AS = {"marks": [3, 4], "mark_weight": 1.0, "likelihood": 1.0}  # the prm.json of a test
ENVIRONMENTS = {}  # family of models -> where test_families.py ran it


def pil(name: str):
    """An image processor class of transformers; where torchvision is missing, its PIL version."""
    return getattr(transformers, name if importlib.util.find_spec("torchvision") else f"{name}Pil")


def pytest_terminal_summary(terminalreporter):
    """Say in which environment each family of models ran."""
    for family, environment in ENVIRONMENTS.items():
        terminalreporter.write_line(f"{family}: {environment}")


def stage(name: str):
    """A numbered script as a module."""
    return importlib.import_module(name)


def seeds_of(examples: list[dict], n: int, *key) -> list[list[int]]:
    """n seeds for every example."""
    return [[common.seed_of(0, *key, example["id"], k) for k in range(n)] for example in examples]


def ids_of(responses) -> list[list[list[int]]]:
    """The token ids of what `generate` gives."""
    return [[response.token_ids for response in row] for row in responses]


def one_by_one(policy, example: dict, ids: list[int], args) -> tuple[dict, int]:
    """Prompt + ids as a batch of one without padding, and where the ids begin: for references."""
    batch = common.encode_prompts(policy, [example], args)
    start = batch["input_ids"].shape[1]
    assert batch["attention_mask"].all()
    for name, value in batch.items():
        if value.shape == (1, start):
            tail = torch.tensor([ids]) if name == "input_ids" else torch.ones(1, len(ids))
            tail = tail * (name in ("input_ids", "attention_mask"))  # text has token type 0
            batch[name] = torch.cat([value, tail.to(value)], 1)
    return batch, start


def scores_by_hand(prm, logits, start: int, ids: list[int], ends: list[int]) -> list[float]:
    """Scores of the steps that end at `ends`, from the logits (L + W, V) of a plain forward pass.

    start: how many tokens the prompt has.
    """
    scores, begin = [], 0
    for end in ends:
        likely = 0.0
        for place in range(begin, end):
            likely += logits[start + place - 1].log_softmax(-1)[ids[place]].item()
        score = prm.likelihood * likely / (end - begin)
        if prm.marks:
            good, bad = logits[start + end - 1, list(prm.marks)].tolist()
            score += prm.mark_weight * (good - bad)
        scores.append(1 / (1 + math.exp(-score)))
        begin = end
    return scores


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small toy world with the real base model: 32 train, 32 unlabelled, 4 val, 6 test, 4 ood."""
    out = tmp_path_factory.mktemp("world") / "toy"
    toy.write_world(out, scale=1 / 75)
    return out


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random model of the toy's architecture as a checkpoint folder: its answers are noise."""
    out = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    processor = toy.build_processor()
    model = toy.build_model(processor, hidden=64, layers=2)
    for p in model.parameters():
        p.data *= 3  # far from uniform, so that greedy choices are clear
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


@pytest.fixture
def args():
    """The common flags at their defaults, on the CPU, with the fields that training reads."""
    args = common.ScoringArgs(device="cpu", dtype="float32", engine="transformers")
    args.max_new_tokens, args.learning_rate, args.warmup_steps = 12, 1e-3, 4
    return args


@pytest.fixture
def policy(tiny, args):
    """The random model, loaded."""
    return common.load_policy(tiny, args)


@pytest.fixture
def examples(world):
    """The 32 labelled prompts of the small world."""
    return common.load_examples(world / "train.jsonl")
