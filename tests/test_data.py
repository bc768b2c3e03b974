"""Data files: images, answer types and links, each refused with its line; at scale."""

import io
import os
import shutil

import numpy as np
import pytest
from conftest import stage
from PIL import Image

import common


def picture() -> bytes:
    """A small PNG file."""
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), "red").save(buffer, "PNG")
    return buffer.getvalue()


def put(folder, count):
    """A data file of `count` records, an image file to each."""
    (folder / "images").mkdir(parents=True)
    (folder / "images/0.png").write_bytes(picture())
    for i in range(1, count):
        os.link(folder / "images/0.png", folder / f"images/{i}.png")
    same = {"question": "q", "answer": "7", "source": "s"}
    rows = [{"id": str(i), "image": f"images/{i}.png", **same} for i in range(count)]
    common.write_jsonl(folder / "d.jsonl", rows)
    return folder / "d.jsonl"


# ---- images


def cut(path):
    """Put a file in place of another that has its header and no more."""
    path.unlink()
    path.write_bytes(picture()[:60])


def test_every_image_is_read_before_hours_are_spent(tmp_path, tiny, args):
    path = put(tmp_path, 80)  # enough for worker processes
    whole = tmp_path / "images/70.png"
    cut(whole)
    examples = common.load_examples(path)
    with pytest.raises(common.InputError, match="d.jsonl line 71: image .*70.png cannot be read"):
        common.fitting(tmp_path / "out", tiny, args, examples)
    whole.write_bytes(picture())
    assert common.fitting(tmp_path / "out", tiny, args, examples) == [examples]
    (tmp_path / "images/1.png").unlink()
    with pytest.raises(common.InputError, match="line 2: image .*1.png' does not exist"):
        common.load_examples(path)


def test_over_long_prompts_are_left_out_and_listed_and_more_than_a_tenth_is_refused(
    tmp_path, tiny, policy, args, capsys
):
    examples = common.load_examples(put(tmp_path, 20))
    long = dict(examples[3], question="sum of row 1 " * 9)
    files = [examples[:3] + [long] + examples[4:], examples[:1]]
    usual, longer = (common.encode_prompts(policy, [e], args) for e in (examples[0], long))
    lengths = [batch["input_ids"].shape[1] for batch in (usual, longer)]
    args.max_prompt_tokens = lengths[1] - 1
    kept = common.fitting(tmp_path / "a", tiny, args, *files)
    assert kept == [examples[:3] + examples[4:], examples[:1]]
    rows = common.read_jsonl(tmp_path / "a/prompts/lengths.jsonl")
    assert [row["tokens"] for row in rows] == [lengths[i == 3] for i in range(20)] + lengths[:1]
    assert [row["id"] for row in rows if not row["fits"]] == ["3"]
    assert "1 of 20 prompts have more than --max_prompt_tokens" in capsys.readouterr().out
    args.max_prompt_tokens = lengths[0] - 1
    with pytest.raises(common.InputError, match="20 of 20 prompts have more .* raise the flag"):
        common.fitting(tmp_path / "b", tiny, args, *files)


def test_an_image_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert common.read_image({"image": tmp_path / "a.jpg", "where": "d"}).size == (20, 40)


@pytest.mark.parametrize("kind", ["PPM", "EPS", "ICO"])
def test_other_formats_are_refused_whatever_the_name_says(tmp_path, kind):
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png", kind)
    with pytest.raises(common.InputError, match="d line 1: image .* cannot be read"):
        common.read_image({"image": tmp_path / "a.png", "where": "d line 1"})


def test_a_jpeg_that_was_cut_is_refused_and_the_sentence_says_what_to_do(tmp_path):
    path = tmp_path / "a.jpg"
    Image.effect_noise((200, 200), 50).convert("RGB").save(path)
    example = {"image": str(path), "where": "d.jsonl line 1"}
    assert common.read_image(example).size == (200, 200)
    path.write_bytes(path.read_bytes()[:-2000])
    message = "d.jsonl line 1: image .*a.jpg cannot be read .* put a whole file"
    with pytest.raises(common.InputError, match=message):
        common.read_image(example)


def pixels_of(image, folder):
    """The first row of an image after it was saved and read."""
    image.save(folder / "a.png")
    read = common.read_image({"image": str(folder / "a.png"), "where": "line 1"})
    assert read.mode == "RGB"
    return [read.getpixel((x, 0)) for x in range(read.width)]


