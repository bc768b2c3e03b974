"""Bad inputs of every kind: each ends in one sentence, in no traceback, hang or wrong result."""

import io
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import typing
import zlib
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, stage
from PIL import Image
from safetensors.torch import load_file, save_file

import common

STAGES = [stage(name) for name in ("01_warmup", "02_train_prm", "03_self_evolve", "04_eval")]
warmup, train_prm, evolve, evaluate = STAGES
rng = random.Random(0)


# ---- the judge


class Hang(BaseException):
    """Ten seconds have passed; nothing but this file catches it."""


@contextmanager
def ten_seconds():
    """Raises Hang in what takes longer."""

    def late(*given):
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refuses(call, *given, says="") -> None:
    """Fails unless a call ends in one sentence of ours with these words, or in argparse's code 2.

    Whatever else it raises goes on to pytest, and so does a hang.
    """
    try:
        with ten_seconds():
            result = call(*given)
    except common.InputError as error:
        assert str(error).isprintable() and says in str(error), str(error)
    except SystemExit as end:
        assert end.code == 2 or end.code.startswith("error: ")
        assert end.code == 2 or end.code.isprintable() and says in end.code, end.code
    else:
        pytest.fail(f"accepted: {str(result)[:200]}")


# ---- data

FIELDS = ("id", "image", "question", "answer", "source")
GOOD = {"image": "a.png", "question": "3 + 4 ?", "answer": "7", "source": "toy"}
NO_TEXT = [None, 7, 1.5, True, float("nan"), 10**4000, [], ["a"], {}, {"a": 1}, "", " \n", "\ud800"]
NO_FIELD = {
    "choices": [7, "ab", {}, [], ["7"], ["7", 8], ["7", " "], ["7", "\udfff"], ["7", "8"] * 6],
    "answer_type": ["number", "", 7, [], {}, True],
    "precision": [-1, 1.5, "2", True, float("nan"), [], {}, 10**9, 10**30],
    "image": ["../a.png", "/etc/passwd", "b.png", ".", "a.png\0", "b\n.png", "x" * 5000, "a.png/b"],
    "id": ["0"],
}


def line_of(number: int, **changed) -> bytes:
    """A record as a line of JSONL, some of its fields changed; Ellipsis leaves one out."""
    row = {"id": str(number), **GOOD, **changed}
    return json.dumps({name: x for name, x in row.items() if x is not ...}).encode() + b"\n"


def bad_data() -> dict[str, bytes]:
    """Data files whose second record cannot be used, by what is wrong with it."""
    lines = {}
    for name in FIELDS:
        for value in (..., *rng.sample(NO_TEXT, 7)):
            lines[f"{name} {str(value)[:20]!r}"] = line_of(1, **{name: value})
    for name, values in NO_FIELD.items():
        for number, value in enumerate(values):
            kind = {"answer_type": "float"} if name == "precision" else {}
            lines[f"{name} {number}"] = line_of(1, **kind | {name: value})
    good = line_of(1)
    for place in rng.sample(range(1, len(good) - 1), 10):  # a part of an object is none
        lines[f"cut at {place}"] = good[:place] + b"\n"
    lines |= {
        "torn at the end": good[:-2],
        "two in a line": good[:-1] + good,
        "an empty line": b"\n" + good,
        "a list": b"[" + good[:-1] + b"]\n",
        "a number": b"7\n",
        "null": b"null\n",
        "NaN": b"NaN\n",
        "deep": b"[" * 10**5 + b"\n",
        "deep field": line_of(1)[:-2] + b', "x": ' + b'{"a":' * 10**5 + b"\n",
        "many digits": line_of(1)[:-2] + b', "x": ' + b"9" * 10**4 + b"}\n",
        "a bare NUL": good.replace(b"3 + 4", b"3 \0 4"),
        "Latin-1": good.replace(b"3 + 4", b"3 \xe9 4"),
        "half a character": good.replace(b"3 + 4", b"\xc3"),
        "a byte order mark": b"\xef\xbb\xbf" + good,
        "UTF-16": good.decode().encode("utf-16"),
        "quotes of Python": good.replace(b'"', b"'"),
        "gzip": b"\x1f\x8b\x08\x00" + rng.randbytes(99) + b"\n",
    }
    return lines


