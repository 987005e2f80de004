"""Tests of mmgen.py: `make test`. Everything is tiny; nothing is downloaded."""

import codecs
import collections
import colorsys
import contextlib
import copy
import csv
import errno
import functools
import gzip
import io
import json
import math
import operator
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mmgen
from mmgen import (Config, FactoredVQVAE, InputError, JointTrainer, Models,
                   Options, SamplingConfig, Tokenizer, VectorQuantizer, VQVAE, VQVAETrainer,
                   compute_loss, create_dataset, iGPT, iGPTTrainer, make_sequences)

MMGEN = Path(mmgen.__file__)
CPU = torch.device("cpu")
# Tiny models gain nothing from more threads, and results must not depend on the machine
torch.set_num_threads(1)
TEXTS = ["dark red seven on light blue", "plain green one on dark red",
         "light blue two on plain green"]
GREEDY = SamplingConfig(greedy=True)

def drawn(n_train=64, n_test=16, size=28, seed=0):
    return mmgen.make_drawn(n_train, n_test, size, seed)

def tiny_config(**changes):
    return Config.preset("tiny", **changes)

def write_pairs(folder, arrays):
    """A drawn.npz as `mmgen.py data` lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "drawn.npz", **arrays)

def curves(run):
    """The table of a run's curves, a dict a pass."""
    return list(csv.DictReader((run / "results/training_curves.csv").open()))

def contents(folder):
    """All files in a folder, path -> bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def command(*args, cwd="."):
    """Call mmgen.main as the command line does -> returncode, stdout, stderr."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = mmgen.main(list(map(str, args)))
    except SystemExit as stop:
        status = stop.code
    finally:
        os.chdir(before)
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())

def works(*args, **options):
    result = command(*args, **options)
    assert result.returncode == 0, result.stderr
    return result

def refused(*args, **options):
    """A command must end with status 2 and one line, which is returned."""
    result = command(*args, **options)
    lines = [line for line in result.stderr.splitlines()
             if not line.startswith(("preset", "pictures", "warning", "to do"))]
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert lines[0].startswith("mmgen: error: ")
    return lines[0]

def training(phase, data, run, *more, steps=None):
    """The arguments of a tiny training, all phases of the preset's length or of so many steps."""
    args = ["train", "--preset", "tiny", "--phase", phase, "--data", data, "--run", run, *more]
    if steps:
        args += [f"--{phase}-steps={steps}" for phase in ("vqvae", "igpt", "single", "finetune")]
    return list(map(str, args))

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(MMGEN.parent)}

def separately(*args, **env):
    """A Python process of its own, as a user starts it: separately(MMGEN, "train", ...)."""
    return subprocess.run([sys.executable, *map(str, args)], text=True, capture_output=True,
                          timeout=240, env=ENV | env)

@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder, drawn(96, 16))
    return folder

@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_dir):
    """A tiny run of the whole `multi` regime, made by the command line."""
    folder = tmp_path_factory.mktemp("run")
    result = separately(MMGEN, *training("multi", data_dir, folder))
    assert result.returncode == 0, result.stderr
    return folder

def small_models():
    torch.manual_seed(0)
    vqvae = VQVAE(dim=16, K=24, D=16)
    tokenizer = Tokenizer(TEXTS, 24)
    igpt = iGPT(tokenizer.vocab_size, 58, d_model=32, n_heads=2, n_layers=2, dropout=0.0,
                codebook=vqvae.codebook.weight)
    return vqvae, tokenizer, igpt


# --- data -----------------------------------------------------------------------------------------

def test_drawn_set_has_the_promised_arrays_and_is_deterministic(tmp_path):
    for name, seed in ("a", 5), ("b", 5), ("c", 6):
        works("data", "--train", 20, "--test", 10, "--size", 32, "--seed", seed,
              "--data", tmp_path / name)
    a, b, c = ((tmp_path / name / "drawn.npz").read_bytes() for name in "abc")
    assert a == b != c
    with np.load(tmp_path / "a" / "drawn.npz") as file:
        images, captions = file["train_images"], file["test_captions"]
        assert images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
        assert captions.shape == (10,) and captions.dtype.kind == "U"
        assert all(len(c.split()) == 6 for c in file["train_captions"])

def test_drawn_colours_are_those_of_the_caption():
    arrays = drawn(40, 1)
    for image, caption in zip(arrays["train_images"], arrays["train_captions"]):
        shade, hue, _, _, *ground = caption.split()
        ink, ground = (np.round(255 * np.array(colorsys.hsv_to_rgb(
            mmgen.HUES[hue], *mmgen.SHADES[shade]))) for shade, hue in ((shade, hue), ground))
        assert (image[0, 0] == ground).all() and np.abs(image - ink).sum(-1).min() < 60

def test_drawn_digits_differ_within_a_class_and_can_be_told_apart():
    labels = np.repeat(np.arange(10), 60)
    ink = mmgen.draw_digits(labels, 28, np.random.default_rng(0)).reshape(600, -1) / 255.0
    distance = ((ink[1::2, None] - ink[None, ::2]) ** 2).sum(-1)
    # One nearest neighbour, 30 examples a class
    assert (labels[::2][distance.argmin(1)] == labels[1::2]).mean() > 0.6
    assert np.unique(ink, axis=0).shape[0] == 600

@pytest.mark.parametrize("scale,dtype,name", [(3, np.uint8, "2bit"), (255, np.uint8, "8bit"),
                                              (255, np.int64, "8bit"), (1, np.float32, "unit"),
                                              (1, np.float64, "unit")])
def test_value_ranges_are_detected(scale, dtype, name):
    levels = np.random.default_rng(0).integers(0, 4, (5, 8, 8, 3))
    levels.flat[0] = 3
    out, found = mmgen.to_uint8((levels / 3 * scale).astype(dtype))
    assert found == name and out.dtype == np.uint8
    assert (out == levels * 85).all()

def test_floats_beyond_the_range_by_a_rounding_error_and_fractions_in_other_ranges():
    images = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    images.flat[0] = 1.0000002  # an antialiased resize makes such
    out, found = mmgen.to_uint8(images)
    assert found == "unit" and np.abs(out - 255 * images).max() <= 0.5 + 1e-3
    for bad in (images * 2, images * 200):
        with pytest.raises(InputError, match="does not fit"):
            mmgen.to_uint8(bad)

PAIRS_FILE, PICTURES_FILE = "colored_mnist_with_text.pkl", "mnist_colored.pkl"

@pytest.mark.parametrize("layout", ["tuple", "dict"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_are_accepted(tmp_path, layout, protocol):
    images = np.random.default_rng(0).integers(0, 4, (6, 28, 28, 3)).astype(np.uint8)
    captions = np.array(TEXTS * 2)
    if protocol == 2:  # blanks are blanks
        captions = [f"  {text} \n".replace(" ", "\t") for text in TEXTS * 2]
    content = (images, images[:3], captions, captions[:3])
    if layout == "dict":
        content = dict(zip(("train_images", "test_images", "train_texts", "test_texts"), content))
    (tmp_path / PAIRS_FILE).write_bytes(pickle.dumps(content, protocol))
    data = mmgen.load_data(tmp_path)
    assert (data.train_images == images * 85).all() and data.test_captions == TEXTS
    assert data.vqvae_train is data.train_images  # with one file its pictures serve both
    (tmp_path / PICTURES_FILE).write_bytes(
        pickle.dumps({"train": images[:4], "test": images[:2]}, protocol))
    assert mmgen.load_data(tmp_path).vqvae_train.shape == (4, 28, 28, 3)

U8 = np.zeros((4, 8, 8, 3), np.uint8)
TALL = np.zeros((4, 12, 8, 3), np.uint8)
CAPTIONS = [TEXTS[0]] * 4

def pairs(train=U8, test=U8, texts=CAPTIONS, test_texts=CAPTIONS):
    return train, test, texts, test_texts

BAD_PAIRS = {
    "no readable tuple or dict": [b"", b"\x80\x05.", pickle.dumps(U8)[:-40]],
    "tuple or dict of train_images": [
        None, 7, [U8, U8, CAPTIONS],
        {"train_images": U8, "test_images": U8, "train_texts": CAPTIONS}],
    "training pictures: want numbers (N,H,W,3), H and W divisible by 4, found": [
        pairs(train=bad) for bad in (
            None, [1, 2], U8[..., :2], U8[:0], U8[:, :0], U8[:, :6], U8.astype(bool),
            U8.astype(complex), U8.astype(str))],
    "found object (4, 8, 8, 3)": [pairs(train=U8.astype(object))],
    "test pictures: want numbers (N,H,W,3)": [pairs(test=U8[0])],
    "unlike sizes": [pairs(test=TALL)],
    "nan": [pairs(train=U8 + np.nan)],
    "inf": [pairs(train=U8 - np.inf)],
    "256": [pairs(train=U8.astype(int) + 256)],
    "-1": [pairs(train=U8.astype(int) - 1)],
    "test pictures: 200 to 200 does not fit 2bit": [pairs(train=U8 + 1, test=U8 + 200)],
    "training texts: want a list of 4 captions, one a picture, found": [
        pairs(texts=bad) for bad in (CAPTIONS[:3], {"a.png": "red one"}, "red one", 5)],
    "test texts: want a list of 4 captions": [pairs(test_texts=CAPTIONS * 2)],
    "training texts: caption 0 is b'red one'": [pairs(texts=[b"red one"] * 4)],
    "test texts: caption 2 is None": [pairs(test_texts=[*CAPTIONS[:2], None, 3.5])],
    "training texts: caption 0 is ''": [pairs(texts=[""] * 4)],
    "test texts: caption 0 is ' '": [pairs(test_texts=[" "] * 4)],
    r"training texts: caption 1 is 'red \ud800'": [pairs(texts=["red", "red \ud800"] * 2)],
}
BAD_PICTURES = {
    "tuple or dict of train, test": [{}, [U8], [U8] * 3, {"train": U8}],
    "test pictures: want numbers": [{"train": U8, "test": "pictures"}],
    "unlike sizes": [{"train": TALL, "test": U8}, {"train": TALL, "test": TALL}],
}

@pytest.mark.parametrize("name,message,contents",
                         [(PAIRS_FILE, *item) for item in BAD_PAIRS.items()]
                         + [(PICTURES_FILE, *item) for item in BAD_PICTURES.items()])
def test_bad_pickles(tmp_path, name, message, contents):
    (tmp_path / PAIRS_FILE).write_bytes(pickle.dumps(pairs()))
    for content in contents:
        content = content if isinstance(content, bytes) else pickle.dumps(content)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as error:
            mmgen.load_data(tmp_path)
        error = str(error.value)
        assert message in error and str(tmp_path) in error and "\n" not in error

def test_a_drawn_set_of_floats_is_refused(tmp_path):
    arrays = drawn(8, 8)
    write_pairs(tmp_path, arrays | {"train_images": arrays["train_images"] / 255})
    with pytest.raises(InputError, match="does not fit 8bit"):
        mmgen.load_data(tmp_path)

def test_pickles_and_arrays_of_other_kinds(tmp_path):
    """A memmap, an OrderedDict; arrays in drawn.npz that nobody needs."""
    memmap = np.memmap(tmp_path / "raw", np.uint8, "w+", shape=(6, 8, 8, 3))
    content = collections.OrderedDict(train=memmap, test=memmap[::3])
    (tmp_path / PICTURES_FILE).write_bytes(pickle.dumps(content))
    assert mmgen.load_data(tmp_path).vqvae_test.shape == (2, 8, 8, 3)
    (tmp_path / PICTURES_FILE).unlink()
    write_pairs(tmp_path, drawn(4, 2) | {"more": np.array([None], object)})
    assert len(mmgen.load_data(tmp_path).test_captions) == 2

class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/mmgen_was_here",)

@pytest.mark.parametrize("content", [Evil(), {"train": Evil(), "test": 0},
                                     codecs.lookup("utf-8").encode, print])
def test_pickles_with_code_are_refused(tmp_path, content):
    path = tmp_path / PICTURES_FILE
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="refused"):
        mmgen.load_pickled_data(path)
    assert not Path("/tmp/mmgen_was_here").exists()

EMPTY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I%d\ntS'b'\ntR." % 2**34

@pytest.mark.parametrize("content,message", [
    (b"cnumpy\nndarray\n(I%d\ntR." % 2**34, "no readable"), (EMPTY, "no readable"),
    (b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'V1900000000'\ntRS'x'\ntR.",
     "no readable"),
    (b"(lr\xff\xff\xff\x7f.", "memo"),  # room for so many
    # bytearray, bytes, text, frame
    *((b"\x80\x05" + opcode + struct.pack("<Q", 2**34) + b"abc.", "no readable")
      for opcode in (b"\x96", b"\x8e", b"\x8d", b"\x95")),
])
def test_a_pickle_cannot_ask_for_gigabytes(tmp_path, content, message):
    path = tmp_path / PICTURES_FILE
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(InputError, match=message):
        mmgen.load_pickled_data(path)
    assert time.monotonic() - started < 1
    if content == EMPTY:  # np.empty would pass the above: memory is given when it is written to
        assert mmgen.unpickle(path).size == 0

def idx(array):
    """The bytes of an MNIST file."""
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()

@pytest.mark.parametrize("place,pack", [("{}", bytes), ("{}.gz", gzip.compress),
                                        ("{}.gz", bytes), ("raw/{0}/{0}", gzip.compress)])
def test_raw_mnist_as_people_have_it(tmp_path, place, pack):
    """In folders named as the files in them; gzipped or not, whatever the name says."""
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 12), ("t10k", 6)):
        labels = rng.integers(0, 10, n)
        for kind, array in (("images-idx3", rng.integers(0, 256, (n, 28, 28))),
                            ("labels-idx1", labels)):
            path = tmp_path / "mnist" / place.format(f"{prefix}-{kind}-ubyte")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pack(idx(array)))
    data = mmgen.load_data(tmp_path)
    assert data.train_images.shape == (12, 28, 28, 3)
    assert [c.split()[2] for c in data.test_captions] == [mmgen.DIGITS[i] for i in labels]
    path.write_bytes(pack(idx(labels)[:-1]))
    with pytest.raises(InputError, match="no readable IDX"):
        mmgen.load_data(tmp_path)

