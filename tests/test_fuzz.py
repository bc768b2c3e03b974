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
rng = random.Random(0)


# ---- the judge


class Hang(BaseException):
    """Ten seconds have passed; nothing but this file catches it."""


@contextmanager
def alarm(seconds: float, ring):
    """Calls `ring` after so many seconds, unless the block has ended."""
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def hang(*given):
    raise Hang


def refuses(call, *given, says="") -> None:
    """Fails unless a call ends in one sentence of ours with these words, or in argparse's code 2.

    Whatever else it raises goes on to pytest, and so does a hang.
    """
    try:
        with alarm(10, hang):
            result = call(*given)
    except common.InputError as error:
        assert str(error).isprintable() and says in str(error), str(error)
    except SystemExit as end:
        assert end.code == 2 or end.code.startswith("error: ") and end.code.isprintable(), end.code
    else:
        pytest.fail(f"accepted: {str(result)[:200]}")


def edit_digit(content: bytes) -> bytes:
    """Another digit in place of one."""
    place = rng.choice([i for i, byte in enumerate(content) if chr(byte).isdigit()])
    other = (content[place] - 48 + rng.randint(1, 9)) % 10
    return content[:place] + b"%d" % other + content[place + 1 :]


BREAK = {  # what makes any of our files one that cannot be read
    "cut": lambda content: content[: rng.randrange(1, len(content) * 3 // 4)],
    "emptied": lambda content: b"",
    "noise": lambda content: content.translate(bytes(reversed(range(256)))),
    "a list": lambda content: b"[1, 2]\n",
    "deep": lambda content: b"[" * 10**5,
}
TAMPER = BREAK | {  # and what may go unnoticed
    "a digit edited": edit_digit,
    "a line lost": lambda content: content.partition(b"\n")[2],
    "a line twice": lambda content: content.partition(b"\n")[0] + b"\n" + content,
    "other JSON": lambda content: b'{"flags": 7, "iteration": "x", "id": []}\n',
    "deleted": None,
}


def change(path, how) -> None:
    """Put what `how` makes of a file's bytes in its place; None deletes it."""
    content = path.read_bytes()
    path.unlink()
    if how:
        path.write_bytes(how(content))


# ---- data

GOOD = {"image": "a.png", "question": "3 + 4 ?", "answer": "7", "source": "toy"}
NO_TEXT = [None, 7, 1.5, True, float("nan"), 10**4000, [], ["a"], {"a": 1}, "", " \n", "\ud800"]
NO_VALUE = {name: NO_TEXT for name in ("id", *GOOD)} | {
    "choices": [7, "ab", {}, [], ["7"], ["7", 8], ["7", " "], ["7", "\udfff"], ["7", "8"] * 6],
    "answer_type": ["number", "", 7, [], {}, True],
    "precision": [-1, 1.5, "2", True, float("nan"), [], {}, 10**9, 10**30],
}
IMAGE_NAMES = ["../a.png", "/etc/passwd", "b.png", ".", "a.png\0", "b\n.png", "x" * 5000, "a.png/b"]


def line_of(number: int, **changed) -> bytes:
    """A record as a line of JSONL, some of its fields changed; Ellipsis leaves one out."""
    row = {"id": str(number), **GOOD, **changed}
    return json.dumps({name: x for name, x in row.items() if x is not ...}).encode() + b"\n"


def bad_data() -> dict[str, bytes]:
    """Lines that cannot be the second record of a data file, by what is wrong with them."""
    good = line_of(1)
    lines = {f"{name} missing": line_of(1, **{name: ...}) for name in ("id", *GOOD)}
    for name, values in NO_VALUE.items():
        kind = {"answer_type": "float"} if name == "precision" else {}
        for number in rng.sample(range(len(values)), min(6, len(values))):
            lines[f"{name} {number}"] = line_of(1, **kind | {name: values[number]})
    lines |= {f"image {name[:9]!r}": line_of(1, image=name) for name in IMAGE_NAMES}
    lines |= {f"{how} {k}": BREAK[how](good[:-1]) + b"\n" for how in BREAK for k in range(4)}
    return lines | {
        "torn at the end": good[:-2],
        "the same id": line_of(0),
        "two in a line": good[:-1] + good,
        "an empty line": b"\n" + good,
        "NaN": b"NaN\n",
        "many digits": good[:-2] + b', "x": ' + b"9" * 10**4 + b"}\n",
        "a bare NUL": good.replace(b"3 + 4", b"3 \0 4"),
        "Latin-1": good.replace(b"3 + 4", b"3 \xe9 4"),
        "a byte order mark": b"\xef\xbb\xbf" + good,
        "UTF-16": good.decode().encode("utf-16"),
    }


DATA = bad_data()


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with an image; a test writes its data file there."""
    folder = tmp_path_factory.mktemp("desk")
    Image.new("RGB", (24, 24), "red").save(folder / "a.png")
    return folder


def load(desk, lines: bytes = line_of(0), hidden=False) -> list[dict]:
    """The examples of a data file with these lines."""
    (desk / "d.jsonl").write_bytes(lines)
    return common.load_examples(desk / "d.jsonl", hidden)


@pytest.mark.parametrize("what", DATA)
def test_a_bad_record_is_refused_with_its_line(desk, what):
    assert len(load(desk, line_of(0) + line_of(1))) == 2
    refuses(load, desk, line_of(0) + DATA[what], says=f"{desk}/d.jsonl line 2: ")


def test_a_bad_record_without_an_answer_is_refused_too(desk):
    assert len(load(desk, line_of(0, answer=7), hidden=True)) == 1
    for value in NO_TEXT:
        for name in ("id", "image", "question"):
            refuses(load, desk, line_of(0, **{name: value}), True, says="d.jsonl line 1: ")


# ---- images


def bytes_of(image, kind: str, **how) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bad_images() -> dict[str, bytes]:
    """Image files that cannot be read, by what is wrong with them."""
    noise, found = Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3)), {}
    for kind in common.FORMATS:
        whole = bytes_of(noise, kind)
        for share in (0.0, 0.01, rng.uniform(0.1, 0.5), rng.uniform(0.5, 0.8)):
            found[f"{kind} cut at {share:.2f}"] = whole[: int(share * len(whole))]
        found[f"{kind} without its first byte"] = whole[1:]
    whole = bytes_of(noise, "PNG")
    for place in rng.sample(range(33), 8):  # the signature and the header, which has a checksum
        flipped = whole[place] ^ (1 << rng.randrange(8))
        found[f"PNG flipped at {place}"] = whole[:place] + bytes([flipped]) + whole[place + 1 :]
    found |= {kind: bytes_of(noise, kind) for kind in ("EPS", "PPM", "ICO", "TGA", "SGI", "PDF")}
    for width in (0, 60000):
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, 60000, 8, 2, 0, 0, 0))
        found[f"{width} pixels wide"] = whole[:8] + header + whole[33:]
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))
    found |= {"a text bomb": whole[:33] + text + whole[33:]}
    found |= {"floats": bytes_of(noise.convert("F"), "TIFF"), "HTML": b"<html>not found</html>"}
    return found | {"zip": b"PK\3\4" + rng.randbytes(99), "noise": rng.randbytes(999)}


IMAGES = bad_images()


@pytest.mark.parametrize("what", IMAGES)
def test_an_image_that_cannot_be_read_is_refused_with_its_line(tmp_path, what):
    (tmp_path / "a.png").write_bytes(IMAGES[what])
    example = {"image": tmp_path / "a.png", "where": "d.jsonl line 1"}
    refuses(common.read_image, example, says=f"d.jsonl line 1: image {tmp_path}/a.png")


def test_an_unusual_image_is_its_first_frame_in_rgb(tmp_path):
    red, blue = (Image.new("RGB", (24, 24), colour) for colour in ("red", "blue"))
    two = {"save_all": True, "append_images": [blue]}
    files = [bytes_of(red, kind, **two) for kind in ("PNG", "GIF", "TIFF")]
    files += [bytes_of(red.convert(mode), "TIFF") for mode in ("CMYK", "P")]
    files += [bytes_of(image, "PNG") for image in (red.quantize(2), red.resize((1, 1)))]
    for content in files:
        (tmp_path / "a.png").write_bytes(content)
        image = common.read_image({"image": tmp_path / "a.png", "where": "d.jsonl line 1"})
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 0, 0))


PLACES = {  # what may stand where an image or a data file is expected
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a link to itself": lambda path: os.symlink(path, path),
    "a link to a device": lambda path: os.symlink("/dev/zero", path),
}


@pytest.mark.parametrize("what", PLACES)
def test_what_is_no_file_is_not_opened(desk, tmp_path, args, what):
    PLACES[what](tmp_path / "a.png")
    refuses(load, tmp_path, says="d.jsonl line 1: image")
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
    "processor": ["", "{", "[1]", "[[1, 2, 3]]", "3", "null", "NaN", "[" * 10**5, '"{}"'],
    "chat_template_kwargs": ["", "{", "[1]", "3", "null", '{"a"}', "{'a': 1}"],
}


def bad_flags() -> list[tuple]:
    """(stage, words) of command lines of which one flag cannot be meant; each flag has some."""
    seen, found = set(), []
    for module in STAGES:
        for item in fields(module.Args):
            texts = OTHER.get(item.type, OTHER.get(item.name, []))
            if typing.get_origin(item.type) is typing.Literal:
                texts = ["neither", "", f"{item.default} x"]
            for text in rng.sample(texts, min(3, len(texts))) if item.name not in seen else ():
                found.append((module, [f"--{item.name}", *text.split(" ")]))
            seen.add(item.name)
        found += [(module, ["--run", "x"]), (module, ["--runs"]), (module, ["stray"])]
    return found


FLAGS = bad_flags()


def read_flags(module, words: list[str]) -> None:
    """A command line, as far as it is judged before any file is read."""
    common.check_ranges(common.parse_flags(module.Args, words)[0])


@pytest.mark.parametrize("module, words", FLAGS)
def test_a_flag_that_cannot_be_meant_is_refused(module, words):
    refuses(read_flags, module, words, says=words[0])


@pytest.mark.parametrize(
    "device", ["gpu", "cuda:", "cuda:99", "CPU", "cpu:1", "", "cuda:-1", "mps"]
)
def test_a_device_that_there_is_not_is_refused(monkeypatch, device):
    monkeypatch.setattr(common.dist, "is_initialized", lambda: False)
    refuses(common.join_ranks, device, says="--device")


# ---- model folders

LAYER = "model.text_model.layers.1.self_attn.q_proj.weight"
MODEL_FILES = ["config", "tokenizer", "tokenizer_config", "processor_config", "generation_config"]
MODEL_FILES = [*(f"{name}.json" for name in MODEL_FILES), "model.safetensors"]
SETTINGS = {  # of config.json
    "model_type": ["llama", "t5", "nothing", 7, None],
    "text_config": [5, "x"],
    "text_config.hidden_size": [-1, 0, 65, "x", 10**30],
    "text_config.num_attention_heads": [0, "x", 3],
    "text_config.vocab_size": [1, -1, None],
    "text_config.num_hidden_layers": [3],
    "vision_config.patch_size": [0, 7],
    "scale_factor": [0],
}
TENSORS = {
    "a tensor missing": lambda tensors: tensors.pop(LAYER),
    "another shape": lambda tensors: tensors.update({LAYER: torch.zeros(3, 3)}),
    "a vector": lambda tensors: tensors.update({LAYER: torch.zeros(3)}),
    "NaN": lambda tensors: tensors[LAYER][0, 0].fill_(float("nan")),
    "infinity": lambda tensors: tensors[LAYER][0, 0].fill_(float("inf")),
    "none": lambda tensors: tensors.clear(),
}
TEMPLATES = ["", "{% for %}", "{{ nothing.at.all }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"]


def set_in(path, name: str, value) -> None:
    """Change the field of a JSON file that a name with dots leads to."""
    whole = part = json.loads(path.read_text())
    *groups, last = name.split(".")
    for group in groups:
        part = part[group]
    part[last] = value
    path.write_text(json.dumps(whole))


def rewrite(path, spoil) -> None:
    """Change the tensors of a safetensors file; `spoil` sees them by name."""
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path, {"format": "pt"})


def bad_models() -> dict[str, tuple]:
    """(what to do, file, how) that makes a checkpoint folder one that cannot be used, by name."""
    found = {f"{file} {how}": (change, file, BREAK[how]) for file in MODEL_FILES for how in BREAK}
    for file in ("config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"):
        found[f"{file} deleted"] = change, file, None
    for text in TEMPLATES:
        found[f"template {text}"] = change, "chat_template.jinja", lambda _, x=text: x.encode()
    for name, values in SETTINGS.items():
        found |= {f"{name} {value}": (set_in, "config.json", name, value) for value in values}
    found |= {what: (rewrite, "model.safetensors", TENSORS[what]) for what in TENSORS}
    found |= {f"tokenizer {x}": (set_in, "tokenizer.json", "model", x) for x in (5, {"type": "x"})}
    return found


MODELS = bad_models()


def read_model(folder, desk, out, args):
    """A checkpoint folder, read as the stages do: first the processor, then the weights."""
    examples = load(desk)
    common.fitting(out, folder, args, examples)
    common.prove_policy(common.load_policy(folder, args), examples[0], args)


@pytest.mark.parametrize("what", MODELS)
def test_a_checkpoint_that_is_not_whole_is_refused(tiny, desk, tmp_path, args, monkeypatch, what):
    folder = shutil.copytree(tiny, tmp_path / "model")
    do, file, *how = MODELS[what]
    do(folder / file, *how)
    monkeypatch.setattr(common, "PROVED", set())
    refuses(read_model, folder, desk, tmp_path / "out", args)


@pytest.mark.parametrize("make", [lambda path: None, os.mkdir, lambda path: path.write_text("{}")])
def test_what_is_no_model_folder_is_refused(desk, tmp_path, args, make):
    make(tmp_path / "model")
    refuses(read_model, tmp_path / "model", desk, tmp_path / "out", args, says="/model")
    refuses(common.load_prm, tmp_path / "model", args, says="/model")


# ---- what users bring besides: settings, checkers, MathV360K, step labels


@pytest.mark.parametrize(
    "name, text",
    [
        *(("processor", text) for text in ('{"size": "x"}', '{"size": NaN}')),
        ("chat_template_kwargs", '{"tokenize": false}'),
        ("chat_template_kwargs", '{"conversation": 7}'),
        ("chat_template_kwargs", '{"chat_template": "{{ 1 / 0 }}"}'),
        ("chat_template_kwargs", '{"chat_template": 7}'),
        ("chat_template_kwargs", '{"processor_kwargs": 7}'),
    ],
)
def test_settings_that_a_model_refuses_are_a_sentence(tiny, desk, tmp_path, args, name, text):
    setattr(args, name, text)
    refuses(common.fitting, tmp_path, tiny, args, load(desk))


HEAD = "def judge(response, example):\n    "
CHECKERS = ["def judge(response:\n", "x = 7\n", "import no_such_module\n", "1 / 0\n", "judge = 7\n"]
CHECKERS += ["judge = '\0'\n", "def judge():\n    return True\n", f"{HEAD}return example['none']\n"]
CHECKERS += [f"{HEAD}assert False\n", f"{HEAD}return judge(response, example)\n"]
CHECKERS += [f"{HEAD}return {verdict}\n" for verdict in ("'yes'", "0.5", "[True]", "example")]


@pytest.mark.parametrize("text", CHECKERS)
def test_a_checker_that_fails_is_named(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    spec = f"{tmp_path}/mine.py:judge"
    refuses(lambda: common.load_checker(spec)("7", {}), says=f"--chain_checker {spec} fails: ")


ASKED = {"value": "<image>\nQuestion: 3 + 4 ?"}
PUBLISHED = [  # of three records of twenty, what is changed
    *({"image": image} for image in ("none.png", 7, "\0.png", "\ud800.png")),
    *({"conversations": turns} for turns in ([ASKED], ASKED, [ASKED, {"value": ""}], None)),
    {},  # whole, but too few for 750 test and 250 val prompts
]


@pytest.mark.parametrize("how", [*BREAK, *range(len(PUBLISHED))])
def test_a_published_file_that_is_not_whole_is_refused(tmp_path, how):
    records = []
    (tmp_path / "data_images").mkdir()
    for number in range(20):
        (tmp_path / f"data_images/{number}.png").touch()
        records.append({"image": f"{number}.png", "conversations": [ASKED, {"value": "7"}]})
    if how not in BREAK:
        records[:3] = [record | PUBLISHED[how] for record in records[:3]]
    path = tmp_path / "train_samples_all_tuning.json"
    path.write_text(json.dumps(records))
    if how in BREAK:
        change(path, BREAK[how])
    refuses(STAGES[0].split_mathv360k, tmp_path, 0)
    assert not (tmp_path / "split.json").exists()


LABELS = [{"step": "7", "score": score} for score in ("1", float("nan"), 10**4000, None)]
LABELS += [{"step": "\ud800", "score": 1}, {"step": 7, "score": 1}, ["7", 1], None]


@pytest.mark.parametrize("label", LABELS)
def test_a_step_label_that_cannot_be_one_is_refused_with_its_line(desk, policy, args, label):
    args.labels, args.held_out, args.label_kind = str(desk / "labels.jsonl"), 0.5, "soft"
    rows = [{"id": "0", "steps_with_score": [x]} for x in ({"step": "7", "score": 1}, label)]
    (desk / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    given = ({"0": load(desk)[0]}, policy.tokenizer, args, desk / "steps.jsonl")
    refuses(STAGES[1].read_labels, *given, says="labels.jsonl line 2, and 1 of 2")


# ---- run folders

LINES = {
    "01_warmup": "--steps 2 --samples 4 --chunk 8 --save_every 1",
    "02_train_prm": "--prompts 20 --samples 4 --rollouts 1 --epochs 1 --held_out 0.4 "
    "--val_samples 2 --batch_size 32",
    "03_self_evolve": "--passes 1.5 --steps 3 --samples 3 --interval 0.5 --search_prompts 2 "
    "--search_grid 0.5 1.0",
}
READ_AGAIN = {  # what a finished stage that is started again reads or shows
    "01_warmup": "run.json digests.json samples.jsonl sft.jsonl metrics.json "
    "training/progress.json prompts/lengths.jsonl prompts/digests.json model/config.json",
    "02_train_prm": "run.json digests.json samples.jsonl prefixes.jsonl rollouts.jsonl steps.jsonl "
    "held_out.jsonl val_samples.jsonl metrics.json training/progress.json model/prm.json",
    "03_self_evolve": "run.json digests.json metrics.jsonl temperature.jsonl iter_00/metrics.json "
    "iter_01/metrics.json iter_02/metrics.json iter_02/digests.json model/tokenizer.json",
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


def copy_of(folder, runs, name: str):
    """The folder of a stage, copied into other runs, with links to the stages before it."""
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(folder, runs / name)
    for other in LINES:
        if other < name:
            (runs / other).symlink_to(folder.parent / other)
    return runs / name


def results(folder) -> dict:
    """The JSON and JSONL files of a run but digests, without seconds, and the weights."""
    found = {}
    for path in sorted(folder.rglob("*.[js]*")):
        if path.name != "digests.json":
            found[path.relative_to(folder)] = re.sub(rb'"seconds": [\d.]+', b"", path.read_bytes())
    return found


TAMPERED = []
for name, files in READ_AGAIN.items():
    TAMPERED += rng.sample([(name, file, how) for file in files.split() for how in TAMPER], 22)


@pytest.mark.parametrize("name, file, how", TAMPERED)
def test_a_finished_run_that_was_tampered_with_is_repaired_or_refused(finished, name, file, how):
    whole = finished / "runs/toy" / name
    folder = copy_of(whole, finished / "runs/tampered", name)
    change(folder / file, TAMPER[how])
    try:
        with alarm(10, hang):
            start(name, "--runs", "runs/tampered")
    except SystemExit as end:
        assert end.code.startswith("error: ") and end.code.isprintable(), end.code
    else:
        assert results(folder) == results(whole)


@pytest.fixture(scope="module")
def half_trained(finished):
    """Stage 01 in runs/half, interrupted between its last step and its model."""

    def stop(*given):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common, "save_policy", stop)
        start("01_warmup", "--runs", "runs/half")
    return finished / "runs/half/01_warmup"


SPOILED = [("progress.json", how) for how in TAMPER if how not in ("a line lost", "deleted")]
SPOILED += [("batch_*/*.safetensors", how) for how in ("cut", "emptied", "noise", "deleted")]


@pytest.mark.parametrize("file, how", SPOILED)
def test_a_training_state_that_is_not_whole_is_refused(finished, half_trained, file, how):
    folder = copy_of(half_trained, finished / "runs/spoiled", "01_warmup")
    change(next((folder / "training").glob(file)), TAMPER[how])
    refuses(start, "01_warmup", "--runs", "runs/spoiled")


@pytest.mark.parametrize("how", TAMPER)
def test_a_chunk_that_was_tampered_with_is_made_again(tmp_path, args, how):
    def produce(chunk):
        if stopped and 9 in chunk:
            raise KeyboardInterrupt
        return [{"item": item, "copy": k} for item in chunk for k in range(2)]

    args.chunk, stopped = 4, False
    given = (range(10), produce, args, "t")
    common.write_chunks(tmp_path / "whole.jsonl", *given)
    for spoiled in ("000000000-4.jsonl", "000000004-4.jsonl", "000000004-4.digest"):
        path, stopped = tmp_path / f"{spoiled}.jsonl", True
        with pytest.raises(KeyboardInterrupt):
            common.write_chunks(path, *given)
        change(tmp_path / f"{spoiled}.jsonl.parts" / spoiled, TAMPER[how])
        stopped = False
        common.write_chunks(path, *given)
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ---- Ctrl-C


def test_an_interruption_at_any_moment_is_one_sentence_and_the_run_goes_on(finished):
    said, stopped = [], finished / "runs/stopped"
    for _ in range(10):
        try:
            with alarm(rng.uniform(0.1, 1.0), lambda *given: signal.raise_signal(signal.SIGINT)):
                start("01_warmup", "--runs", "runs/stopped")
            shutil.rmtree(stopped)  # it had gone on to its end
        except SystemExit as end:
            said.append(end.code)
    assert len(said) >= 5
    assert set(said) == {"interrupted: what was written is whole; the same command continues"}
    start("01_warmup", "--runs", "runs/stopped")
    assert results(stopped / "01_warmup") == results(finished / "runs/toy/01_warmup")


def test_at_least_two_hundred_bad_inputs_are_tried():
    tables = {"data": DATA, "images": IMAGES, "flags": FLAGS, "models": MODELS, "runs": TAMPERED}
    counts = {kind: len(table) for kind, table in tables.items()}
    assert min(counts.values()) >= 30 and sum(counts.values()) >= 200, counts