DATA = bad_data()


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with an image; a test writes its data file there."""
    folder = tmp_path_factory.mktemp("desk")
    Image.new("RGB", (24, 24), "red").save(folder / "a.png")
    return folder


def load(desk, lines: bytes, hidden=False) -> list[dict]:
    """The examples of a data file with these lines."""
    (desk / "d.jsonl").write_bytes(lines)
    return common.load_examples(desk / "d.jsonl", hidden)


@pytest.mark.parametrize("what", DATA)
def test_a_bad_record_is_refused_with_its_line(desk, what):
    assert len(load(desk, line_of(0) + line_of(1))) == 2
    refuses(load, desk, line_of(0) + DATA[what], says=f"{desk}/d.jsonl line 2: ")


@pytest.mark.parametrize("name", FIELDS[:3])
def test_a_bad_record_without_an_answer_is_refused_too(desk, name):
    assert len(load(desk, line_of(0, answer=7), hidden=True)) == 1
    for value in NO_TEXT:
        refuses(load, desk, line_of(0, **{name: value}), True, says="d.jsonl line 1: ")


# ---- images


def bytes_of(image, kind: str, **how) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def header(width: int, height: int) -> bytes:
    """A PNG file that ends after its header."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def bad_images() -> dict[str, bytes]:
    """Image files that cannot be read, by what is wrong with them."""
    noise = Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3))
    found = {}
    for kind in common.FORMATS:
        whole = bytes_of(noise, kind)
        for share in (0.0, 0.01, rng.uniform(0.1, 0.5), rng.uniform(0.5, 0.8)):
            found[f"{kind} cut at {share:.2f}"] = whole[: int(share * len(whole))]
        found[f"{kind} without its first byte"] = whole[1:]
    whole = bytes_of(noise, "PNG")
    for place in rng.sample(range(33), 8):  # the signature and the header, which has a checksum
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        found[f"PNG flipped at {place}"] = bytes(flipped)
    for kind in ("EPS", "PPM", "ICO", "TGA", "PCX", "SGI", "PDF"):
        found[kind] = bytes_of(noise, kind)
    text = b"zTXta\0\0" + zlib.compress(bytes(10**8))
    text = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    found |= {
        "a bomb": header(60000, 60000) + whole[33:],
        "a text bomb": whole[:33] + text + whole[33:],
        "no width": header(0, 64) + whole[33:],
        "floats": bytes_of(noise.convert("F"), "TIFF"),
        "HTML": b"<html>not found</html>",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
        "zip": b"PK\3\4" + rng.randbytes(99),
        "noise": rng.randbytes(999),
    }
    return found


IMAGES = bad_images()


@pytest.mark.parametrize("what", IMAGES)
def test_an_image_that_cannot_be_read_is_refused_with_its_line(tmp_path, what):
    (tmp_path / "a.png").write_bytes(IMAGES[what])
    example = {"image": tmp_path / "a.png", "where": "d.jsonl line 1"}
    refuses(common.read_image, example, says=f"d.jsonl line 1: image {tmp_path}/a.png")


def good_images() -> dict[str, tuple]:
    """Unusual image files that are whole: (file, the colour of their first frame)."""
    red, blue = (Image.new("RGB", (24, 24), colour) for colour in ("red", "blue"))
    frames = {"save_all": True, "append_images": [blue]}
    found = {f"{kind} of 2": bytes_of(red, kind, **frames) for kind in ("PNG", "GIF", "TIFF")}
    found |= {f"{mode} in TIFF": bytes_of(red.convert(mode), "TIFF") for mode in ("CMYK", "P")}
    found |= {
        "palette": bytes_of(red.quantize(2), "PNG"),
        "1 x 1": bytes_of(red.resize((1, 1)), "PNG"),
    }
    found["CMYK in JPEG"] = bytes_of(red.convert("CMYK"), "JPEG", quality=100)
    found = {what: (content, (255, 0, 0)) for what, content in found.items()}
    white = {"1 bit": "1", "grey with alpha": "LA", "grey of 16 bits": "I;16"}
    for what, mode in white.items():
        image = Image.new(
            mode, (24, 24), (255, 255) if mode == "LA" else 65535 if "I" in mode else 1
        )
        found[what] = bytes_of(image, "PNG"), (255, 255, 255)
    return found