def test_batches_are_a_function_of_seed_and_step():
    def batches(**options):
        return mmgen.Batches(lambda rows: rows.tolist(), 10, 4, **options)

    shuffled = batches(seed=3)
    first, second = list(shuffled), list(shuffled)  # two passes, each an epoch
    assert sorted(sum(first, [])) == list(range(10)) and [len(b) for b in first] == [4, 4, 2]
    assert second != first and len(shuffled) == 3
    assert [shuffled[step] for step in range(6)] == first + second
    short = batches(seed=3, per_pass=2)
    assert [list(short), list(short), list(short)] == [
        first[:2], [first[2], second[0]], second[1:]]
    assert list(batches()) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# --- tokenizer and sequences ----------------------------------------------------------------------

def test_vocabulary_and_round_trip():
    tokenizer = Tokenizer(TEXTS, 24)
    assert tokenizer.all_words[:-3] == sorted(set(" ".join(TEXTS).split()))
    assert tokenizer.vocab_size == 24 + len(tokenizer.all_words)
    ids = tokenizer.text_encode(TEXTS[0])
    assert ids.shape == (6,) and ids.min() >= 24
    assert tokenizer.text_decode(ids) == tokenizer.text_decode([t[None] for t in ids]) == TEXTS[0]
    short = tokenizer.encode_batch(["plain red", TEXTS[0]])
    assert short.shape == (2, 7) and tokenizer.text_decode(short[0]) == "plain red"
    assert short[0, 2:].tolist() == [tokenizer.end_of_text_token] * 5
    with pytest.raises(InputError, match="'sevn'.*'seven'"):
        tokenizer.text_encode("dark red sevn on light blue")
    for bad in ("", "   ", " ".join(["red"] * 7)):
        with pytest.raises(InputError):
            tokenizer.text_encode(bad)

def test_token_ids_are_stable_across_processes():
    program = f"import mmgen; print(mmgen.Tokenizer({TEXTS}, 24).encode_batch({TEXTS}).tolist())"
    outputs = {separately("-c", program, PYTHONHASHSEED=seed).stdout for seed in "12"}
    assert outputs == {str(Tokenizer(TEXTS, 24).encode_batch(TEXTS).tolist()) + "\n"}

def test_prompts_are_the_beginnings_of_training_sequences():
    captions = [*TEXTS, "red"]
    t = Tokenizer(captions, 24)
    tokens, text_ids = torch.randint(24, (4, 49)), t.encode_batch(captions)
    plain, drawing, reading = (make_sequences(tokens, text_ids, t, order)
                               for order in ("plain", "text_image", "image_text"))
    assert plain.shape == drawing.shape == reading.shape == (4, 58)
    prompts = mmgen.text_prompts(t, captions)
    assert prompts.shape == (4, 9) and torch.equal(drawing[:, :9], prompts)
    prompts = mmgen.image_prompts(t, tokens)
    assert prompts.shape == (4, 52) and torch.equal(reading[:, :52], prompts)
    bos, eot, eoi = t.bos_token, t.end_of_text_token, t.end_of_image_token
    assert plain[0].tolist() == [bos, *tokens[0], eoi, *t.text_encode(TEXTS[0]), eot]
    # A short caption is filled up with EOTs, so that all pictures begin at the same place
    word, = t.text_encode("red")
    assert drawing[3].tolist() == [bos, eoi, word, *[eot] * 6, *tokens[3]]
    assert reading[3].tolist() == [bos, eot, *tokens[3], eoi, word, *[eot] * 5]

def test_a_batch_has_equal_parts_of_all_orders():
    """And pictures that come before their captions are the warped ones."""
    t, orders = Tokenizer(TEXTS, 24), ("image_text", "text_image")
    tokens, ids = torch.randint(23, (3, 49)), t.encode_batch(TEXTS)
    rows = mmgen.mixed_sequences(tokens, ids, t, orders)
    for i, order in enumerate(("image_text", "image_text", "text_image")):
        assert torch.equal(rows[i], make_sequences(tokens, ids, t, order)[i])
    batch = mmgen.sequence_batches(t, orders, tokens, 3, ids, warped=tokens + 1)[0]
    assert torch.equal(batch[2], rows[2]) and torch.equal(batch[:2, 2:51], tokens[:2] + 1)
    # A sixteenth of those that come after their captions has none
    tokens, ids = torch.randint(23, (35, 49)), t.encode_batch(TEXTS[:1] * 35)
    mixed = mmgen.mixed_sequences(tokens, ids, t, orders)
    assert mixed[18:19, 2:9].unique().tolist() == [t.end_of_text_token]
    assert torch.equal(mixed[18, 9:], tokens[18])
    assert torch.equal(mixed[19:], make_sequences(tokens, ids, t, "text_image")[19:])
    # Of the other pictures a quarter is warped
    part = mmgen.pick_warped(orders, torch.zeros(32), torch.ones(32))
    assert part[:16].all() and part[16:].sum() == 4

@pytest.mark.parametrize("order,captioning,filled", [
    ("image_text", slice(51, 57), slice(53, 57)), ("text_image", slice(0), slice(3, 8)),
    ("plain", slice(50, 57), slice(52, 57))])
def test_what_a_target_counts(order, captioning, filled):
    """Words after a picture caption_weight, what comes before them image_weight, the EOTs that fill
    up a short caption, or one that was taken away, nothing, else 1.

    captioning, filled: places of the targets of either kind, the latter in the short row."""
    tokenizer = Tokenizer([*TEXTS, "red"], 24)
    rows = make_sequences(torch.randint(24, (2, 49)), tokenizer.encode_batch(["red", TEXTS[0]]),
                          tokenizer, order)
    none = tokenizer.encode_batch([None])
    assert none.unique().tolist() == [tokenizer.end_of_text_token]
    if order == "text_image":
        rows = torch.cat([rows, make_sequences(rows[:1, -49:], none, tokenizer, order)])
    model = iGPT(tokenizer.vocab_size, 58, 32, 2, 2, 0.0)
    trainer = iGPTTrainer(model, torch.optim.Adam(model.parameters()), "cpu",
                          tokenizer.vocab_size, 58, cfg=Config(caption_weight=6, image_weight=0.5))
    weight = torch.full((len(rows), 57), 1.0 if order == "text_image" else 0.5)
    weight[:, captioning] = 6
    weight[0, filled] = weight[2:, 1:8] = 0
    log_p = model(rows[:, :-1]).log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    assert torch.allclose(trainer.loss(rows)["loss"], -(log_p * weight).sum() / weight.sum())


# --- VQ-VAE ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [VQVAE, FactoredVQVAE])
@pytest.mark.parametrize("size,D", [((28, 28), 16), ((32, 32), 8), ((16, 40), 16)])
def test_vqvae_shapes(kind, size, D):
    vqvae = kind(16, 24, D, size).eval()
    x = torch.rand(3, 3, *size) * 2 - 1
    z_e, z_q, recon = vqvae(x)
    h, w = size[0] // 4, size[1] // 4
    assert z_e.shape == z_q.shape == (3, D, h, w) and recon.shape == x.shape
    tokens = vqvae.get_tokens(x)
    assert tokens.shape == (3, h, w) and tokens.dtype == torch.int64 and tokens.max() < 24
    assert torch.equal(vqvae.decode_tokens(tokens), vqvae.decode_tokens(tokens.flatten(1)))
    assert torch.allclose(vqvae.decode_tokens(tokens), recon, atol=1e-5)
    assert vqvae.decode_tokens(tokens[:, :3, :2]).shape == (3, 3, 12, 8)  # any grid will do

def recolored(mask, low, high):
    """Masks (B,H,W) in [0,1] -> pictures (B,3,H,W) between the colours low and high (B,3)."""
    return low[..., None, None] + (high - low)[..., None, None] * mask[:, None]

def random_masks(n, size):
    """Ink in the middle of n pictures (n,size,size), with a soft edge; none at the border."""
    mask = (torch.rand(n, size, size) < 0.5).float()
    mask[:, 3:5, 3:5] = 0.5
    mask[:, :3] = mask[:, -3:] = mask[..., :3] = mask[..., -3:] = 0
    return mask

def test_split_colors_are_joined_again_and_shares_do_not_depend_on_colors():
    torch.manual_seed(0)
    mask = random_masks(4, 12)
    low, high = torch.tensor([[-1.0, 0.5, 0.0], [0.2, -1.0, 0.9]])[:, None].expand(2, 4, 3)
    x = recolored(mask, low, high)
    found, colors = mmgen.split_colors(x)
    assert torch.allclose(found, torch.stack([1 - mask, 0 * mask, mask, 0 * mask], 1), atol=1e-5)
    assert torch.allclose(colors, torch.stack([low, low, high, low], 1))
    assert torch.allclose(mmgen.join_colors(found, colors), x, atol=1e-5)
    # Which of two colours is the ground, the picture says, even where a stroke touches its edge
    for other in (recolored(mask, -high, -low), recolored(mask, high, low)):
        assert torch.allclose(mmgen.split_colors(other)[0], found, atol=1e-5)
    mask[:, :6, 4] = 1
    found, colors = mmgen.split_colors(recolored(mask, low, high))
    assert torch.allclose(found[:, 2], mask, atol=1e-5)
    plain = torch.full((1, 3, 8, 8), 0.3)  # a single colour
    assert torch.equal(mmgen.join_colors(*mmgen.split_colors(plain)), plain)

def test_ink_is_told_from_a_ground_of_two_colors():
    torch.manual_seed(0)
    mask, stripes = random_masks(4, 12), (torch.arange(12) % 4 < 2).float().expand(4, 12, 12)
    light, dark, ink = torch.tensor([[0.9, 0.7, -1], [-0.9, 0.2, 0], [0.3, -1, 1]])
    ground = recolored(stripes, dark.expand(4, 3), light.expand(4, 3))
    x = ground.lerp(ink[:, None, None], mask[:, None])
    shares, colors = mmgen.split_colors(x)
    grounds = stripes * (1 - mask), (1 - stripes) * (1 - mask)
    expected = torch.stack([*grounds, mask, 0 * mask], 1)
    assert torch.allclose(shares, expected, atol=1e-5)
    assert torch.allclose(colors, torch.stack([light, dark, ink, light]).expand(4, 4, 3))
    assert torch.allclose(mmgen.join_colors(shares, colors), x, atol=1e-5)

def test_factored_vqvae_keeps_colors_in_the_corners():
    torch.manual_seed(0)
    vqvae = FactoredVQVAE(16, 24, 8, size=(16, 16)).eval()
    mask = random_masks(3, 16)
    pictures = [recolored(mask, *torch.rand(2, 3, 3) * 2 - 1) for _ in range(2)]
    one, other = (vqvae.encode(x) for x in pictures)
    corner = torch.zeros(4, 4, dtype=torch.bool)
    corner[::3, ::3] = True
    assert torch.allclose(one[..., ~corner], other[..., ~corner], atol=1e-3)
    assert not torch.allclose(one[..., corner], other[..., corner], atol=1e-1)
    # Colours reach the picture from there alone: with other corners it is another one
    z = one.where(~corner, other)
    assert not torch.allclose(vqvae.decode(z), vqvae.decode(one), atol=1e-2)
    z_e, z_q, recon_x = vqvae.train()(pictures[0])
    compute_loss(pictures[0], recon_x, z_e, z_q).backward()
    for layer in (vqvae.colors_in[0], vqvae.colors_out[0]):
        assert layer.weight.grad.abs().sum() > 0

def test_any_picture_is_four_colors_and_their_blends():
    """Busy ones as well; of one or two colours the others get no share."""
    torch.manual_seed(0)
    for x, used in (torch.rand(3, 3, 16, 12) * 2 - 1, 4), (torch.zeros(2, 3, 8, 8), 1), (
            recolored(random_masks(3, 16), -torch.ones(3, 3), torch.ones(3, 3)), 2):
        shares, colors = mmgen.split_colors(x)
        assert torch.allclose(mmgen.join_colors(shares, colors), x, atol=1e-4)
        assert (shares.abs().flatten(2).amax(2) > 1e-3).sum(1).tolist() == [used] * len(x)

@pytest.mark.parametrize("factored,side,kind", [
    ("on", 8, FactoredVQVAE), ("on", 4, VQVAE), ("off", 8, VQVAE)])
def test_colors_are_factored_where_there_are_four_corners(factored, side, kind):
    images = np.zeros((2, side, 8, 3), np.uint8)
    assert type(mmgen.new_vqvae(tiny_config(factored=factored), images)) is kind

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizer_finds_the_nearest_code(dtype):
    quantizer = VectorQuantizer(40, 6, ema=0.9).eval()
    z = torch.randn(2, 6, 3, 3).to(dtype)
    tokens = quantizer.distances(z).argmin(-1)
    slow = ((z.float().movedim(1, -1)[..., None, :] - quantizer.weight) ** 2).sum(-1)  # (2,3,3,40)
    assert torch.equal(tokens, slow.argmin(-1))
    assert torch.equal(quantizer(z), quantizer.weight[tokens].movedim(-1, 1))
    assert quantizer.train()(z).isfinite().all()

