"""Generation by vLLM, for real, on a CPU: the same tokens as transformers, seeded samples, prefixes, a whole iteration, the probe."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
from conftest import ROOT
from test_models import ids_of, seeds
from test_stages import ENV

LACK = common.vllm_lacks("cpu")
pytestmark = pytest.mark.skipif(bool(LACK), reason=f"no vLLM here for a CPU: {LACK}")


@pytest.fixture
def args(args, tmp_path):
    """The common flags with vLLM, and room for a folder of the engine."""
    args.engine, args.engine_memory, args.runs, args.max_new_tokens = "vllm", 0.15, str(tmp_path / "runs"), 16
    yield args
    common.close_engine()


def by_transformers(args):
    return common.replace(args, engine="transformers")


def children(of: int | None = None) -> dict[int, int]:
    """Resident memory in MiB of every live process under this one (or under `of`)."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            continue
        if fields["State"].strip()[0] not in "ZX":
            found[int(fields["Pid"])] = int(fields["PPid"]), int(fields.get("VmRSS", "0 kB").split()[0]) >> 10
    mine, grown = {of or os.getpid()}, True
    while grown:
        more = {pid for pid, (parent, _) in found.items() if parent in mine} - mine
        mine, grown = mine | more, bool(more)
    return {pid: found[pid][1] for pid in mine - {of or os.getpid()}}


def alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_engine_gives_the_trainers_tokens_and_is_repeatable_and_leaves_nothing_behind(tiny, examples, args, capsys):
    """One engine for several claims, since a start takes long."""
    policy, before = common.load_policy(tiny, args), sum(children().values())

    # greedy, token for token, in float32, and the logprobs
    mine = common.generate(policy, examples, [[0]] * len(examples), 0.0, args, logprobs=True)
    theirs = common.generate(policy, examples, [[0]] * len(examples), 0.0, by_transformers(args), logprobs=True)
    tokens = sum(len(r.token_ids) for row in theirs for r in row)
    assert ids_of(mine) == ids_of(theirs) and tokens > 200 and [r[0].finished for r in mine] == [r[0].finished for r in theirs]
    for (a,), (b,) in zip(mine, theirs):
        assert a.logprobs == pytest.approx(b.logprobs, abs=0.01) and a.text == b.text

    # samples: from their seeds, whatever the order and the neighbours
    together = ids_of(common.generate(policy, examples[:8], seeds(examples[:8], 4, "x"), 1.0, args))
    backwards = ids_of(common.generate(policy, examples[7::-1], seeds(examples[7::-1], 4, "x"), 1.0, args))[::-1]
    alone = [ids_of(common.generate(policy, [e], seeds([e], 4, "x"), 1.0, args))[0] for e in examples[:8]]
    assert together == backwards == alone and len({tuple(t) for row in together for t in row}) > 16
    assert together != ids_of(common.generate(policy, examples[:8], seeds(examples[:8], 4, "y"), 1.0, args))

    # and from the softmax at the temperature
    one = common.replace(args, max_new_tokens=1)
    (row,) = common.generate(policy, examples[:1], seeds(examples[:1], 2000, "freq"), 0.7, one)
    logits = policy.model(**common.encode_prompts(policy, examples[:1], args)).logits[0, -1]
    logits[policy.banned] = -torch.inf
    wanted = (logits / 0.7).softmax(-1)
    first = torch.tensor([r.token_ids[0] if r.token_ids else policy.eos_ids[0] for r in row])
    assert (torch.bincount(first, minlength=len(wanted)) / 2000 - wanted).abs().max() < 4 * (0.25 / 2000) ** 0.5

    # rollouts: a partial assistant turn is continued exactly where it ends
    prefixes = [policy.tokenizer(text)["input_ids"] for text in ("sum of row 1 : 1 2 3\n", "", "1 + 2", "maximum of row 2 :")]
    mine = common.generate(policy, examples[:4], [[0]] * 4, 0.0, args, prefixes)
    assert ids_of(mine) == ids_of(common.generate(policy, examples[:4], [[0]] * 4, 0.0, by_transformers(args), prefixes))
    assert all(r.token_ids[:len(p)] == p and len(r.token_ids) <= 16 for p, (r,) in zip(prefixes, mine))

    # one engine so far, proved by its probe; after it no process and no file is left
    engine, alive = common.ENGINES[0][1], sum(children().values())
    common.close_engine()
    after, printed = sum(children().values()), capsys.readouterr().out
    print(f"processes under this one: {before} MiB before, {alive} MiB with the engine, {after} MiB after")
    assert printed.count("vLLM started") == 1 and alive > before + 300 and after <= before + 50
    assert not list(Path(args.runs).iterdir()) and not common.ENGINES


