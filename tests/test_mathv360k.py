"""MathV360K: published records to examples, and its split by image; small files of its schema."""

import io
import json
import shutil
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
from conftest import stage
from PIL import Image

import common

warmup = stage("01_warmup")

RECORDS = "train_samples_all_tuning.json"
SMALL = {"test": 8, "val": 4}
HINTS = {  # as the published file words them
    "letter": "Hint: Please answer the question and provide the correct option letter, "
    "e.g., A, B, C, D, at the end.",
    "integer": "Hint: Please answer the question requiring an integer answer and provide "
    "the final value, e.g., 1, 2, 3, at the end.",
    "float": "Hint: Please answer the question requiring a floating-point number with two decimal "
    "places and provide the final value, e.g., 1.23, 1.34, at the end.",
    "list": "Hint: Please answer the question requiring a Python list as an answer and provide "
    "the final list, e.g., [1, 2, 3], [1.2, 1.3], at the end.",
    "free": "Hint: Please answer the question and provide the final answer at the end.",
}


def record(image, question, answer, hint="free", choices=()):
    """A record as it is published."""
    asked = f"<image>\n{HINTS[hint]}\nQuestion: {question}"
    if choices:
        lines = [f"({letter}) {text}" for letter, text in zip("ABCDEFGH", choices)]
        asked += "\n".join(["\nChoices:", *lines])
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": "identity_0", "image": image, "conversations": turns}


