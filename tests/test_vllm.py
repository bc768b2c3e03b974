"""Generation by vLLM, for real, on a CPU: tokens, seeds, prefixes, the probe, whole iterations."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ENV, ROOT, ids_of, one_by_one

import common

LACK = common.vllm_lacks("cpu")
pytestmark = pytest.mark.skipif(bool(LACK), reason=f"no vLLM here for a CPU: {LACK}")
STARTED = "engine: vLLM started"


@pytest.fixture
def args(args):
    """The common flags with vLLM, whose engine takes a part of this machine."""
    common.join_ranks("cpu")
    return replace_flags(args, engine="vllm", engine_memory=0.15, max_new_tokens=16)


def replace_flags(args, **changed):
    """Flags with some changed, and the fields that training reads."""
    new = replace(args, **changed)
    new.learning_rate, new.warmup_steps = args.learning_rate, args.warmup_steps
    return new


def processes() -> dict[int, tuple[int, int]]:
    """{process: (its parent, resident memory in MiB)} of every live process."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            continue
        names = dict(line.split(":", 1) for line in lines)
        if names["State"].strip()[0] not in "ZX":
            memory = int(names.get("VmRSS", "0 kB").split()[0]) >> 10
            found[int(names["Pid"])] = int(names["PPid"]), memory
    return found


def children(of: int) -> dict[int, int]:
    """Resident memory in MiB of every live process under one."""
    found, mine = processes(), {of}
    while more := {pid for pid, (parent, _) in found.items() if parent in mine} - mine:
        mine |= more
    return {pid: found[pid][1] for pid in mine - {of} if pid in found}


def memory_below_this() -> int:
    """Resident memory in MiB of all processes under this one."""
    return sum(children(os.getpid()).values())


def sampled(sampler, path, examples, *given, **named) -> list[list[list[int]]]:
    """The token ids that a phase of sampling writes, example by example."""
    sampler.sample(path, examples, *given, **named)
    rows = common.read_jsonl(path)
    n = len(rows) // len(examples)
    return [[row["token_ids"] for row in rows[i : i + n]] for i in range(0, len(rows), n)]


def greedy(policy, examples, args, prefixes=None) -> list[list[list[int]]]:
    """The greedy token ids of our own generation by transformers."""
    return ids_of(common.generate(policy, examples, [[0]] * len(examples), 0.0, args, prefixes))


