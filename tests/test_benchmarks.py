"""The benchmarks: small hand-written files of the published forms, with every known quirk."""

import base64
import io
import json
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from conftest import READ_AS, stage
from PIL import Image
from sklearn.metrics import f1_score

import common

evolve, evaluate = stage("03_self_evolve"), stage("04_eval")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """The `datasets` package keeps its cache in the test's folder; no run folder stays locked."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    common.close_runs()


def picture(shade: int, kind: str = "PNG") -> bytes:
    """A 24x24 image file, another one for every shade."""
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (shade, 0, 255 - shade)).save(buffer, kind)
    return buffer.getvalue()


def parquet(path, rows, image):
    """Rows as a parquet file in which bytes become an image column, as the hub's files have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{**row, image: {"bytes": row[image], "path": None}} for row in rows]
    table = datasets.Dataset.from_list(cells)
    table.cast_column(image, datasets.Image()).to_parquet(str(path))
    return path.parent


def bare_parquet(path, rows):
    """Rows as a parquet file without the notes of the `datasets` package."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.parent


def made(name, folder):
    """The checked examples of a benchmark folder by id."""
    examples = common.load_examples(evaluate.make_benchmark(name, folder))
    return {example["id"].removeprefix(name + "-"): example for example in examples}


def left_out(folder):
    """The reasons why records were left out, by record; and of how many."""
    found = json.loads((folder / "left_out.json").read_text())
    assert found["share"] == len(found["left_out"]) / found["records"]
    return {row["record"]: row["reason"] for row in found["left_out"]}, found["records"]


def is_right(example, response):
    """Whether a response to an example is judged right."""
    return common.is_correct(common.extract_answer(response, example), example)


def shade_of(example):
    """The shade of an example's image."""
    return common.read_image(example).getpixel((0, 0))[0]


# ---- MathVista


def vista(pid, question, answer, kind, choices=None, **changed):
    """A record of MathVista's testmini."""
    listed = [f"({letter}) {text}" for letter, text in zip("ABCDEFGH", choices or [])]
    query = "\n".join(
        ["Hint: h", f"Question: {question}", *(["Choices:", *listed] if choices else [])]
    )
    row = {
        "pid": pid,
        "question": question,
        "image": f"images/{pid}.jpg",
        "decoded_image": picture(int(pid) % 256),
        "choices": choices,
        "unit": None,
        "precision": None,
        "answer": answer,
        "question_type": "multi_choice" if choices else "free_form",
        "answer_type": kind,
        "query": query,
        "metadata": {"task": "math word problem", "grade": "college", "split": "testmini"},
    }
    return row | changed


def task(name):
    """The metadata of a task."""
    return {"task": name, "grade": "college", "split": "testmini"}


VQA = task("visual question answering")
VISTA = [
    vista(
        "168",
        "Which shape?",
        "(a)",
        "text",
        ["(c)", "(a)", "(b)"],
        metadata=task("geometry problem solving"),
    ),
    vista("1", "How many?", "7", "integer", metadata=task("figure question answering")),
    vista("2", "How much? (Unit: $)", "1.45", "float", precision=2.0, unit="$"),
    vista(
        "3",
        "Which years?",
        "[2007, 2008]",
        "list",
        metadata=task("textbook question answering"),
    ),
    vista("4", "Is it?", "No", "text", ["Yes", "No"], metadata=VQA),
    vista("5", "Pick.", "h", "text", list("hgfedcba"), metadata=VQA),
]


def test_mathvista_asks_its_own_query_and_answers_are_positions_or_typed(tmp_path):
    path = tmp_path / "mathvista/data/testmini-00000-of-00001.parquet"
    folder = parquet(path, VISTA, "decoded_image").parent
    # the set without answers lies beside it
    hidden = [vista("9", "hidden", "", "text", ["Yes", "No"])]
    parquet(folder / "data/test-00000-of-00002.parquet", hidden, "decoded_image")
    got = made("mathvista", folder)
    assert list(got) == ["168", "1", "2", "3", "4", "5"]
    keys = ("answer", "answer_type", "precision", "category")
    assert {pid: tuple(map(example.get, keys)) for pid, example in got.items()} == {
        "168": ("B", None, None, "GPS"),
        "1": ("7", "integer", None, "FQA"),
        "2": ("1.45", "float", 2, "MWP"),
        "3": ("[2007, 2008]", "list", None, "TQA"),
        "4": ("B", None, None, "VQA"),
        "5": ("A", None, None, "VQA"),
    }
    for row in VISTA:
        assert common.user_text(got[row["pid"]], "") == row["query"]
        assert shade_of(got[row["pid"]]) == int(row["pid"]) % 256
    # a letter is a position
    assert is_right(got["168"], "Answer: (b)") and not is_right(got["168"], "Answer: (a)")
    assert is_right(got["2"], "Answer: $1.451") and not is_right(got["2"], "Answer: 1.46")
    assert is_right(got["3"], "Answer: [2007, 2008]")
    assert is_right(got["5"], "Answer: A") and not is_right(got["5"], "Answer: H")
    assert not is_right(got["4"], "")  # the empty answer earns nothing