def test_unused_codes_restart_where_the_error_is():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4, restart=3)
    z = 0.01 * torch.randn(1, 4, 20, 50)  # well coded, all but ten
    z[0, :, 0, :10] = 5.0
    index = torch.arange(32)
    far, due = index < 12, index < 8
    quantizer.weight.data[:] = torch.where(far, 100.0, 0.0)[:, None]  # nothing is near to these
    quantizer.unused[:] = torch.where(due, 3, 2 * far)
    before = quantizer.weight.clone()
    quantizer.eval()(z)
    assert torch.equal(quantizer.weight, before)  # in training only
    quantizer.train()(z)
    moved = quantizer.weight[due].mean(1)
    assert ((moved > 4) & (moved < 6)).all()
    assert torch.equal(quantizer.weight[~due], before[~due])
    quantizer.unused[due] = 4
    quantizer(torch.zeros(1, 4, 5, 5))  # no error anywhere is no error either

def test_moving_averages_of_features():
    quantizer = VectorQuantizer(3, 1, ema=0.75, restart=0)
    quantizer.weight.data[:] = torch.tensor([[0.0], [10.0], [99.0]])
    z = torch.tensor([3.0, 1.0, 14.0]).view(1, 1, 1, 3)
    assert not quantizer(z).requires_grad
    # A quarter of the way to 2, the mean of two features, and to 14; the last had none
    assert torch.allclose(quantizer.weight[:, 0], torch.tensor([0.5, 11.0, 99.0]))
    before = quantizer.weight.clone()
    quantizer.eval()(z)
    assert torch.equal(before, quantizer.weight)

@pytest.mark.parametrize("phase", ["vqvae", "single"])
def test_moving_averages_are_no_parameters(phase):
    data = mmgen.Data(**drawn(32, 8))
    for ema in (0.0, 0.9):
        models, trainer, _ = mmgen.prepare_phase(phase, tiny_config(ema=ema), data, Models(), CPU)
        names = {group["name"] for group in trainer.optimizer.param_groups}
        assert ("codebook" in names) is models.vqvae.codebook.weight.requires_grad is not bool(ema)

def test_codebook_and_encoder_receive_gradient():
    vqvae, _, _ = small_models()
    x = torch.rand(4, 3, 28, 28) * 2 - 1
    z_e, z_q, recon = vqvae(x)
    compute_loss(x, recon, z_e, z_q).backward()
    assert vqvae.encoder[0].weight.grad.abs().sum() > 0
    # The codebook's comes of its term alone, which must leave the encoder alone
    vqvae.zero_grad()
    z_e, z_q, recon = vqvae(x)
    F.mse_loss(z_q, z_e.detach()).backward()
    assert vqvae.codebook.weight.grad.abs().sum() > 0 and vqvae.encoder[0].weight.grad is None


# --- iGPT -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("order,n_prompt,n_new,span", [
    ("text_image", 2, 7, "text_span"), ("text_image", 9, 49, "image_span"),
    ("text_image", 30, 28, "image_span"), ("image_text", 2, 49, "image_span"),
    ("image_text", 52, 6, "text_span"), ("plain", 1, 49, "image_span")])
def test_cached_logits_are_the_uncached_ones(order, n_prompt, n_new, span):
    """Prompts that end within a span as well as at its beginning; the span's tokens are given."""
    _, tokenizer, igpt = small_models()
    rows = make_sequences(torch.randint(24, (3, 49)), tokenizer.encode_batch(TEXTS),
                          tokenizer, order)
    span = getattr(tokenizer, span)
    with torch.no_grad():
        whole = igpt.eval()(rows)[:, n_prompt - 1 : n_prompt - 1 + n_new, slice(*span)]
        embedding, output = igpt.tables()
        tables, caches = (embedding, output[slice(*span)]), torch.empty(2, 2, 3, 58, 16)
        tokens, position = rows[:, :n_prompt], 0
        for i in range(n_new):
            logits = igpt(tokens, tables, caches, position)[:, -1]
            assert torch.allclose(logits, whole[:, i], atol=1e-5)
            position = n_prompt + i
            tokens = rows[:, position, None]

@pytest.mark.parametrize("chunk", [250, 2])
def test_captions_of_unlike_length_are_drawn_as_each_alone(chunk, monkeypatch):
    """Also where there are too many for one go."""
    monkeypatch.setattr(mmgen, "CHUNK", chunk)
    tokenizer = Tokenizer(TEXTS + ["red two"], 24)
    torch.manual_seed(0)
    igpt = iGPT(tokenizer.vocab_size, 58, 32, 2, 2, 0.0).eval()
    models = Models(VQVAE(16, 24, 16), igpt, tokenizer)
    texts = [TEXTS[0], "red two", TEXTS[1]]
    alone = torch.cat([models.images([text], GREEDY) for text in texts])
    assert torch.equal(models.images(texts, GREEDY), alone)
    assert models.captions(alone, GREEDY) == [models.captions(row[None], GREEDY)[0]
                                              for row in alone]

@pytest.mark.parametrize("guidance", [0, 3])
def test_greedy_generation_is_the_uncached_argmax_guided_or_not(guidance):
    _, tokenizer, igpt = small_models()
    igpt.head.weight.data *= 100  # so that not all tokens are plausible
    cond, uncond = mmgen.text_prompts(tokenizer, TEXTS[:1]), mmgen.text_prompts(tokenizer, [None])
    how = SamplingConfig(greedy=True, guidance=guidance)
    out = mmgen.generate(igpt, cond, 12, tokenizer.image_span, how, uncond)
    with torch.no_grad():
        for _ in range(12):
            a, b = igpt.eval()(cond)[:, -1:, :24], igpt(uncond)[:, -1:, :24]
            plausible = a >= a.amax(-1, keepdim=True) - 3
            token = (a + guidance * (a - b)).where(plausible, torch.tensor(-torch.inf)).argmax(-1)
            cond, uncond = torch.cat([cond, token], 1), torch.cat([uncond, token], 1)
    assert torch.equal(out, cond[:, -12:])

class Reader(torch.nn.Module):
    """Reads, whatever the caption: the first caption, and instead of its third word, with a logit
    of `doubt` less or more, that of the second."""
    causal, orders = True, mmgen.ORDERS[:2]
    def __init__(self, tokenizer, doubt):
        super().__init__()
        self.head, self.tokenizer, self.doubt = torch.nn.Linear(1, 1), tokenizer, doubt

    def forward(self, tokens):
        ids, t = self.tokenizer.encode_batch(TEXTS[:2])[:, :-1], self.tokenizer  # (2,6)
        logits = torch.zeros(len(tokens), tokens.shape[1], t.vocab_size)
        logits[:, -6:].scatter_(2, ids[0].expand(len(tokens), 6)[..., None], 9)
        logits[:, -4, ids[1, 2]] = 9 + self.doubt
        return logits

def test_a_caption_is_denied_where_the_reader_is_less_than_90_percent_sure_of_a_word():
    t = Tokenizer(TEXTS, 24)
    tokens, first = torch.zeros(2, 49, dtype=torch.long), TEXTS[0].split()
    other = " ".join([*first[:2], TEXTS[1].split()[2], *first[3:]])
    for doubt, denied in (-3, [0, 1]), (-2, [1, 1]), (2, [1, 1]), (3, [1, 0]):
        models = Models(None, Reader(t, doubt), t)
        sums = mmgen.span_sums(models, tokens, [TEXTS[0], other], "image_text")
        assert sums[4].tolist() == denied

def test_what_is_unsure_is_drawn_again_and_nothing_else(monkeypatch):
    vqvae, tokenizer, igpt = small_models()
    models, judged = Models(vqvae, igpt, tokenizer), []
    monkeypatch.setattr(models, "unsure", lambda tokens, captions: (
        judged.append(tokens.clone()) or ([1] if len(judged) < 3 else [])))
    torch.manual_seed(0)
    plain = models.images(TEXTS[:3], SamplingConfig(redraw=0))
    assert not judged
    for redraw in 1, 5:
        judged.clear()
        torch.manual_seed(0)
        tokens = models.images(TEXTS[:3], SamplingConfig(redraw=redraw))
        assert len(judged) == redraw and torch.equal(judged[0], plain)
        assert torch.equal(tokens[[0, 2]], plain[[0, 2]]) and not torch.equal(tokens[1], plain[1])
    assert torch.equal(judged[2], tokens)  # the third time all is well

@pytest.mark.parametrize("redraw", [0, 2])
def test_pairs_that_stay_unsure_are_replaced(redraw, monkeypatch):
    vqvae, tokenizer, igpt = small_models()
    models, spoken = Models(vqvae, igpt, tokenizer), []
    monkeypatch.setattr(models, "continue_captions", lambda prompts, *_: (
        spoken.append(len(prompts)) or [TEXTS[len(spoken) - 1]] * len(prompts)))
    monkeypatch.setattr(models, "unsure", lambda tokens, captions: (
        [1] if len(captions) == 3 else [0] if captions == [TEXTS[1]] else []))
    tokens, captions = models.pairs(3, SamplingConfig(redraw=redraw))
    # The second pair is never legible, nor is the one that replaces it
    assert spoken == ([3, 1, 1] if redraw else [3]) and tokens.shape == (3, 49)
    assert captions == [TEXTS[0], TEXTS[2 if redraw else 0], TEXTS[0]]

def test_pictures_are_judged_through_pixels_and_only_where_reading_was_learned(monkeypatch):
    vqvae, tokenizer, igpt = small_models()
    models, tokens, seen = Models(vqvae, igpt, tokenizer), torch.randint(24, (3, 49)), []
    def read(_, tokens, captions, order):
        seen.append(tokens)
        return torch.tensor([0.0, 2, 1]).expand(5, 3)
    monkeypatch.setattr(mmgen, "span_sums", read)
    assert models.unsure(tokens, TEXTS[:3]) == [1, 2]
    pictures = mmgen.decode_pictures(vqvae, tokens)
    assert torch.equal(seen[0], mmgen.extract_tokens(vqvae, pictures))
    igpt.orders = ["text_image"]
    assert models.unsure(tokens, TEXTS[:3]) == [] and len(seen) == 1

def test_igpt_is_causal_and_knows_its_limits():
    _, tokenizer, igpt = small_models()
    tokens = torch.randint(tokenizer.vocab_size, (2, 58))
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 24
    a, b = igpt.eval()(tokens), igpt(changed)
    assert torch.allclose(a[:, :40], b[:, :40], atol=1e-5)
    assert not torch.allclose(a[:, 40:], b[:, 40:], atol=1e-5)
    with pytest.raises(InputError):
        igpt(torch.zeros(1, 59, dtype=torch.long))
    with pytest.raises(InputError, match="not divisible by twice 4 heads"):
        iGPT(40, 58, d_model=30, n_heads=4)

def test_attention_is_the_formula_head_by_head():
    """All heads look up the same keys and values, each with queries and distances of its own."""
    torch.manual_seed(0)
    layer, x = mmgen.SelfAttention(32, 2), torch.randn(3, 5, 32)
    turns, bias = torch.randn(5, 1, 8).mul(1j).exp(), torch.randn(5 * 2, 5)
    rows = layer.qkv.weight.split(16)  # of the queries of either head, the key, the value

    def turned(weight):
        pairs = layer.norm(x @ weight.T).unflatten(2, (8, 2)).contiguous()
        return torch.view_as_real(torch.view_as_complex(pairs) * turns[:, 0]).flatten(2)

    key, value, out = turned(rows[2]), x @ rows[3].T, []
    for head in 0, 1:
        scores = turned(rows[head]) @ key.mT / 4 + bias[head::2]  # rows are tokens, then heads
        out.append(scores.softmax(-1) @ value)
    expected = torch.cat(out, 2) @ layer.out.weight.T
    assert torch.allclose(layer(x, turns, bias), expected, atol=1e-5)

def test_dropout_only_in_training():
    torch.manual_seed(0)
    igpt = iGPT(40, 58, 32, 2, 2, dropout=0.5)
    tokens = torch.randint(36, (2, 20))
    assert not torch.equal(igpt(tokens), igpt(tokens))
    igpt.eval()
    assert torch.equal(igpt(tokens), igpt(tokens))

def test_the_codebook_gets_gradient_from_an_igpt_that_does_not_own_it():
    vqvae, tokenizer, igpt = small_models()
    assert not any(p is vqvae.codebook.weight for p in igpt.parameters())
    assert not any("codebook" in name for name in igpt.state_dict())
    rows = make_sequences(torch.randint(24, (2, 49)), tokenizer.encode_batch(TEXTS[:2]),
                          tokenizer, "text_image")
    igpt(rows).square().mean().backward()
    assert vqvae.codebook.weight.grad.abs().sum() > 0