def test_the_engine_gives_transformers_tokens_is_repeatable_and_leaves_nothing_behind(
    tiny, policy, examples, args, tmp_path, capsys
):
    """One engine for several claims, since a start takes long."""
    before = memory_below_this()
    with common.Sampler(tiny, args) as sampler:
        # Greedy: token for token, in float32.
        mine = sampled(sampler, tmp_path / "greedy", examples, 1, 0.0, "t")
        theirs = common.generate(policy, examples, [[0]] * len(examples), 0.0, args)
        rows = common.read_jsonl(tmp_path / "greedy")
        assert mine == ids_of(theirs)
        assert sum(len(ids) for row in mine for ids in row) > 200
        assert [row["finished"] for row in rows] == [row[0].finished for row in theirs]
        assert [row["response"] for row in rows] == [row[0].text for row in theirs]

        # Samples: from their seeds, whatever the order and the neighbours.
        eight = examples[:8]
        together = sampled(sampler, tmp_path / "a", eight, 4, 1.0, "x")
        assert sampled(sampler, tmp_path / "b", eight[::-1], 4, 1.0, "x")[::-1] == together
        sampler.args = replace(args, chunk=1)
        assert sampled(sampler, tmp_path / "c", eight, 4, 1.0, "x") == together
        assert sampled(sampler, tmp_path / "d", eight, 4, 1.0, "y") != together
        assert len({tuple(ids) for row in together for ids in row}) > 16

        # One temperature per example: those at 0 are greedy.
        heats = [0.0, 1.0] * 4
        mixed = sampled(sampler, tmp_path / "e", eight, 4, heats, "x")
        assert mixed[1::2] == together[1::2]
        assert mixed[::2] == [row * 4 for row in greedy(policy, eight[::2], args)]

        # Samples: from the softmax at the temperature.
        sampler.args = replace(args, max_new_tokens=1)
        (row,) = sampled(sampler, tmp_path / "f", examples[:1], 2000, 0.7, "freq")
        batch, _ = one_by_one(policy, examples[0], [], args)
        with torch.no_grad():
            logits = policy.model(**batch).logits[0, -1]
        logits[policy.banned] = -torch.inf
        wanted = (logits / 0.7).softmax(-1)
        first = torch.tensor([ids[0] if ids else policy.eos_ids[0] for ids in row])
        shares = torch.bincount(first, minlength=len(wanted)) / 2000
        assert (shares - wanted).abs().max() < 4 * (0.25 / 2000) ** 0.5

        # Rollouts: a partial assistant turn is continued exactly where it ends.
        sampler.args = args
        texts = ("sum of row 1 : 1 2 3\n", "", "1 + 2", "maximum of row 2 :")
        prefixes = [policy.tokenizer(text)["input_ids"] for text in texts]
        begun = {"prefixes": [{"token_ids": ids} for ids in prefixes]}
        mine = sampled(sampler, tmp_path / "g", examples[:4], 1, 0.0, "t", **begun)
        assert mine == greedy(policy, examples[:4], args, prefixes)
        for prefix, (ids,) in zip(prefixes, mine):
            assert ids[: len(prefix)] == prefix
            assert len(ids) <= 16
        full = [[9, 10] * 8]
        mine = sampled(
            sampler, tmp_path / "h", examples[:1], 1, 0.0, "t", prefixes=[{"token_ids": full[0]}]
        )
        assert mine == [full]

        alive = memory_below_this()

    # One engine so far, proved by its probe; now no process is left.
    after = memory_below_this()
    print(f"processes under this one: {before} MiB before, {alive} with it, {after} after")
    assert capsys.readouterr().out.count(STARTED) == 1
    assert alive > before + 300
    assert after <= before + 50


def test_a_new_engine_holds_the_new_weights_and_the_probe_stops_other_ones(
    tiny, examples, args, tmp_path, capsys
):
    rows = [(example, [5, 6, 7]) for example in examples[:2]]

    def loss_of(policy, part):
        return common.sft_loss(policy, [e for e, _ in part], [t for _, t in part], args)

    with common.Sampler(tiny, args) as sampler:
        before = sampled(sampler, tmp_path / "before", examples[:8], 1, 0.0, "t")
    work, new = tmp_path / "work", tmp_path / "new"
    common.train(new, tiny, work, [[0, 1]] * 2, rows, loss_of, lambda row: 4, args, "t")
    policy = common.load_policy(new, args)
    with common.Sampler(new, args) as sampler:
        after = sampled(sampler, tmp_path / "after", examples[:8], 1, 0.0, "t")
        assert after != before
        assert after == greedy(policy, examples[:8], args)
        assert capsys.readouterr().out.count(STARTED) == 2

        # Weights that change behind the engine's back.
        common.prove_engine(sampler.engine, policy, examples[0], args)
        for weight in policy.model.parameters():
            weight.data *= 1.3
        wrong = "vLLM does not hold the policy's weights"
        with pytest.raises(common.InputError, match=wrong):
            common.prove_engine(sampler.engine, policy, examples[0], args)

        # The reload that vLLM offers, which is silently wrong on a CPU.
        common.save_policy(policy, tmp_path / "changed", args)
        folder = {"weights_path": str(tmp_path / "changed")}
        sampler.engine.collective_rpc("reload_weights", kwargs=folder)
        sampler.engine.reset_prefix_cache()
        sampler.engine.reset_mm_cache()
        sampler.engine.llm_engine.reset_encoder_cache()
        with pytest.raises(common.InputError, match=wrong):
            common.prove_engine(sampler.engine, policy, examples[0], args)

        # A processor that gives an image another number of tokens.
        policy.processor.image_seq_len = 4
        with pytest.raises(common.InputError, match=r"train.jsonl line 1\b.*prompt"):
            common.prove_engine(sampler.engine, policy, examples[0], args)