def put(folder, records, images=True):
    """A folder with the list of records and, beside it, their images."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORDS).write_text(json.dumps(records, indent=2))
    pixels = io.BytesIO()
    Image.new("RGB", (24, 24), "red").save(pixels, "PNG")
    names = {row["image"] for row in records} if images else set()
    for name in names:
        path = folder / "data_images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pixels.getvalue())
    return folder


def world_of(images):
    """Three records to each image, of three sources; texts that many images share; five odd ones.

    The odd ones: a conflict (two records), an agreeing pair, and one that cannot be used.
    """
    records = []
    for i in range(images):
        for k, text in enumerate(("How many dots?", "How many lines?", f"What stands in row {i}?")):
            image = f"S{i % 3}/images/{i}.png"
            records.append(record(image, text, f"The answer is {i + k}.", "integer"))
    for image, text, answer in (
        ("S0/images/0.png", "Twice?", "The answer is 7"),
        ("S0/images/0.png", "Twice?", "The answer is 8"),
        ("S1/images/1.png", "Agreed?", "The answer is 7.0"),
        ("S1/images/1.png", "Agreed?", "7"),
        ("S1/images/1.png", "Broken?", "The answer is many"),
    ):
        records.append(record(image, text, answer, "integer"))
    return records


def split(root, monkeypatch, seed=0, sizes=SMALL):
    """The path of train.jsonl after a split into small test and val sets."""
    monkeypatch.setattr(warmup, "HELD_OUT", sizes)
    return warmup.split_mathv360k(root, seed)


def files_of(root):
    """What stands in the files of a folder, and when it was written."""
    files = [path for path in root.iterdir() if path.is_file()]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ---- records


@pytest.mark.parametrize(
    "given, wanted",
    [
        (
            record("Geometry3K/images/454.png", "Find x.", "The answer is B", "letter", ["4", "5"]),
            {"answer": "B", "choices": ["4", "5"], "source": "Geometry3K"},
        ),
        (record("a/1.png", "Find x.", "The answer is 5.", "letter", ["4", "5"]), {"answer": "B"}),
        (record("a/1.png", "Find x.", "(b)", "letter", ["4", "5"]), {"answer": "B"}),
        (
            record("TabMWP/images/1.png", "How many?", "The answer is 1,250.", "integer"),
            {"answer": "1,250", "choices": None, "answer_type": "integer", "precision": None},
        ),
        (
            record("TabMWP/images/1.png", "How much?", "100", "float"),
            {"answer": "100", "answer_type": "float", "precision": 2},
        ),
        (record("a/1.png", "How much?", " .5 ", "float"), {"answer": ".5"}),
        (
            record("a/1.png", "Which years?", "The answer is [2007, 2008]", "list"),
            {"answer": "[2007, 2008]", "answer_type": "list"},
        ),
        (
            record("VQA2.0/images/1.png", "What colour?", "The answer is Dark Blue."),
            {
                "answer": "Dark Blue",
                "answer_type": None,
                "question": HINTS["free"] + "\nQuestion: What colour?",
            },
        ),
        (record("a/1.png", "What does he do?", "Answering a call"), {"answer": "Answering a call"}),
        (
            record("IQTest/images/1.png", "Which fits?", "answer: C", "letter"),
            {"answer": "C", "choices": None, "answer_type": "letter"},
        ),
    ],
)
def test_a_record_becomes_an_example_in_its_own_words(given, wanted):
    example = warmup.convert(given, 9)
    assert {key: example[key] for key in wanted} == wanted
    assert example["id"] == "mathv360k-9"
    assert example["image"] == "data_images/" + given["image"]
    # What we ask is what the data set asks, and its own answer is right.
    assert "<image>\n" + common.user_text(example, "") == given["conversations"][0]["value"]
    assert common.is_correct(
        common.extract_answer(f"Answer: {example['answer']}", example), example
    )


TURNS = record("a/1.png", "q", "7")["conversations"]
FORM = "not of the published form"
CHOICES = "not <image>, a question, and choices (A) ..., (B) ..., one a line"
ANSWER = "an answer that is not what the question asks for"


@pytest.mark.parametrize(
    "given, reason",
    [
        ("text", FORM),
        (None, FORM),
        ({"image": "a/1.png"}, FORM),
        ({"image": None, "conversations": TURNS}, FORM),
        ({"image": "a/1.png", "conversations": TURNS * 2}, FORM),
        ({"image": "a/1.png", "conversations": TURNS[:1]}, FORM),
        ({"image": "a/1.png", "conversations": [{"from": "human", "value": 7}, TURNS[1]]}, FORM),
        ({"image": "a/1.png", "conversations": TURNS[::-1]}, CHOICES),
        (record("a/1.png", "q", "A", "letter", ["4"]), CHOICES),
        (record("a/1.png", "Are <image> and this one alike?", "yes"), CHOICES),
        (record("a/1.png", "q\nChoices:\n(A) 4\n(C) 5", "A", "letter"), CHOICES),
        (record("a/1.png", "q\nChoices:\nA. 4\nB. 5", "A", "letter"), CHOICES),
        (record("a/1.png", "q\nChoices:\n(A) \n(B) 5", "B", "letter"), CHOICES),
        (record("a/1.png", "q", "The answer is ."), ANSWER),
        (record("a/1.png", "q", "The answer is D", "letter", ["4", "5"]), ANSWER),
        (record("a/1.png", "q", "The answer is four", "integer"), ANSWER),
        (record("a/1.png", "q", "cat", "letter"), ANSWER),
    ],
)
def test_a_record_that_cannot_be_used_says_why(given, reason):
    with pytest.raises(common.InputError) as refused:
        warmup.convert(given, 9)
    assert str(refused.value) == reason


@pytest.mark.parametrize("text", ["", '{"a": 1}', '[{"a": 1}, {"a"', '[{"a": 1} {"a": 2}]', "7"])
def test_a_file_that_is_no_whole_list_is_refused_with_its_name(tmp_path, text):
    (tmp_path / RECORDS).write_text(text)
    with pytest.raises(common.InputError, match=f"{RECORDS} is not a whole JSON list"):
        warmup.read_mathv360k(tmp_path / RECORDS)


def test_a_file_that_is_not_utf_8_is_refused_with_its_name(tmp_path):
    (tmp_path / RECORDS).write_bytes(b'["\xff"]')
    with pytest.raises(common.InputError, match=f"{RECORDS} is not a whole JSON list"):
        warmup.read_mathv360k(tmp_path / RECORDS)


def test_few_unusable_records_are_counted_by_reason_and_more_than_a_tenth_refused(tmp_path):
    good = [record(f"a/{i}.png", "q", "7") for i in range(18)]
    root = put(
        tmp_path, [*good, record("a/1.png", "q", "cat", "integer"), record("b.png", "q", "7")]
    )
    (root / "data_images/b.png").unlink()
    examples, left_out = warmup.read_mathv360k(root / RECORDS)
    assert [row["id"] for row in examples] == [f"mathv360k-{n}" for n in range(1, 19)]
    assert left_out == {ANSWER: 1, "an image that is not there": 1}  # 2 of 20: a tenth
    (root / "data_images/a/0.png").unlink()
    with pytest.raises(common.InputError, match="not whole; unusable: .*not there': 2"):
        warmup.read_mathv360k(root / RECORDS)


@pytest.mark.parametrize(
    "first, second, agree",
    [
        (("q", "7", "integer"), ("q", "7.0", "integer"), True),
        (("q", "7", "integer"), ("q", "8", "integer"), False),
        (("q", "Dark Blue"), ("q", "dark blue."), True),
        (("q", "5 cm"), ("q", "5"), True),  # a missing unit fits any
        (("q", "5 cm"), ("q", "5 m"), False),
        (("q", "7", "integer"), ("another q", "8", "integer"), True),
        (("q", "A", "letter", ["4", "5"]), ("q", "4", "letter", ["4", "5"]), True),
        (("q", "A", "letter", ["4", "5"]), ("q", "B", "letter", ["4", "5"]), False),
        (("q", "A", "letter", ["4", "5"]), ("q", "B", "letter", ["6", "7"]), True),
    ],
)
def test_records_that_ask_the_same_of_an_image_must_agree(tmp_path, first, second, agree):
    records = [record("a/1.png", *first), record("a/1.png", *second), record("a/2.png", *second)]
    examples, left_out = warmup.read_mathv360k(put(tmp_path, records) / RECORDS)
    assert [row["id"] for row in examples] == [
        f"mathv360k-{n}" for n in (1, 2, 3) if agree or n == 3
    ]
    assert left_out["conflicting answers"] == (0 if agree else 2)


# ---- the split


@pytest.mark.parametrize("seed", range(4))
def test_the_image_decides_and_half_of_the_records_are_labelled(seed):
    sizes = [1 + i % 7 for i in range(400)]  # records of each image, 1,597 in all
    examples = [
        {"id": f"{i}-{k}", "image": f"{i}.png"} for i in range(400) for k in range(sizes[i])
    ]
    splits = warmup.split_by_image(examples, {"test": 75, "val": 25}, seed)
    assert list(splits) == ["train", "test", "val", "unlabeled"]
    owner = {}
    for name, rows in splits.items():
        for row in rows:
            assert owner.setdefault(row["image"], name) == name
    assert set(owner) == {row["image"] for row in examples}  # no image is lost
    assert 799 <= len(splits["train"]) < 799 + 7  # half, to the last image
    for name, size in (("test", 75), ("val", 25)):
        assert len(splits[name]) == len({row["image"] for row in splits[name]}) == size
    for name in ("train", "unlabeled"):  # whole images
        counts = Counter(row["image"] for row in splits[name])
        assert all(n == sizes[int(image.removesuffix(".png"))] for image, n in counts.items())


def test_a_split_follows_from_paths_and_seed_not_from_the_order_of_the_file():
    examples = [{"id": f"{i}-{k}", "image": f"{i}.png"} for i in range(60) for k in range(2)]
    backwards = sorted(examples, key=lambda row: -int(row["id"].split("-")[0]))

    def images(rows, seed):
        splits = warmup.split_by_image(rows, SMALL, seed)
        return {name: [row["image"] for row in found] for name, found in splits.items()}

    assert images(examples, 0) == images(backwards, 0) == images(examples, 0)
    assert images(examples, 0) != images(examples, 1)


def test_the_record_of_a_test_image_may_be_any_of_its_records():
    examples = [{"id": f"{i}-{k}", "image": f"{i}.png"} for i in range(600) for k in range(3)]
    drawn = warmup.split_by_image(examples, {"test": 200, "val": 1}, 0)["test"]
    counts = Counter(row["id"].split("-")[1] for row in drawn)
    assert set(counts) == {"0", "1", "2"} and min(counts.values()) > 40  # of 200, a third each


def test_too_few_images_are_refused():
    examples = [{"image": f"{i}.png"} for i in range(24)]  # 12 are labelled, 12 held out, none left
    with pytest.raises(common.InputError, match="24 images .* too few for {'test': 8, 'val': 4}"):
        warmup.split_by_image(examples, SMALL, 0)
    more = [*examples, {"image": "x"}, {"image": "y"}]  # 13, 12 and one
    assert len(warmup.split_by_image(more, SMALL, 0)["unlabeled"]) == 1


def test_the_split_on_disk_is_complete_disjoint_and_readable(tmp_path, monkeypatch):
    root = put(tmp_path / "m", world_of(60))
    assert split(root, monkeypatch) == root / "train.jsonl"
    report, owner, ids = json.loads((root / "split.json").read_text()), {}, []
    for name in ("train", "unlabeled", "test", "val"):
        examples = common.load_examples(root / f"{name}.jsonl")
        sources = Counter(example["source"] for example in examples)
        assert report[name] == {"records": len(examples), **sources}
        ids += [example["id"] for example in examples]
        for example in examples:
            assert owner.setdefault(example["image"], name) == name
    assert len(ids) == len(set(ids)) and len(owner) == 60
    # Of 185 records one is broken and two conflict. The 12 images of test and val have two others
    # each; image 1 has four.
    others = 26 if owner[str(root / "data_images/S1/images/1.png")] in SMALL else 24
    assert report["left_out"] == {
        ANSWER: 1,
        "conflicting answers": 2,
        "of an image in test or val": others,
    }
    assert len(ids) == 185 - 3 - others
    assert 91 <= report["train"]["records"] < 91 + 5  # half of 182, to the last image
    assert (report["test"]["records"], report["val"]["records"]) == (8, 4)
    assert (report["seed"], report["held_out"]) == (0, SMALL)
    assert report["source"] == common.digest(root / RECORDS)
    names = ("train", "unlabeled", "test", "val")
    wanted = [
        ".lock",
        "data_images",
        "digests.json",
        "split.json",
        RECORDS,
        *(f"{name}.jsonl" for name in names),
    ]
    assert sorted(path.name for path in root.iterdir()) == sorted(wanted)


def test_a_split_is_reused_and_one_of_another_seed_file_or_size_is_refused(tmp_path, monkeypatch):
    root = put(tmp_path / "m", world_of(60))
    split(root, monkeypatch)
    before = files_of(root)
    split(root, monkeypatch)
    assert files_of(root) == before
    with pytest.raises(common.InputError, match="split.json: seed was 0, now 1; delete it"):
        split(root, monkeypatch, seed=1)
    with pytest.raises(common.InputError, match="held_out was .*8.*, now .*9.*; delete it"):
        split(root, monkeypatch, sizes={"test": 9, "val": 4})
    put(root, world_of(61))
    with pytest.raises(common.InputError, match="source was .*, now .*; delete it"):
        split(root, monkeypatch)


def test_runs_that_start_at_once_split_once(tmp_path, monkeypatch):
    root = put(tmp_path / "m", world_of(60))
    monkeypatch.setattr(warmup, "HELD_OUT", SMALL)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(warmup.split_mathv360k, [root] * 4, [0] * 4))
    assert made == [root / "train.jsonl"] * 4
    assert not list(root.glob("*.part"))


def test_what_a_killed_split_left_counts_for_nothing(tmp_path, monkeypatch):
    root = put(tmp_path / "m", world_of(60))
    split(root, monkeypatch)
    whole = {name: text for name, (_, text) in files_of(root).items()}
    (root / "split.json").unlink()  # it is written last
    (root / "train.jsonl").write_text("torn")
    (root / "val.jsonl").unlink()
    (root / "test.jsonl.part").write_text("torn")
    split(root, monkeypatch)
    assert {name: text for name, (_, text) in files_of(root).items()} == whole


# ---- the hub


def test_without_the_files_and_the_hub_the_sentence_says_what_to_put_where(tmp_path):
    message = f"the hub fails .*: put {RECORDS} and data_images/ into .*none, or name another"
    with pytest.raises(common.InputError, match=message):
        warmup.split_mathv360k(tmp_path / "none", 0)


def test_what_the_hub_sends_is_unpacked_and_a_killed_unpacking_done_again(tmp_path, monkeypatch):
    published, cache, root = put(tmp_path / "hub", world_of(60)), tmp_path / "cache", tmp_path / "m"

    def download(repo, repo_type):
        """As snapshot_download: the list and the images, zipped, in a folder of the cache."""
        assert (repo, repo_type) == ("Zhiqiang007/MathV360K", "dataset")
        cache.mkdir()
        shutil.copy(published / RECORDS, cache)
        with zipfile.ZipFile(cache / "data_images.zip", "w") as archive:
            for path in (published / "data_images").rglob("*.png"):
                archive.write(path, path.relative_to(published))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    put(root, world_of(1))  # as after a kill: an image is torn, the list is not there
    (root / "data_images/S0/images/0.png").write_bytes(b"torn")
    (root / RECORDS).unlink()
    assert split(root, monkeypatch).read_bytes() == split(published, monkeypatch).read_bytes()
    shutil.rmtree(cache)  # it is not needed again
    split(root, monkeypatch)


# ---- the stage


def test_warmup_takes_mathv360k_by_its_name(tmp_path, tiny):
    """2,120 records of as many images: 1,060 are labelled, and the other half leaves 60."""
    records = [
        record(f"S/images/{i % 60}_{i}.png", "How many?", "The answer is 999999", "integer")
        for i in range(2120)
    ]
    root = put(tmp_path / "m", records)
    paths = {"data_root": str(root), "model": str(tiny), "runs": str(tmp_path / "runs")}
    args = warmup.Args(device="cpu", data="mathv360k", samples=1, max_new_tokens=2, **paths)
    with pytest.raises(common.InputError, match="none of 1060 sampled responses is right"):
        warmup.main(args)
    common.close_runs()
    counts = {
        name: len(common.read_jsonl(root / f"{name}.jsonl"))
        for name in ("train", "unlabeled", "test", "val")
    }
    assert counts == {"train": 1060, "unlabeled": 60, "test": 750, "val": 250}