def test_a_parallel_predictor_sees_the_caption_and_no_code():
    vqvae, tokenizer, _ = small_models()
    model = mmgen.ParallelPredictor(tokenizer.vocab_size, 58, 32, 2, 2, 0.5,
                                    vqvae.codebook.weight).train()
    models = Models(vqvae, model, tokenizer)
    drawn = models.images(TEXTS, GREEDY)  # which ends training mode, or there would be dropout
    tokens, ids = torch.randint(24, (3, 49)), tokenizer.encode_batch(TEXTS)
    rows = make_sequences(tokens, ids, tokenizer, "text_image")
    others = make_sequences(torch.randint(24, (3, 49)), ids, tokenizer, "text_image")
    logits = model(rows[:, :-1])
    assert logits.shape == (3, 57, tokenizer.vocab_size)
    assert torch.equal(logits, model(others[:, :-1]))
    assert torch.equal(drawn, logits[:, 8:, :24].argmax(-1))
    assert not torch.allclose(logits[0, 8:], logits[1, 8:])
    with pytest.raises(InputError, match="parallel"):
        models.captions(tokens, SamplingConfig())
    # Captions of unlike length together
    images, captions = mmgen.make_samples(Options(mode="text", n=2), models, ["red one", TEXTS[0]])
    assert images.shape == (4, 28, 28, 3) and captions == ["red one"] * 2 + [TEXTS[0]] * 2

@pytest.mark.parametrize("regime,phase,key", [("multi", "igpt", "test_loss"),
                                              ("single", "single", "test_xent")])
def test_training_a_parallel_predictor(tmp_path, data_dir, regime, phase, key):
    works(*training(regime, data_dir, tmp_path, "--predictor", "parallel"))
    rows = [row for row in curves(tmp_path) if row["phase"] == phase]
    found = [float(row[key]) for row in rows if row[key]]  # lambda is 0 at first
    assert found[-1] < found[0]
    assert np.load(tmp_path / "results/text_conditioned_samples.npy").shape == (9, 28, 28, 3)
    figures = json.loads(works("eval", "--run", tmp_path, "--data", data_dir, "--json").stdout)
    assert figures.keys() == {"recon_mse", "recon_psnr", "codebook_used", "codebook_perplexity",
                              "nll_text_to_image", "code_accuracy"}
    for message, *more in (("parallel predictor", "--mode", "image"),
                           ("parallel predictor", "--mode", "unconditional"),
                           ("not trained both to draw and to read", "--best-of", "2")):
        assert message in refused("sample", "--run", tmp_path, "--data", data_dir, *more)


# --- sampling -------------------------------------------------------------------------------------

def test_top_k_top_p_and_temperature():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def probs(logits, **how):
        return mmgen.logits_to_probs(logits, SamplingConfig(**how))

    assert torch.allclose(probs(logits), logits.exp())
    assert torch.allclose(probs(logits, top_k=2), torch.tensor([[0.625, 0.375, 0, 0]]))
    assert torch.allclose(probs(logits, top_p=0.6), torch.tensor([[0.625, 0.375, 0, 0]]))
    assert torch.allclose(probs(logits, top_p=0.01), torch.tensor([[1.0, 0, 0, 0]]))
    assert probs(logits, temperature=0.1).max() > probs(logits).max()
    logits = torch.randn(50, 9)
    for how in (GREEDY, SamplingConfig(temperature=0)):
        assert torch.equal(mmgen.sample_token(logits, how), logits.argmax(1))

def test_unconditional_spans_never_mix():
    vqvae, tokenizer, igpt = small_models()
    torch.manual_seed(0)
    tokens, captions = Models(vqvae, igpt, tokenizer).pairs(40, SamplingConfig(temperature=3.0))
    assert tokens.shape == (40, 49) and tokens.min() >= 0 and tokens.max() < 24
    assert len(captions) == 40
    assert all(c and set(c.split()) <= set(tokenizer.words) for c in captions)

def test_a_begun_caption_is_completed_and_a_whole_one_kept():
    vqvae, tokenizer, igpt = small_models()
    models, how = Models(vqvae, igpt, tokenizer), SamplingConfig()
    assert mmgen.finish_caption(models, "plain red", how) == "plain red"  # short, but whole
    for begun in ("plain red...", "green ...", "..."):
        text = mmgen.finish_caption(models, begun, how)
        beginning = begun.removesuffix("...").split()
        assert text.split()[: len(beginning)] == beginning
        assert len(beginning) < len(text.split()) <= 6
    with pytest.raises(InputError, match="unknown word"):
        mmgen.finish_caption(models, "plain rad ...", how)
    with pytest.raises(InputError, match="has 7 words"):
        mmgen.finish_caption(models, TEXTS[0] + "...", how)

@pytest.mark.parametrize("kind", [VQVAE, FactoredVQVAE])
def test_a_completed_picture_keeps_its_first_rows_and_its_colors(kind, monkeypatch):
    torch.manual_seed(0)
    vqvae, tokenizer = kind(16, 24, 16).eval(), Tokenizer(TEXTS, 24)
    models = Models(vqvae, iGPT(tokenizer.vocab_size, 58, 32, 2, 2).eval(), tokenizer)
    images = drawn(4, 6)["test_images"]
    monkeypatch.setattr(mmgen, "decode_pictures", lambda _, tokens: tokens.view(-1, 7, 7))
    made, captions = mmgen.make_samples(Options(mode="image", n=1, complete=3), models, images)
    whole = mmgen.extract_tokens(vqvae, images).view(-1, 7, 7)
    assert torch.equal(made[:, :3], whole[:, :3]) and not torch.equal(made[:, 3:], whole[:, 3:])
    # Colours, if they are coded apart, lie in the corners
    assert torch.equal(made[mmgen.CORNERS], whole[mmgen.CORNERS]) is (kind is FactoredVQVAE)
    assert len(captions) == 6

@pytest.mark.parametrize("chunk", [250, 2])
def test_likelihoods_are_those_of_the_next_token_predictions(chunk, monkeypatch):
    monkeypatch.setattr(mmgen, "CHUNK", chunk)
    vqvae, tokenizer, igpt = small_models()
    igpt.eval()
    tokens, texts = torch.randint(24, (3, 49)), [TEXTS[0], TEXTS[1], "red one"]
    drawn, read, pair = mmgen.likelihoods(Models(vqvae, igpt, tokenizer), tokens, texts)

    @torch.no_grad()
    def log_p(prompts, new):
        logits = igpt(torch.cat([prompts[0], new])[None, :-1])[0, prompts.shape[1] - 1 :]
        return logits.log_softmax(-1).gather(1, new[:, None]).sum()

    for i, text in enumerate(texts):
        wanted = log_p(mmgen.text_prompts(tokenizer, [text]), tokens[i])
        assert torch.allclose(drawn[i], wanted, atol=1e-3)
        ids = tokenizer.encode_batch([text])[0, : min(6, len(text.split()) + 1)]  # a short
        wanted = log_p(mmgen.image_prompts(tokenizer, tokens[i : i + 1]), ids)  # one's end counts
        assert torch.allclose(read[i], wanted, atol=1e-3)
        wanted = drawn[i] + log_p(mmgen.text_prompts(tokenizer, [text])[:, :2], ids)
        assert torch.allclose(pair[i], wanted, atol=1e-3)


# --- training -------------------------------------------------------------------------------------

@pytest.mark.parametrize("regime", ["two-stage", "single", "multi"])
def test_loss_falls_in_every_regime(tmp_path, data_dir, regime):
    works(*training(regime, data_dir, tmp_path, "--single-steps=120", "--vqvae-steps=80"))
    rows = curves(tmp_path)
    assert tuple(dict.fromkeys(row["phase"] for row in rows)) == mmgen.REGIMES[regime]
    mse = [float(row["test_recon_mse"]) for row in rows if row["test_recon_mse"]]
    assert mse[-1] < 0.9 * mse[0]
    xent = [row["test_loss"] if row["phase"] == "igpt" else row.get("test_xent") for row in rows]
    xent = [float(text) for text in xent if text]  # `single` begins without
    assert xent[-1] < xent[0] - 0.1
    models, data = mmgen.load_models(tmp_path, CPU), mmgen.load_data(data_dir)
    figures = mmgen.evaluate(models, data.test_images, data.test_captions)
    assert figures.keys() == {
        "recon_mse", "recon_psnr", "codebook_used", "codebook_perplexity", "nll_text_to_image",
        "nll_image_to_text", "nll_image", "nll_text", "code_accuracy", "caption_exact",
        "caption_slot_accuracy", "round_trip_exact", "round_trip_unguided"}
    assert all(np.isfinite(v) for v in figures.values())
    assert figures["nll_image"] < np.log(models.vqvae.n_embeddings)
    assert figures["nll_text"] < np.log(len(models.tokenizer.words))

def joint_trainer(lambda_xent=1.0, phase="finetune", linked=True):
    """-> JointTrainer, its Models, a batch. linked: the iGPT is built from the codebook."""
    vqvae, tokenizer, igpt = small_models()
    if not linked:
        igpt = iGPT(tokenizer.vocab_size, 58, 32, 2, 2, 0.0)
    vqvae.train()
    optimizer = torch.optim.Adam([*vqvae.parameters(), *igpt.parameters()])
    x = torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = (x, tokenizer.encode_batch(TEXTS + TEXTS[:1]))
    vqvae(x)  # data-dependent initialization
    models = Models(vqvae, igpt, tokenizer)
    cfg = Config(lambda_xent=lambda_xent, lambda_warmup=0.05)
    return JointTrainer(phase, models, optimizer, "cpu", 200, cfg=cfg), models, batch

@pytest.mark.parametrize("linked", [True, False])
def test_cross_entropy_reaches_encoder_and_codebook(linked):
    """Without the link only the soft targets carry it. And its value is the plain one."""
    trainer, models, (x, text_ids) = joint_trainer(linked=linked)
    vqvae, igpt = models.vqvae, models.igpt
    xent = trainer.cross_entropy(vqvae.encode(x), text_ids)
    weights = vqvae.encoder[0].weight, vqvae.codebook.weight
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(xent, weights))
    rows = mmgen.mixed_sequences(vqvae.get_tokens(x).flatten(1), text_ids, models.tokenizer,
                                 igpt.orders)
    plain = F.cross_entropy(igpt(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    assert torch.allclose(xent, plain, atol=1e-5)

def test_soft_targets_move_features_to_where_the_transformer_expects_them():
    trainer, models, (x, text_ids) = joint_trainer(linked=False)
    vqvae, igpt = models.vqvae, models.igpt
    z_e = vqvae.encode(x).detach().requires_grad_()
    wanted = 5
    with torch.no_grad():
        igpt.norm.weight.zero_(), igpt.norm.bias.fill_(1.0)
        igpt.head.weight.zero_()
        igpt.head.weight[wanted] = 0.3  # code 5 is now the most likely everywhere
    trainer.cross_entropy(z_e, text_ids).backward()
    step = z_e.detach() - 1e-2 * z_e.grad / z_e.grad.abs().max()

    def share_of_wanted(z):
        return F.softmax(-vqvae.codebook.distances(z), -1)[..., wanted].mean()

    assert share_of_wanted(step) > share_of_wanted(z_e.detach())

def test_lambda_warms_up_and_ramps():
    trainer, _, batch = joint_trainer(0.5, "single")  # of 200 steps: 10 warm up, 10 rise
    assert "xent" not in trainer.loss(batch)
    seen = []
    for step in range(30):
        trainer.step_losses = [1.0] * step
        seen.append(trainer.lambda_now())
    assert seen[:10] == [0.0] * 10 and seen[19:] == [0.5] * 11 and seen == sorted(seen)
    assert "xent" in trainer.loss(batch)

@pytest.mark.parametrize("phase,training", [("finetune", True), ("single", False)])
def test_neither_fine_tuning_nor_a_test_restarts_or_averages_codes(phase, training):
    trainer, models, batch = joint_trainer(phase=phase)
    codebook = models.vqvae.train(training).codebook
    before = copy.deepcopy(codebook.state_dict())
    for _ in range(3):
        trainer.loss(batch)
    assert all(torch.equal(before[k], v) for k, v in codebook.state_dict().items())
    assert models.vqvae.training is training and not codebook.training

def test_frozen_parts_stay_frozen():
    """Phase 2 leaves the VQ-VAE as it is, phase 3 moves all."""
    data, models, states = mmgen.Data(**drawn(64, 16)), None, []
    cfg = tiny_config(vqvae_steps=20, igpt_steps=20, finetune_steps=20)
    for phase in ("vqvae", "igpt", "finetune"):
        models = mmgen.train_regime(phase, cfg, data, models)
        states.append(copy.deepcopy((models.vqvae.state_dict(),
                                     models.igpt and models.igpt.state_dict())))
    (first, _), (second, igpt), (third, igpt_after) = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first if "weight" in name)
    assert not all(torch.equal(igpt[name], igpt_after[name]) for name in igpt)

@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_parameter_groups_hold_everything_once_and_the_codebook_is_slower(optimizer):
    vqvae, _, igpt = small_models()
    models, cfg = {"vqvae": vqvae, "igpt": igpt}, tiny_config(optimizer=optimizer)
    groups = mmgen.make_optimizer(cfg, models, {"codebook": 0.25}).param_groups
    rates = {g["name"]: g["lr"] for g in groups if not g["orthogonal"]}
    assert rates["codebook"] == 0.25 * rates["vqvae"]
    assert any(g["orthogonal"] for g in groups) is (optimizer == "muon")
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for m in (vqvae, igpt) for p in m.parameters())