# ---- stage 03 as a user runs it

FLAGS = """
--device cpu --engine vllm --engine_memory 0.15 --passes 0.5 --interval 0.5 --steps 3 --samples 6
--temperature 1.0 --chunk 4
"""
SCRIPT = str(ROOT / "03_self_evolve.py")


def alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended and waits to be collected does not."""
    return pid in processes()


def place(folder: Path, world) -> Path:
    """The toy's base model as the policy of 01 and as the PRM of 02, and the data; the runs."""
    shutil.copytree(world, folder / "data/toy")
    runs = folder / "runs/toy"
    for name in ("01_warmup", "02_train_prm"):
        shutil.copytree(world / "base", runs / name / "model")
    policy = common.load_policy(world / "base", common.CommonArgs(device="cpu"))
    marks = policy.tokenizer.convert_tokens_to_ids(["+", "-"])
    common.write_json(
        runs / "02_train_prm/model/prm.json",
        {"marks": marks, "mark_weight": 1.0, "likelihood": 1.0},
    )
    return runs / "03_self_evolve"


def test_a_whole_iteration_runs_on_vllm_and_a_killed_one_leaves_no_engine(world, tmp_path):
    """Killed with its engine up, then run to the end."""
    out, log = place(tmp_path, world), tmp_path / "log"
    command = [sys.executable, SCRIPT, *FLAGS.split()]
    settings = {"cwd": tmp_path, "env": ENV, "text": True}
    with (
        open(log, "w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, **settings) as killed,
    ):
        assert any(STARTED in line for line in killed.stdout), log.read_text()[-2000:]
        engine = children(killed.pid)
        killed.kill()
    deadline = time.time() + 60
    while time.time() < deadline and any(map(alive, engine)):
        time.sleep(0.5)
    assert len(engine) >= 2
    assert not [pid for pid in engine if alive(pid)]

    done = subprocess.run(command, capture_output=True, **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(STARTED) == 3  # for the look before, the samples, the look after
    _, end = common.read_jsonl(out / "metrics.jsonl")
    samples = common.read_jsonl(out / "iter_01/samples.jsonl")
    assert end["selected"] > 0
    assert end["steps"] == 3
    assert len(samples) == 16 * 6 == len({row["seed"] for row in samples})
    assert json.loads((out / "run.json").read_text())["flags"]["engine"] == "vllm"
    assert (out / "model/model.safetensors").exists()


def ranks_with_an_engine(torchrun: int) -> set[int]:
    """The ranks under a torchrun that have an engine, which is a process of their own."""
    found = processes()
    ranks = {pid for pid, (parent, _) in found.items() if parent == torchrun}
    return {parent for parent, memory in found.values() if parent in ranks and memory > 300}


def test_two_ranks_have_an_engine_each_and_sample_what_one_rank_samples(world, tmp_path):
    settings = {"env": ENV, "stdout": subprocess.DEVNULL, "text": True}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    found, seen = {}, {}
    for ranks, command in (
        ("one", [sys.executable, SCRIPT, *FLAGS.split()]),
        ("two", [*launch, "2", SCRIPT, *FLAGS.split()]),
    ):
        cwd = tmp_path / ranks
        out, log, seen[ranks] = place(cwd, world), cwd / "log", set()
        with (
            open(log, "w") as errors,
            subprocess.Popen(command, cwd=cwd, stderr=errors, **settings) as running,
        ):
            while running.poll() is None:
                seen[ranks] |= ranks_with_an_engine(running.pid)
                time.sleep(0.2)
        assert running.returncode == 0, log.read_text()[-2000:]
        rows = common.read_jsonl(out / "iter_01/samples.jsonl")
        found[ranks] = [(row["id"], row["sample"], row["token_ids"]) for row in rows]
        assert (out / "model/model.safetensors").exists()
    assert len(seen["two"]) == 2
    assert len(found["one"]) == 16 * 6
    assert found["one"] == found["two"]
