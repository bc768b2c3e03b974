"""Paths, one thread (many small tensors), and tiny models for the tests."""

import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import common
import toy

torch.set_num_threads(1)


ENVIRONMENTS = {}  # family of models -> where test_families.py ran it


def pil(name: str):
    """An image processor class of transformers, in its PIL version where torchvision is missing and the plain name cannot be made."""
    import importlib.util
    import transformers
    return getattr(transformers, name if importlib.util.find_spec("torchvision") else f"{name}Pil")


def pytest_terminal_summary(terminalreporter):
    """Say in which environment each family of models ran."""
    for family, environment in ENVIRONMENTS.items():
        terminalreporter.write_line(f"{family}: {environment}")


def stage(name: str):
    """A numbered script as a module."""
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small toy world with the real base model: 32 train, 32 unlabelled, 4 val, 6 test and 4 ood prompts."""
    out = tmp_path_factory.mktemp("world") / "toy"
    toy.write_world(out, scale=1 / 75)
    return out


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random model of the toy's architecture as a checkpoint folder: its answers are noise, its shapes are real."""
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
    args = common.ScoringArgs(device="cpu", max_new_tokens=12)
    args.learning_rate, args.warmup_steps = 1e-3, 4
    return args


@pytest.fixture
def policy(tiny, args):
    """The random model, loaded."""
    return common.load_policy(tiny, args)


@pytest.fixture
def examples(world):
    """The 32 labelled prompts of the small world."""
    return common.load_examples(world / "train.jsonl")
