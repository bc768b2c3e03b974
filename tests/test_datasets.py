"""MathV360K and the five benchmarks: small hand-written files of the published schemas, with every quirk that is known."""

import base64
import io
import json
import os
import random
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

import common
from conftest import stage

warmup, evolve, evaluation = stage("01_warmup"), stage("03_self_evolve"), stage("04_eval")


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
    (tmp_path / "n/data_images").mkdir(parents=True)
    with pytest.raises(common.InputError, match="too many cannot be used.*data_images whole"):
        warmup.split_mathv360k(put(tmp_path / "n", world_of(120), images=False), 0, SMALL)


def test_without_the_files_and_without_the_hub_the_sentence_says_what_to_put_where(tmp_path):
    with pytest.raises(common.InputError, match="none does not hold train_samples_all_tuning.json and data_images/, and the hub cannot be reached.*put them there"):
        warmup.split_mathv360k(tmp_path / "none", 0)


@pytest.mark.parametrize("top", ["data_images/", ""])
def test_what_the_hub_sends_is_unpacked_and_a_killed_unpacking_is_done_again(tmp_path, monkeypatch, top):
    import huggingface_hub
    published, root = put(tmp_path / "hub", world_of(120)), tmp_path / "m"

    def download(repo, repo_type, local_dir, allow_patterns):
        assert (repo, repo_type) == ("Zhiqiang007/MathV360K", "dataset")
        local_dir.mkdir(exist_ok=True)
        shutil.copy(published / "train_samples_all_tuning.json", local_dir)
        with zipfile.ZipFile(local_dir / "data_images.zip", "w") as archive:
            for path in (published / "data_images").rglob("*.png"):
                archive.write(path, top + str(path.relative_to(published / "data_images")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (root / "images.part/half").mkdir(parents=True)  # as after a kill: the list is there, the images are not
    shutil.copy(published / "train_samples_all_tuning.json", root)
    warmup.split_mathv360k(root, 0, SMALL)
    assert (root / "train.jsonl").read_bytes() == (warmup.split_mathv360k(published, 0, SMALL)).read_bytes()
    assert not (root / "images.part").exists() and not (root / "data_images/half").exists()


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


def test_of_many_images_all_must_open_a_sample_is_verified_and_the_rest_when_read(tmp_path):
    path = lines(tmp_path, 4100)  # more than 4,096: every second one is verified
    (tmp_path / "images/1.png").unlink()
    (tmp_path / "images/1.png").write_bytes(picture(0)[:60])  # its header is whole
    examples = common.load_examples(path)
    with pytest.raises(common.InputError, match="d.jsonl line 2: image .*1.png cannot be read"):
        common.read_image(examples[1])
    assert common.read_image(examples[0]).size == (24, 24)
    (tmp_path / "images/2.png").unlink()
    (tmp_path / "images/2.png").write_bytes(picture(0)[:60])
    with pytest.raises(common.InputError, match="line 3: image .* cannot be read"):
        common.load_examples(path)
    (tmp_path / "images/2.png").unlink()
    with pytest.raises(common.InputError, match="line 3: image .* does not exist"):
        common.load_examples(path)
    (tmp_path / "images/1.png").write_bytes(b"no image")
    with pytest.raises(common.InputError, match="line 2: image .* cannot be read"):
        common.load_examples(path)


@pytest.mark.parametrize("check", ["bytes", ""])
def test_a_jpeg_that_was_cut_is_refused_by_the_first_look_and_by_use(tmp_path, check):
    Image.effect_noise((200, 200), 50).convert("RGB").save(tmp_path / "a.jpg")
    example = {"image": str(tmp_path / "a.jpg"), "where": "d.jsonl line 1"}
    common.read_image(example, check)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-2000])
    with pytest.raises(common.InputError, match="d.jsonl line 1: image .*a.jpg cannot be read .* put a whole file in its place"):
        common.read_image(example, check)