@pytest.mark.parametrize("bf16", [False, True])
def test_muon_orthogonalizes(bf16):
    torch.manual_seed(0)

    def orthogonalize(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return mmgen.Muon.orthogonalize(x).float()

    random = torch.randn(3, 24, 60)
    for x in (random, random.mT, torch.randn(3, 24, 1) @ torch.randn(3, 1, 60),
              torch.zeros(3, 24, 60)):
        values = torch.linalg.svdvals(orthogonalize(x))
        assert values.max() < 1.25  # also for rank one, where rounding might lead to explosion
    assert torch.linalg.svdvals(orthogonalize(random)).min() > 0.6

def test_muon_is_adam_but_for_orthogonal_groups():
    weight = torch.nn.Parameter(torch.zeros(24, 60))
    bias = torch.nn.Parameter(torch.zeros(24))
    muon = mmgen.Muon([{"params": [weight], "orthogonal": True, "lr": 0.1}, {"params": [bias]}],
                      lr=0.01)
    (weight.sum() + bias.sum()).backward()
    muon.step()
    assert 0 < torch.linalg.matrix_norm(weight, 2) < 0.13
    assert torch.allclose(bias, torch.tensor(-0.01), atol=1e-4)
    assert mmgen.Muon([bias], 0.5).param_groups[0]["lr"] == 0.5  # as any optimizer of torch

def test_cosine_scheduler():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = mmgen.create_cosine_scheduler(optimizer, warmup_steps=10, total_steps=110)
    rates = []
    for _ in range(120):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), scheduler.step()
    assert rates[:10] == sorted(rates[:10]) and max(rates) == 1.0 and rates[10] == 1.0
    assert abs(rates[60] - 0.5) < 1e-6 and rates[-1] < 1e-6

def test_library_snippets_of_the_notes(tmp_path):
    """The custom training of the notes, with smaller numbers."""
    images = drawn(40, 1)["train_images"] // 85
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"train": images[:32], "test": images[32:]}))
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(
        (images[:32], images[32:], TEXTS * 10 + TEXTS[:2], TEXTS * 2 + TEXTS[:2])))
    train_data, test_data = mmgen.load_pickled_data(tmp_path / "a.pkl")
    train_loader, test_loader = mmgen.DataProcessor.prepare_vqvae_data(
        train_data, test_data, batch_size=8)
    batch = next(iter(train_loader))
    assert batch.shape == (8, 3, 28, 28) and batch.min() >= -1 and batch.max() <= 1
    vqvae = VQVAE(dim=16, K=24, D=16).to("cpu")
    trainer = VQVAETrainer(vqvae, torch.optim.Adam(vqvae.parameters(), lr=1e-3), "cpu")
    train_losses, test_losses = trainer.train(train_loader, test_loader, num_epochs=3)
    assert len(train_losses) == len(test_losses) == 3 and test_losses[-1] < test_losses[0]
    train_data, test_data, texts, test_texts = mmgen.load_colored_mnist_text(tmp_path / "b.pkl")
    tokenizer = Tokenizer(texts, vqvae.n_embeddings)
    train_loader, test_loader = (create_dataset(*pairs, vqvae, tokenizer, batch_size=8)
                                 for pairs in ((train_data, texts), (test_data, test_texts)))
    rows = torch.cat(list(train_loader))
    assert rows.shape == (32, 58) and len(train_loader) == 4
    assert (rows[:, 1] == tokenizer.end_of_text_token).sum() == 16  # each order has a half
    vocab_size = vqvae.n_embeddings + len(tokenizer.all_words)
    for context_length in (58, 64):  # one that fits, one with room to spare
        igpt = iGPT(vocab_size=vocab_size, context_length=context_length, d_model=32, n_heads=4,
                    n_layers=2).to("cpu")
        trainer = iGPTTrainer(igpt, torch.optim.Adam(igpt.parameters(), lr=1e-3), "cpu",
                              vocab_size, 58)
        train_losses, test_losses = trainer.train(train_loader, test_loader, num_epochs=3)
        assert len(train_losses) == 3 and test_losses[-1] < test_losses[0]
        image = mmgen.generate_from_text(igpt, tokenizer, vqvae, TEXTS[0], "cpu")
        assert image.shape == (1, 3, 28, 28)
        caption = mmgen.generate_from_image(igpt, tokenizer, vqvae, image[0], "cpu")
        assert caption and set(caption.split()) <= set(tokenizer.words)
        pictures, captions = mmgen.generate_unconditional(igpt, tokenizer, vqvae, 3, "cpu")
        assert pictures.shape == (3, 3, 28, 28) and len(captions) == 3
    x = mmgen.normalize_images(train_data, method="vqvae")
    assert x.shape == (32, 3, 28, 28) and x.min() == -1 and x.max() == 1

def test_part_one_is_complete():
    """All above the banner, alone in a module, trains every regime and samples every mode."""
    source = MMGEN.read_text()
    part_one = types.ModuleType("part_one")
    sys.modules["part_one"] = part_one  # dataclasses look their module up
    exec(source[: source.index("# ===== Part II")], part_one.__dict__)
    data, how = part_one.Data(**drawn(40, 8)), part_one.SamplingConfig()
    steps = dict(vqvae_steps=10, igpt_steps=10, single_steps=10, finetune_steps=5)
    for regime in ("two-stage", "single", "multi"):
        cfg = part_one.Config.preset("tiny", **steps)
        models = part_one.train_regime(regime, cfg, data)
        tokens = models.images(data.test_captions[:1], how)
        assert part_one.decode_pictures(models.vqvae, tokens).shape == (1, 28, 28, 3)
        assert models.captions(tokens, how)[0].split()
        tokens, captions = models.pairs(3, how)
        assert len(tokens) == len(captions) == 3
    del sys.modules["part_one"]

def test_arrays_need_not_be_contiguous():
    vqvae, tokenizer, _ = small_models()
    images = drawn(6, 1)["train_images"]
    tokens = mmgen.extract_tokens(vqvae, images)
    for part in slice(None, None, -1), slice(None, None, 3):
        rows = torch.arange(6).numpy()[part].tolist()
        assert torch.equal(mmgen.extract_tokens(vqvae, images[part]), tokens[rows])
        assert len(create_dataset(images[part], TEXTS[:1] * len(rows), vqvae, tokenizer)[0])
        assert mmgen.picture_batches(images[part], 2)[0].shape == (2, 3, 28, 28)

def test_numbers_of_numpy_become_pythons():
    cfg = Config(vqvae_lr=np.float64(1e-3), vqvae_K=np.int64(64), dropout=0)
    assert [type(v) for v in (cfg.vqvae_lr, cfg.vqvae_K, cfg.dropout)] == [float, int, float]
    for bad in (dict(vqvae_K=64.5), dict(vqvae_K=True), dict(vqvae_lr="1e-3"), dict(d_model="4")):
        with pytest.raises(InputError):
            Config(**bad)

def test_noise_falsifies_codes_and_no_words():
    _, tokenizer, igpt = small_models()
    tokens, ids = torch.randint(24, (300, 49)), tokenizer.encode_batch(TEXTS * 100)
    rows = make_sequences(tokens, ids, tokenizer, "text_image")
    draws = torch.ones(300, 1, dtype=torch.bool)
    changed = mmgen.with_noise(igpt, rows, 0.4, draws) != rows
    assert not changed[rows >= 24].any()
    assert 0.14 < changed[rows < 24].float().mean() < 0.23  # mean share 0.2
    plain = iGPT(tokenizer.vocab_size, 58, 32, 2, 2)  # without a codebook it cannot tell
    for model in (plain, igpt.eval()):
        assert torch.equal(mmgen.with_noise(model, rows, 0.4, draws), rows)

@pytest.mark.parametrize("order", ["image_text", "text_image"])
def test_noise_is_for_drawing_alone(order, monkeypatch):
    _, tokenizer, igpt = small_models()
    tokens, ids = torch.randint(24, (4, 49)), tokenizer.encode_batch([*TEXTS, TEXTS[0]])
    rows, seen = make_sequences(tokens, ids, tokenizer, order), []
    forward = igpt.forward
    monkeypatch.setattr(igpt, "forward", lambda x: seen.append(x) or forward(x))
    mmgen.igpt_loss(igpt.train(), rows, Config(noise=1.0))
    assert torch.equal(seen[0], rows[:, :-1]) is (order == "image_text")

@pytest.mark.parametrize("phase", ["igpt", "single"])
def test_pictures_that_no_caption_precedes_are_warped_in_training(phase, monkeypatch):
    warped = []
    monkeypatch.setattr(mmgen, "random_affine", lambda x, s: warped.append(len(x)) or x.flip(3))
    data, cfg = mmgen.Data(**drawn(10, 8)), tiny_config(augment=0.2, lambda_warmup=0.0)
    models, _, _ = mmgen.prepare_phase("vqvae", cfg, data, Models(), CPU)
    _, trainer, (batches, test, _) = mmgen.prepare_phase(phase, cfg, data, models, CPU)
    trainer.train_step(batches[0])
    assert warped == [10]
    trainer.end_pass(1, test)
    assert len(warped) == 1

@pytest.mark.parametrize("order,other,missing", [
    ("image_text", "text_image", ["nll_text_to_image", "code_accuracy", "nll_text"]),
    ("text_image", "image_text", ["nll_image", "nll_image_to_text", "caption_exact",
                                  "caption_slot_accuracy"])])
def test_what_a_model_was_not_trained_for_is_said_and_left_out(capsys, order, other, missing):
    data, how = mmgen.Data(**drawn(32, 8)), SamplingConfig()
    cfg = tiny_config(vqvae_steps=2, igpt_steps=2, orders=order)
    with pytest.raises(InputError, match="phase igpt goes on from models"):
        mmgen.train_regime("igpt", cfg, data)
    models = mmgen.train_regime("two-stage", cfg, data)
    capsys.readouterr()
    tokens = models.images(data.test_captions, how)
    captions = models.captions(tokens, how)
    assert capsys.readouterr().err.count(f"trained on {order}, not {other}") == 1
    with pytest.raises(InputError, match="not trained both to draw and to read"):
        mmgen.likelihoods(models, tokens, captions)
    figures = mmgen.evaluate(models, data.test_images, data.test_captions)
    assert not {*missing, "round_trip_exact", "round_trip_unguided"} & figures.keys()
    assert len(figures) == 13 - 2 - len(missing)

def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    vqvae, _, _ = small_models()
    trainer = VQVAETrainer(vqvae, torch.optim.Adam(vqvae.parameters()), "cpu")
    vqvae.decoder[0].weight.register_hook(lambda gradient: gradient * math.nan)
    before = vqvae.encoder[0].weight.detach().clone()
    with pytest.raises(InputError, match="gradient is nan at step 0"):
        trainer.train_step(torch.rand(2, 3, 28, 28))
    assert torch.equal(vqvae.encoder[0].weight, before)

@pytest.mark.parametrize("labels", [(), (torch.arange(4),)])
def test_the_loop_takes_the_loaders_of_torch(labels):
    """Of pictures, or of tuples that begin with them."""
    vqvae, _, _ = small_models()
    pictures = torch.utils.data.TensorDataset(torch.rand(4, 3, 28, 28), *labels)
    loader = torch.utils.data.DataLoader(pictures, 2, shuffle=True)
    trainer = VQVAETrainer(vqvae, torch.optim.Adam(vqvae.parameters()), "cpu")
    losses, _ = trainer.train(loader, loader, num_epochs=2)
    assert len(losses) == 2 and trainer.step == 4 and not vqvae.training


# --- files and command line -----------------------------------------------------------------------

def test_a_run_writes_what_it_promises(trained):
    for name in ("checkpoints/vqvae_model.pth", "checkpoints/igpt_model.pth",
                 "results/training_curves.ppm", "results/reconstructions.ppm"):
        assert (trained / name).stat().st_size > 0
    rows = curves(trained)
    assert [row["phase"] for row in rows] == ["vqvae"] * 10 + ["igpt"] * 10 + ["finetune"] * 10
    assert all(row["step"] and row["train_loss"] and row["test_loss"] for row in rows)
    for mode in ("text_conditioned", "image_conditioned", "unconditional"):
        images = np.load(trained / f"results/{mode}_samples.npy")
        assert images.shape == (9, 28, 28, 3) and images.dtype == np.uint8
        assert len((trained / f"results/{mode}_samples.txt").read_text().splitlines()) == 9
        assert (trained / f"results/{mode}_samples.ppm").read_bytes()[:2] == b"P6"

