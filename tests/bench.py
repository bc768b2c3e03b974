"""Measures what this project says about speed: ratios of alternating runs, never single figures.

    python tests/bench.py          # sampling and scoring against `generate` and a plain loop
    python tests/bench.py --trl    # fine-tuning against TRL, in an environment of its own
    python tests/bench.py --size   # time and memory of stages 02, 03, 04 at 1x, 4x, 16x prompts
    python tests/bench.py --gpu    # Qwen2.5-VL 3B and 7B shapes with random weights on one GPU
    python tests/bench.py --gpu --shapes tiny --device cpu    # the same code on a CPU, to try it

Every comparison first checks that both sides give the same result, which is also their warm-up;
then the sides take turns, --pairs times. A ratio is the median over the pairs, with the least and
the most. The model is the toy's base model, or what --policy names. Results are printed and written
to --out, one section per command.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TQDM_DISABLE"] = "1"

import torch
import toy
import transformers
from transformers import LogitsProcessor

import common

ROOT = Path(__file__).resolve().parent.parent

# ---- measuring


def alternate(sides: dict, pairs: int) -> tuple[dict, dict]:
    """Rates of sides that take turns: {name: work / seconds of each turn}, by the clock and by CPU.

    sides: {name: function that does the work and returns how much of it there was}. Seconds of CPU
    tell of the work itself where other programs share the cores.
    """
    clock: dict = {name: [] for name in sides}
    cpu: dict = {name: [] for name in sides}
    for turn in range(pairs):
        for name, work in sides.items():
            start = now()
            amount = work()
            seconds, used = (b - a for a, b in zip(start, now()))
            clock[name].append(amount / seconds)
            cpu[name].append(amount / used)
            print(f"turn {turn + 1}: {name} {clock[name][-1]:.4g} per second", file=sys.stderr)
    return clock, cpu


def now() -> tuple[float, float]:
    """Seconds by the clock and seconds of CPU."""
    return time.perf_counter(), time.process_time()


def spread(values: list[float]) -> dict:
    """Median, least and most.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'least': 1.0, 'most': 3.0}
    """
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratio(rates: dict, ours: str, other: str, goal: float) -> dict:
    """Our rate over another's, pair by pair, beside the goal.

    >>> ratio({"a": [4.0, 9.0], "b": [2.0, 3.0]}, "a", "b", 2.0)["median"]
    2.5
    """
    pairs = [a / b for a, b in zip(rates[ours], rates[other])]
    found = spread(pairs)
    return found | {"pairs": len(pairs), "goal": goal, "reached": found["median"] >= goal}


def compare(sides: dict, unit: str, goals: dict, pairs: int) -> dict:
    """Let the sides take turns; the rates of all and the ratios of "ours" to those with a goal."""
    clock, cpu = alternate(sides, pairs)
    return table(clock, cpu, unit, goals)


def table(clock: dict, cpu: dict, unit: str, goals: dict) -> dict:
    """Rates and ratios as they are printed and written."""
    return {
        unit: {name: spread(values) for name, values in clock.items()},
        "ours over": {name: ratio(clock, "ours", name, goal) for name, goal in goals.items()},
        "ours over, by seconds of CPU": {
            name: ratio(cpu, "ours", name, goal) for name, goal in goals.items()
        },
    }


def show(name: str, values: dict, indent: str = "") -> None:
    """A nested table: one figure a line, a median with its spread on one."""
    print(f"{indent}{name}")
    for key, value in values.items():
        if isinstance(value, dict) and "median" in value:
            text = f"{value['median']:.4g} ({value['least']:.4g} to {value['most']:.4g})"
            goal = f", goal {value['goal']}" if "goal" in value else ""
            print(f"{indent}  {key:<44} {text}{goal}")
        elif isinstance(value, dict):
            show(key, value, indent + "  ")
        else:
            text = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{indent}  {key:<44} {text}", flush=True)


def write_section(out: Path, section: str, values: dict) -> None:
    """Print a section and put it into the JSON file beside the sections that are there."""
    values = {"settings": settings()} | values
    show(section, values)
    found = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    common.write_json(out, found | {section: values})
    print(f"written to {out}, section {section}")


def settings() -> dict:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }


def make_world(folder: str, prompts: int) -> Path:
    """The toy world with this many training prompts."""
    world = Path(folder) / "world"
    toy.write_world(world, scale=(prompts + 0.5) / 2400)
    return world


# ---- sampling


class SeededDraw(LogitsProcessor):
    """Makes `generate` draw every row's token from the row's own seed, as our `generate` does."""

    def __init__(self, policy, seeds: list[int], args):
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.uniform = torch.stack([torch.rand(args.max_new_tokens, generator=g) for g in draws])
        self.banned, self.step = policy.banned, 0

    def __call__(self, input_ids, scores):
        """Scores (n, V) in which only the drawn token is possible."""
        scores[:, self.banned] = -torch.inf
        token = common.draw(scores, torch.ones(len(scores)), self.uniform[:, self.step])  # (n,)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def hf_generate(policy, examples, seeds, args, at_once: int, seeded: bool) -> list[list[int]]:
    """What transformers' `generate` makes of the prompts, `at_once` of them in a batch.

    Returns the token ids of every sample before its EOS, prompt by prompt.
    """
    found, stop = [], policy.eos_ids
    for start in range(0, len(examples), at_once):
        part = slice(start, start + at_once)
        flat = [seed for row in seeds[part] for seed in row]
        batch = common.encode_prompts(policy, examples[part], args)
        ids = policy.model.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=args.max_new_tokens,
            num_return_sequences=len(seeds[0]),
            logits_processor=[SeededDraw(policy, flat, args)] if seeded else [],
            suppress_tokens=policy.banned,
        )[:, batch["input_ids"].shape[1] :].tolist()  # (n, W)
        for row in ids:
            ends = [place for place, token in enumerate(row) if token in stop]
            found.append(row[: ends[0]] if ends else row)
    return found


def measure_sampling(policy, examples, pairs: int, args) -> dict:
    """Samples per second of our `generate` and of transformers', 8 samples per prompt at T = 1.

    Equal results: drawn by the same seeds, the samples must be the same but for rounding.
    """
    seeds = [[common.seed_of("bench", e["id"], k) for k in range(8)] for e in examples]
    few = len(examples) // 8  # prompt by prompt takes long

    def ours() -> int:
        responses = common.generate(policy, examples, seeds, 1.0, args)
        return sum(map(len, responses))

    def batched(seeded: bool, at_once: int):
        return lambda: len(hf_generate(policy, examples, seeds, args, at_once, seeded))

    mine = common.generate(policy, examples, seeds, 1.0, args)
    mine = [response.token_ids for row in mine for response in row]
    theirs = hf_generate(policy, examples, seeds, args, 64, seeded=True)
    same = sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(mine)
    if same < 0.99:
        sys.exit(f"only {same:.1%} of the samples are those of `generate`: nothing was timed")
    sides = {
        "ours": ours,
        "per prompt": lambda: len(hf_generate(policy, examples[:few], seeds, args, 1, False)),
        "batches of 64 prompts, seeded": batched(True, 64),
        "batches of 64 prompts, do_sample": batched(False, 64),
        "all at once, do_sample": batched(False, len(examples)),
    }
    goals = {name: 14.0 if name == "per prompt" else 3.0 for name in sides if name != "ours"}
    return {
        "prompts": len(examples),
        "mean tokens of a sample": statistics.mean(map(len, mine)),
        "share of samples that are the same": same,
    } | compare(sides, "samples per second", goals, pairs)


# ---- scoring


@torch.inference_mode()
def score_prefixes(prm, examples, responses, args) -> list[float]:
    """Scores of all steps as a plain PRM loop makes them: a forward pass over every step prefix.

    The prefixes go in batches of 64 of like length; every prompt is encoded once.
    """
    prompts = common.encode_prompts(prm, examples, args)
    jobs = []  # (prompt, prefix)
    for i, row in enumerate(responses):
        for ids in row:
            jobs += [(i, ids[:end]) for end in common.step_ends(ids, prm.tokenizer)]
    order = sorted(range(len(jobs)), key=lambda job: len(jobs[job][1]))
    scores = [0.0] * len(jobs)
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        owner = torch.tensor([jobs[job][0] for job in part])
        batch = {name: value[owner] for name, value in prompts.items()}
        tails = [jobs[job][1] for job in part]
        batch = common.append_tokens(batch, tails, prm.pad_id, left=True)
        logits = prm.model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]  # (64, V)
        good, bad = prm.marks
        for job, score in zip(part, (logits[:, good] - logits[:, bad]).sigmoid().tolist()):
            scores[job] = score
    return scores


def measure_scoring(policy, examples, pairs: int, args) -> dict:
    """Steps per second of `score_steps` and of passes over every prefix, 8 responses per prompt."""
    marks = policy.tokenizer.convert_tokens_to_ids(["+", "-"])
    prm = common.Prm(**vars(policy), marks=tuple(marks), mark_weight=1.0, likelihood=0.0)
    seeds = [[common.seed_of("score", e["id"], k) for k in range(8)] for e in examples]
    sampled = common.generate(policy, examples, seeds, 1.0, args)
    responses = [[response.token_ids for response in row] for row in sampled]

    def ours() -> int:
        scored = common.score_steps(prm, examples, responses, args)
        return sum(len(steps) for row in scored for steps in row)

    scored = common.score_steps(prm, examples, responses, args)
    mine = [score for row in scored for steps in row for score in steps]
    theirs = score_prefixes(prm, examples, responses, args)
    off = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    if off > 1e-5:
        sys.exit(f"the scores differ by {off:.2g}: nothing was timed")
    sides = {
        "ours": ours,
        "every prefix": lambda: len(score_prefixes(prm, examples, responses, args)),
    }
    return {
        "responses": len(examples) * 8,
        "steps": len(mine),
        "largest difference of a score": off,
    } | compare(sides, "steps per second", {"every prefix": 8.0}, pairs)


def run_ratios(options) -> dict:
    """Sampling and scoring on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(folder, options.prompts)
        args = common.CommonArgs(device="cpu")
        policy = common.load_policy(options.policy or world / "base", args)
        examples = common.load_examples(world / "train.jsonl")
        return {
            "policy": options.policy or "the toy's base model",
            "sampling": measure_sampling(policy, examples, options.pairs, args),
            "scoring": measure_scoring(
                policy, examples[: options.prompts // 2], options.pairs, args
            ),
        }


# ---- fine-tuning against TRL


def trl_python() -> Path:
    """The Python of an environment of its own that has TRL; torch and transformers are those of

    this one, found by a .pth file, so that both sides run on the same versions.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "mstar-bench" / f"trl-{platform.python_version()}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    own = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(own) / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # --no-deps: what else they need is there, and none may bring another torch, or torchvision.
    wanted = ["trl==1.16.0", "accelerate==1.15.0", "psutil"]
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *wanted], check=True)
    return python


def run_trl(options) -> dict:
    """Both sides in the environment that has TRL; that process writes its figures to a file."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        script = Path(__file__).with_name("bench_trl.py")
        one = {"OMP_NUM_THREADS": "1"}  # for both: small matrices keep one core busy, not two
        command = [trl_python(), script, folder, str(options.pairs), options.policy]
        subprocess.run(command, check=True, env=os.environ | one)
        return json.loads(found.read_text())


# ---- cost against size


def run_child(command: list) -> dict:
    """Seconds and the largest memory, MiB, of a program of its own."""
    start = time.perf_counter()
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed")
    seconds = time.perf_counter() - start
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": usage.ru_maxrss / 1024}


def size_commands(world: Path, policy, runs: Path, prompts: int) -> dict[str, list]:
    """{stage: its flags} on this many prompts; even the least size fills batches so small."""
    data = world / f"train_{prompts}.jsonl"
    same = ["--runs", runs, "--device", "cpu", "--rows", 64, "--chunk", 16, "--samples", 4]
    learn = [*same, "--data", data, "--val", world / "val_8.jsonl", "--policy", policy]
    checker = ["--chain_checker", ROOT / "tests" / "toy.py:judge"]
    loop = ["--interval", 0.5, "--passes", 1, "--temperature", 1.0]
    loop += ["--steps", prompts // 4, "--batch_size", 4]
    test = ["--test", data, "--ood", world / "ood_4.jsonl", "--model", world / "base"]
    return {
        "02_train_prm": [*learn, "--prompts", prompts, "--rollouts", 2, *checker],
        "03_self_evolve": [*learn, *loop],
        "04_eval": [*same, *test, *checker],
    }


def run_size(options) -> dict:
    """Seconds and peak memory of three stages at 1x, 4x, 16x the prompts: linear and flat.

    What a further prompt costs is (seconds of the larger - of the smaller) / their difference in
    prompts, so that what every start costs does not count.
    """
    sizes = [options.least, 4 * options.least, 16 * options.least]
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(folder, sizes[-1])
        for name, count in [("train", n) for n in sizes] + [("val", 8), ("ood", 4)]:
            rows = common.read_jsonl(world / f"{name}.jsonl")[:count]
            common.write_jsonl(world / f"{name}_{count}.jsonl", rows)
        measured: dict = {}
        for prompts in sizes:
            runs = Path(folder) / f"runs_{prompts}"
            commands = size_commands(world, options.policy or world / "base", runs, prompts)
            for stage, flags in commands.items():
                used = run_child([sys.executable, ROOT / f"{stage}.py", *flags])
                measured.setdefault(stage, []).append(used)
                print(f"{stage}, {prompts} prompts: {used}", file=sys.stderr)
    return {stage: growth(sizes, used) for stage, used in measured.items()}


def growth(sizes: list[int], used: list[dict]) -> dict:
    """How seconds and memory grow with the prompts.

    >>> used = [{"cpu_seconds": 5.0 + n, "peak_mib": 100.0} for n in (1, 4, 16)]
    >>> found = growth([1, 4, 16], used)
    >>> found["cost of a further prompt, last over first"], found["memory, last over first"]
    (1.0, 1.0)
    """
    seconds = [row["cpu_seconds"] for row in used]
    first = (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])
    last = (seconds[2] - seconds[1]) / (sizes[2] - sizes[1])
    return {
        **{f"{size} prompts": row for size, row in zip(sizes, used)},
        "cost of a further prompt, last over first": last / first,
        "memory, last over first": used[2]["peak_mib"] / used[0]["peak_mib"],
    }


# ---- the command


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--trl", action="store_true", help="fine-tuning against TRL")
    which.add_argument("--size", action="store_true", help="time and memory against size")
    which.add_argument("--gpu", action="store_true", help="figures of one GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--pairs", type=int, default=5, help="turns of every side")
    parser.add_argument("--prompts", type=int, default=128, help="prompts of the sampling ratio")
    parser.add_argument("--least", type=int, default=32, help="prompts of 1x in --size")
    parser.add_argument("--policy", default="", help="checkpoint in place of the toy's base model")
    parser.add_argument("--shapes", nargs="+", choices=["3b", "7b", "tiny"], default=["3b", "7b"])
    parser.add_argument("--device", default="cuda", help="of --gpu")
    return parser.parse_args(argv)


def main() -> None:
    """Measure what was asked for."""
    options = parse()
    transformers.logging.set_verbosity_error()
    if options.gpu and options.device != "cpu" and not torch.cuda.is_available():
        print("skipped: --gpu needs a CUDA GPU, and torch finds none")
    elif options.gpu:
        from bench_gpu import run_gpu

        write_section(options.out, "gpu", run_gpu(options.shapes, options.device, show))
    elif options.size:
        write_section(options.out, "size", run_size(options))
    elif options.trl:
        write_section(options.out, "trl", run_trl(options))
    else:
        write_section(options.out, "ratios", run_ratios(options))


if __name__ == "__main__":
    main()
