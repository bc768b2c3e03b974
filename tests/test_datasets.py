"""MathV360K: small hand-written files of the published schema, with every quirk that is known."""

import io
import json
import os
import random
import shutil

import pytest
from PIL import Image

import common
from conftest import stage

warmup = stage("01_warmup")


def picture(shade: int, kind: str = "PNG") -> bytes:
    """A 24x24 image file, another one for every shade."""
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (shade, 0, 255 - shade)).save(buffer, kind)
    return buffer.getvalue()


# ---- MathV360K: reading

HINTS = {"letter": "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
         "integer": "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
         "float": "Hint: Please answer the question requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, at the end.",
         "free": "Hint: Please answer the question and provide the final answer at the end."}


def record(image, question, answer, hint="free", choices=()):
    value = f"<image>\n{HINTS[hint]}\nQuestion: {question}" + ("\nChoices:\n" + "\n".join(f"({c}) {t}" for c, t in zip("ABCDEFGH", choices)) if choices else "")
    return {"id": "identity_0", "image": image, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]}


def put(folder, records, images=True):
    """A folder as MathV360K is published."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_samples_all_tuning.json").write_text(json.dumps(records, indent=2))
    for name in {r["image"] for r in records} if images else ():
        path = folder / "data_images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(len(name)))
    return folder


@pytest.mark.parametrize("size", [16, 17, 23, 50, 4000])
def test_streaming_gives_what_loading_whole_gives_wherever_the_buffer_ends(tmp_path, size):
    records = [{"id": i, "text": "é,]}\\\" " * (i % 4), "list": [1, {"a": []}]} for i in range(40)]
    for indent in (None, 1):
        (tmp_path / "l.json").write_text("  " + json.dumps(records, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        assert list(warmup.stream_list(tmp_path / "l.json", size)) == list(enumerate(records, 1))


@pytest.mark.parametrize("text, message", [('{"a": 1}', "expected a JSON list"), ("", "expected a JSON list"), ('[{"a": 1}, {"a": ]', "record 2: not JSON"),
                                           ('[{"a": 1}, {"a"', "record 2: not JSON, or the file ends there"), ('[{"a": 1}', "record 1: not JSON, or the file ends there"),
                                           ('[{"a": 1} {"a": 2}]', "record 2: expected a comma")])
def test_a_broken_list_is_refused_with_its_record(tmp_path, text, message):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(common.InputError, match=message):
        list(warmup.stream_list(tmp_path / "l.json"))


@pytest.mark.parametrize("given, wanted", [
    (record("Geometry3K/images/454.png", "Find x.", "The answer is B", "letter", ["4", "5"]), {"answer": "B", "choices": ["4", "5"], "source": "Geometry3K"}),
    (record("GEOS/images/1.png", "Find x.", "The answer is 5.", "letter", ["4", "5"]), {"answer": "B"}),
    (record("GEOS/images/1.png", "Find x.", "(b)", "letter", ["4", "5"]), {"answer": "B"}),
    (record("TabMWP/images/1.png", "How many?", "The answer is 1,250.", "integer"), {"answer": "1,250", "choices": None, "answer_type": "integer"}),
    (record("TabMWP/images/1.png", "How much?", "100", "float"), {"answer": "100", "answer_type": "float", "precision": 2}),
    (record("VQA2.0/images/1.png", "What colour?", "The answer is Dark Blue."), {"answer": "Dark Blue", "question": HINTS["free"] + "\nQuestion: What colour?"}),
    (record("IQTest/images/1.png", "Which fits?", "The answer is C", "letter"), {"answer": "C", "choices": None, "answer_type": "letter"})])
def test_a_record_becomes_an_example_in_its_own_words(given, wanted):
    example, _ = warmup.convert(given, "f record 1")
    assert {key: example.get(key) for key in wanted} == wanted and example["image"] == "data_images/" + given["image"]
    assert "<image>" + "\n" + common.user_text(example, "") == given["conversations"][0]["value"]  # our prompt is the dataset's
    assert common.is_correct(common.extract_answer(f"Answer: {example['answer']}"), example)


@pytest.mark.parametrize("given, reason", [
    (record("a/1.png", " ", "7"), "no question"), (record("a/1.png", "q", "The answer is ."), "no answer"),
    (record("a/1.png", "q", "The answer is D", "letter", ["4", "5"]), "an answer that is none of the choices"),
    (record("a/1.png", "q", "A", "letter", ["4"]), "choices that are not (A) ..., (B) ..., one a line"),
    (record("a/1.png", "q", "The answer is four", "integer"), "an answer that is no integer"), (record("a/1.png", "q", "cat", "letter"), "an answer that is no letter")])
def test_a_record_that_cannot_be_used_is_skipped_with_its_reason(given, reason):
    assert warmup.convert(given, "f record 1") == (None, reason)


TURNS = record("a/1.png", "q", "7")["conversations"]


@pytest.mark.parametrize("given, message", [
    ("text", "f record 9: expected"), ({"image": "a/1.png"}, "f record 9: expected"), ({"image": None, "conversations": TURNS}, "f record 9: expected"),
    ({"image": "a/1.png", "conversations": TURNS * 2}, "f record 9: expected"), ({"image": "a/1.png", "conversations": TURNS[::-1]}, "f record 9: expected"),
    ({"image": "a/1.png", "conversations": [{"from": "human", "value": 7}, TURNS[1]]}, "f record 9: expected"),
    ({"image": "../1.png", "conversations": TURNS}, "leaves the data folder"), ({"image": "/etc/hostname", "conversations": TURNS}, "leaves the data folder"),
    ({"image": "a/../../1.png", "conversations": TURNS}, "leaves the data folder")])
def test_a_record_of_another_form_is_refused_with_file_and_number(given, message):
    with pytest.raises(common.InputError, match=message):
        warmup.convert(given, "f record 9")


# ---- MathV360K: splitting

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("giant", [2000, 50])
def test_splits_share_no_image_and_no_text_and_the_halves_are_equal(monkeypatch, seed, giant):
    monkeypatch.setattr(warmup, "GIANT", giant)
    rng = random.Random(seed)  # 3,000 records: 700 images; half of the texts their own, half of 400 generic ones
    pairs = [(rng.randrange(700), 1000 + (rng.randrange(400) if rng.random() < 0.1 * seed else 400 + i)) for i in range(3000)]
    split = warmup.assign_splits(pairs, {"test": 75, "val": 25}, seed)
    for side in (0, 1):
        owners = {}
        for pair, name in zip(pairs, split):
            if name != "shared":
                assert owners.setdefault(pair[side], name) == name
    count = {name: split.count(name) for name in ("train", "unlabeled", "test", "val", "shared")}
    assert count["test"] == 75 and count["val"] == 25
    if seed == 0 or giant == 50:  # no group is larger than what is missing on either side
        assert abs(count["train"] - count["unlabeled"] - 100) < 0.05 * 3000 and count["train"] > 600
    assert split == warmup.assign_splits(pairs, {"test": 75, "val": 25}, seed) != warmup.assign_splits(pairs, {"test": 75, "val": 25}, seed + 1)


def test_groups_below_the_limit_stay_whole_and_lose_nothing():
    pairs = [(g, 100 + g) for g in range(90) for _ in range(3)]  # 90 groups of three records
    split = warmup.assign_splits(pairs, {"test": 1}, 0)
    assert split.count("shared") == 2  # the other two of the test record's group
    assert [split.count(name) for name in ("train", "unlabeled", "test")] in ([[135, 132, 1], [132, 135, 1]])
    with pytest.raises(common.InputError, match="too few"):
        warmup.assign_splits(pairs, {"test": 91}, 0)


def world_of(n):
    """n records, two per image; some texts shared, one conflict, one agreeing pair, one unusable record."""
    records = [record(f"S{i % 3}/images/{i // 2}.png", f"what is {i if i % 5 else 'shared ' + str(i % 15)} ?", f"The answer is {i}.", "integer") for i in range(n)]
    records += [record("S0/images/0.png", "twice", "The answer is 7", "integer"), record("S0/images/0.png", " TWICE ", "The answer is 8", "integer"),
                record("S1/images/1.png", "agreed", "The answer is 7.0", "integer"), record("S1/images/1.png", "agreed", "7", "integer"),
                record("S1/images/1.png", "broken", "The answer is many", "integer")]
    return records


SMALL = {"test": 8, "val": 4}


def test_the_split_on_disk_is_complete_disjoint_and_readable(tmp_path, capsys):
    root = put(tmp_path / "m", world_of(120))
    assert warmup.split_mathv360k(root, 0, SMALL) == root / "train.jsonl"
    report, seen = json.loads((root / "split.json").read_text()), {}
    names = ("train", "unlabeled", "test", "val")
    for name in names:
        examples = common.load_examples(root / f"{name}.jsonl")
        assert len(examples) == report[name] == sum(report["by_source"][name].values())
        for e in examples:
            for key in (e["image"], e["question"].split("Question:")[1].strip().casefold()):
                assert seen.setdefault(key, name) == name
    assert report["conflicting"] == 2 and report["skipped"] == {"an answer that is no integer": 1} and report["test"] == 8 and report["val"] == 4
    assert sum(report[name] for name in (*names, "shared", "conflicting")) + 1 == report["records"] == 125
    assert abs(report["train"] - report["unlabeled"] - 12) <= 12 and "conflicting" in capsys.readouterr().out
    assert sorted(p.name for p in root.iterdir()) == sorted(["data_images", "split.json", "train_samples_all_tuning.json", *(f"{n}.jsonl" for n in names)])


def test_a_split_is_reused_and_one_of_another_seed_or_file_is_refused(tmp_path):
    root = put(tmp_path / "m", world_of(120))
    warmup.split_mathv360k(root, 0, SMALL)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.iterdir() if p.is_file()}
    warmup.split_mathv360k(root, 0, SMALL)
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.iterdir() if p.is_file()}
    with pytest.raises(common.InputError, match="seed was 0, now 1.*delete it to split anew"):
        warmup.split_mathv360k(root, 1, SMALL)
    put(root, world_of(121))
    with pytest.raises(common.InputError, match="source was"):
        warmup.split_mathv360k(root, 0, SMALL)
    (root / "split.json").unlink()  # as after a kill: what lies there counts for nothing
    (root / "train.jsonl").write_text("torn")
    warmup.split_mathv360k(root, 0, SMALL)
    assert len(common.load_examples(root / "train.jsonl")) == json.loads((root / "split.json").read_text())["train"]


def test_missing_images_are_skipped_if_few_and_refused_if_many(tmp_path):
    root = put(tmp_path / "m", world_of(120))
    (root / "data_images/S0/images/3.png").unlink()  # of two records, number 6 (S0) and 7 (S1): one is S0's
    warmup.split_mathv360k(root, 0, SMALL)
    assert json.loads((root / "split.json").read_text())["skipped"]["an image that is not there"] == 1
    with pytest.raises(common.InputError, match="too many cannot be used.*data_images whole"):
        warmup.split_mathv360k(put(tmp_path / "n", world_of(120), images=False), 0, SMALL)


def test_without_the_files_and_without_the_hub_the_sentence_says_what_to_put_where(tmp_path):
    with pytest.raises(common.InputError, match="no train_samples_all_tuning.json and the hub cannot be reached.*put that file and data_images/ there"):
        warmup.split_mathv360k(tmp_path / "none", 0)


def test_warmup_takes_mathv360k_by_its_name(tmp_path, tiny, monkeypatch):
    records = [record(f"S/images/{i % 60}_{i}.png", f"what is row {i} ?", "The answer is 999999", "integer") for i in range(1060)]
    root = put(tmp_path / "m", records)
    monkeypatch.setattr(common, "LOCKS", [])
    with pytest.raises(common.InputError, match="none of 60 sampled responses is right"):  # what test and val leave
        warmup.main(warmup.Args(device="cpu", data="mathv360k", data_root=str(root), model=str(tiny), runs=str(tmp_path / "runs"), samples=1, max_new_tokens=4))
    assert {name: len(common.read_jsonl(root / f"{name}.jsonl")) for name in ("train", "unlabeled", "test", "val")} == {
        "train": 60, "unlabeled": 0, "test": 750, "val": 250}


# ---- data files at scale

def lines(folder, count):
    (folder / "images").mkdir(parents=True)
    (folder / "images/0.png").write_bytes(picture(0))
    for i in range(1, count):
        os.link(folder / "images/0.png", folder / f"images/{i}.png")
    common.write_jsonl(folder / "d.jsonl", [{"id": str(i), "image": f"images/{i}.png", "question": "q", "answer": "7", "source": "s"} for i in range(count)])
    return folder / "d.jsonl"


def test_of_many_images_all_must_exist_a_sample_is_verified_and_the_rest_when_read(tmp_path):
    path = lines(tmp_path, 4100)  # more than 4,096: every second one is verified
    (tmp_path / "images/1.png").unlink()
    (tmp_path / "images/1.png").write_bytes(b"no image")
    examples = common.load_examples(path)
    with pytest.raises(common.InputError, match="d.jsonl line 2: image .*1.png cannot be read"):
        common.read_image(examples[1])
    assert common.read_image(examples[0]).size == (24, 24)
    (tmp_path / "images/2.png").unlink()
    (tmp_path / "images/2.png").write_bytes(b"no image")
    with pytest.raises(common.InputError, match="line 3: image .* cannot be read"):
        common.load_examples(path)
    (tmp_path / "images/2.png").unlink()
    with pytest.raises(common.InputError, match="line 3: image .* does not exist"):
        common.load_examples(path)


def test_a_link_in_the_data_folder_may_lead_out_of_it_a_record_may_not(tmp_path):
    lines(tmp_path / "store", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/images").symlink_to(tmp_path / "store/images")
    shutil.copy(tmp_path / "store/d.jsonl", tmp_path / "data/d.jsonl")
    assert len(common.load_examples(tmp_path / "data/d.jsonl")) == 2
    common.write_jsonl(tmp_path / "data/d.jsonl", [{"id": "a", "image": "images/../../store/images/0.png", "question": "q", "answer": "7", "source": "s"}])
    with pytest.raises(common.InputError, match="leaves the data folder"):
        common.load_examples(tmp_path / "data/d.jsonl")


@pytest.mark.parametrize("fields, message", [({"answer_type": "number"}, '"answer_type" must be one of'), ({"answer_type": "float", "precision": 1.5}, '"precision" a count'),
                                             ({"answer_type": "float", "precision": -1}, '"precision" a count'), ({"answer_type": "integer", "answer": "x"}, "cannot be read as its answer_type"),
                                             ({"answer_type": "list", "answer": "[1, a]"}, "cannot be read"), ({"answer_type": "letter", "answer": "cat"}, "cannot be read")])
def test_an_answer_type_that_is_unknown_or_does_not_fit_is_refused_with_its_line(tmp_path, fields, message):
    lines(tmp_path, 1)
    common.write_jsonl(tmp_path / "d.jsonl", [{**common.read_jsonl(tmp_path / "d.jsonl")[0], **fields}])
    with pytest.raises(common.InputError, match=f"d.jsonl line 1: .*{message}"):
        common.load_examples(tmp_path / "d.jsonl")