def npy(shape=(8, 8, 3), dtype="|u1", body=192):
    """The bytes of a .npy file whose header need not be true."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + bytes(body)

@pytest.mark.parametrize("message,contents", [
    ("neither", [b"", b"GIF89a", b"P6", b"P6 8 8 255", b"P6 8 8 65535\n" + bytes(384),
                 b"P6 999999999999 8 255\n", b"P6 -8 8 255\n" + bytes(192),
                 b"P3 1 1 255\n0 0 0\n", b"P5 8 8 255\n" + bytes(64)]),
    ("no readable picture", [b"\x93NUMPY", npy()[:40], npy(body=191), npy((10**9, 10**3, 3)),
                             npy((-8, -8, 3)), npy(dtype="|O"), npy(dtype="junk"),
                             b"P6 8 8 255\n", b"P6 8 8 255\n" + bytes(191),
                             b"P6 99999 99999 255\n" + bytes(192)]),
    ("want uint8", [npy(dtype="<f4", body=768), npy((8, 8)), npy((8, 24)), npy((0, 8, 8, 3)),
                    npy((1, 1, 8, 8, 3)), b"P6 0 8 255\n"]),
    ("the model knows", [npy((4, 4, 4, 3)), npy((16, 4, 3)), b"P6 8 8 255\n" + bytes(192)]),
])
def test_bad_images(trained, tmp_path, message, contents):
    path = tmp_path / "x"
    for content in contents:
        path.write_bytes(content)
        error = refused("sample", "--mode", "image", "--run", trained, "--image", path,
                        "--out", tmp_path / "out")
        assert message in error, content
        assert list(tmp_path.iterdir()) == [path]

@pytest.mark.parametrize("args,message", [
    ("data --size 30 --data {tmp}", "divisible by 4"),
    ("train --resume --overwrite", "not allowed with"),
    ("train --phase never", "phase is 'never', want str two-stage|single|"),
    ("train --preset tiny --run {tmp}/r --n-heads 3", "32 is not divisible by twice 3 heads"),
    ("train --preset tiny --phase igpt --run {tmp}", "does not exist"),
    ("train --preset tiny", "holds a run"),
    ("train --preset tiny --resume --vqvae-lr 0.5", "vqvae_lr"),
    ("train --preset tiny --data {data}/drawn.npz --run {tmp}/new", "holds none of"),
    ("eval --device quantum", "quantum"),
    ("eval --data {tmp}", "no data"),
    ("score", "wants --prompts and --image"),
    ("score --prompts {tmp}/three --image {tmp}/two.npy", "3 captions for 2 pictures"),
    ("sample --sideways", "unrecognized"),
    ("sample --mode sound", "mode is 'sound', want str text|image|unconditional"),
    ("sample --run {tmp}", "does not exist"),
    ("sample --prompt 'dark red sevn on light blue'", "unknown word 'sevn' in"),
    ("sample --prompt ''", "has 0 words"),
    ("sample --prompt 'red red red red red red red'", "has 7 words, not 1 to 6"),
    ("sample --prompts {tmp}/none", "does not exist"),
    ("sample --prompts {tmp}", "directory"),
    ("sample --prompts {tmp}/empty", "holds no caption"),
    ("sample --prompts {tmp}/binary", "no readable text file"),
    ("sample --out {tmp}/", "is a directory"),
    ("sample --image {tmp}/two.npy", "image"),
    ("sample --complete 3", "complete"),
    ("sample --mode image --complete 7", "7 rows"),
    ("sample --mode unconditional --best-of 2", "best"),
    ("sample --top-p 0", "top_p is 0.0, want float"),
    ("sample -n x", "argument -n: invalid int value: 'x'"),
    ("sample --guidance -.5", "guidance is -0.5, want float 0.."),
    ("sample --out {tmp}/empty/out", "empty"),
])
def test_errors_are_one_line(args, message, trained, data_dir, tmp_path):
    """Where --run and --data are not given they are good ones."""
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "three").write_text("red\n" * 3)
    np.save(tmp_path / "two.npy", np.zeros((2, 28, 28, 3), np.uint8))
    args = shlex.split(args)
    for flag, place in ("--run", trained), ("--data", data_dir):
        if flag not in args and args[0] != "data":
            args += [flag, str(place)]
    args = [arg.format(tmp=tmp_path, data=data_dir) for arg in args]
    assert message in refused(*args, cwd=tmp_path)
    assert not (tmp_path / "new").exists()

@pytest.mark.parametrize("name,settings", [("train", Config), ("sample", SamplingConfig)])
def test_every_flag_of_a_configuration_is_checked(tmp_path, name, settings):
    for field_name, field in settings.fields.items():
        flag, bad = "--" + field_name.replace("_", "-"), ["sideways"]
        low, dots, high = field.limits.partition("..")
        if dots:
            bad += [float(low) - 1, "nan", *([float(high) * 2 + 1] if high else [])]
        for value in bad:
            error = refused(name, f"{flag}={value}", "--run", tmp_path, "--data", tmp_path)
            assert field_name in error or flag in error
    assert not list(tmp_path.iterdir())

def test_without_a_command_the_help_is_printed():
    result = works()
    assert "train" in result.stdout and not result.stderr

def test_the_help_begins_with_what_matters_and_is_grouped(capsys):
    with pytest.raises(SystemExit):
        mmgen.build_parser().parse_args(["train", "--help"])
    text = capsys.readouterr().out
    _, _, *groups = re.split(r"\n\n(?=\S.*:\n)", text)
    flags = re.findall(r"^  (--\w+)", groups[0], re.M)
    assert flags[:5] == ["--phase", "--preset", "--data", "--run", "--resume"]
    assert [group.split(":")[0] for group in groups] == ["general", "VQ-VAE", "iGPT",
                                                         "joint training"]
    assert "--igpt-lr" in groups[2] and "--seed" in groups[0]

def test_a_training_says_what_it_will_do_and_what_to_try_next(tmp_path, data_dir):
    lines = works(*training("multi", data_dir, tmp_path, steps=20)).stderr.splitlines()
    plan, = (line for line in lines if line.startswith("to do: "))
    assert re.match("to do: vqvae 20 steps, igpt 20 steps, finetune 20 steps, about \\d+ s on cpu, "
                    "1 threads, float32$", plan)
    assert sum("python mmgen.py sample --mode" in line for line in lines) == 2
    assert lines[-2].endswith(f"mmgen.py eval --run {tmp_path} --data {data_dir}")
    assert lines[-1].endswith(f"see {tmp_path}/results")
    assert "try next" not in works(*training("vqvae", data_dir, tmp_path / "v", steps=20)).stderr

def test_progress_says_how_long_the_rest_will_take(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(mmgen.time, "monotonic", lambda: next(clock))
    assert list(mmgen.track(range(3), "steps")) == [0, 1, 2]
    # After item 1 and two looks at the clock: 2 items to come, of 20 seconds each
    assert "0:40 left" in capsys.readouterr().err

def test_importing_does_nothing():
    result = separately("-c", "import torch; before = torch.get_rng_state(); import mmgen; "
                        "assert (before == torch.get_rng_state()).all()")
    assert result.returncode == 0 and result.stdout == "" and result.stderr == ""

def test_sample_text(trained, data_dir, tmp_path):
    """Prompts from a file and of the command line; the samples of one share a row of the grid."""
    prompts = mmgen.load_data(data_dir).test_captions[:2]
    (tmp_path / "p.txt").write_bytes(codecs.BOM_UTF8 + "\n".join(prompts).encode())
    for out, seed in ("a", 3), ("b", 3), ("c", 4):
        works("sample", "--mode", "text", "--run", trained, "--prompts", tmp_path / "p.txt",
              "--prompt", prompts[0], "-n", 5, "--out", tmp_path / out, "--seed", seed)
    a, b, c = ((tmp_path / f"{name}.npy").read_bytes() for name in "abc")
    assert a == b != c
    assert np.load(tmp_path / "a.npy").shape == (15, 28, 28, 3)
    wanted = [prompts[0]] * 10 + [prompts[1]] * 5
    assert (tmp_path / "a.txt").read_text().splitlines() == wanted
    assert (tmp_path / "a.ppm").read_bytes().startswith(b"P6\n570 390\n")  # 5 pictures by 3
    for n, size in ((1, (3, 3)), (4, (5, 8))):  # rows and columns for nine prompts
        images = np.zeros((9 * n, 4, 4, 3), np.uint8)
        grid = mmgen.picture_grid(images, scale=2, together=n)
        assert grid.shape == (size[0] * 10, size[1] * 10, 3)

@pytest.mark.parametrize("code", ["utf-8-sig", "utf-16"])
def test_prompts_of_windows_editors(trained, tmp_path, code):
    (tmp_path / "p.txt").write_text(TEXTS[0], code)
    args = ["--run", trained, "--out", tmp_path / "a"]
    works("sample", "--prompts", tmp_path / "p.txt", *args)
    assert (tmp_path / "a.txt").read_text().splitlines() == TEXTS[:1]

def test_an_output_that_cannot_show_all_letters(trained, tmp_path):
    result = separately(MMGEN, "sample", "--mode", "unconditional", "--run", trained, "--show",
                        "--out", tmp_path / "a", PYTHONIOENCODING="cp1252")
    assert result.returncode == 0 and "?" in result.stdout

def test_a_caption_of_unusual_length_is_drawn(trained, tmp_path):
    works("sample", "--run", trained, "--out", tmp_path / "a", "--prompt", "red seven")
    assert (tmp_path / "a.txt").read_text() == "red seven\n"

def test_letters():
    """As many shapes as letters; texts are wrapped, and one that has no letter here is a box."""
    def write(*texts):
        return mmgen.add_texts(np.zeros((len(texts), 0, 24, 3), np.uint8), texts)

    shapes = {write(letter).tobytes() for letter in mmgen.LETTERS}
    assert len(shapes) == len(mmgen.LETTERS) == 39
    texts = write("One two", "1", "")
    assert texts.shape == (3, 16, 24, 3)
    assert [bool(text.any()) for text in texts] == [True, True, False]
    assert (texts[0, :8] == write("one")[0]).all()
    assert (write("é")[0, :, :, 0] > 0).sum() == 2 * 7 + 2 * 3  # the frame of 5 x 7 pixels

def test_grids_carry_captions():
    images = np.zeros((2, 28, 28, 3), np.uint8)
    grid = mmgen.picture_grid(images, ["red one", ""])
    white = (grid == [255, 255, 255]).all(2)
    assert grid.shape == (2 + 4 * 28 + 8, 2 * (2 + 4 * 28), 3)
    assert white[-9:, :114].any() and not white[-9:, 114:].any()

def test_reconstructions_show_original_and_reconstruction(tmp_path):
    torch.manual_seed(0)
    vqvae, images = VQVAE(8, 16, 3).eval(), drawn(3, 1)["train_images"]
    mmgen.report_codebook(vqvae, images, tmp_path)
    grid = mmgen.read_pictures(tmp_path / "results" / "reconstructions.ppm")[0]
    original, made = grid[1:113, : 2 * 114].reshape(112, 2, 114, 3)[:, :, 1:113].swapaxes(0, 1)
    assert (original[::4, ::4] == images[0]).all()
    tokens = mmgen.extract_tokens(vqvae, images[:1])
    assert (made[::4, ::4] == mmgen.decode_pictures(vqvae, tokens)[0]).all()

def test_sample_image_from_npy_and_ppm(trained, data_dir, tmp_path):
    image = mmgen.load_data(data_dir).test_images[0]
    np.save(tmp_path / "x.npy", image)
    (tmp_path / "x.ppm").write_bytes(
        b"P6\n# a comment\n28 28\n255\n" + image.tobytes() + b"\n")
    texts = []
    for name in ("x.npy", "x.ppm"):
        works("sample", "--mode", "image", "--run", trained, "--image", tmp_path / name,
              "--greedy", "--out", tmp_path / "out")
        texts.append((tmp_path / "out.txt").read_text())
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 1

def test_sample_unconditional_shown_as_png(trained, tmp_path):
    result = works("sample", "--mode", "unconditional", "--run", trained, "-n", 5,
                   "--out", tmp_path / "u.png", "--show")
    assert result.stdout.count("▀") >= 5 * 28 * 14
    assert (tmp_path / "u.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert np.load(tmp_path / "u.npy").shape == (5, 28, 28, 3)

def test_sample_completed_pictures(trained, data_dir, tmp_path):
    np.save(tmp_path / "x.npy", mmgen.load_data(data_dir).test_images[:3])
    args = ["sample", "--mode", "image", "--complete", 3, "--run", trained,
            "--image", tmp_path / "x.npy", "--out", tmp_path / "out"]
    works(*args, "-n", 2)
    assert np.load(tmp_path / "out.npy").shape == (6, 28, 28, 3)
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 6
    works(*args, "--best-of", 2)
    assert np.load(tmp_path / "out.npy").shape == (3, 28, 28, 3)

def test_score(trained, data_dir, tmp_path):
    data, models = mmgen.load_data(data_dir), mmgen.load_models(trained, CPU)
    images, captions = data.test_images[:2], data.test_captions[:2]
    np.save(tmp_path / "x.npy", images)
    (tmp_path / "p.txt").write_text("\n".join(captions))
    _, header, *rows = works("score", "--run", trained, "--image", tmp_path / "x.npy",
                             "--prompts", tmp_path / "p.txt").stdout.splitlines()
    assert header.split() == ["picture|caption", "caption|picture", "pair", "caption"]
    tokens = mmgen.extract_tokens(models.vqvae, images)
    wanted = torch.stack(mmgen.likelihoods(models, tokens, captions), 1).tolist()
    for row, figures, caption in zip(rows, wanted, captions, strict=True):
        assert list(map(float, row.split()[:3])) == pytest.approx(figures, abs=1e-3)
        assert row.endswith("  " + caption)

def test_best_of_several(trained, data_dir):
    data, models = mmgen.load_data(data_dir), mmgen.load_models(trained, CPU)
    captions, means = data.test_captions, []
    for best_of in (1, 16):
        images, texts = mmgen.make_samples(Options(best_of=best_of), models, captions)
        assert images.shape == (16, 28, 28, 3) and texts == captions
        tokens = mmgen.extract_tokens(models.vqvae, images)
        means.append(mmgen.likelihoods(models, tokens, texts)[1].mean())
    assert means[1] > means[0]
    images, texts = mmgen.make_samples(Options(mode="image", n=2, best_of=3), models,
                                       data.test_images[:4])
    assert (images == np.repeat(data.test_images[:4], 2, 0)).all() and len(texts) == 8

def test_eval_as_json_and_as_a_table(trained, data_dir):
    args = ["eval", "--run", trained, "--data", data_dir]
    figures = json.loads(works(*args, "--json").stdout)
    assert figures["recon_psnr"] == pytest.approx(10 * np.log10(4 / figures["recon_mse"]))
    assert 0 <= figures["caption_exact"] <= figures["caption_slot_accuracy"] <= 1
    lines = works(*args).stdout.splitlines()
    assert all(re.match(r"\w+ +\S+  [+-] \w+", line) for line in lines)
    table = dict(line.split()[:2] for line in lines)
    assert {name: float(text) for name, text in table.items()} == pytest.approx(figures, abs=1e-4)

def test_a_32_pixel_run(tmp_path):
    works("data", "--data", tmp_path, "--train", 40, "--test", 8, "--size", 32)
    works(*training("multi", tmp_path, tmp_path, "--vqvae-steps", 10, "--igpt-steps", 10,
                    "--finetune-epochs", 0, "--precision", "bf16"))
    assert np.load(tmp_path / "results/unconditional_samples.npy").shape == (9, 32, 32, 3)
    assert "finetune" not in {row["phase"] for row in curves(tmp_path)}

def test_data_is_drawn_only_in_the_default_directory(tmp_path, monkeypatch):
    arrays = drawn(32, 8)
    monkeypatch.setattr(mmgen, "make_drawn", lambda *_: arrays)
    train = ["train", "--phase", "vqvae", "--preset", "tiny", "--vqvae-steps", 2]
    (tmp_path / "there").mkdir()
    for folder in ("there", "not"):  # a mistyped path is an error
        assert "no data" in refused(*train, "--data", folder, cwd=tmp_path)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    works(*train, cwd=tmp_path)
    assert (tmp_path / "checkpoints/vqvae_model.pth").exists()
    assert (tmp_path / "data/drawn.npz").exists()

def test_pictures_alone_train_the_vqvae_and_nothing_else(tmp_path):
    images = drawn(32, 8)
    (tmp_path / PICTURES_FILE).write_bytes(pickle.dumps(
        {"train": images["train_images"], "test": images["test_images"]}))
    assert PAIRS_FILE in refused(*training("multi", tmp_path, tmp_path, steps=2))
    works(*training("vqvae", tmp_path, tmp_path, steps=2))
    assert not (tmp_path / "drawn.npz").exists()

def test_a_run_belongs_to_its_data(tmp_path):
    """To the test captions, too: the vocabulary knows their words."""
    arrays = drawn(8, 4)
    write_pairs(tmp_path, arrays)
    args = training("vqvae", tmp_path, tmp_path, "--resume", steps=1)
    works(*args)
    write_pairs(tmp_path, arrays | {"test_captions": np.array(["other words"] * 4)})
    assert re.search("cannot resume: checksum of the data was ", refused(*args))

def test_phases_of_other_settings_keep_the_models_loadable(tmp_path, data_dir):
    """Each model's file carries the configuration it was built with, not that of the last phase."""
    for phase, flag in (("vqvae", "--vqvae-dim=8"), ("igpt", "--d-model=16"),
                        ("finetune", "--beta=1")):
        works(*training(phase, data_dir, tmp_path, flag, steps=4))
    models = mmgen.load_models(tmp_path, CPU)
    assert models.vqvae.encoder[0].out_channels == 8
    assert models.igpt.norm.normalized_shape == (16,)
    # Phase 1 anew would orphan the iGPT
    assert "holds a run" in refused(*training("vqvae", data_dir, tmp_path))