WHOLE = good_images()


@pytest.mark.parametrize("what", WHOLE)
def test_an_unusual_image_is_its_first_frame_in_rgb(tmp_path, what):
    content, colour = WHOLE[what]
    (tmp_path / "a.png").write_bytes(content)
    image = common.read_image({"image": tmp_path / "a.png", "where": "d.jsonl line 1"})
    pixel = image.getpixel((image.width // 2, 0))
    assert image.mode == "RGB" and max(abs(a - b) for a, b in zip(pixel, colour)) <= 3


PLACES = {  # what may stand where an image or a data file is expected
    "a FIFO": os.mkfifo,
    "a folder": os.mkdir,
    "a link to itself": lambda path: os.symlink(path, path),
    "a link to nothing": lambda path: os.symlink("nothing", path),
    "a link to a device": lambda path: os.symlink("/dev/zero", path),
}


@pytest.mark.parametrize("what", PLACES)
def test_what_is_no_file_is_not_opened(desk, tmp_path, args, what):
    PLACES[what](tmp_path / "a.png")
    shutil.copy(desk / "a.png", tmp_path / "b.png")
    refuses(load, tmp_path, line_of(0), says="d.jsonl line 1: image")
    (tmp_path / "a.png").rename(tmp_path / "e.jsonl")
    refuses(common.load_examples, tmp_path / "e.jsonl", says="e.jsonl")
    args.runs = tmp_path / "runs"
    if what != "a folder":  # which may be a model
        refuses(common.open_run, args, "01_warmup", {"data": tmp_path / "e.jsonl"}, says="e.jsonl")


# ---- flags

OTHER = {
    int: ["1.5", "nan", "inf", "x", "", "1e3", "0x10", "9" * 30, "1 2", "-9"],
    float: ["nan", "inf", "-inf", "1e400", "x", "", "9" * 30, "1,5", "1 2", "-9"],
    bool: ["maybe", "2", "nan", "yes no"],
    list[float]: ["", "nan", "0.5 inf", "x", "0.5 -1", "0.5,1.0"],
}
TEXTS = {  # flags that are texts of a form
    "processor": ["", "{", "[1]", "[[1, 2, 3]]", "3", "null", "NaN", "[" * 10**5, '"{}"'],
    "chat_template_kwargs": ["", "{", "[1]", "3", "null", '{"a"}', "{'a': 1}"],
}


def bad_flags() -> list[tuple]:
    """(stage, words) of command lines of which one flag cannot be meant; each flag has some."""
    seen, found = set(), []
    for module in STAGES:
        for item in fields(module.Args):
            if item.name in seen:
                continue
            seen.add(item.name)
            texts = OTHER.get(item.type, TEXTS.get(item.name, []))
            if typing.get_origin(item.type) is typing.Literal:
                texts = ["neither", "", str(item.default).upper() + "x"]
            for text in rng.sample(texts, min(3, len(texts))):
                words = text.split(" ") if text else [""]
                found.append((module, [f"--{item.name}", *words]))
        found.append((module, [f"--{item.name[:-1]}", "1"]))  # an abbreviation
        found.append((module, [f"--{item.name}"]))  # without a value
        found.append((module, ["stray"]))
    return found


FLAGS = bad_flags()


def read_flags(module, words: list[str]):
    """A command line, as far as it is judged before any file is read."""
    args, _ = common.parse_flags(module.Args, words)
    common.check_ranges(args)
    return args


@pytest.mark.parametrize("module, words", FLAGS)
def test_a_flag_that_cannot_be_meant_is_refused_by_name(module, words, capsys):
    refuses(read_flags, module, words)


CONTRADICTIONS = [
    *("--interval 0.3", "--interval 2", "--interval 1e-9", "--passes 0.1", "--passes 1e7"),
    *("--search_grid 1 1", "--mixin 1", "--mixin 0.33 --unlabeled vote", "--mixin 0.5"),
    *("--method sft --gold_response {}{}", "--method sft --gold_response x --steps 1"),
    *("--temperature nan", "--temperature inf", "--temperature -1", "--temperature 1e400"),
    *("--temperature hot", "--temperature 0", "--temperature Adaptive", "--prm_refresh 99"),
    *("--search_every 99", "--vote_weights equal", "--objective pass_at_k --temperature 1"),
]


@pytest.mark.parametrize("line", CONTRADICTIONS)
def test_flags_of_evolving_that_contradict_each_other_are_refused(line):
    refuses(lambda: evolve.check_flags(read_flags(evolve, line.split())), says="--")


@pytest.mark.parametrize(
    "device", ["gpu", "cuda:", "cuda:99", "CPU", "cpu:1", "", "cuda:-1", "mps"]
)
def test_a_device_that_there_is_not_is_refused(monkeypatch, device):
    monkeypatch.setattr(common.dist, "is_initialized", lambda: False)
    refuses(common.join_ranks, device, says="--device")


# ---- model folders


def text_of(path, change) -> None:
    """Put what `change` makes of a file's bytes in its place."""
    path.write_bytes(change(path.read_bytes()))


def set_in(*names, to):
    """A change of the field of a JSON file that the names lead to."""

    def change(content: bytes) -> bytes:
        whole = json.loads(content)
        part = whole
        for name in names[:-1]:
            part = part[name]
        part[names[-1]] = to
        return json.dumps(whole).encode()

    return change


def tensors_of(change):
    """A change of the tensors of a safetensors file; `change` sees them by name."""

    def rewrite(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return rewrite


LAYER = "model.text_model.layers.1.self_attn.q_proj.weight"
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json")
MODEL_FILES = (*MODEL_FILES, "model.safetensors", "generation_config.json")


def bad_models() -> dict[str, typing.Callable]:
    """What makes a checkpoint folder one that cannot be used, by name."""
    found = {}

    def change(file, what, new):
        found[f"{file} {what}"] = lambda folder: text_of(folder / file, new)

    for file in MODEL_FILES:
        share = rng.uniform(0.2, 0.9)
        change(file, f"cut at {share:.2f}", lambda old, share=share: old[: int(share * len(old))])
        change(file, "emptied", lambda old: b"")
        change(file, "noise", lambda old: old.translate(bytes(reversed(range(256)))))
        change(file, "a list", lambda old: b"[1, 2]")
        change(file, "deep", lambda old: b"[" * 10**5)
    for file in MODEL_FILES[:2] + ("model.safetensors", "chat_template.jinja"):
        found[f"{file} deleted"] = lambda folder, file=file: (folder / file).unlink()
    for name, to in (
        *((("model_type",), to) for to in ("llama", "t5", "nothing", 7, None)),
        *((("text_config",), to) for to in (5, "x")),
        *((("text_config", "hidden_size"), to) for to in (-1, 0, 65, "x", 10**30)),
        *((("text_config", "num_attention_heads"), to) for to in (0, "x", 3)),
        *((("text_config", "vocab_size"), to) for to in (1, -1, None)),
        *((("vision_config", "patch_size"), to) for to in (0, 7)),
        (("text_config", "num_hidden_layers"), 3),
        (("scale_factor",), 0),
    ):
        what = f"{'.'.join(name)} {to}"
        change("config.json", what, set_in(*name, to=to))
    for name, to in ((("model",), 5), (("model", "type"), "x")):
        change("tokenizer.json", ".".join(name), set_in(*name, to=to))
    for text in (
        "",
        "{% for %}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
    ):
        change("chat_template.jinja", text, lambda old, text=text: text.encode())
    for what, spoil in {
        "a tensor missing": lambda tensors: tensors.pop(LAYER),
        "another shape": lambda tensors: tensors.update({LAYER: torch.zeros(3, 3)}),
        "a vector": lambda tensors: tensors.update({LAYER: torch.zeros(3)}),
        "NaN": lambda tensors: tensors[LAYER][0, 0].fill_(float("nan")),
        "infinity": lambda tensors: tensors[LAYER][0, 0].fill_(float("inf")),
        "none": lambda tensors: tensors.clear(),
    }.items():
        spoiled = tensors_of(spoil)
        found[what] = lambda folder, spoiled=spoiled: spoiled(folder / "model.safetensors")
    for one, other in zip(MODEL_FILES, MODEL_FILES[1:]):
        found[f"{one} is {other}"] = lambda folder, one=one, other=other: shutil.copy(
            folder / other, folder / one
        )
    return found


MODELS = bad_models()


def read_model(folder, desk, out, args):
    """A checkpoint folder, read as the stages do: first the processor, then the weights."""
    args.max_prompt_tokens = 2048
    common.fitting(out, folder, args, load(desk, line_of(0)))
    policy = common.load_policy(folder, args)
    common.prove_policy(policy, load(desk, line_of(0))[0], args)


@pytest.mark.parametrize("what", MODELS)
def test_a_checkpoint_that_is_not_whole_is_refused(tiny, desk, tmp_path, args, monkeypatch, what):
    folder = shutil.copytree(tiny, tmp_path / "model")
    MODELS[what](folder)
    monkeypatch.setattr(common, "PROVED", set())
    refuses(read_model, folder, desk, tmp_path / "out", args)


NO_FOLDER = {
    "nothing": lambda path: None,
    "empty": lambda path: path.mkdir(),
    "a file": lambda path: path.write_text("{}"),
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("what", NO_FOLDER)
def test_what_is_no_model_folder_is_refused(desk, tmp_path, args, what):
    NO_FOLDER[what](tmp_path / "model")
    refuses(read_model, tmp_path / "model", desk, tmp_path / "out", args, says="/model")
    refuses(common.load_prm, tmp_path / "model", args, says="/model")


# ---- what users bring besides: checkers, settings, MathV360K, step labels

CHECKERS = {
    "a syntax error": "def judge(response, example:\n",
    "no function": "x = 7\n",
    "no import": "import nothing_of_this_name\n",
    "an error when read": "1 / 0\n",
    "no function of this name": "def other(response, example):\n    return True\n",
    "no callable": "judge = 7\n",
    "NUL": "judge = '\0'\n",
    "an error": "def judge(response, example):\n    return example['none']\n",
    "a failed assertion": "def judge(response, example):\n    assert False\n",
    "no arguments": "def judge():\n    return True\n",
    "a text": "def judge(response, example):\n    return 'yes'\n",
    "a share": "def judge(response, example):\n    return 0.5\n",
    "a list": "def judge(response, example):\n    return [True]\n",
    "endless recursion": "def judge(response, example):\n    return judge(response, example)\n",
}


@pytest.mark.parametrize("what", CHECKERS)
def test_a_checker_that_fails_is_named(tmp_path, what):
    (tmp_path / "mine.py").write_text(CHECKERS[what])
    spec = f"{tmp_path}/mine.py:judge"
    refuses(lambda: common.load_checker(spec)("7", {}), says=f"--chain_checker {spec} fails: ")


TEMPLATE_SETTINGS = [
    *('{"tokenize": false}', '{"conversation": 7}', '{"add_generation_prompt": false}'),
    *('{"chat_template": "{% for %}"}', '{"chat_template": "{{ 1 / 0 }}"}', '{"chat_template": 7}'),
    *('{"chat_template": ""}', '{"processor_kwargs": 7}', '{"return_dict": 0}'),
]


@pytest.mark.parametrize("text", TEMPLATE_SETTINGS)
def test_settings_that_the_chat_template_refuses_are_named_with_the_prompt(
    tiny, desk, tmp_path, args, text
):
    args.chat_template_kwargs = text
    examples = load(desk, line_of(0))
    refuses(common.fitting, tmp_path, tiny, args, examples, says="d.jsonl line 1: the processor")


@pytest.mark.parametrize("text", ['{"size": "x"}', '{"size": NaN}', '{"max_image_size": "x"}'])
def test_settings_that_the_processor_refuses_are_a_sentence(tiny, desk, tmp_path, args, text):
    args.processor = text
    refuses(common.fitting, tmp_path, tiny, args, load(desk, line_of(0)))


def published(count: int) -> list[dict]:
    """Records in the form of MathV360K, an image each."""
    turns = [{"value": "<image>\nQuestion: 3 + 4 ?"}, {"value": "7"}]
    return [{"image": f"{number}.png", "conversations": turns} for number in range(count)]


def spoil(number: int, **changed) -> str:
    """Twenty records, of which the first few are changed."""
    records = published(20)
    for record in records[:number]:
        record |= changed
    return json.dumps(records)


PUBLISHED = {
    "empty": "",
    "an object": "{}",
    "a number": "7",
    "deep": "[" * 10**5,
    "torn": spoil(0)[:-9],
    "many digits": "[" + "9" * 10**4 + "]",
    "numbers": json.dumps([7] * 20),
    "no images": spoil(3, image="none.png"),
    "images of another kind": spoil(3, image=7),
    "a NUL in a name": spoil(3, image="\0.png"),
    "half a character": spoil(3, image="\ud800.png"),
    "one turn": spoil(3, conversations=[{"value": "7"}]),
    "turns of another kind": spoil(3, conversations={"value": "7"}),
    "no answers": spoil(3, conversations=[{"value": "<image>\nQuestion: q"}, {"value": ""}]),
    "too few": json.dumps(published(20)),  # for 750 test and 250 val prompts
}


@pytest.mark.parametrize("what", PUBLISHED)
def test_a_published_file_that_is_not_whole_is_refused(tmp_path, what):
    (tmp_path / "data_images").mkdir()
    for record in published(20):
        (tmp_path / "data_images" / record["image"]).touch()
    (tmp_path / "train_samples_all_tuning.json").write_text(PUBLISHED[what])
    refuses(warmup.split_mathv360k, tmp_path, 0)
    assert not (tmp_path / "split.json").exists()


LABELS = {
    "half a character": {"step": "\ud800", "score": 1},
    "no text": {"step": 7, "score": 1},
    "a text as score": {"step": "7", "score": "1"},
    "no number": {"step": "7", "score": float("nan")},
    "many digits": {"step": "7", "score": 10**4000},
    "a list": ["7", 1],
}


@pytest.mark.parametrize("what", LABELS)
def test_a_step_label_that_cannot_be_one_is_refused_with_its_line(tiny, desk, policy, args, what):
    example = load(desk, line_of(0))[0]
    args.labels, args.held_out, args.label_kind = str(desk / "labels.jsonl"), 0.5, "soft"
    row = {"id": "0", "steps_with_score": [{"step": "7", "score": 1}]}
    bad = row | {"steps_with_score": [LABELS[what]]}
    (desk / "labels.jsonl").write_text("\n".join(map(json.dumps, (row, bad))) + "\n")
    given = ({"0": example}, policy.tokenizer, args, desk / "steps.jsonl")
    refuses(train_prm.read_labels, *given, says="labels.jsonl line 2, and 1 of 2")


# ---- run folders

LINES = {
    "01_warmup": "--steps 2 --samples 4 --chunk 8 --save_every 1",
    "02_train_prm": "--prompts 32 --samples 4 --rollouts 1 --epochs 1 --held_out 0.4 "
    "--val_samples 2 --batch_size 32",
    "03_self_evolve": "--passes 1.5 --steps 3 --samples 3 --interval 0.5 --search_prompts 2 "
    "--search_grid 0.5 1.0",
}


def start(name: str, *words: str) -> None:
    """A stage in this process as its command line starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", "--device", "cpu", *LINES[name].split(), *words])
        try:
            common.run_stage(stage(name).Args, stage(name).main)
        finally:
            common.close_runs()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, world):
    """A working directory with finished runs of stages 01 to 03 in runs/toy."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data").mkdir()
    (folder / "data/toy").symlink_to(world)
    (folder / "tests").symlink_to(ROOT / "tests")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in LINES:
            start(name)
        yield folder


def copy_of(finished, name: str, runs: str):
    """The folder of a stage, copied into runs/<runs>, with links to the stages before it."""
    folder = finished / "runs" / runs
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished / "runs/toy" / name, folder / name)
    for other in LINES:
        if other < name:
            (folder / other).symlink_to(finished / "runs/toy" / other)
    return folder / name


def results(folder) -> dict:
    """The JSON and JSONL files of a run but digests, without seconds, and the weights."""
    found = {}
    for path in sorted(folder.rglob("*.[js]*")):
        content = path.read_bytes()
        if path.name != "digests.json":
            found[str(path.relative_to(folder))] = re.sub(rb'"seconds": [\d.]+', b"", content)
    return found


def edit_digit(content: bytes) -> bytes:
    """Another digit in place of one."""
    places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    place = rng.choice(places)
    other = (content[place] - 48 + rng.randint(1, 9)) % 10
    return content[:place] + b"%d" % other + content[place + 1 :]


def swap_lines(content: bytes) -> bytes:
    """The last line first."""
    lines = content.splitlines(keepends=True)
    return b"".join([lines[-1], *lines[:-1]])


TAMPERS = {
    "a digit edited": edit_digit,
    "lines swapped": swap_lines,
    "cut": lambda content: content[: rng.randrange(1, len(content) - 2)],
    "a line lost": lambda content: b"".join(content.splitlines(keepends=True)[1:]),
    "emptied": lambda content: b"",
    "noise": lambda content: content.translate(bytes(reversed(range(256)))),
    "other JSON": lambda content: b'{"flags": 7, "iteration": "x", "id": []}\n',
    "a list": lambda content: b"[]\n",
    "deleted": None,
}
READ_AGAIN = {  # what a finished stage that is started again reads or shows
    "01_warmup": "run.json digests.json samples.jsonl sft.jsonl metrics.json "
    "training/progress.json prompts/lengths.jsonl prompts/digests.json model/config.json",
    "02_train_prm": "run.json digests.json samples.jsonl prefixes.jsonl rollouts.jsonl steps.jsonl "
    "held_out.jsonl val_samples.jsonl metrics.json training/progress.json model/prm.json",
    "03_self_evolve": "run.json digests.json metrics.jsonl temperature.jsonl iter_00/metrics.json "
    "iter_01/metrics.json iter_02/metrics.json iter_03/metrics.json iter_02/digests.json "
    "model/tokenizer.json",
}
TAMPERED = []
for name, names in READ_AGAIN.items():
    pairs = [(name, file, how) for file in names.split() for how in TAMPERS]
    TAMPERED += rng.sample(pairs, 24)


@pytest.mark.parametrize("name, file, how", TAMPERED)
def test_a_finished_run_that_was_tampered_with_is_repaired_or_refused(finished, name, file, how):
    folder = copy_of(finished, name, "tampered")
    path, whole = folder / file, results(finished / "runs/toy" / name)
    before = path.read_bytes()
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(TAMPERS[how](before))
    try:
        with ten_seconds():
            start(name, "--runs", "runs/tampered")
    except SystemExit as end:
        assert end.code.startswith("error: ") and end.code.isprintable(), end.code
    else:
        assert results(folder) == whole


SPOILED = {
    "progress emptied": lambda work: (work / "progress.json").write_text(""),
    "progress a list": lambda work: (work / "progress.json").write_text("[1]"),
    "progress of nothing": lambda work: (work / "progress.json").write_text("{}"),
    "another batch": lambda work: text_of(work / "progress.json", set_in("batch", to=7)),
    "no number": lambda work: text_of(work / "progress.json", set_in("batch", to="x")),
    "a digit edited": lambda work: text_of(work / "progress.json", edit_digit),
    "state deleted": lambda work: shutil.rmtree(work / "batch_000001"),
    "weights deleted": lambda work: next(work.glob("batch*/*.safetensors")).unlink(),
    "weights cut": lambda work: text_of(
        next(work.glob("batch*/*.safetensors")), lambda old: old[: len(old) // 2]
    ),
    "weights emptied": lambda work: next(work.glob("batch*/*.safetensors")).write_bytes(b""),
}


@pytest.fixture(scope="module")
def half_trained(finished):
    """Stage 01 in runs/half, interrupted after its first step."""

    class Stop(BaseException):
        pass

    def stop(work, keep=""):
        raise Stop

    folder = copy_of(finished, "01_warmup", "half")
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "training")
    (folder / "metrics.json").unlink()
    made = json.loads((folder / "digests.json").read_text())
    del made["model"], made["metrics.json"]
    common.write_json(folder / "digests.json", made)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(common, "drop_states", stop)
        start("01_warmup", "--runs", "runs/half")
    return folder


@pytest.mark.parametrize("what", SPOILED)
def test_a_training_state_that_is_not_whole_is_refused(finished, half_trained, what):
    shutil.rmtree(finished / "runs/spoiled", ignore_errors=True)
    folder = shutil.copytree(half_trained, finished / "runs/spoiled/01_warmup")
    SPOILED[what](folder / "training")
    refuses(start, "01_warmup", "--runs", "runs/spoiled")


@pytest.mark.parametrize("how", TAMPERS)
def test_a_chunk_that_was_tampered_with_is_made_again(tmp_path, args, how):
    items, args.chunk = list(range(10)), 4

    def produce(chunk):
        return [{"item": item, "copy": k} for item in chunk for k in range(2)]

    def killed(chunk):
        if 9 in chunk:
            raise KeyboardInterrupt
        return produce(chunk)

    common.write_chunks(tmp_path / "whole.jsonl", items, produce, args, "t")
    for number in (0, 4):
        path = tmp_path / f"{number}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            common.write_chunks(path, items, killed, args, "t")
        for part in (f"{number:09d}-4.jsonl", f"{number:09d}-4.digest"):
            part = tmp_path / f"{number}.jsonl.parts" / part
            if how == "deleted":
                part.unlink()
            else:
                part.write_bytes(TAMPERS[how](part.read_bytes()))
            with pytest.raises(KeyboardInterrupt):
                common.write_chunks(path, items, killed, args, "t")
        common.write_chunks(path, items, produce, args, "t")
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ---- Ctrl-C


def test_an_interruption_at_any_moment_is_one_sentence_and_the_run_goes_on(finished):
    def interrupt(*given):
        signal.raise_signal(signal.SIGINT)

    said = []
    shutil.rmtree(finished / "runs/stopped", ignore_errors=True)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(10):
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.1, 1.0))
            try:
                start("01_warmup", "--runs", "runs/stopped")
            except SystemExit as end:
                said.append(end.code)
            else:  # it had gone on to its end
                signal.setitimer(signal.ITIMER_REAL, 0)
                shutil.rmtree(finished / "runs/stopped")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(said) >= 5
    assert set(said) == {"interrupted: what was written is whole; the same command continues"}
    start("01_warmup", "--runs", "runs/stopped")
    whole = finished / "runs/toy/01_warmup"
    assert results(finished / "runs/stopped/01_warmup") == results(whole)


def test_at_least_two_hundred_bad_inputs_are_tried():
    tables = (DATA, IMAGES, FLAGS, MODELS, TAMPERED, CHECKERS, PUBLISHED, LABELS, SPOILED)
    assert sum(map(len, tables)) >= 400