def test_what_is_transparent_becomes_white(tmp_path):
    drawing = Image.new("RGBA", (3, 1), (0, 0, 0, 0))  # nothing, a black stroke, half of a red one
    drawing.putpixel((1, 0), (0, 0, 0, 255))
    drawing.putpixel((2, 0), (255, 0, 0, 128))
    assert pixels_of(drawing, tmp_path) == [(255, 255, 255), (0, 0, 0), (255, 127, 127)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    assert pixels_of(palette, tmp_path) == [(255, 255, 255), (40, 50, 60)]


def test_grey_of_16_bits_keeps_its_shades_and_plain_images_their_colours(tmp_path):
    deep = Image.fromarray(np.array([[0, 40092, 65535]], dtype=np.uint16))  # 40092 = 156 x 257
    assert pixels_of(deep, tmp_path) == [(0, 0, 0), (156, 156, 156), (255, 255, 255)]
    assert pixels_of(Image.new("RGB", (1, 1), (1, 2, 3)), tmp_path) == [(1, 2, 3)]
    assert pixels_of(Image.new("L", (1, 1), 9), tmp_path) == [(9, 9, 9)]


# ---- records


def test_a_link_in_the_data_folder_may_lead_out_of_it_a_record_may_not(tmp_path):
    store, data = put(tmp_path / "store", 2), tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(tmp_path / "store/images")
    shutil.copy(store, data / "d.jsonl")
    assert len(common.load_examples(data / "d.jsonl")) == 2
    for image in ("images/../../store/images/0.png", str(tmp_path / "store/images/0.png")):
        row = {**common.read_jsonl(store)[0], "image": image}
        common.write_jsonl(data / "d.jsonl", [row])
        with pytest.raises(common.InputError, match="d.jsonl line 1: .* leaves the data folder"):
            common.load_examples(data / "d.jsonl")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"answer_type": "number"}, '"answer_type" must be one of'),
        ({"answer_type": "float", "precision": 1.5}, '"precision" must be a count'),
        ({"answer_type": "float", "precision": -1}, '"precision" must be a count'),
        ({"answer_type": "integer", "answer": "x"}, "the answer 'x' .* not of its type"),
        ({"answer_type": "list", "answer": "[1, a]"}, "the answer .* not of its type"),
        ({"answer_type": "letter", "answer": "cat"}, "the answer 'cat' .* not of its type"),
        ({"choices": ["8", "9"]}, "the answer '7' is none of the choices"),
        ({"choices": ["7"]}, '"choices" must be a list of 2 to 10 texts'),
        ({"answer": " "}, 'field "answer" must be a text that is not empty'),
    ],
)
def test_an_answer_that_does_not_fit_its_record_is_refused_with_its_line(tmp_path, fields, message):
    path = put(tmp_path, 2)
    rows = common.read_jsonl(path)
    common.write_jsonl(path, [rows[0], {**rows[1], **fields}])
    with pytest.raises(common.InputError, match=f"d.jsonl line 2: .*{message}"):
        common.load_examples(path)


@pytest.mark.parametrize(
    "answer, fields, form",
    [
        ("(B)", {"choices": ["9", "12"]}, "B"),
        ("12", {"choices": ["9", "12"]}, "B"),
        ("A and B", {"choices": ["9", "12"]}, None),
        ("7.0", {"answer_type": "integer"}, "7"),
        ("3.14159", {"answer_type": "float", "precision": 2}, "3.14"),
        ("[1, 2.0]", {"answer_type": "list"}, "[1, 2]"),
        ("(c)", {"answer_type": "letter"}, "C"),
        ("seven", {"answer_type": "integer"}, None),
        ("Dark  Blue", {}, "dark blue"),
        (None, {}, None),
    ],
)
def test_an_answer_is_read_as_its_record_says(answer, fields, form):
    example = {"question": "q", "choices": None, **fields}
    assert common.canonical(answer, example) == form


@pytest.mark.parametrize(
    "name, files",
    [
        ("02_train_prm", ["val"]),
        ("03_self_evolve", ["val", "unlabeled"]),
        ("04_eval", ["test", "ood"]),
    ],
)
def test_prompts_to_judge_by_lie_beside_those_that_are_trained_on(monkeypatch, name, files):
    """Not in data/toy, where they would be other prompts than the run's."""
    module, opened = stage(name), {}
    flags = {"data": "mine/train.jsonl", "policy": "", "prm": "", "aggregate": "min"}

    def open_run(args, stage_name, inputs):
        opened.update(inputs)
        raise common.InputError("seen")

    for owner in (common, module):
        monkeypatch.setattr(owner, "open_run", open_run, raising=False)
    monkeypatch.setattr(module, "origin_of", lambda folder: {"flags": flags}, raising=False)
    args = module.Args()
    args.data, args.unlabeled = flags["data"], "vote"
    with pytest.raises(common.InputError, match="seen"):
        module.main(args)
    assert [str(opened[file]) for file in files] == [f"mine/{file}.jsonl" for file in files]