def on_disk(rows, folder):
    """Rows without their images, which are written where `image` says, beside the rows' file."""
    for row in rows:
        path = folder / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["decoded_image"])
    return [{k: v for k, v in row.items() if k != "decoded_image"} for row in rows]


def test_mathvista_by_image_path_reads_the_files_beside_its_json(tmp_path):
    folder = tmp_path / "mathvista"
    rows = on_disk(VISTA[:2], folder)
    common.write_jsonl(folder / "testmini.jsonl", rows)
    first = made("mathvista", folder)
    images = [example["image"] for example in first.values()]
    assert images == [str(folder / "images" / f"{pid}.jpg") for pid in (168, 1)]
    common.write_jsonl(folder / "testmini.jsonl", rows[:1])
    assert list(made("mathvista", folder)) == ["168"]  # one record is no set of records
    (folder / "testmini.jsonl").unlink()
    common.write_json(folder / "testmini.json", rows)  # a list
    assert made("mathvista", folder) == first


def test_the_repository_of_mathvistas_authors_is_read_with_its_queries(tmp_path):
    folder, rows = tmp_path / "mathvista", on_disk(VISTA, tmp_path / "mathvista/data")
    queries = {row["pid"]: row["query"] for row in rows} | {"1001": "of the split test"}
    keyed = {row["pid"]: {k: v for k, v in row.items() if k != "query"} for row in rows}
    common.write_json(folder / "data/testmini.json", keyed)
    # notes on the records, under a name that ends alike
    notes = {pid: {"solution": None} for pid in keyed}
    common.write_json(folder / "data/annot_testmini.json", notes)
    says = r"mathvista record 1 is not as published: .*query.json must lie beside"
    with pytest.raises(common.InputError, match=says):
        evaluate.make_benchmark("mathvista", folder)
    common.write_json(folder / "data/query.json", queries)
    theirs = made("mathvista", folder)
    # the rows of the hub, whose files stand beside those of the authors
    parquet(folder / "data/testmini-00000-of-00001.parquet", VISTA, "decoded_image")
    ours = made("mathvista", folder)
    for example in ours.values():
        example["image"] = theirs[example["id"].removeprefix("mathvista-")]["image"]
    assert theirs == ours and list(theirs) == ["168", "1", "2", "3", "4", "5"]
    assert shade_of(theirs["168"]) == 168


def test_of_two_equal_choices_either_letter_is_right(tmp_path):
    rows = [vista("781", "How long?", "18", "text", ["9", "12", "18", "18"])]
    folder = parquet(tmp_path / "mathvista/testmini.parquet", rows, "decoded_image")
    example = made("mathvista", folder)["781"]
    right = ["C", "D", "(D) 18", "18"]
    assert [text for text in "ABCD" if is_right(example, f"Answer: {text}")] == ["C", "D"]
    assert all(is_right(example, f"Answer: {text}") for text in right)


# ---- records that cannot be used


OTHER_CHOICES = "Hint: h\nQuestion: q\nChoices:\n(A) Yes\n(B) Maybe"
BAD = [
    ({"query": OTHER_CHOICES}, "do not fit together"),
    ({"answer": "Maybe"}, "'Maybe' is not in list"),
    ({"choices": None}, "do not fit together"),
    ({"answer_type": "poem", "choices": None, "query": "Question: q"}, "must be one of"),
    ({"decoded_image": b"text"}, "cannot be read"),
    ({"decoded_image": picture(0)[:60]}, "cannot be read"),
    ({"metadata": None}, "TypeError"),
    ({"pid": "12"}, "id mathvista-12 is there already"),
]


@pytest.mark.parametrize("change, reason", BAD)
def test_one_bad_record_of_thirty_is_left_out_and_listed(tmp_path, change, reason):
    rows = [vista(str(pid), "Is it?", "No", "text", ["Yes", "No"]) for pid in range(30)]
    rows[20] |= change
    folder = parquet(tmp_path / "mathvista/testmini.parquet", rows, "decoded_image")
    got = made("mathvista", folder)
    assert list(got) == [str(pid) for pid in range(30) if pid != 20]
    reasons, records = left_out(folder)
    assert records == 30 and list(reasons) == ["mathvista record 21"]
    assert reason in reasons["mathvista record 21"]
    # without the published files the list stays, as the examples do
    (folder / "testmini.parquet").unlink()
    assert made("mathvista", folder) == got and left_out(folder) == (reasons, 30)