def test_after_training_a_new_engine_holds_the_new_weights(policy, examples, args, capsys):
    before = ids_of(common.generate(policy, examples[:8], [[0]] * 8, 0.0, args))
    optimizer = common.make_optimizer(policy)
    args.offload = True
    common.fit(policy, optimizer, [[0, 1]] * 2, lambda b: common.sft_loss(policy, [examples[i] for i in b], [[5, 6, 7]] * len(b), args), args, "t")
    assert not common.ENGINES
    after = ids_of(common.generate(policy, examples[:8], [[0]] * 8, 0.0, args))
    assert after != before and after == ids_of(common.generate(policy, examples[:8], [[0]] * 8, 0.0, by_transformers(args)))
    assert capsys.readouterr().out.count("vLLM started") == 2

    # the probe: weights that change behind the engine's back, then the reload that vLLM offers, which is silently wrong on a CPU
    engine, probe = common.ENGINES[0][1], common.replace(by_transformers(args), max_new_tokens=16)
    ids = common.encode_prompts(policy, examples[:1], args)["input_ids"][0].tolist()
    for p in policy.model.parameters():
        p.data *= 1.3
    wanted = common.generate(policy, examples[:1], [[0]], 0.0, probe, logprobs=True)[0][0]
    with pytest.raises(common.InputError, match="vLLM does not hold the policy's weights: greedy logprob 0"):
        common.probe_engine(policy, engine, examples[0], ids, wanted, probe)
    common.save_model(policy, Path(args.runs) / "new")
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(Path(args.runs) / "new")})
    engine.reset_prefix_cache(), engine.reset_mm_cache(), engine.llm_engine.reset_encoder_cache()
    with pytest.raises(common.InputError, match="vLLM does not hold the policy's weights"):
        common.probe_engine(policy, engine, examples[0], ids, wanted, probe)

    # and prompt ids that differ are named at the first place
    with pytest.raises(common.InputError, match=r"train.jsonl line 1 differently, first at token 2 of the prompt: trainer 0, vLLM \d+"):
        common.probe_engine(policy, engine, examples[0], [*ids[:2], 0, *ids[3:]], wanted, probe)


def test_a_whole_iteration_of_self_evolving_runs_on_vllm_and_a_killed_one_leaves_no_engine(world, tmp_path):
    """Stage 03 with the toy's base model as policy and as PRM, from folders as 01 and 02 leave them: killed with its engine up, then run to the end."""
    shutil.copytree(world, tmp_path / "data/toy")
    runs = tmp_path / "runs/toy"
    for name in ("01_warmup", "02_train_prm"):
        shutil.copytree(world / "base", runs / name / "model")
    tokens = common.load_policy(world / "base", common.CommonArgs(device="cpu")).tokenizer.convert_tokens_to_ids(["+", "-"])
    common.write_json(runs / "02_train_prm/model/prm.json", {"marks": tokens})
    command = [sys.executable, str(ROOT / "03_self_evolve.py"), *"--device cpu --engine vllm --engine_memory 0.15 --passes 0.5 --steps 3 --samples 6 --interval 0.5 --temperature 1.0".split()]

    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=log, text=True) as killed:
        assert any("vLLM started" in line for line in killed.stdout), (tmp_path / "log").read_text()[-2000:]
        engine = children(killed.pid)
        killed.kill()
    deadline = time.time() + 60
    while time.time() < deadline and any(map(alive, engine)):
        time.sleep(0.5)
    assert len(engine) >= 2 and not [pid for pid in engine if alive(pid)]

    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("vLLM started") == 2  # one engine before the training, one after
    start, end = common.read_jsonl(runs / "03_self_evolve/metrics.jsonl")
    samples = common.read_jsonl(runs / "03_self_evolve/iter_01/samples.jsonl")
    assert end["selected"] > 0 and end["steps"] == 3 and len(samples) == 16 * 6 == len({row["seed"] for row in samples})
    assert json.loads((runs / "03_self_evolve/run.json").read_text())["flags"]["engine"] == "vllm"