@pytest.mark.parametrize("done,regime,admitted,left", [
    ("vqvae", "igpt", True, "vqvae"), ("vqvae igpt", "finetune", True, "vqvae igpt"),
    ("vqvae igpt finetune", "finetune", True, "vqvae igpt"),
    ("single", "finetune", True, "single"), ("vqvae", "two-stage", False, ""),
    ("vqvae igpt finetune", "single", False, "vqvae igpt finetune"),
    ("vqvae igpt finetune", "igpt", False, "vqvae finetune"),
    ("single", "multi", False, "single"), ("single", "vqvae", False, "single"),
    ("single", "igpt", False, "single"),
])
def test_what_a_finished_run_admits_and_what_is_left_of_it(tmp_path, done, regime, admitted, left):
    """Only with --overwrite is a file made anew, or a run replaced that has not come to its end.
    The curves of the other phases stay."""
    data = mmgen.Data(**drawn(8, 8))

    def run(regime, **flags):
        run = mmgen.Run(tmp_path, regime, tiny_config(), data, **flags)
        run.lock.close()
        return run

    def stays(**flags):
        with pytest.raises(InputError, match="holds a run"):
            run(regime, **flags)

    old, phases = run("multi"), done.split()
    for name in ("vqvae", "igpt"):
        if name in phases or "single" in phases:
            (tmp_path / "checkpoints" / f"{name}_model.pth").touch()
    old.save(done=len(phases), rows=[{"phase": phase} for phase in phases])
    stays()
    old.save(complete=True)
    if not admitted:
        stays()
    new = run(regime, overwrite=not admitted)
    assert new.state["done"] == 0
    assert [row["phase"] for row in new.state["rows"]] == left.split()
    if not admitted:  # nor without the state that tells who made the files
        new.state_path.unlink()
        stays(resume=True)

def test_a_finished_run_changes_nothing(trained, data_dir):
    before = contents(trained)
    result = works(*training("multi", data_dir, trained, "--resume"))
    assert "finished" in result.stderr and contents(trained) == before