@pytest.mark.parametrize(
    "name, file, text",
    [
        ("mmbench_r", "MMBench_DEV_EN_V11.tsv", "<html>\n<body>404</body>\n"),
        ("mathvista", "testmini.json", "7"),
        ("mathvista", "testmini.json", '{"1": 7}'),
        ("mathvista", "testmini.json", "[" * 100_000),
    ],
)
def test_a_file_that_is_something_else_is_refused_by_name(tmp_path, name, file, text):
    (tmp_path / file).write_text(text)
    with pytest.raises(common.InputError, match=f"{file} cannot be read .*; put .* into "):
        evaluate.make_benchmark(name, tmp_path)


def test_four_bad_records_of_thirty_refuse_the_set_and_the_first_is_named(tmp_path):
    rows = [vista(str(pid), "Is it?", "No", "text", ["Yes", "No"]) for pid in range(30)]
    for pid in (7, 8, 9):
        rows[pid]["answer"] = "Maybe"
    folder = parquet(tmp_path / "mathvista/testmini.parquet", rows, "decoded_image")
    assert len(made("mathvista", folder)) == 27  # exactly a tenth is not more
    rows[29]["answer"] = "Perhaps"
    parquet(folder / "testmini.parquet", rows, "decoded_image")
    says = r"4 of 30 records of .*, more than a tenth; mathvista record 8 is not .*'Maybe'"
    with pytest.raises(common.InputError, match=says):
        evaluate.make_benchmark("mathvista", folder)
    assert not (folder / "left_out.json").exists()


def test_an_image_outside_the_benchmarks_folder_is_left_out(tmp_path):
    folder = tmp_path / "mathvista"
    rows = on_disk([vista(str(pid), "How many?", "7", "integer") for pid in range(10)], folder)
    (tmp_path / "secret.png").write_bytes(picture(1))
    rows[3]["image"] = "../secret.png"
    common.write_jsonl(folder / "testmini.jsonl", rows)
    assert len(made("mathvista", folder)) == 9
    assert "secret.png" in left_out(folder)[0]["mathvista record 4"]


# ---- M3CoT and MMStar-R


def cot(name, context, choices, answer, domain):
    """A record of M3CoT."""
    return {
        "id": name,
        "category": "c",
        "image_id": name,
        "question": "Which?",
        "choices": choices,
        "context": context,
        "answer": answer,
        "rationale": "because",
        "split": "test",
        "image": {"bytes": picture(9, "JPEG"), "path": None},
        "domain": domain,
        "topic": "t",
    }


def test_m3cot_has_a_line_of_context_only_where_there_is_some(tmp_path):
    rows = [
        cot("s-1", "", ["x", "y"], "A", "science"),
        cot("c-2", "It rains.", ["a", "b", "c", "d", "e"], "E", "commonsense"),
        cot("m-3", "  \n", ["1", "2"], "B", "mathematics"),
    ]
    got = made("m3cot", bare_parquet(tmp_path / "m3cot/data/test-00000-of-00001.parquet", rows))
    assert [(e["question"], e["answer"], e["category"]) for e in got.values()] == [
        ("Which?", "A", "science"),
        ("Context: It rains.\nWhich?", "E", "commonsense"),
        ("Which?", "B", "mathematics"),
    ]
    assert len({example["image"] for example in got.values()}) == 1  # one file for one image


def star(index, question, answer, category):
    """A record of MMStar."""
    image = {"bytes": picture(index), "path": "x.jpg"}
    row = {"index": index, "question": question, "image": image, "answer": answer}
    return row | {"category": category, "l2_category": "l", "meta_info": {"source": "s"}}


