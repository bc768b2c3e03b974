"""Other tools on a run's files as they are: what they read is what the stages train on."""

import math

import datasets
import pytest
import torch
from conftest import one_by_one, stage

import common

trl = pytest.importorskip("trl", reason="TRL is not installed in this environment")
TEXTS = ("3 + 4 = 7\nAnswer : 7", "row 1 : 1 2 3\n1 + 2 = 3\nAnswer : 3", "Answer : 5")


def selected(folder, policy, examples, args) -> None:
    """Let stage 03 write folder/selected.jsonl: a right response to each of some prompts."""
    rows = []
    for example, text in zip(examples, TEXTS):
        row = {"id": example["id"], "iteration": 1, "sample": 0, "correct": True, "reward": 0.5}
        token_ids = policy.tokenizer(text)["input_ids"]
        rows.append(row | {"response": text, "token_ids": token_ids})
    folder.mkdir()
    common.write_jsonl(folder / "samples.jsonl", rows)
    evolve = stage("03_self_evolve")
    flags = evolve.Args(instruction=args.instruction)
    evolve.select(folder, common.by_id_of(examples), flags)


def test_trl_takes_a_step_on_selected_jsonl_with_the_tokens_and_images_of_stage_03(
    policy, examples, args, tmp_path
):
    common.join_ranks("cpu")
    examples = examples[: len(TEXTS)]
    selected(tmp_path / "iter_01", policy, examples, args)
    data = datasets.Dataset.from_json(str(tmp_path / "iter_01/selected.jsonl"))
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=len(TEXTS),
        max_steps=1,
        max_length=None,
        learning_rate=1e-3,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model, before = policy.model.train(), [p.detach().clone() for p in policy.model.parameters()]
    processor = policy.processor
    trainer = trl.SFTTrainer(model, config, train_dataset=data, processing_class=processor)
    (batch,) = trainer.get_train_dataloader()
    for i, (example, text) in enumerate(zip(examples, TEXTS)):
        ids = [*policy.tokenizer(text)["input_ids"], policy.eos_ids[0]]
        ours, _ = one_by_one(policy, example, ids, args)
        theirs = batch["input_ids"][i][batch["attention_mask"][i] == 1]
        assert theirs.tolist() == ours["input_ids"][0].tolist()
        assert torch.equal(batch["pixel_values"][i], ours["pixel_values"][0])
    trainer.train()
    (loss,) = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert math.isfinite(loss)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
