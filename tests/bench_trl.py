"""Fine-tuning, ours and TRL's side by side; `python tests/bench.py --trl` runs it where TRL is.

    bench_trl.py FOLDER PAIRS POLICY    # writes FOLDER/found.json; no POLICY: the toy's base model

Both train the same checkpoint on the same responses in the same order with the same AdamW. TRL
makes its batches by its own collator from prompt-completion rows; its losses must be ours.
"""

import sys
from pathlib import Path

import bench
import datasets
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import SFTConfig, SFTTrainer

import common


class Clock(TrainerCallback):
    """Notes when a step begins."""

    def __init__(self):
        self.began: list = []

    def on_step_begin(self, *_, **__):
        """Called by the trainer."""
        self.began.append(bench.now())


def trl_rows(policy, examples, targets, args) -> list[dict]:
    """The examples in TRL's prompt-completion form, the prompt by the processor's chat template."""
    template, rows = policy.processor.apply_chat_template, []
    closing = policy.tokenizer.convert_ids_to_tokens(policy.eos_ids[0])
    for example, ids in zip(examples, targets):
        talk = common.conversation(policy.processor, example, args)
        prompt = template(talk, tokenize=False, add_generation_prompt=True)
        completion = policy.tokenizer.decode(ids) + closing
        image = common.read_image(example)
        rows.append({"images": [image], "prompt": prompt, "completion": completion})
    return rows


def time_trl(policy_folder, work: Path, rows: list[dict], args) -> tuple[list, list]:
    """SFTTrainer over the rows in their order: (loss of every step, when it began)."""
    config = SFTConfig(
        output_dir=str(work),
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=1,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForImageTextToText.from_pretrained(
        policy_folder, dtype=torch.float32, attn_implementation=args.attention or None
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(policy_folder),
        callbacks=[clock],
    )
    trainer.log = lambda logs, *_: trainer.state.log_history.append(logs)  # it would print them
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], clock.began


def time_ours(policy_folder, work: Path, examples, targets, args) -> tuple[list, list]:
    """Our `train` over the same batches: (loss of every step, when it began)."""
    losses, began = [], []
    pairs = list(zip(examples, targets, strict=True))
    size = args.batch_size
    batches = [list(range(start, start + size)) for start in range(0, len(pairs), size)]

    def loss_of(policy, part):
        """The SFT loss, noted."""
        began.append(bench.now())
        loss, count = common.sft_loss(policy, [e for e, _ in part], [t for _, t in part], args)
        losses.append(loss.item() / count)
        return loss, count

    def count_of(pair):
        """Supervised tokens of a row, its EOS included."""
        return len(pair[1]) + 1

    out = work / "model"
    common.train(out, policy_folder, work, batches, pairs, loss_of, count_of, args, "ours")
    return losses, began


def main() -> None:
    """Supervised tokens per second of our training loop and of TRL's, step by step the same loss.

    Where they are not the same, nothing is reported.
    """
    folder, pairs, policy_name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    world = bench.make_world(folder, 256)
    policy_folder = policy_name or world / "base"
    args = common.CommonArgs(device="cpu")
    args.batch_size, args.learning_rate, args.warmup_steps = 16, 1e-4, 1
    policy = common.load_policy(policy_folder, args)
    examples = common.load_examples(world / "train.jsonl")
    seeds = [[common.seed_of("sft", example["id"])] for example in examples]
    sampled = common.generate(policy, examples, seeds, 1.0, args)
    targets = [row[0].token_ids for row in sampled]
    supervised = sum(len(ids) + 1 for ids in targets[args.batch_size : -args.batch_size])
    rows = trl_rows(policy, examples, targets, args)
    names = ("ours", "TRL", "TRL, eager attention")
    clock: dict = {name: [] for name in names}
    cpu: dict = {name: [] for name in names}
    worst = 0.0
    for turn in range(pairs):
        ours = time_ours(policy_folder, folder / f"ours{turn}", examples, targets, args)
        sides = {"ours": ours}
        for name, attention in (("TRL", "sdpa"), ("TRL, eager attention", "eager")):
            args.attention = attention
            sides[name] = time_trl(policy_folder, folder / "trl", rows, args)
            off = max(abs(a - b) for a, b in zip(ours[0], sides[name][0], strict=True))
            worst = max(worst, off)
            if off > 1e-3:
                sys.exit(f"the losses of {name} and ours differ by {off:.2g}: no fair pair")
        args.attention = ""
        for name, (_, began) in sides.items():  # from the second step's beginning to the last's
            seconds, used = (b - a for a, b in zip(began[1], began[-1]))
            clock[name].append(supervised / seconds)
            cpu[name].append(supervised / used)
            print(f"turn {turn + 1}: {name} {clock[name][-1]:.4g} tokens/s", file=sys.stderr)
    goals = {name: 1.3 for name in names[1:]}
    found = {
        "policy": policy_name or "the toy's base model",
        "batches": "TRL's own collator, prompt-completion; the same tokens as ours",
        "threads of both": torch.get_num_threads(),
        "steps": len(ours[0]),
        "largest difference of a step's loss": worst,
    } | bench.table(clock, cpu, "supervised tokens per second", goals)
    common.write_json(folder / "found.json", found)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