def test_mmstar_r_keeps_its_options_in_the_question_and_drops_perception(tmp_path):
    asked = "Which?\nOptions: A: red, blue, B: 1,200 km, C: none, D: both"
    rows = [
        star(0, "q", "A", "coarse perception"),
        star(1, asked, "B", "logical reasoning"),
        star(2, "q", "A", "fine-grained perception"),
        star(3, "Hint: h\nQuestion: q\nChoices:\n(A) 4\n(B) 5", "B", "math"),
        star(4, asked, "A", "science & technology"),
        star(5, asked, "C", "instance reasoning"),
    ]
    got = made("mmstar_r", bare_parquet(tmp_path / "mmstar_r/mmstar.parquet", rows))
    assert list(got) == ["1", "3", "4", "5"] and got["1"]["question"] == asked
    for example in got.values():
        assert example["choices"] is None and example["answer_type"] == "letter"
    right = {"1": "B: 1,200 km", "3": "(B) 5", "4": "A: red, blue", "5": "c"}
    for key, answer in right.items():
        assert is_right(got[key], f"Answer: {answer}"), key
    wrong = [("1", "B: red, blue"), ("3", "5"), ("3", "(B) 4"), ("4", "A: red, B: 1,200 km")]
    for key, answer in wrong:
        assert not is_right(got[key], f"Answer: {answer}"), (key, answer)
    assert left_out(tmp_path / "mmstar_r") == ({}, 6)  # perception is no bad record


# ---- MMBench-R


COLUMNS = "index question hint A B C D answer category image source l2-category comment split"


def bench(index, image, answer, options, l2="logic_reasoning", hint=""):
    """A line of MMBench's TSV."""
    options = (options + ["", "", "", ""])[:4]
    return [str(index), "Which?", hint, *options, answer, "c", image, "s", l2, "", "dev"]