def test_what_is_transparent_becomes_white_and_16_bit_grey_keeps_its_shades(tmp_path):
    def pixels(image):
        image.save(tmp_path / "a.png")
        read = common.read_image({"image": str(tmp_path / "a.png"), "where": "line 1"})
        assert read.mode == "RGB"
        return [read.getpixel((x, 0)) for x in range(read.width)]

    drawing = Image.new("RGBA", (3, 1), (0, 0, 0, 0))  # nothing, a black stroke, half of a red one
    drawing.putpixel((1, 0), (0, 0, 0, 255))
    drawing.putpixel((2, 0), (255, 0, 0, 128))
    assert pixels(drawing) == [(255, 255, 255), (0, 0, 0), (255, 127, 127)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    assert pixels(palette) == [(255, 255, 255), (40, 50, 60)]
    deep = Image.fromarray(np.array([[0, 40092, 65535]], dtype=np.uint16))  # 40092 = 156 x 257
    assert pixels(deep) == [(0, 0, 0), (156, 156, 156), (255, 255, 255)]
    assert pixels(Image.new("RGB", (1, 1), (1, 2, 3))) == [(1, 2, 3)] and pixels(Image.new("L", (1, 1), 9)) == [(9, 9, 9)]


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


# ---- benchmarks: published records to examples

@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The `datasets` package, with its cache in a folder of its own."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return package


def parquet(path, rows, image=None):
    """Rows as a parquet file; `image` names a column of bytes that becomes a Hugging Face image column, as its writers save it."""
    import datasets
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list([{**row, image: {"bytes": row[image], "path": None}} for row in rows])
    table.cast_column(image, datasets.Image()).to_parquet(str(path))
    return path.parent


def bare_parquet(path, rows):
    """Rows as a parquet file without the notes of the `datasets` package: an image is a struct of bytes and path."""
    import pyarrow
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.parent


def made(name, folder):
    """The checked examples of a benchmark folder by id."""
    return {e["id"].removeprefix(name + "-"): e for e in common.load_examples(evaluation.make_benchmark(name, folder))}


def vista(pid, question, answer, kind, choices=None, precision=None, hint="Hint: h", task="math word problem", unit=None):
    query = f"{hint}\nQuestion: {question}" + (f" (Unit: {unit})" if unit else "") + ("\nChoices:\n" + "\n".join(f"({c}) {t}" for c, t in zip("ABCDEFGH", choices)) if choices else "")
    return {"pid": pid, "question": question, "image": f"images/{pid}.jpg", "decoded_image": picture(int(pid) % 256), "choices": choices, "unit": unit, "precision": precision,
            "answer": answer, "question_type": "multi_choice" if choices else "free_form", "answer_type": kind, "query": query,
            "metadata": {"task": task, "source": "IQTest", "category": "math-targeted-vqa", "skills": ["logical reasoning"], "grade": "college", "language": "english", "split": "testmini"}}


VISTA = [vista("168", "Which shape?", "(a)", "text", ["(c)", "(a)", "(b)"], task="geometry problem solving"), vista("1", "How many?", "7", "integer", task="figure question answering"),
         vista("2", "How much?", "1.45", "float", precision=2.0, unit="$"), vista("3", "Which years?", "[2007, 2008]", "list", task="textbook question answering"),
         vista("4", "Is it?", "No", "text", ["Yes", "No"], task="visual question answering"),
         vista("5", "Pick.", "h", "text", list("hgfedcba"), task="visual question answering")]


def test_mathvista_asks_its_own_query_and_answers_are_positions_or_typed(datasets, tmp_path):
    folder = parquet(tmp_path / "mathvista/data/testmini-00000-of-00001.parquet", VISTA, "decoded_image").parent
    parquet(folder / "data/test-00000-of-00002.parquet", [vista("9", "hidden", "", "text", ["Yes", "No"])], "decoded_image")  # the set without answers lies beside it
    got = made("mathvista", folder)
    assert list(got) == ["168", "1", "2", "3", "4", "5"]
    assert {k: (e["answer"], e.get("answer_type"), e.get("precision"), e["category"]) for k, e in got.items()} == {
        "168": ("B", None, None, "GPS"), "1": ("7", "integer", None, "FQA"), "2": ("1.45", "float", 2, "MWP"), "3": ("[2007, 2008]", "list", None, "TQA"),
        "4": ("B", None, None, "VQA"), "5": ("A", None, None, "VQA")}
    for row in VISTA:
        assert common.user_text(got[row["pid"]], "") == row["query"] and common.read_image(got[row["pid"]]).getpixel((0, 0))[0] == int(row["pid"]) % 256
    judge = lambda pid, response: common.is_correct(common.extract_answer(response, got[pid]), got[pid])
    assert judge("168", "Answer: (b)") and not judge("168", "Answer: (a)")  # a letter is a position
    assert judge("2", "Answer: $1.451") and not judge("2", "Answer: 1.46") and judge("3", "Answer: [2007, 2008]")
    assert judge("5", "Answer: A") and not judge("5", "Answer: H") and not judge("4", "")  # the empty answer earns nothing


def test_mathvista_by_image_path_reads_the_files_beside_its_json(datasets, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "decoded_image"} for row in VISTA[:2]]
    (tmp_path / "mathvista/images").mkdir(parents=True)
    (tmp_path / "mathvista/testmini.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        (tmp_path / "mathvista" / row["image"]).write_bytes(picture(3, "JPEG"))
    lines = made("mathvista", tmp_path / "mathvista")
    assert [e["image"] for e in lines.values()] == [str(tmp_path / "mathvista/images" / f"{p}.jpg") for p in (168, 1)]
    (tmp_path / "mathvista/testmini.jsonl").unlink()
    (tmp_path / "mathvista/testmini.json").write_text(json.dumps({row["pid"]: row for row in rows}))  # the form of the authors' own repository
    assert made("mathvista", tmp_path / "mathvista") == lines
    (tmp_path / "mathvista/testmini.json").write_text("".join(json.dumps(row) + "\n" for row in rows))  # JSON lines under the name of JSON
    assert made("mathvista", tmp_path / "mathvista") == lines


@pytest.mark.parametrize("change, message", [({"query": "Hint: h\nQuestion: q\nChoices:\n(A) Yes\n(B) Maybe"}, "do not fit together"), ({"answer": "Maybe"}, "do not fit together"),
                                             ({"choices": None}, "do not fit together"), ({"metadata": {"task": "poetry"}}, "poetry"), ({"decoded_image": b"text"}, "cannot identify image")])
def test_a_mathvista_record_of_another_form_is_refused_with_its_number(datasets, tmp_path, change, message):
    folder = parquet(tmp_path / "mathvista/testmini.parquet", [{**VISTA[4], **change}], "decoded_image")
    with pytest.raises(common.InputError, match=f"mathvista record 1 is not as published .*{message}"):
        evaluation.make_benchmark("mathvista", folder)


def cot(name, context, choices, answer, domain):
    return {"id": name, "category": "c", "image_id": name, "question": "Which?", "choices": choices, "context": context, "answer": answer, "rationale": "because",
            "split": "test", "image": {"bytes": picture(9, "JPEG"), "path": None}, "domain": domain, "topic": "t"}


def test_m3cot_has_a_line_of_context_only_where_there_is_some(datasets, tmp_path):
    got = made("m3cot", bare_parquet(tmp_path / "m3cot/data/test-00000-of-00001.parquet", [
        cot("s-1", "", ["x", "y"], "A", "science"), cot("c-2", "It rains.", ["a", "b", "c", "d", "e"], "E", "commonsense"), cot("m-3", "  \n", ["1", "2"], "B", "mathematics")]))
    assert [(e["question"], e["answer"], e["category"]) for e in got.values()] == [
        ("Which?", "A", "science"), ("Context: It rains.\nWhich?", "E", "commonsense"), ("Which?", "B", "mathematics")]
    assert len({e["image"] for e in got.values()}) == 1 and got["s-1"]["image"].endswith(".jpeg")  # one file for one image


def star(index, question, answer, category):
    return {"index": index, "question": question, "image": {"bytes": picture(index), "path": "x.jpg"}, "answer": answer, "category": category, "l2_category": "l", "meta_info": {"source": "s"}}


def test_mmstar_r_keeps_its_options_in_the_question_and_drops_perception(datasets, tmp_path):
    asked = "Which?\nOptions: A: red, blue, B: 1,200 km, C: none, D: both"
    got = made("mmstar_r", bare_parquet(tmp_path / "mmstar_r/mmstar.parquet", [
        star(0, "q", "A", "coarse perception"), star(1, asked, "B", "logical reasoning"), star(2, "q", "A", "fine-grained perception"),
        star(3, "Hint: h\nQuestion: q\nChoices:\n(A) 4\n(B) 5", "B", "math"), star(4, asked, "A", "science & technology"), star(5, asked, "C", "instance reasoning")]))
    assert list(got) == ["1", "3", "4", "5"] and got["1"]["question"] == asked and all(e["choices"] is None and e["answer_type"] == "letter" for e in got.values())
    judge = lambda key, response: common.is_correct(common.extract_answer(response, got[key]), got[key])
    assert judge("1", "Answer: B: 1,200 km") and judge("4", "Answer: A: red, blue") and judge("3", "Answer: (B) 5") and judge("5", "Answer: c")
    assert not judge("3", "Answer: 5") and not judge("4", "Answer: A: red, B: 1,200 km") and not judge("1", "Answer: B: red, blue") and not judge("3", "Answer: (B) 4")


HEADER = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment", "split"]


def bench(index, image, answer, options, l2="logic_reasoning", hint="", question="Which?"):
    return [str(index), question, hint, *(options + ["", "", "", ""])[:4], answer, "c", image, "s", l2, "", "dev"]


def tsv(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "MMBench_DEV_EN_V11.tsv").write_text("\n".join("\t".join(row) for row in [HEADER, *rows]) + "\n", encoding="utf-8")
    return folder


PIXELS = [base64.b64encode(picture(k)).decode() for k in (10, 20, 30)]
MMBENCH = [bench(1000007, "7", "A", ["3", "2", "None"]), bench(7, PIXELS[0], "B", ["2", "3", "None"]), bench(2000007, "7", "C", ["None", "2", "3"]),  # a copy before its base row
           bench(8, PIXELS[1], "A", ["yes", "no"], "coarse_perception"), bench(9, "8", "B", ["yes", "no"], "attribute_reasoning", hint="Look."),   # the image of a row that is dropped
           bench(10, PIXELS[2], "A", ["a", "b", "c", "d"], "relation_reasoning", hint="nan"), bench(11, "10", "A", ["x", "y"], "finegrained_perception (cross-instance)")]


def test_mmbench_r_groups_circular_copies_and_finds_images_in_other_rows(datasets, tmp_path):
    got = made("mmbench_r", tsv(tmp_path / "mmbench_r", MMBENCH))
    assert {k: (e["group"], e["answer"], e["choices"]) for k, e in got.items()} == {
        "1000007": (7, "A", ["3", "2", "None"]), "7": (7, "B", ["2", "3", "None"]), "2000007": (7, "C", ["None", "2", "3"]), "9": (9, "B", ["yes", "no"]), "10": (10, "A", list("abcd"))}
    assert {k: common.read_image(e).getpixel((0, 0))[0] for k, e in got.items()} == {"1000007": 10, "7": 10, "2000007": 10, "9": 20, "10": 30}
    assert got["9"]["question"] == "Hint: Look.\nQuestion: Which?" and got["7"]["question"] == got["10"]["question"] == "Which?"


@pytest.mark.parametrize("row, message", [(bench(12, "99", "A", ["x", "y"]), "mmbench_r-12: its image is said to be in row 99"), (bench(12, "A" * 80, "A", ["x", "y"]), "record 8 .*cannot identify image"),
                                          (bench(12, PIXELS[0], "A", ["x", "", "z"]), "an option is missing"), (bench(12, PIXELS[0], "A", ["x", "y"], "poetry"), "unknown l2-category"),
                                          (bench("twelve", PIXELS[0], "A", ["x", "y"]), "record 8 is not as published")])
def test_an_mmbench_row_of_another_form_is_refused(datasets, tmp_path, row, message):
    with pytest.raises(common.InputError, match=message):
        evaluation.make_benchmark("mmbench_r", tsv(tmp_path / "mmbench_r", [*MMBENCH, row]))


def test_ai2d_answers_are_positions_even_where_options_are_letters(datasets, tmp_path):
    row = lambda options, answer: {"question": "Which part?", "options": options, "answer": answer, "image": {"bytes": picture(50), "path": None}}
    got = made("ai2d", bare_parquet(tmp_path / "ai2d/data/test-00000-of-00001.parquet", [row(["B", "C", "D", "A"], "3"), row(["leaf", "root", "stem", "bud"], "0")]))
    assert [e["answer"] for e in got.values()] == ["D", "A"]
    judge = lambda response: common.is_correct(common.extract_answer(response, got["0"]), got["0"])
    assert judge("Answer: D") and not judge("Answer: A") and judge("Answer: (D) A") and not judge("Answer: (D) D")


def test_a_benchmark_without_files_or_with_two_formats_says_what_to_do(datasets, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(common.InputError, match="ai2d has no file .*lmms-lab/ai2d cannot be reached .no route.*put it there or name its parent by --data_root"):
        evaluation.make_benchmark("ai2d", tmp_path / "ai2d")
    with pytest.raises(common.InputError, match="mmbench_r has no file .*put .*MMBench_DEV_EN_V11.tsv there"):
        evaluation.make_benchmark("mmbench_r", tmp_path / "mmbench_r")
    monkeypatch.undo()
    (tmp_path / "m3cot").mkdir()
    (tmp_path / "m3cot/test.parquet").write_text("no parquet")
    with pytest.raises(common.InputError, match="m3cot/test.parquet cannot be read"):
        evaluation.make_benchmark("m3cot", tmp_path / "m3cot")
    for name in ("test.parquet", "test.jsonl"):
        (tmp_path / "ai2d" / name).write_text("")
    with pytest.raises(common.InputError, match="keep one format"):
        evaluation.make_benchmark("ai2d", tmp_path / "ai2d")


def test_a_benchmark_made_once_serves_without_its_files_and_is_remade_with_them(datasets, tmp_path):
    out = evaluation.make_benchmark("mmbench_r", tsv(tmp_path / "mmbench_r", MMBENCH))
    before = out.read_bytes()
    assert evaluation.make_benchmark("mmbench_r", tsv(tmp_path / "mmbench_r", MMBENCH[:2])).read_bytes() != before
    assert len(list((tmp_path / "mmbench_r/images").iterdir())) == 3  # written once
    (tmp_path / "mmbench_r/MMBench_DEV_EN_V11.tsv").unlink()
    assert len(made("mmbench_r", tmp_path / "mmbench_r")) == 2


# ---- benchmarks: figures

def test_circular_accuracy_needs_every_copy_and_macro_is_not_micro():
    examples = {f"mmbench_r-{i}": {"group": i % 1000000, "category": c} for i, c in ((7, "a"), (1000007, "a"), (8, "a"), (9, "a"), (10, "b"), (1000010, "b"))}
    right = {"mmbench_r-7": True, "mmbench_r-1000007": False, "mmbench_r-8": True, "mmbench_r-9": True, "mmbench_r-10": True, "mmbench_r-1000010": True}
    got = evaluation.benchmark_figures([{"id": k, "correct": v, "answer": None if k.endswith("9") else "A"} for k, v in right.items()], examples, 50)
    assert got["score"]["mean"] == 3 / 4 and got["plain"]["mean"] == 1.0 and got["score"]["n"] == 4 and got["unparsable"]["mean"] == 1 / 6
    assert got["categories"] == {"a": {"mean": 2 / 3, "n": 3}, "b": {"mean": 1.0, "n": 1}} and got["macro"] == pytest.approx(5 / 6) and got["micro"] == 3 / 4


def test_table_4_has_the_papers_columns_and_an_average_only_of_all_five():
    one = lambda x: {"score": {"mean": x, "low": x, "high": x, "n": 2}, "plain": {"mean": x, "low": x, "high": x, "n": 2}, "unparsable": {"mean": 0.5, "low": 0, "high": 1, "n": 2}}
    report = {name: {"base": one(0.1 * k), "M-STaR": one(0.2)} for k, name in enumerate(evaluation.BENCHMARKS, 1)}
    lines = evaluation.benchmark_tables(report).splitlines()
    assert "|  | MathVista | M3CoT | MMStar-R | MMBench-R | AI2D | average |" in lines
    assert "| base | 10.0 | 20.0 | 30.0 | 40.0 | 50.0 | 30.0 |" in lines and "| M-STaR | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 |" in lines
    del report["m3cot"]
    assert "| base | 10.0 | - | 30.0 | 40.0 | 50.0 | - |" in evaluation.benchmark_tables(report).splitlines()
    assert "### MathVista: 2 questions of the 1000 published" in evaluation.benchmark_tables(report)


def test_evaluation_on_benchmarks_writes_every_verdict_and_every_table(datasets, tmp_path, world, tiny, monkeypatch):
    runs = tmp_path / "runs"
    for name in ("01_warmup", "02_train_prm", "03_self_evolve"):
        shutil.copytree(tiny, runs / name / "model")
    common.write_json(runs / "02_train_prm/model/prm.json", {"marks": [3, 4]})
    common.write_json(runs / "03_self_evolve/run.json", {"flags": vars(evolve.Args(samples=2))})
    common.write_jsonl(runs / "03_self_evolve/metrics.jsonl", [{"iteration": 0, "pass_at_k": 1, "reward_pass_at_2": 1, "greedy_accuracy": 1, "temperature": 1.0}])
    tsv(tmp_path / "data/mmbench_r", MMBENCH)
    parquet(tmp_path / "data/mathvista/testmini.parquet", VISTA, "decoded_image")
    monkeypatch.setattr(common, "LOCKS", [])
    evaluation.main(evaluation.Args(device="cpu", test=str(world / "test.jsonl"), ood=str(world / "ood.jsonl"), model=str(tiny), runs=[str(runs)], data_root=str(tmp_path / "data"),
                                    benchmarks=["mathvista", "mmbench_r"], samples=2, resamples=20, max_new_tokens=6))
    rows, report, text = (common.read_jsonl(runs / "04_eval/benchmarks.jsonl"), json.loads((runs / "04_eval/report.json").read_text()), (runs / "04_eval/report.md").read_text())
    assert len(rows) == 3 * (6 + 5) and all({"split", "policy", "id", "response", "answer", "gold", "correct"} <= row.keys() for row in rows)
    assert report["benchmarks"]["mmbench_r"]["base"]["score"]["n"] == 3 and set(report["benchmarks"]["mathvista"]["base"]["categories"]) == {"FQA", "GPS", "MWP", "TQA", "VQA"}
    wanted = sum(row["answer"] is None for row in rows if (row["split"], row["policy"]) == ("mathvista", "base")) / 6
    assert report["benchmarks"]["mathvista"]["base"]["unparsable"]["mean"] == pytest.approx(wanted)
    for line in ("## Benchmarks (the paper's Table 4)", "MMBench-R: 3 questions, asked 5 times", "| all copies right |", "| plain: base copy right |", "| macro: mean of categories |",
                 "| unparsable share |", "Think step by step , then end with Answer :", f"torch {evaluation.torch.__version__}", "at most 6 new tokens"):
        assert line in text


def test_an_unknown_benchmark_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(common.InputError, match="--benchmarks knows mathvista, .*not mmlu"):
        evaluation.main(evaluation.Args(device="cpu", runs=[str(tmp_path)], benchmarks=["mmlu"]))