@pytest.mark.parametrize("regime", ["two-stage", "single", "multi"])
def test_kill_9_at_any_moment_then_resume(tmp_path, data_dir, regime):
    """Killed again and again, the run ends with the weights of the one that never was."""
    whole, cut = (training(regime, data_dir, tmp_path / name, "--optimizer", "muon",
                           "--factored", "on", "--dropout", "0.1", "--ema", "0.9",
                           "--noise", "0.2", "--resume", "--vqvae-steps", "40",
                           "--igpt-steps", "40", "--finetune-steps", "10", "--single-steps", "40")
                  for name in ("whole", "cut"))
    assert separately(MMGEN, *whole).returncode == 0
    program = f"import sys, mmgen; mmgen.SAVE_SECONDS = 0.05; sys.exit(mmgen.main({cut}))"
    rng, kills, state = np.random.default_rng(0), 0, tmp_path / "cut" / "checkpoints" / "state.pth"
    while True:
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL,
                                   env=ENV)
        before = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == before):
            time.sleep(0.01)  # until it is at work
        try:
            assert process.wait(timeout=rng.uniform(0.05, 1.5) if kills < 4 else 120) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills >= 1
    for name in ("vqvae_model.pth", "igpt_model.pth"):
        a, b = (torch.load(tmp_path / f / "checkpoints" / name, weights_only=True)["model"]
                for f in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert curves(tmp_path / "whole") == curves(tmp_path / "cut")

@pytest.mark.parametrize("number,status", [(2, 130), (15, 143)])
def test_ctrl_c_and_sigterm_save_and_exit(tmp_path, data_dir, number, status):
    args = training("vqvae", data_dir, tmp_path, steps=100_000)
    process = subprocess.Popen([sys.executable, str(MMGEN), *args], stderr=subprocess.PIPE,
                               text=True)
    state = tmp_path / "checkpoints" / "state.pth"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status and "--resume" in stderr and "Traceback" not in stderr
    assert mmgen.load_checkpoint(state)["trainer"]["phase"] == "vqvae"

def test_two_trainings_in_one_directory(tmp_path, data_dir):
    run = mmgen.Run(tmp_path, "vqvae", tiny_config(), mmgen.load_data(data_dir))
    with run.lock:
        assert "another training" in refused(*training("vqvae", data_dir, tmp_path))
    assert not (tmp_path / "checkpoints" / "vqvae_model.pth").exists()

def test_without_file_locks_training_goes_on(tmp_path, data_dir, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(mmgen.fcntl, "flock", flock)
    result = works(*training("vqvae", data_dir, tmp_path, steps=2))
    assert result.stderr.count("cannot be locked") == 1

def test_files_that_cannot_be_replaced_for_a_while(tmp_path, data_dir, monkeypatch):
    """As on systems where an open file is not replaced: curves and pictures can be missing, and
    checkpoints are tried again."""
    replace, waited = Path.replace, []

    def held(self, target):
        if "results" in str(target) or len(waited) % 3 < 2:
            raise PermissionError(errno.EACCES, "held by another program", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", held)
    monkeypatch.setattr(mmgen.time, "sleep", waited.append)
    result = works(*training("multi", data_dir, tmp_path, steps=2))
    assert waited and "warning: [Errno 13] held" in result.stderr
    mmgen.load_models(tmp_path, CPU)
    assert not list(tmp_path.rglob("results/*"))
    monkeypatch.setattr(mmgen.time, "sleep", lambda seconds: None)
    assert "held" in refused("sample", "--run", tmp_path, "--data", data_dir)

def test_an_older_torch_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.4.1"))
    assert "2.4.1" in refused("train")

@pytest.mark.parametrize("at", ["start", "first pass"])
def test_training_goes_on_where_models_cannot_be_compiled(tmp_path, data_dir, monkeypatch, at):
    def fail(*_):
        raise RuntimeError("no compiler")

    def compile_(function, disable=False):
        if disable:
            return function
        return fail() if at == "start" else fail

    monkeypatch.setattr(torch, "compile", compile_)
    for name, flags in ("a", ["--compile"]), ("b", []):
        result = works(*training("single", data_dir, tmp_path / name, *flags, steps=6))
        assert ("not compiled" in result.stderr) == bool(flags)
    a, b = (curves(tmp_path / name) for name in "ab")
    assert a == b

def test_training_in_a_worker_thread(tmp_path, data_dir):
    """Signal handlers can be set in the main thread only."""
    args, status = training("vqvae", data_dir, tmp_path, steps=2), []
    thread = threading.Thread(target=lambda: status.append(mmgen.main(args)))
    thread.start()
    thread.join()
    assert status == [0]

def test_progress_is_shown_at_every_step_of_a_slow_training(tmp_path, data_dir, monkeypatch):
    clock = iter(range(0, 10**9, 10))  # ten seconds between any two looks
    monkeypatch.setattr(mmgen.time, "monotonic", lambda: next(clock))
    lines = works(*training("two-stage", data_dir, tmp_path, steps=20)).stderr.splitlines()
    for phase in ("vqvae", "igpt"):
        shown = [line for line in lines if re.match(rf"{phase} .* left  loss \d\.\d{{4}}$", line)]
        assert len(shown) == 19  # all steps but the first

def test_same_seed_same_bytes(tmp_path, data_dir):
    args = [training("multi", data_dir, tmp_path / name, "--seed", 7, steps=20) for name in "ab"]
    assert separately(MMGEN, *args[0]).returncode == 0
    (tmp_path / "b/checkpoints").mkdir(parents=True)
    (tmp_path / "b/checkpoints/.state.pth.tmp").write_text("what a kill has left")
    works(*args[1])
    a, b = ({path.relative_to(tmp_path / name): content
             for path, content in contents(tmp_path / name).items()} for name in "ab")
    assert len(a) >= 14 and a.keys() == b.keys()
    assert [path for path in a if a[path] != b[path]] == []

@pytest.mark.parametrize("in_training,step", [(True, 3), (False, 4)])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data_dir, monkeypatch, in_training,
                                                 step):
    works(*training("two-stage", data_dir, tmp_path, steps=10))
    good = {path: path.read_bytes() for path in tmp_path.rglob("*_model.pth")}
    calls, original = [], mmgen.compute_loss

    def loss(*options):
        calls.append(torch.is_grad_enabled() == in_training)
        return original(*options) * (math.nan if sum(calls) == 4 and calls[-1] else 1)

    monkeypatch.setattr(mmgen, "compute_loss", loss)
    result = command(*training("finetune", data_dir, tmp_path))
    message = f"mmgen: error: loss or gradient is nan at step {step} of phase finetune"
    assert result.returncode == 2 and message in result.stderr
    assert len(good) == 2 and good.items() <= contents(tmp_path).items()

def test_a_full_disk_leaves_the_old_files_whole(trained, data_dir, tmp_path):
    """The limit on a file's size stands for the disk's: a write fails half-way."""
    run = shutil.copytree(trained, tmp_path / "run")
    before = contents(run)
    program = "import resource, sys, mmgen; " \
              "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); " \
              "sys.exit(mmgen.main(sys.argv[1:]))"
    for args in (training("multi", data_dir, run, "--overwrite"),
                 ["sample", "--data", data_dir, "--run", run]):
        result = separately("-c", program, *args)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        assert result.stderr.splitlines()[-1].startswith("mmgen: error: "), result.stderr
        assert contents(run) == before

def test_a_damaged_state_is_refused(tmp_path, data_dir):
    cfg, data = tiny_config(vqvae_steps=20), mmgen.load_data(data_dir)
    run = mmgen.Run(tmp_path, "vqvae", cfg, data)
    run.lock.close()
    _, trainer, _ = mmgen.prepare_phase("vqvae", cfg, data, Models(), CPU)
    run.restore(trainer)
    good = torch.load(run.state_path, weights_only=True)
    args = training("vqvae", data_dir, tmp_path, "--resume", "--vqvae-steps", 20)
    for keys in (["settings"], ["rows"], ["done"], *(["trainer", name] for name in good["trainer"]),
                 ["trainer", "modules", "vqvae.codebook.unused"]):
        state = copy.deepcopy(good)
        del functools.reduce(operator.getitem, keys[:-1], state)[keys[-1]]
        mmgen.save_checkpoint(run.state_path, **state)
        assert "no readable" in refused(*args), keys
    assert not (tmp_path / "checkpoints" / "vqvae_model.pth").exists()

@pytest.mark.parametrize("kind", [VQVAE, FactoredVQVAE])
@pytest.mark.parametrize("linked", [True, False])
def test_models_built_by_hand_are_saved(tmp_path, kind, linked):
    # NumPy's numbers are as good as Python's
    vqvae = kind(np.int64(16), 32, 16, tuple(np.array([28, 28])), restart=np.int32(9)).eval()
    tokenizer = Tokenizer(np.array(TEXTS), 32)
    igpt = iGPT(np.int64(tokenizer.vocab_size), 58, 32, 2, np.int64(2), np.float32(0.5),
                codebook=vqvae.codebook.weight if linked else None).eval()
    wrapped = types.SimpleNamespace(_orig_mod=vqvae)  # as torch.compile wraps a model
    mmgen.save_vqvae(tmp_path / "v.pth", wrapped)
    mmgen.save_igpt(tmp_path / "i.pth", igpt, tokenizer, vqvae)
    again = mmgen.load_vqvae(tmp_path / "v.pth")
    igpt_again, tokenizer_again = mmgen.load_igpt(tmp_path / "i.pth", again)
    x, rows = torch.rand(2, 3, 28, 28), torch.randint(tokenizer.vocab_size, (2, 20))
    assert type(again) is kind and torch.equal(again(x)[2], vqvae(x)[2])
    assert torch.equal(igpt_again(rows), igpt(rows)) and tokenizer_again.words == tokenizer.words
    with pytest.raises(InputError, match="no readable VQ-VAE"):
        mmgen.load_vqvae(tmp_path / "i.pth")
    again.codebook.weight.data[0] += 1
    with pytest.raises(InputError, match="other codes"):
        mmgen.load_igpt(tmp_path / "i.pth", again)

@pytest.mark.parametrize("change", [dict(words=words) for words in (None, 5, "red", [], ["red", 7])]
                         + [dict(format=4), dict(kind="Tokenizer"), dict(kind=None)])
def test_a_damaged_model_file_is_refused(trained, tmp_path, change):
    vqvae = mmgen.load_vqvae(trained / "checkpoints" / "vqvae_model.pth")
    content = torch.load(trained / "checkpoints" / "igpt_model.pth", weights_only=True)
    torch.save(content | change, tmp_path / "igpt.pth")
    with pytest.raises(InputError, match="igpt.pth"):
        mmgen.load_igpt(tmp_path / "igpt.pth", vqvae)

def mutated(good, rng):
    """A file's bytes with bits flipped, a piece cut out, doubled or overwritten, or no end."""
    data = bytearray(good)

    def somewhere():  # headers and directories stand at the ends, and deserve half of the damage
        near = rng.integers(min(len(data), 300))
        return int(rng.choice([rng.integers(len(data)), near, len(data) - 1 - near],
                              p=[0.5, 0.25, 0.25]))

    for _ in range(rng.integers(1, 4)):
        at, length, kind = somewhere(), int(rng.integers(1, 40)), rng.integers(5)
        if kind == 0:
            for _ in range(rng.integers(1, 9)):
                data[somewhere()] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[max(1, at) :]
        elif kind == 2 and len(data) > 2 * length:
            del data[at : at + length]
        elif kind == 3:
            source = somewhere()
            data[at:at] = data[source : source + length]
        else:
            data[at : at + 4] = bytes([int(rng.choice([0, 0x7F, 0xFF]))]) * 4
    return bytes(data)

def good_files(trained, folder):
    """Write good files of all kinds -> a list of (path, what reads it)."""
    arrays, files = drawn(12, 4), []
    images, test = arrays["train_images"], arrays["test_images"]
    texts = [list(map(str, arrays[f"{part}_captions"])) for part in ("train", "test")]

    def add(name, content, reader=lambda path: mmgen.load_data(path.parent)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        files.append((path, reader))

    for part, pictures in ("train", images), ("t10k", test):
        for kind, array in (("images-idx3", pictures[..., 0]),
                            ("labels-idx1", np.arange(len(pictures)) % 10)):
            add(f"mnist/{part}-{kind}-ubyte", idx(array),
                lambda path: mmgen.load_data(path.parent.parent))
    for protocol in (0, 2, 5):
        add(f"{protocol}/{PAIRS_FILE}", pickle.dumps((images, test, *texts), protocol))
    add(f"d/{PAIRS_FILE}", pickle.dumps(dict(
        train_images=images / 255, test_images=test / 255, train_texts=np.array(texts[0]),
        test_texts=texts[1])))
    write_pairs(folder / "n", arrays)
    add("n/drawn.npz", (folder / "n/drawn.npz").read_bytes())
    add("x.npy", npy(images.shape, body=0) + images.tobytes(), mmgen.read_pictures)
    add("x.ppm", b"P6\n# made by hand\n28 28\n255\n" + images[0].tobytes(), mmgen.read_pictures)
    vqvae = mmgen.load_vqvae(trained / "checkpoints/vqvae_model.pth")
    for name, reader in (("vqvae_model", mmgen.load_vqvae), ("state", mmgen.load_checkpoint),
                         ("igpt_model", lambda path: mmgen.load_igpt(path, vqvae))):
        add(f"{name}.pth", (trained / f"checkpoints/{name}.pth").read_bytes(), reader)
    return files

def test_damaged_files_lead_to_one_clear_error(trained, tmp_path):
    """`make fuzz` tries ten thousand: success or InputError, under 5 s and 1 GiB each."""
    import resource
    rng, tried, refusals = np.random.default_rng(int(os.environ.get("FUZZ_SEED", 0))), 0, []
    files = good_files(trained, tmp_path)
    for path, reader in files:
        reader(path)  # as it is, it can be read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while tried < int(os.environ.get("FUZZ_CASES", 400)):
        for path, reader in files:
            good, tried = path.read_bytes(), tried + 1
            path.write_bytes(mutated(good, rng))
            started = time.monotonic()
            try:
                reader(path)
            except InputError as error:
                refusals.append(path)
                assert str(error) and "\n" not in str(error), (tried, path, error)
            except BaseException as error:
                raise AssertionError(f"case {tried}, {path}: {error!r}") from error
            assert time.monotonic() - started < 5, (tried, path)
            path.write_bytes(good)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert set(refusals) == {path for path, _ in files}
    print(tried, "cases,", len(refusals), "refused")


# --- bench: `make bench` times mmgen against plain code and the machine --------------------------
#
# Absolute times say more about the machine than about the code, so every row is a ratio of two
# things timed in the same rounds: mmgen's way and the plain way, or mmgen and the machine's limit.

def timed_in_turn(*functions, rounds=5):
    """Median seconds of each function; they take turns, so a slow moment hits all alike."""
    seconds = [[] for _ in functions]
    for i in range(rounds + 1):
        for f, out in zip(functions, seconds):
            start = time.perf_counter()
            f()
            if i or rounds == 1:  # the first round warms caches up
                out.append(time.perf_counter() - start)
    return [float(np.median(s)) for s in seconds]

class DistanceTensor(VectorQuantizer):
    """The notes' quantizer: every difference of a feature and a code is written to memory."""

    def distances(self, z):
        return (z.movedim(1, -1)[..., None, :] - self.weight).square().sum(-1)

class PlainBlock(mmgen.Block):
    """A textbook block: each head has keys and values, scores, mask and softmax are spelled out in
    float32, products are nn.Linear's."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__(d_model, n_heads, dropout)
        linear = torch.nn.Linear
        self.attention.qkv = linear(d_model, 3 * d_model, bias=False)
        self.attention.out = linear(d_model, d_model, bias=False)
        self.mlp[0], self.mlp[2] = linear(d_model, 4 * d_model), linear(4 * d_model, d_model)

    def forward(self, x, *context):
        B, T, d = x.shape
        layer = self.attention
        qkv = layer.qkv(self.norm1(x)).view(B, T, 3, layer.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B,heads,T,head_dim) each
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B,heads,T,T)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = self.dropout(scores.masked_fill(future, -math.inf).softmax(-1))
        x = x + self.dropout(layer.out((weights @ v).transpose(1, 2).reshape(B, T, d)))
        return x + self.dropout(self.mlp(self.norm2(x)))

def training_steps(pairs, batch):
    """[(model, its trainer's class and arguments)] -> functions that make one training step each:
    ours, in the precision that `train` would choose, and the other, in float32."""
    steps = []
    for i, (model, trainer_class, *options) in enumerate(pairs):
        bf16 = i == 0 and mmgen.use_bf16("auto", torch.device("cpu"))
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        trainer = trainer_class(model.train(), optimizer, "cpu", *options, bf16=bf16)
        steps.append(functools.partial(trainer.train_step, batch))
    return steps

def bench_quantizer():
    """6272 features of length 256, forward and backward."""
    z = torch.randn(128, 7, 7, 256).movedim(-1, 1).requires_grad_()  # laid out as the encoder's

    def both_ways(quantizer):
        z_q = quantizer(z)
        (F.mse_loss(z_q, z.detach()) + F.mse_loss(z, z_q.detach())).backward()

    ours, large, plain = yield [functools.partial(both_ways, q.eval()) for q in (
        VectorQuantizer(128, 256), VectorQuantizer(1024, 256), DistanceTensor(128, 256))]
    yield [("quantizer, K 128, both ways", ours, plain, "(N,K,D) tensor"),
           ("quantizer, K 1024, both ways", large, ours, "K 128")]

def bench_vqvae():
    """Training steps and token extraction of the notes' VQ-VAE, batch 128."""
    x, vqvae, plain_vqvae = torch.rand(128, 3, 28, 28) * 2 - 1, VQVAE(), VQVAE()
    plain_vqvae.codebook = DistanceTensor(128, 256)
    images = np.zeros((128, 28, 28, 3), np.uint8)
    encode = torch.no_grad()(lambda: vqvae.encoder(x))
    steps = training_steps([(vqvae, VQVAETrainer), (plain_vqvae, VQVAETrainer)], x)
    ours, plain, extract, encoded = yield [
        *steps, lambda: mmgen.extract_tokens(vqvae, images), encode]
    yield [("VQ-VAE step, dim 256, batch 128", ours, plain, "(N,K,D) tensor"),
           ("token extraction", extract, encoded, "encoder's forward pass")]

def bench_igpt():
    """Training steps of the notes' iGPT, batch 128, V 165, 57 tokens."""
    igpt, plain = iGPT(165, 58), iGPT(165, 58)
    plain.blocks = torch.nn.ModuleList(PlainBlock(128, 4, 0.1) for _ in range(4))
    ours, other = yield training_steps([(m, iGPTTrainer, 165, 58) for m in (igpt, plain)],
                                       torch.randint(165, (128, 58)))
    yield [("iGPT step, batch 128", ours, other, "plain block, float32")]

def bench_sampling():
    """64 pictures of 49 tokens after 9 of prompt."""
    tokenizer, how = Tokenizer(["a b c d e f"], 128), SamplingConfig(guidance=0)
    igpt = iGPT(tokenizer.vocab_size, 58).eval()
    prompts, span = mmgen.text_prompts(tokenizer, ["a b c d e f"] * 64), tokenizer.image_span
    nothing = mmgen.text_prompts(tokenizer, [None])
    cached = functools.partial(mmgen.generate, igpt, prompts, 49, span, how)
    guided = functools.partial(mmgen.generate, igpt, prompts, 49, span, SamplingConfig(), nothing)

    @torch.no_grad()
    def uncached():
        row = prompts
        for _ in range(49):
            row = torch.cat([row, mmgen.sample_token(igpt(row)[:, -1, :128], how)[:, None]], 1)

    ours, with_guidance, plain = yield [cached, guided, uncached]
    yield [("sampling 64 pictures", ours, plain, "no cache"),
           ("the same, guided", with_guidance, ours, "unguided")]

def bench_start():
    """`mmgen.py --help` in a fresh process."""
    run = functools.partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    help_, torch_ = yield [lambda: run([sys.executable, str(MMGEN), "--help"]),
                           lambda: run([sys.executable, "-c", "import torch"])]
    yield [("mmgen.py --help", help_, torch_, "import torch")]

def bench(rounds=5):
    """Rows (what, seconds of ours, of the other, what the other is), one by one."""
    torch.manual_seed(0)
    for part in (bench_quantizer, bench_vqvae, bench_igpt, bench_sampling, bench_start):
        steps = part()  # a generator: first what is to be timed, then, given the seconds, the rows
        yield from steps.send(timed_in_turn(*next(steps), rounds=rounds))

def test_bench_has_its_rows():
    """One round in place of several: whether the rows are there and the large ratios large."""
    ratios = {}
    for what, ours, other, against in bench(rounds=1):
        assert ours > 0 and other > 0
        ratios[what, against] = other / ours
    assert len(ratios) == 8
    assert ratios["quantizer, K 128, both ways", "(N,K,D) tensor"] > 4
    assert ratios["sampling 64 pictures", "no cache"] > 2


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    bf16 = mmgen.use_bf16("auto", torch.device("cpu"))
    print(f"mmgen's training steps in {'bfloat16' if bf16 else 'float32'}, all else in float32")
    print(f"{'what':34}{'mmgen':>10}{'other':>10}{'ratio':>8}  other")
    for what, ours, other, against in bench():
        print(f"{what:34}{1e3 * ours:7.1f} ms{1e3 * other:7.1f} ms{other / ours:7.2f}x  {against}",
              flush=True)