def tsv(folder, rows):
    """Rows as MMBench's TSV."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(row) + "\n" for row in [COLUMNS.split(), *rows]]
    (folder / "MMBench_DEV_EN_V11.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


PIXELS = [base64.b64encode(picture(shade)).decode() for shade in (10, 20, 30)]
MMBENCH = [
    bench(1000007, "7", "A", ["3", "2", "None"]),  # a copy before its base row
    bench(7, PIXELS[0], "B", ["2", "3", "None"]),
    bench(2000007, "7", "C", ["None", "2", "3"]),
    bench(8, PIXELS[1], "A", ["yes", "no"], "coarse_perception"),
    # the image of a row that is dropped
    bench(9, "8", "B", ["yes", "no"], "attribute_reasoning", hint="Look."),
    bench(10, PIXELS[2], "A", ["a", "b", "c", "d"], "relation_reasoning", hint="nan"),
    bench(11, "10", "A", ["x", "y"], "finegrained_perception (cross-instance)"),
]


def test_mmbench_r_groups_circular_copies_and_finds_images_in_other_rows(tmp_path):
    got = made("mmbench_r", tsv(tmp_path / "mmbench_r", MMBENCH))
    assert {key: (e["group"], e["answer"], e["choices"]) for key, e in got.items()} == {
        "1000007": (7, "A", ["3", "2", "None"]),
        "7": (7, "B", ["2", "3", "None"]),
        "2000007": (7, "C", ["None", "2", "3"]),
        "9": (9, "B", ["yes", "no"]),
        "10": (10, "A", list("abcd")),
    }
    shades = {key: shade_of(example) for key, example in got.items()}
    assert shades == {"1000007": 10, "7": 10, "2000007": 10, "9": 20, "10": 30}
    assert got["9"]["question"] == "Hint: Look.\nQuestion: Which?"
    assert got["7"]["question"] == got["10"]["question"] == "Which?"


@pytest.mark.parametrize(
    "row, reason",
    [
        (bench(12, "A" * 400, "A", ["x", "y"]), "cannot be read"),
        (bench(12, "?" * 400, "A", ["x", "y"]), "base64"),
        (bench(12, "99", "A", ["x", "y"]), "Incorrect padding"),  # of a row that is not there
        (bench(12, PIXELS[0], "A", ["x", "", "z"]), "an option is missing"),
        (bench(12, PIXELS[0], "E", ["x", "y"]), "the answer 'E' is none of the choices"),
        (bench("twelve", PIXELS[0], "A", ["x", "y"]), "ValueError"),
        (bench(10, PIXELS[0], "A", ["x", "y"]), "is there already"),
    ],
)
def test_an_mmbench_row_of_another_form_is_left_out(tmp_path, row, reason):
    more = [bench(index, PIXELS[0], "A", ["x", "y"]) for index in range(20, 30)]
    folder = tsv(tmp_path / "mmbench_r", [*MMBENCH, *more, row])
    assert len(made("mmbench_r", folder)) == 15
    reasons, records = left_out(folder)
    assert records == 18 and reason in reasons.pop("mmbench_r record 18") and not reasons


# ---- AI2D


def test_ai2d_answers_are_positions_even_where_options_are_letters(tmp_path):
    image = {"bytes": picture(50), "path": None}
    rows = [
        {"question": "Which part?", "options": options, "answer": answer, "image": image}
        for options, answer in ((["B", "C", "D", "A"], "3"), (["leaf", "root", "stem", "bud"], "0"))
    ]
    got = made("ai2d", bare_parquet(tmp_path / "ai2d/data/test-00000-of-00001.parquet", rows))
    assert [example["answer"] for example in got.values()] == ["D", "A"]
    assert is_right(got["0"], "Answer: D") and is_right(got["0"], "Answer: (D) A")
    assert not is_right(got["0"], "Answer: A") and not is_right(got["0"], "Answer: (D) D")


# ---- VisualProcessBench


def process(number, steps, labels, source="MMMU", images=1):
    """A line of VisualProcessBench; its images are those of `process_bench`."""
    return {
        "image": [
            f"images/{source}/a_path_of_more_than_sixty_four_characters_{number % 3}_{i}.png"
            for i in range(images)
        ],
        "question": f"<image>\nQuestion {number}?",
        "answer": "D",
        "response": {"steps": steps, "process_correctness": labels},
        "policy_model": "InternVL2.5-8B",
        "data_source": source,
    }


def process_bench(folder, rows):
    """The lines as they are published, with their images."""
    for row in rows:
        for name in row["image"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(picture(7))
    common.write_jsonl(folder / "test.jsonl", rows)
    return folder


PROCESSES = [
    process(
        n, ["sum of row 1 :", "3 + 4 = 7", "Answer : 7"], [1, -1 if n % 3 else 1, n % 2], source
    )
    for n, source in enumerate(["MMMU", "WeMath"] * 15)
]


def test_visualprocessbench_keeps_steps_and_labels_and_leaves_out_several_images(tmp_path):
    rows = [*PROCESSES, process(30, ["a", "b"], [1, 0], images=2), process(31, ["a"], [1, 1])]
    rows += [process(32, ["a", "b"], [1, 2])]
    folder = process_bench(tmp_path / "visualprocessbench", rows)
    got = made("visualprocessbench", folder)
    assert list(got) == [str(n) for n in range(30)]
    assert got["4"]["steps"] == ["sum of row 1 :", "3 + 4 = 7", "Answer : 7"]
    assert got["4"]["labels"] == [1, -1, 0] and got["4"]["category"] == "MMMU"
    assert got["4"]["question"] == "Question 4?"  # the image has its own place in a prompt
    assert shade_of(got["4"]) == 7
    reasons, records = left_out(folder)
    assert records == 33
    assert {key: reason.split("(")[1][1:9] for key, reason in reasons.items()} == {
        "visualprocessbench record 31": "2 images",
        "visualprocessbench record 32": "steps an",
        "visualprocessbench record 33": "steps an",
    }


def test_macro_f1_is_that_of_scikit_learn():
    draws = random.Random(0)
    for _ in range(20):
        n = draws.randrange(1, 9)
        steps = pandas.DataFrame(
            {
                "id": [str(draws.randrange(3)) for _ in range(n)],
                "source": "s",
                "labels": [draws.choice([1, -1]) for _ in range(n)],
                "scores": [draws.random() for _ in range(n)],
            }
        )
        counts = evaluate.step_counts(steps, 0.4).to_numpy()
        called = numpy.where(steps["scores"] >= 0.4, 1, -1)
        wanted = f1_score(steps["labels"], called, labels=[1, -1], average="macro", zero_division=0)
        assert evaluate.macro_f1(counts[None]) == pytest.approx([wanted])


def verdicts(n, source, wrong=lambda k: False):
    """Rows of n samples: right steps score 0.7, wrong ones 0.4; those of `wrong` the other way."""
    rows = []
    for k in range(n):
        high, low = (0.4, 0.7) if wrong(k) else (0.7, 0.4)
        row = {"id": f"{source}-{k}", "source": source, "labels": [1, 0, -1]}
        rows.append(row | {"scores": [high, 0.1, low]})
    return rows


def test_the_threshold_is_chosen_on_a_fifth_of_the_samples_that_is_not_reported():
    rows = verdicts(300, "a") + verdicts(200, "b")
    rows.append({"id": "c", "source": "a", "labels": [1], "scores": None})
    got = evaluate.step_figures(rows, 20)
    assert 0.4 < got["threshold"] <= 0.7
    assert got["chosen_on"] + got["reported"] == 500 and got["unscored"] == 1
    assert 60 < got["chosen_on"] < 140
    figures = got["macro_f1"]
    assert [figures[key]["mean"] for key in ("a", "b", "macro")] == [1, 1, 1]  # 0 is ignored
    assert figures["a"]["n"] + figures["b"]["n"] == got["reported"] and figures["macro"]["n"] == 2
    # turned round in the reported samples alone, nothing of it reaches the threshold
    chosen = {row["id"] for row in rows if evaluate.seed_of(row["id"]) % 5 == 0}
    assert len(chosen - {"c"}) == got["chosen_on"]
    turned = verdicts(300, "a", lambda k: f"a-{k}" not in chosen) + verdicts(200, "b")
    other = evaluate.step_figures(turned, 20)
    assert other["threshold"] == got["threshold"]
    assert other["macro_f1"]["a"]["mean"] == 0 and other["macro_f1"]["macro"]["mean"] == 0.5
    # and turned round in those that choose, nothing of it reaches the figures of a threshold
    turned = verdicts(300, "a", lambda k: f"a-{k}" in chosen) + verdicts(200, "b")
    assert evaluate.step_figures(turned, 20)["reported"] == got["reported"]


def test_macro_f1_is_by_source_and_then_their_mean():
    rows = verdicts(300, "a", lambda k: k % 2 == 0) + verdicts(200, "b")
    got = evaluate.step_figures(rows, 200)
    kept = [row for row in rows if evaluate.seed_of(row["id"]) % 5]
    wanted = {}
    for source in "ab":
        pairs = [
            (label, 1 if score >= got["threshold"] else -1)
            for row in kept
            if row["source"] == source
            for label, score in zip(row["labels"], row["scores"])
            if label
        ]
        wanted[source] = f1_score(*zip(*pairs), average="macro")
        figure = got["macro_f1"][source]
        assert figure["mean"] == pytest.approx(wanted[source])
        assert figure["low"] <= figure["mean"] <= figure["high"]
    assert got["macro_f1"]["a"]["low"] < wanted["a"] < got["macro_f1"]["a"]["high"]
    assert got["macro_f1"]["macro"]["mean"] == pytest.approx(sum(wanted.values()) / 2)


def test_the_prm_scores_every_step_of_a_response_and_none_of_one_that_is_joined(
    tmp_path, tiny, args
):
    folder, prm = tmp_path / "visualprocessbench", tmp_path / "prm"
    shutil.copytree(tiny, prm)
    common.write_json(prm / "prm.json", READ_AS)
    blank = process(30, ["3 + 4 = 7", " \n", "Answer : 7"], [1, 1, 1])
    process_bench(folder, [*PROCESSES[:5], blank])
    examples = list(made("visualprocessbench", folder).values())
    args.chunk = 4
    out = tmp_path / "benchmarks/visualprocessbench.jsonl"
    evaluate.score_processes(out, prm, examples, args)
    rows = common.read_jsonl(out)
    assert [row["id"] for row in rows] == [example["id"] for example in examples]
    assert [row["labels"] for row in rows] == [example["labels"] for example in examples]
    assert [row["source"] for row in rows][:2] == ["MMMU", "WeMath"]
    assert rows[5]["scores"] is None
    loaded = common.load_prm(prm, args)
    ids, ends = common.encode_steps(examples[2]["steps"], loaded.tokenizer)
    assert len(ends) == 3
    alone = common.score_steps(loaded, [examples[2]], [[ids]], args)[0][0]
    assert rows[2]["scores"] == pytest.approx(alone, abs=1e-5)
    before = out.read_bytes()
    shutil.rmtree(prm)  # a finished phase asks for no model
    evaluate.score_processes(out, prm, examples, args)
    assert out.read_bytes() == before


# ---- published files


def test_a_benchmark_without_files_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    says = "lmms-lab/ai2d cannot be read .*no route.*; put .* into .*ai2d or name its parent"
    with pytest.raises(common.InputError, match=says):
        evaluate.make_benchmark("ai2d", tmp_path / "ai2d")
    monkeypatch.undo()
    says = "MMBench_DEV_EN_V11.tsv cannot be read .*; put .* into .*mmbench_r or name its parent"
    with pytest.raises(common.InputError, match=says):
        evaluate.make_benchmark("mmbench_r", tmp_path / "mmbench_r")


def test_two_evaluations_make_a_benchmark_one_after_the_other(tmp_path, monkeypatch):
    running, most = [], []

    def convert(name, folder):
        running.append(name)
        time.sleep(0.05)
        most.append(len(running))
        running.pop()

    monkeypatch.setattr(evaluate, "convert", convert)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(evaluate.make_benchmark, ["ai2d"] * 4, [tmp_path] * 4))
    assert most == [1, 1, 1, 1]


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "m3cot").mkdir()
    (tmp_path / "m3cot/test.parquet").write_text("no parquet")
    with pytest.raises(common.InputError, match="m3cot/test.parquet cannot be read"):
        evaluate.make_benchmark("m3cot", tmp_path / "m3cot")


def test_a_benchmark_comes_from_the_hub_where_there_are_no_files_and_is_then_kept(
    tmp_path, monkeypatch
):
    asked = []

    def hub(name, **how):
        asked.append((name, how))
        rows = [cot("s-1", "", ["x", "y"], "A", "science")]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", hub)
    got = made("m3cot", tmp_path / "m3cot")
    assert list(got) == ["s-1"] and made("m3cot", tmp_path / "m3cot") == got
    assert asked == [("LightChen2333/M3CoT", {"split": "test", "streaming": True})]


def test_a_benchmark_made_once_serves_without_its_files_and_is_remade_with_them(tmp_path):
    folder = tmp_path / "mmbench_r"
    out = evaluate.make_benchmark("mmbench_r", tsv(folder, MMBENCH))
    before = out.read_bytes()
    images = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    assert len(images) == 3
    again = evaluate.make_benchmark("mmbench_r", tsv(folder, MMBENCH[:2]))
    assert again.read_bytes() != before
    after = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    assert after == images  # written once
    (folder / "MMBench_DEV_EN_V11.tsv").unlink()
    assert len(made("mmbench_r", folder)) == 2


# ---- figures and tables


def test_circular_accuracy_needs_every_copy_and_macro_is_not_micro():
    categories = {7: "a", 1000007: "a", 8: "a", 9: "a", 10: "b", 1000010: "b"}
    examples = {
        f"mmbench_r-{index}": {"group": index % 1000000, "category": category}
        for index, category in categories.items()
    }
    rows = [
        {
            "id": f"mmbench_r-{index}",
            "correct": index != 1000007,
            "answer": None if index == 9 else "A",
        }
        for index in (1000007, 7, 8, 9, 10, 1000010)  # a copy before its base row
    ]
    got = evaluate.benchmark_figures(rows, examples, 50)
    assert got["score"]["mean"] == 3 / 4 and got["score"]["n"] == 4
    assert got["plain"]["mean"] == 1.0 and got["unparsable"]["mean"] == 1 / 6
    assert got["a"]["mean"] == pytest.approx(2 / 3) and got["a"]["n"] == 3
    assert got["b"]["mean"] == 1.0 and got["b"]["n"] == 1
    assert got["macro"]["mean"] == pytest.approx(5 / 6) and got["macro"]["n"] == 2


def test_a_benchmark_without_groups_and_categories_has_neither():
    examples = {f"ai2d-{k}": {} for k in range(3)}
    rows = [{"id": key, "correct": key == "ai2d-1", "answer": "A"} for key in examples]
    got = evaluate.benchmark_figures(rows, examples, 50)
    assert got["score"] == got["plain"] and got["score"]["mean"] == pytest.approx(1 / 3)
    assert list(got) == ["score", "plain", "unparsable"]


def one(share, n=2):
    """Figures of a policy on a benchmark of n questions."""
    return {"score": {"mean": share, "low": share, "high": share, "n": n}}


def test_table_4_has_a_row_per_benchmark_and_an_average_only_of_all_five():
    names = list(evaluate.BENCHMARKS)
    names.remove("visualprocessbench")
    report = {name: {"base": one(0.1 * k), "M-STaR": one(0.2)} for k, name in enumerate(names, 1)}
    table = evaluate.table_4(report)
    titles = ["MathVista", "M3CoT", "MMStar-R", "MMBench-R", "AI2D", "average"]
    assert list(table) == ["base", "M-STaR"] and list(table["base"]) == titles
    lines = evaluate.figure_table("## Table 4", table).splitlines()
    assert "| M3CoT | 20.0 [20.0, 20.0] | 20.0 [20.0, 20.0] | 2 |" in lines
    assert "| average | 30.0 [30.0, 30.0] | 20.0 [20.0, 20.0] | 5 |" in lines
    del report["m3cot"]
    assert list(evaluate.table_4(report)["base"]) == ["MathVista", "MMStar-R", "MMBench-R", "AI2D"]


def test_a_table_has_a_row_for_every_figure_of_any_policy_and_how_many_it_is_of():
    gain = {"mean": 0.1, "low": -0.1, "high": 0.3, "n": 4}
    columns = {"base": one(0.5, n=4), "M-STaR": one(0.6, n=4) | {"greedy_gain": gain}}
    assert evaluate.figure_table("## test", columns).splitlines() == [
        "",
        "## test",
        "",
        "|  | base | M-STaR | n |",
        "| --- | --- | --- | --- |",
        "| score | 50.0 [50.0, 50.0] | 60.0 [60.0, 60.0] | 4 |",
        "| greedy gain, paired | - | +10.0 [-10.0, +30.0] | 4 |",
    ]


def test_evaluation_on_benchmarks_writes_every_verdict_and_every_table(tmp_path, world, tiny):
    runs = tmp_path / "runs"
    for name in ("01_warmup", "02_train_prm", "03_self_evolve"):
        shutil.copytree(tiny, runs / name / "model")
    common.write_json(runs / "02_train_prm/model/prm.json", READ_AS)
    flags = {"flags": vars(evolve.Args(samples=2)), "inputs": {}}
    common.write_json(runs / "03_self_evolve/run.json", flags)
    look = {"iteration": 0, "temperature": 1.0, "greedy_accuracy": 1}
    look |= {"pass_at_k": 1, "reward_pass_at_2": 1}
    common.write_jsonl(runs / "03_self_evolve/metrics.jsonl", [look])
    common.write_jsonl(runs / "03_self_evolve/temperature.jsonl", [])
    tsv(tmp_path / "data/mmbench_r", MMBENCH)
    vistas = [*VISTA, *[{**VISTA[1], "pid": str(pid)} for pid in range(10, 20)]]
    vistas[9]["answer"] = "seven"
    parquet(tmp_path / "data/mathvista/testmini.parquet", vistas, "decoded_image")
    process_bench(tmp_path / "data/visualprocessbench", PROCESSES)
    args = evaluate.Args(
        device="cpu",
        runs=str(runs),
        test=str(world / "test.jsonl"),
        ood=str(world / "ood.jsonl"),
        model=str(tiny),
        data_root=str(tmp_path / "data"),
        benchmarks=["mathvista", "visualprocessbench", "mmbench_r"],
        samples=2,
        resamples=20,
        max_new_tokens=6,
        chain_checker=f"{common.__file__}:is_correct",  # no right chain: it is never asked
    )
    evaluate.main(args)
    out = runs / "04_eval"
    rows = {path.stem: common.read_jsonl(path) for path in out.glob("benchmarks/*.jsonl")}
    assert len(rows.pop("visualprocessbench")) == 30
    assert len(rows) == 3 * 2  # no policy is asked for VisualProcessBench
    assert sum(map(len, rows.values())) == 3 * (15 + 5)
    for row in rows["base_mathvista"]:
        assert {"id", "response", "answer", "correct"} <= row.keys()
    report = json.loads((out / "report.json").read_text())
    assert list(report) == ["test", "ood", "left_out", "benchmarks", "prm"]
    assert list(report["benchmarks"]) == ["mathvista", "mmbench_r"]
    (bad,) = report["left_out"]["mathvista"]["left_out"]
    assert bad["record"] == "mathvista record 10" and "'seven'" in bad["reason"]
    assert report["left_out"]["mathvista"]["share"] == 1 / 16
    assert report["left_out"]["visualprocessbench"] == {"records": 30, "share": 0, "left_out": []}
    steps = report["prm"]["visualprocessbench"]
    assert steps["chosen_on"] + steps["reported"] == 30
    assert list(steps["macro_f1"]) == ["MMMU", "WeMath", "macro"]
    base = report["benchmarks"]["mathvista"]["base"]
    assert {"FQA", "GPS", "MWP", "TQA", "VQA"} <= set(base)
    bench = report["benchmarks"]["mmbench_r"]["base"]
    assert bench["score"]["n"] == 3 and bench["unparsable"]["n"] == 5  # asked five times
    unparsable = sum(row["answer"] is None for row in rows["base_mathvista"])
    assert base["unparsable"]["mean"] == pytest.approx(unparsable / 15)
    text = (out / "report.md").read_text()
    for line in (
        "## Benchmarks (the paper's Table 4)",
        "### MMBench-R",
        "| score |",
        "| plain |",
        "| macro |",
        "| unparsable share |",
        "| GPS |",
        "Think step by step , then end with Answer :",
        f"torch {evaluate.torch.__version__}",
        "cut at 6 new tokens",
        "6.2% of 16 records of mathvista are left out\n\n- mathvista record 10: ValueError",
        f"the score {steps['threshold']:.6f} on, which was chosen on {steps['chosen_on']}\nsamples",
        "| WeMath |",
    ):
        assert line in text, line


def test_an_unknown_benchmark_is_refused_before_anything_is_loaded(tmp_path):
    args = evaluate.Args(device="cpu", runs=str(tmp_path), benchmarks=["mmlu"])
    with pytest.raises(common.InputError, match="--benchmarks knows mathvista, .*not mmlu"):
        evaluate.main(args)
