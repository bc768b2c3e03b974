"""The five benchmarks: small hand-written files of the published forms, with every known quirk."""

import base64
import io
import json
import shutil

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import stage
from PIL import Image

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


def test_mathvista_by_image_path_reads_the_files_beside_its_json(tmp_path):
    folder = tmp_path / "mathvista"
    rows = [{k: v for k, v in row.items() if k != "decoded_image"} for row in VISTA[:2]]
    (folder / "images").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        (folder / row["image"]).write_bytes(picture(3, "JPEG"))
    (folder / "testmini.jsonl").write_text(lines)
    first = made("mathvista", folder)
    images = [example["image"] for example in first.values()]
    assert images == [str(folder / "images" / f"{pid}.jpg") for pid in (168, 1)]
    (folder / "testmini.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert list(made("mathvista", folder)) == ["168"]  # one record is no set of records
    (folder / "testmini.jsonl").unlink()
    # the form of the authors' own repository, a list, and JSON lines under the name of JSON
    keyed = {row["pid"]: row for row in rows}
    for text in (json.dumps(keyed), json.dumps(rows), lines):
        (folder / "testmini.json").write_text(text)
        assert made("mathvista", folder) == first


OTHER_CHOICES = "Hint: h\nQuestion: q\nChoices:\n(A) Yes\n(B) Maybe"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": OTHER_CHOICES}, "do not fit together"),
        ({"answer": "Maybe"}, "'Maybe' is not in list"),
        ({"choices": None}, "do not fit together"),
        ({"metadata": task("poetry")}, "poetry"),
        ({"decoded_image": b"text"}, "cannot identify image"),
    ],
)
def test_a_mathvista_record_of_another_form_is_refused_with_its_number(tmp_path, change, message):
    rows = [VISTA[5], {**VISTA[4], **change}]
    folder = parquet(tmp_path / "mathvista/testmini.parquet", rows, "decoded_image")
    says = f"mathvista record 2 is not as published .*{message}"
    with pytest.raises(common.InputError, match=says):
        evaluate.make_benchmark("mathvista", folder)
    assert not (folder / "examples.jsonl").exists()


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
    assert got["s-1"]["image"].endswith(".jpeg")


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
    rows = [star(6, asked, "A", "poetry")]
    folder = bare_parquet(tmp_path / "mmstar_r/mmstar.parquet", rows)
    with pytest.raises(common.InputError, match="record 1 .*unknown category 'poetry'"):
        evaluate.make_benchmark("mmstar_r", folder)


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
    "row, message",
    [
        (bench(12, "A" * 400, "A", ["x", "y"]), "record 8 .*cannot identify image"),
        (bench(12, "?" * 400, "A", ["x", "y"]), "record 8 is not as published"),
        (bench(12, PIXELS[0], "A", ["x", "", "z"]), "an option is missing"),
        (bench(12, PIXELS[0], "A", ["x", "y"], "poetry"), "unknown category 'poetry'"),
        (bench("twelve", PIXELS[0], "A", ["x", "y"]), "record 8 is not as published"),
    ],
)
def test_an_mmbench_row_of_another_form_is_refused(tmp_path, row, message):
    with pytest.raises(common.InputError, match=message):
        evaluate.make_benchmark("mmbench_r", tsv(tmp_path / "mmbench_r", [*MMBENCH, row]))


def test_an_mmbench_image_in_a_row_that_is_not_there_is_refused(tmp_path):
    rows = [*MMBENCH, bench(12, "99", "A", ["x", "y"])]
    with pytest.raises(common.InputError, match="examples.jsonl line 6: .*99"):
        made("mmbench_r", tsv(tmp_path / "mmbench_r", rows))


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


def test_a_broken_file_and_two_formats_are_refused(tmp_path):
    (tmp_path / "m3cot").mkdir()
    (tmp_path / "m3cot/test.parquet").write_text("no parquet")
    with pytest.raises(common.InputError, match="m3cot/test.parquet cannot be read"):
        evaluate.make_benchmark("m3cot", tmp_path / "m3cot")
    (tmp_path / "ai2d").mkdir()
    for name in ("test.parquet", "test.jsonl"):
        (tmp_path / "ai2d" / name).write_text("")
    with pytest.raises(common.InputError, match="keep one format"):
        evaluate.make_benchmark("ai2d", tmp_path / "ai2d")


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
    common.write_json(runs / "02_train_prm/model/prm.json", {"marks": [3, 4]})
    flags = {"flags": vars(evolve.Args(samples=2)), "inputs": {}}
    common.write_json(runs / "03_self_evolve/run.json", flags)
    look = {"iteration": 0, "temperature": 1.0, "greedy_accuracy": 1}
    look |= {"pass_at_k": 1, "reward_pass_at_2": 1}
    common.write_jsonl(runs / "03_self_evolve/metrics.jsonl", [look])
    tsv(tmp_path / "data/mmbench_r", MMBENCH)
    parquet(tmp_path / "data/mathvista/testmini.parquet", VISTA, "decoded_image")
    args = evaluate.Args(
        device="cpu",
        runs=str(runs),
        test=str(world / "test.jsonl"),
        ood=str(world / "ood.jsonl"),
        model=str(tiny),
        data_root=str(tmp_path / "data"),
        benchmarks=["mathvista", "mmbench_r"],
        samples=2,
        resamples=20,
        max_new_tokens=6,
        chain_checker=f"{common.__file__}:is_correct",  # no right chain: it is never asked
    )
    evaluate.main(args)
    out = runs / "04_eval"
    rows = {path.stem: common.read_jsonl(path) for path in (out / "benchmarks").iterdir()}
    assert len(rows) == 3 * 2
    assert sum(map(len, rows.values())) == 3 * (6 + 5)
    for row in rows["base_mathvista"]:
        assert {"id", "response", "answer", "correct"} <= row.keys()
    report = json.loads((out / "report.json").read_text())
    assert list(report) == ["test", "ood", "benchmarks", "prm"]
    base = report["benchmarks"]["mathvista"]["base"]
    assert {"FQA", "GPS", "MWP", "TQA", "VQA"} <= set(base)
    bench = report["benchmarks"]["mmbench_r"]["base"]
    assert bench["score"]["n"] == 3 and bench["unparsable"]["n"] == 5  # asked five times
    unparsable = sum(row["answer"] is None for row in rows["base_mathvista"])
    assert base["unparsable"]["mean"] == pytest.approx(unparsable / 6)
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
    ):
        assert line in text, line


def test_an_unknown_benchmark_is_refused_before_anything_is_loaded(tmp_path):
    args = evaluate.Args(device="cpu", runs=str(tmp_path), benchmarks=["mmlu"])
    with pytest.raises(common.InputError, match="--benchmarks knows mathvista, .*not mmlu"):
        evaluate.main(args)
