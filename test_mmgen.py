"""Tests of mmgen.py: `make test`. Everything is tiny; nothing is downloaded."""

import codecs
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
import os
import pickle
import re
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
# Tiny models gain nothing from more threads, and results must not depend on the machine
torch.set_num_threads(1)
TEXTS = ["dark red seven on light blue", "plain green one on dark red",
         "light blue two on plain green"]

def drawn(n_train=64, n_test=16, size=28, seed=0):
    return mmgen.make_drawn(n_train, n_test, size, seed)

def tiny_config(**changes):
    return Config.preset("tiny", **changes)

def train(folder, regime, cfg, data, resume=False, overwrite=False):
    """What `train` does in a run directory, without the samples at its end -> Models."""
    run = mmgen.Run(folder, regime, cfg, data, resume, overwrite)
    with run.lock:
        models = run.train(cfg, data, torch.device("cpu"))
        run.save(complete=True)
        return models

def as_pairs(arrays):
    return mmgen.Data(**arrays)

def write_pairs(folder, arrays):
    """A drawn.npz as `mmgen.py data` lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "drawn.npz", **arrays)

@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder, drawn(96, 16))
    return folder

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

def separately(*args):
    """Run mmgen.py in a process of its own, as a user does."""
    return subprocess.run([sys.executable, str(MMGEN), *map(str, args)], text=True,
                          capture_output=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})

@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_dir):
    """A tiny run of the whole `multi` regime, made by the command line."""
    folder = tmp_path_factory.mktemp("run")
    result = separately("train", "--phase", "multi", "--preset", "tiny", "--data", data_dir,
                        "--run", folder)
    assert result.returncode == 0, result.stderr
    return folder

def small_models(seed=0):
    torch.manual_seed(seed)
    vqvae = VQVAE(dim=16, K=24, D=16)
    tokenizer = Tokenizer(TEXTS, 24)
    igpt = iGPT(tokenizer.vocab_size, 58, d_model=32, n_heads=2, n_layers=2, dropout=0.0,
                codebook=vqvae.codebook.weight)
    return vqvae, tokenizer, igpt


# --- data -----------------------------------------------------------------------------------------

def test_drawn_set_has_the_promised_arrays_and_is_deterministic(tmp_path):
    for name in ("a", "b"):
        options = Options(train=20, test=10, size=32, seed=5, data=str(tmp_path / name))
        mmgen.command_data(options, {})
    a, b = ((tmp_path / n / "drawn.npz").read_bytes() for n in "ab")
    assert a == b
    with np.load(tmp_path / "a" / "drawn.npz") as file:
        assert (file["train_images"].shape == (20, 32, 32, 3)
                and file["train_images"].dtype == np.uint8)
        assert file["test_captions"].shape == (10,) and file["test_captions"].dtype.kind == "U"
        assert all(len(c.split()) == 6 for c in file["train_captions"])
    mmgen.command_data(options.but(seed=6, data=str(tmp_path / "c")), {})
    assert (tmp_path / "c" / "drawn.npz").read_bytes() != a

def test_drawn_colours_are_those_of_the_caption():
    arrays = drawn(40, 1)

    def color(shade, hue):
        return np.round(255 * np.array(colorsys.hsv_to_rgb(mmgen.HUES[hue], *mmgen.SHADES[shade])))

    for image, caption in zip(arrays["train_images"], arrays["train_captions"]):
        words = caption.split()
        assert (image[0, 0] == color(*words[4:])).all()
        assert np.abs(image - color(*words[:2])).sum(-1).min() < 60

def test_drawn_digits_differ_within_a_class_and_can_be_told_apart():
    labels = np.repeat(np.arange(10), 60)
    ink = mmgen.draw_digits(labels, 28, np.random.default_rng(0)).reshape(600, -1) / 255.0
    train, test = ink[::2], ink[1::2]
    distance = ((test[:, None] - train[None]) ** 2).sum(-1)
    # One nearest neighbour, 30 examples a class
    assert (labels[::2][distance.argmin(1)] == labels[1::2]).mean() > 0.6
    assert np.unique(ink, axis=0).shape[0] == 600

@pytest.mark.parametrize("scale,dtype,name", [(3, np.uint8, "2bit"), (255, np.uint8, "8bit"),
                                              (255, np.int64, "8bit"), (1, np.float32, "unit"),
                                              (1, np.float64, "unit")])
def test_value_ranges_are_detected(scale, dtype, name):
    levels = np.random.default_rng(0).integers(0, 4, (5, 8, 8, 3))
    levels.flat[0] = 3
    out, found = mmgen.to_uint8((levels / 3 * scale).round().astype(dtype) if scale > 1
                                else (levels / 3).astype(dtype))
    assert found == name and out.dtype == np.uint8
    assert (out == levels * 85).all()

@pytest.mark.parametrize("bad", [
    np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8), np.uint8),
    np.zeros((2, 8, 8, 4), np.uint8), np.zeros((2, 9, 8, 3), np.uint8),
    np.full((2, 8, 8, 3), 256), np.full((2, 8, 8, 3), -1),
    np.full((2, 8, 8, 3), np.nan), np.full((2, 8, 8, 3), np.inf), np.zeros((2, 8, 8, 3), object),
])
def test_unusable_pictures_are_refused(bad):
    with pytest.raises(InputError):
        mmgen.to_uint8(bad)

@pytest.mark.parametrize("layout", ["tuple", "dict"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_are_accepted(tmp_path, layout, protocol):
    images = np.random.default_rng(0).integers(0, 4, (6, 28, 28, 3)).astype(np.uint8)
    captions = np.array(TEXTS * 2) if protocol == 5 else ["  " + "\t".join(t.split()) + "\n"
                                                          for t in TEXTS * 2]  # blanks are blanks
    content = (images, images[:3], captions, captions[:3])
    if layout == "dict":
        content = dict(zip(("train_images", "test_images", "train_texts", "test_texts"), content))
    (tmp_path / "colored_mnist_with_text.pkl").write_bytes(pickle.dumps(content, protocol))
    data = mmgen.load_data(tmp_path)
    assert (data.train_images == images * 85).all() and data.test_captions == TEXTS
    assert data.vqvae_train is data.train_images  # with one file its pictures serve both
    (tmp_path / "mnist_colored.pkl").write_bytes(
        pickle.dumps({"train": images[:4], "test": images[:2]}, protocol))
    assert mmgen.load_data(tmp_path).vqvae_train.shape == (4, 28, 28, 3)

U8 = np.zeros((4, 8, 8, 3), np.uint8)
CAPTIONS = [TEXTS[0]] * 4

@pytest.mark.parametrize("content,message", [
    (None, "4-tuple or dict with"),
    (b"", "no readable pickle"),
    (b"\x80\x05.", "no readable pickle"),
    (pickle.dumps(U8)[:-40], "no readable pickle"),
    ([U8, U8, CAPTIONS], "4-tuple or dict"),
    ({"train_images": U8, "test_images": U8, "train_texts": CAPTIONS},
     "4-tuple or dict with train_images"),
    (7, "4-tuple or dict"),
    ((None, U8, CAPTIONS, CAPTIONS), "training pictures: want numbers (N,H,W,3)"),
    (([1, 2], U8, CAPTIONS, CAPTIONS), "training pictures: want numbers (N,H,W,3)"),
    ((U8, U8[0], CAPTIONS, CAPTIONS), "test pictures: want numbers (N,H,W,3)"),
    ((U8[..., :2], U8, CAPTIONS, CAPTIONS), "training pictures: want numbers (N,H,W,3)"),
    ((U8.astype(object), U8, CAPTIONS, CAPTIONS), "found object (4, 8, 8, 3)"),
    ((U8.astype(bool), U8, CAPTIONS, CAPTIONS), "found bool"),
    ((U8.astype(complex), U8, CAPTIONS, CAPTIONS), "found complex128"),
    ((U8.astype(str), U8, CAPTIONS, CAPTIONS), "training pictures: want numbers"),
    ((U8[:0], U8, [], CAPTIONS), "training pictures: want numbers (N,H,W,3)"),
    ((U8[:, :0], U8, CAPTIONS, CAPTIONS), "training pictures: want numbers (N,H,W,3)"),
    ((U8[:, :6], U8[:, :6], CAPTIONS, CAPTIONS), "H and W divisible by 4, found uint8"),
    ((U8, np.zeros((4, 12, 8, 3), np.uint8), CAPTIONS, CAPTIONS), "unlike sizes"),
    ((U8 + np.nan, U8, CAPTIONS, CAPTIONS), "nan"),
    ((U8 - np.inf, U8, CAPTIONS, CAPTIONS), "inf"),
    ((U8.astype(int) + 256, U8, CAPTIONS, CAPTIONS), "256"),
    ((U8.astype(int) - 1, U8, CAPTIONS, CAPTIONS), "-1"),
    ((U8 + 1, U8 + 200, CAPTIONS, CAPTIONS), "test pictures: 200 to 200 does not fit 2bit"),
    ((U8, U8, CAPTIONS[:3], CAPTIONS), "training texts: want a list of 4 captions"),
    ((U8, U8, CAPTIONS, CAPTIONS * 2), "one a picture, found list (8,)"),
    ((U8, U8, {"a.png": "red one"}, CAPTIONS), "one a picture, found dict"),
    ((U8, U8, "red one", CAPTIONS), "one a picture, found str"),
    ((U8, U8, 5, CAPTIONS), "training texts: want a list of 4 captions, one a picture, found int"),
    ((U8, U8, [b"red one"] * 4, CAPTIONS), "training texts: caption 0 is b'red one'"),
    ((U8, U8, CAPTIONS, CAPTIONS[:2] + [None, 3.5]), "test texts: caption 2 is None"),
    ((U8, U8, [""] * 4, [" "] * 4), "training texts: caption 0 is ''"),
])
def test_bad_pickles(tmp_path, content, message):
    path = tmp_path / "colored_mnist_with_text.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(InputError) as error:
        mmgen.load_data(tmp_path)
    assert (message in str(error.value) and str(tmp_path) in str(error.value)
            and "\n" not in str(error.value))

@pytest.mark.parametrize("content,message", [
    ({}, "dict with 'train' and 'test'"),
    ([U8, U8], "dict with 'train' and 'test'"),
    ({"train": U8}, "dict with 'train' and 'test'"),
    ({"train": U8, "test": "pictures"}, "test pictures: want numbers"),
    ({"train": np.zeros((2, 12, 8, 3), np.uint8), "test": U8}, "unlike sizes"),
])
def test_bad_picture_pickles(tmp_path, content, message):
    (tmp_path / "colored_mnist_with_text.pkl").write_bytes(
        pickle.dumps((U8, U8, CAPTIONS, CAPTIONS)))
    (tmp_path / "mnist_colored.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError) as error:
        mmgen.load_data(tmp_path)
    assert message in str(error.value)

def npy(shape=(8, 8, 3), dtype="|u1", body=192, fortran=False):
    """The bytes of a .npy file whose header need not be true."""
    header = repr({"descr": dtype, "fortran_order": fortran, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + bytes(body)

@pytest.mark.parametrize("content,message", [
    (b"", "neither"), (b"GIF89a", "neither"), (b"\x93NUMPY", "no readable picture"),
    (npy()[:40], "no readable picture"), (npy(body=191), "no readable picture"),
    (npy((10**9, 10**3, 3)), "no readable picture"), (npy((-8, -8, 3)), "no readable picture"),
    (npy(dtype="|O"), "no readable picture"), (npy(dtype="<f4", body=768), "want uint8"),
    (npy((8, 8)), "want uint8"), (npy((8, 24), body=192), "want uint8"),
    (npy((4, 4, 4, 3)), "the model knows"), (npy((0, 8, 8, 3), body=0), "want uint8"),
    (npy((16, 4, 3)), "the model knows"), (npy((1, 1, 8, 8, 3)), "want uint8"),
    (npy(dtype="junk"), "no readable picture"),
    (b"P6", "neither"), (b"P6 8 8 255", "neither"),
    (b"P6 8 8 255\n", "no readable picture"), (b"P6 8 8 65535\n" + bytes(384), "neither"),
    (b"P6 8 8 255\n" + bytes(191), "no readable picture"),
    (b"P6 99999 99999 255\n" + bytes(192), "no readable picture"),
    (b"P6 999999999999 8 255\n", "neither"), (b"P6 -8 8 255\n" + bytes(192), "neither"),
    (b"P6 8 8 255\n" + bytes(192), "the model knows"), (b"P6 0 8 255\n", "want uint8"),
    (b"P3 1 1 255\n0 0 0\n", "neither"), (b"P5 8 8 255\n" + bytes(64), "neither"),
])
def test_bad_images(trained, tmp_path, capsys, content, message):
    (tmp_path / "x").write_bytes(content)
    status = mmgen.main(["sample", "--mode", "image", "--run", str(trained),
                         "--image", str(tmp_path / "x"), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert (status == 2 and error.startswith("mmgen: error: ") and message in error
            and error.count("\n") == 1), error
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]

@pytest.mark.parametrize("arguments,message", [
    (["--prompt", "dark red sevn on light blue"], "unknown word 'sevn'"),
    (["--prompt", ""], "0 words"), (["--prompt", "   "], "0 words"),
    (["--prompt", " ".join(["red"] * 7)], "has 7 words, not 1 to 6"),
    (["--prompts", "{tmp}/none"], "does not exist"), (["--prompts", "{tmp}"], "directory"),
    (["--prompts", "{tmp}/empty"], "holds no caption"),
    (["--prompts", "{tmp}/binary"], "no readable text file"), (["-n", "-1"], "want int 0.."),
    (["-n", "x"], "invalid int"), (["--seed", "-1"], "want int 0.."),
    (["--image", "{tmp}/x"], "belong to"), (["--temperature", "-1"], "temperature"),
    (["--temperature", "nan"], "temperature"), (["--top-p", "1.1"], "top_p"),
    (["--top-p", "0"], "top_p"), (["--top-k", "-1"], "top_k"),
    (["--guidance", "-0.1"], "guidance"), (["--min-p", "2"], "min_p"),
    (["--threads", "-1"], "want int 0.."), (["--mode", "sound"], "invalid choice"),
    (["--run", "{tmp}"], "does not exist"), (["--data", "{tmp}"], "no data"),
    (["--sideways"], "unrecognized"), (["--complete", "3"], "belong to"),
    (["--best-of", "0"], "want int 1.."), (["--device", "quantum"], "quantum"),
    (["--out", "{tmp}/empty/out"], "empty"),
])
def test_bad_sample_arguments(trained, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    if "--data" not in arguments and not {"--prompt", "--prompts"} & set(arguments):
        arguments += ["--prompt", "dark red seven on light blue"]
    status = mmgen.main(["sample", "--mode", "text", "--run", str(trained), *arguments])
    error = capsys.readouterr().err
    assert (status == 2 and error.startswith("mmgen: error: ") and message in error
            and error.count("\n") == 1), error

def test_every_flag_of_a_configuration_is_checked(tmp_path, capsys):
    tried = 0
    for name, field in Config.fields.items():
        low, dots, high = field.limits.partition("..")
        bad = ["sideways"]
        if dots:
            bad += [float(low) - 1, "nan", *([float(high) * 2 + 1] if high else [])]
        for value in bad:
            tried += 1
            flag = f"--{name.replace('_', '-')}={value}"
            assert mmgen.main(["train", "--phase", "multi", flag, "--run", str(tmp_path),
                               "--data", str(tmp_path)]) == 2, flag
            error = capsys.readouterr().err.splitlines()[-1]
            assert (error.startswith("mmgen: error: ")
                    and (name in error or name.replace("_", "-") in error)), error
    assert tried > 80 and not list(tmp_path.iterdir())

class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/mmgen_was_here",)

@pytest.mark.parametrize("content", [Evil(), {"train": Evil(), "test": 0},
                                     codecs.lookup("utf-8").encode, print])
def test_pickles_with_code_are_refused(tmp_path, content):
    path = tmp_path / "mnist_colored.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="refused"):
        mmgen.load_pickled_data(path)
    assert not Path("/tmp/mmgen_was_here").exists()

def test_a_pickle_cannot_ask_for_gigabytes(tmp_path):
    path = tmp_path / "mnist_colored.pkl"
    for call in (b"cnumpy\nndarray\n(I%d\ntR.",
                 b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I%d\ntS'b'\ntR."):
        path.write_bytes(call % 2**34)
        with pytest.raises(InputError):
            mmgen.load_pickled_data(path)
    array = path.read_bytes()
    # bytearray, bytes, text, frame of so many bytes
    for opcode in (b"\x96", b"\x8e", b"\x8d", b"\x95"):
        path.write_bytes(b"\x80\x05" + opcode + struct.pack("<Q", 2**34) + b"abc.")
        started = time.monotonic()
        with pytest.raises(InputError):
            mmgen.load_pickled_data(path)
        assert time.monotonic() - started < 1
    path.write_bytes(array)
    assert mmgen.SafeUnpickler(io.BytesIO(path.read_bytes())).load().shape == (0,)

def test_floats_beyond_the_range_by_a_rounding_error_and_fractions_in_other_ranges():
    images = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    images.flat[0] = 1.0000002  # an antialiased resize makes such
    out, found = mmgen.to_uint8(images)
    assert found == "unit" and np.abs(out - 255 * images).max() <= 0.5 + 1e-3
    for bad in (images * 2, images * 200):
        with pytest.raises(InputError, match="does not fit"):
            mmgen.to_uint8(bad)

def test_a_pickled_scalar_cannot_ask_for_gigabytes(tmp_path):
    path = tmp_path / "mnist_colored.pkl"
    path.write_bytes(b"cnumpy.core.multiarray\nscalar\n"
                     b"(cnumpy\ndtype\n(S'V1900000000'\ntRS'x'\ntR.")
    with pytest.raises(InputError, match="no readable pickle"):
        mmgen.load_pickled_data(path)
    path.write_bytes(b"(lr\xff\xff\xff\x7f.")  # nor a memo index for room
    with pytest.raises(InputError, match="memo"):
        mmgen.load_pickled_data(path)

def test_mnist_as_people_have_it(tmp_path):
    """Folders named as the files in them, gzipped bytes under plain names."""
    for prefix, n in (("train", 6), ("t10k", 4)):
        for kind, shape in (("images-idx3-ubyte", (n, 28, 28)), ("labels-idx1-ubyte", (n,))):
            raw = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape)
            folder = tmp_path / "mnist" / "raw" / f"{prefix}-{kind}"
            folder.mkdir(parents=True)
            (folder / f"{prefix}-{kind}").write_bytes(gzip.compress(raw + bytes(math.prod(shape))))
    assert mmgen.load_data(tmp_path).test_images.shape == (4, 28, 28, 3)

def test_a_run_belongs_to_its_data(tmp_path):
    """To the test captions, too: the vocabulary knows their words."""
    arrays = drawn(8, 4)
    train(tmp_path, "vqvae", tiny_config(vqvae_steps=1), as_pairs(arrays))
    arrays["test_captions"] = ["other words"] * 4
    with pytest.raises(InputError, match="cannot resume, data"):
        train(tmp_path, "vqvae", tiny_config(vqvae_steps=1), as_pairs(arrays), resume=True)

def test_raw_mnist(tmp_path):
    (tmp_path / "mnist").mkdir()
    rng = np.random.default_rng(0)
    for prefix, n, suffix in (("train", 12, ""), ("t10k", 6, ".gz")):
        for kind, array in (("images-idx3", rng.integers(0, 256, (n, 28, 28))),
                            ("labels-idx1", rng.integers(0, 10, n))):
            raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            raw += array.astype(np.uint8).tobytes()
            path = tmp_path / "mnist" / f"{prefix}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(raw) if suffix else raw)
            labels = array
    data = mmgen.load_data(tmp_path)
    assert data.train_images.shape == (12, 28, 28, 3)
    assert [c.split()[2] for c in data.test_captions] == [mmgen.DIGITS[i] for i in labels]
    path.write_bytes(gzip.compress(raw[:-1]))
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
    assert tokenizer.all_words[:-4] == sorted(set(" ".join(TEXTS).split()))
    assert tokenizer.vocab_size == 24 + len(tokenizer.all_words)
    ids = tokenizer.text_encode(TEXTS[0])
    assert ids.shape == (6,) and ids.min() >= 24
    assert tokenizer.text_decode(ids) == tokenizer.text_decode([t[None] for t in ids]) == TEXTS[0]
    with pytest.raises(InputError, match="'sevn'.*'seven'"):
        tokenizer.text_encode("dark red sevn on light blue")
    for bad in ("", "   ", " ".join(["red"] * 7)):
        with pytest.raises(InputError):
            tokenizer.text_encode(bad)

def test_token_ids_are_stable_across_processes():
    program = f"import sys; sys.path.insert(0, {str(MMGEN.parent)!r}); import mmgen; " \
              f"print(mmgen.Tokenizer({TEXTS!r}, 24).text_encode({TEXTS[1]!r}).tolist())"
    outputs = {subprocess.run([sys.executable, "-c", program], text=True, capture_output=True,
                              check=True, env={**os.environ, "PYTHONHASHSEED": str(seed)}).stdout
               for seed in (1, 2)}
    assert outputs == {str(Tokenizer(TEXTS, 24).text_encode(TEXTS[1]).tolist()) + "\n"}

def test_prompts_are_the_beginnings_of_training_sequences():
    tokenizer = Tokenizer(TEXTS + ["red"], 24)
    tokens = torch.randint(24, (4, 49))
    text_ids = tokenizer.encode_batch(TEXTS + ["red"])
    drawing = make_sequences(tokens, text_ids, tokenizer, "text_image")
    for row, text in zip(drawing, TEXTS + ["red"]):
        prompt = mmgen.text_prompt(tokenizer, text)
        assert (row[: len(prompt)] == prompt).all()
    reading = make_sequences(tokens, text_ids, tokenizer, "image_text")
    prompts = mmgen.image_prompts(tokenizer, tokens)
    assert (reading[:, : prompts.shape[1]] == prompts).all()
    plain = make_sequences(tokens, text_ids, tokenizer, "plain")
    assert plain.shape == drawing.shape == reading.shape == (4, 58)
    t = tokenizer
    assert plain[0].tolist() == [t.bos_token, *tokens[0], t.end_of_image_token,
                                 *t.text_encode(TEXTS[0]), t.end_of_text_token]
    # A short caption: its picture follows at once, the padding stands at the end
    assert (drawing[3, 4:53] == tokens[3]).all() and (drawing[3, 53:] == t.pad_token).all()
    assert (reading[3, 52:].tolist()
            == [*t.text_encode("red"), t.end_of_text_token] + [t.pad_token] * 4)

def test_processes_that_share_a_batch_of_two_train_on_both_orders(monkeypatch):
    tokenizer = Tokenizer(TEXTS, 8)
    row, ids = torch.zeros(1, 4, dtype=torch.int64), tokenizer.encode_batch(TEXTS[:1])
    for rank, order in enumerate(("image_text", "text_image")):
        monkeypatch.setattr(mmgen, "processes", lambda rank=rank: (rank, 2))
        mixed = mmgen.mixed_sequences(row, ids, tokenizer, ("image_text", "text_image"))
        assert (mixed == make_sequences(row, ids, tokenizer, order)).all()

def test_batches_hold_both_orders_and_every_pair():
    vqvae, tokenizer, _ = small_models()
    images = drawn(30, 1)["train_images"]
    loader = create_dataset(images, TEXTS * 10, vqvae, tokenizer, batch_size=8)
    batches = list(loader)
    assert len(loader) == 4 and [tuple(b.shape) for b in batches] == [(8, 58)] * 3 + [(6, 58)]
    second = torch.cat(batches)[:, 1]
    assert ((second == tokenizer.end_of_text_token).sum()
            == (second == tokenizer.end_of_image_token).sum() == 15)

def test_padding_carries_no_loss():
    tokenizer = Tokenizer(TEXTS + ["red"], 24)
    rows = make_sequences(torch.randint(24, (2, 49)), tokenizer.encode_batch(["red", TEXTS[0]]),
                          tokenizer, "text_image")
    model = iGPT(tokenizer.vocab_size, 58, 32, 2, 2, 0.0)
    trainer = iGPTTrainer(model, torch.optim.Adam(model.parameters()), "cpu",
                          tokenizer.vocab_size, 58)
    loss = trainer.loss(rows)
    log_p = F.log_softmax(model(rows[:, :-1]), -1)
    wanted = [-log_p[b, t, rows[b, t + 1]] for b in range(2) for t in range(57)
              if rows[b, t + 1] != tokenizer.pad_token]
    assert len(wanted) == 2 * 57 - 5
    assert torch.allclose(loss, torch.stack(wanted).mean(), atol=1e-5)

def test_caption_weight_is_on_captions_after_a_picture_only():
    tokenizer = Tokenizer(TEXTS, 24)
    tokens, text_ids = torch.randint(24, (1, 49)), tokenizer.encode_batch(TEXTS[:1])
    heavy = {}
    for order in mmgen.ORDERS:
        nll = torch.rand(1, 57, requires_grad=True)
        rows = make_sequences(tokens, text_ids, tokenizer, order)
        mmgen.weighted_mean(nll, rows, tokenizer.vocab_size, 6.0).backward()
        weight = nll.grad[0] / nll.grad[0].min()  # relative to the lightest target
        assert torch.allclose(weight[(weight > 1.1)], torch.tensor(6.0))
        heavy[order] = (weight > 1.1).nonzero()[:, 0].tolist()
    assert heavy == {"image_text": list(range(51, 57)), "text_image": [],
                     "plain": list(range(50, 57))}


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
    assert tokens.shape == (3, h, w) and tokens.dtype == torch.int64
    assert torch.equal(vqvae.decode_tokens(tokens), vqvae.decode_tokens(tokens.flatten(1)))
    assert torch.allclose(vqvae.decode_tokens(tokens), recon, atol=1e-5)
    assert vqvae.n_embeddings == 24

def recolored(mask, low, high):
    """Masks (B,H,W) in [0,1] -> pictures (B,3,H,W) between the colours low and high (B,3)."""
    return low[..., None, None] + (high - low)[..., None, None] * mask[:, None]

def test_split_colors_are_joined_again_and_masks_do_not_depend_on_colors():
    torch.manual_seed(0)
    mask = (torch.rand(4, 12, 12) < 0.3).float()
    mask[:, :2, :2] = 0.5  # a soft edge
    low, high = (torch.tensor([-1.0, 0.5, 0.0]).expand(4, 3),
                 torch.tensor([0.2, -1.0, 0.9]).expand(4, 3))
    x = recolored(mask, low, high)
    found, colors = mmgen.split_colors(x)
    assert torch.allclose(found[:, 0], mask, atol=1e-5)
    assert torch.allclose(colors, torch.stack([low, high], 1))
    assert torch.allclose(mmgen.join_colors(found, colors), x, atol=1e-5)
    # Which of two colours is the ground, the picture says
    for other in (recolored(mask, -high, -low), recolored(mask, high, low)):
        assert torch.allclose(mmgen.split_colors(other)[0], found, atol=1e-5)
    plain = torch.full((1, 3, 8, 8), 0.3)  # a single colour
    assert torch.equal(mmgen.join_colors(*mmgen.split_colors(plain)), plain)

def test_factored_vqvae_keeps_colors_in_the_corners():
    torch.manual_seed(0)
    vqvae = FactoredVQVAE(16, 24, 8, size=(16, 16)).eval()
    mask = (torch.rand(3, 16, 16) < 0.3).float()
    pictures = [recolored(mask, *torch.rand(2, 3, 3) * 2 - 1) for _ in range(2)]
    one, other = (vqvae.encode(x) for x in pictures)
    corner = torch.zeros(4, 4, dtype=torch.bool)
    corner[::3, ::3] = True
    assert torch.allclose(one[..., ~corner], other[..., ~corner], atol=1e-3)
    assert not torch.allclose(one[..., corner], other[..., corner], atol=1e-1)
    # and colours reach the picture from there alone: shape tokens decode to the same y
    z = one.clone()
    mmgen.corners(z).copy_(mmgen.corners(other))
    assert not torch.allclose(vqvae.decode(z), vqvae.decode(one), atol=1e-2)
    z_e, z_q, recon_x = vqvae.train()(pictures[0])
    compute_loss(pictures[0], recon_x, z_e, z_q).backward()
    assert all(p.grad.abs().sum() > 0
               for p in (vqvae.colors_in[0].weight, vqvae.colors_out[0].weight))

def test_restarted_codes_go_where_the_error_is():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4, restart=3)
    quantizer.weight.data.zero_()
    z = 0.01 * torch.randn(1, 4, 20, 50)  # well coded, all but ten
    z[0, :, 0, :10] = 5.0
    which = torch.arange(32) < 8
    quantizer.weight.data[which] = 100.0  # codes that nothing is near to
    quantizer.unused[:] = torch.where(which, 3, 0)
    quantizer(z)
    moved = quantizer.weight[which].mean(1)
    assert ((moved > 4) & (moved < 6)).all() and not quantizer.weight[~which].any()
    assert (quantizer.unused <= 1).all()
    quantizer.unused[which] = 4
    quantizer(torch.zeros(1, 4, 5, 5))  # no error anywhere is no error either

def test_the_preset_decides_by_the_pictures_whether_to_factor(tmp_path):
    arrays = drawn(40, 8, 16)
    flags = ["--preset", "tiny", "--factored", "auto", "--vqvae-steps", "3", "--phase", "vqvae"]
    for name, busy in (("two", False), ("many", True)):
        if busy:
            noise = np.random.default_rng(0).integers(
                0, 256, arrays["train_images"].shape, np.uint8)
            arrays["train_images"] = noise
        write_pairs(tmp_path / name, arrays)
        assert mmgen.main(["train", *flags, "--data", str(tmp_path / name),
                           "--run", str(tmp_path / name)]) == 0
        vqvae = mmgen.load_vqvae(tmp_path / name / "checkpoints" / "vqvae_model.pth")
        assert isinstance(vqvae, FactoredVQVAE) is not busy

def test_two_colored_pictures_are_told_from_busier_ones():
    images = drawn(30, 4)["train_images"]
    assert mmgen.two_colored(images) and mmgen.two_colored(images[:1])
    noise = np.random.default_rng(0).normal(0, 3, images.shape)
    assert mmgen.two_colored((images + noise).clip(0, 255).astype(np.uint8))
    third = images.copy()
    third[:, 10:20, :10] = 255 - third[:, 10:20, :10].mean((1, 2), keepdims=True)[..., ::-1]
    assert not mmgen.two_colored(third)
    assert not mmgen.two_colored(np.full((3, 8, 8, 3), 7, np.uint8))  # nothing varies at all

def test_decoding_refuses_what_is_no_picture():
    vqvae = VQVAE(dim=8, K=8, D=4, size=(8, 8))
    assert vqvae.decode_tokens(torch.zeros(3, 4, dtype=torch.int64)).shape == (3, 3, 8, 8)
    assert vqvae.decode_tokens(torch.zeros(3, 4, 5, dtype=torch.int64)).shape == (3, 3, 16, 20)
    for bad in (torch.zeros(4, 5, dtype=torch.int64), torch.full((1, 4), 8),
                torch.full((1, 4), -1)):
        with pytest.raises(InputError):
            vqvae.decode_tokens(bad)

def test_quantizer_finds_the_nearest_code():
    quantizer = VectorQuantizer(40, 6).eval()
    z = torch.randn(2, 6, 3, 3)
    z_q, tokens = quantizer(z), quantizer.distances(z.movedim(1, -1)).argmin(-1)
    slow = ((z.movedim(1, -1)[..., None, :] - quantizer.weight) ** 2).sum(-1)  # (2,3,3,40)
    assert torch.equal(tokens, slow.argmin(-1))
    assert torch.equal(z_q, quantizer.weight[tokens].movedim(-1, 1))

def test_colour_extremes_are_part_of_the_loss():
    x = torch.full((1, 3, 28, 28), -1.0)
    x[:, :, 10, 10] = 1.0  # a single bright pixel
    flat, z = torch.full_like(x, -1.0), torch.zeros(1, 4, 7, 7)
    moved = x.roll(1, dims=2)
    # To squared error a miss is worse
    assert compute_loss(x, moved, z, z) > compute_loss(x, flat, z, z)
    assert compute_loss(x, moved, z, z, extremes=1.0) < compute_loss(x, flat, z, z, extremes=1.0)
    # Pictures whose side no window divides: their last rows count, too, and small ones are no error
    for side in (4, 32):
        x = torch.zeros(1, 3, side, side)
        spot = x.clone()
        spot[..., -1, -1] = 1
        share = compute_loss(x, spot, z, z, extremes=1.0) / compute_loss(x, spot, z, z)
        assert share > 2, side

def test_codebook_and_encoder_receive_gradient():
    vqvae, _, _ = small_models()
    x = torch.rand(4, 3, 28, 28) * 2 - 1
    z_e, z_q, recon = vqvae(x)
    compute_loss(x, recon, z_e, z_q).backward()
    assert vqvae.codebook.weight.grad.abs().sum() > 0
    assert vqvae.encoder[0].weight.grad.abs().sum() > 0
    # The codebook term alone must do it, and must leave the encoder alone
    vqvae.zero_grad()
    z_e, z_q, recon = vqvae(x)
    F.mse_loss(z_q, z_e.detach()).backward()
    assert vqvae.codebook.weight.grad.abs().sum() > 0 and vqvae.encoder[0].weight.grad is None

def test_ema_codebook_moves_without_gradient_and_dead_codes_restart():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 4, ema=0.5, restart=3).train()
    z = torch.randn(4, 4, 5, 5)
    quantizer(z)
    assert not quantizer.weight.requires_grad
    before = quantizer.weight.clone()
    quantizer(z + 1)
    assert not torch.equal(before, quantizer.weight)
    with torch.no_grad():
        quantizer.weight[0] = quantizer.ema_sum[0] = 1e3  # far from everything
        for _ in range(5):
            quantizer(z)
    assert quantizer.weight[0].abs().max() < 100
    quantizer.eval()
    before = quantizer.weight.clone()
    quantizer(z - 5)
    assert torch.equal(before, quantizer.weight)


def test_moving_averages_are_no_parameters_of_phase_1():
    data = as_pairs(drawn(32, 8))
    for ema in (0.0, 0.9):
        models, trainer, _ = mmgen.prepare_phase("vqvae", tiny_config(ema=ema), data, Models(),
                                                 torch.device("cpu"))
        names = {group["name"] for group in trainer.optimizer.param_groups}
        assert names == ({"vqvae"} if ema else {"vqvae", "codebook"})
        assert models.vqvae.codebook.weight.requires_grad is not bool(ema)

# --- iGPT -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt", [1, 2, 9, 30])
def test_cached_logits_are_the_uncached_ones(prompt):
    _, tokenizer, igpt = small_models()
    igpt.eval()
    tokens = make_sequences(torch.randint(24, (3, 49)), tokenizer.encode_batch(TEXTS),
                            tokenizer, "text_image")
    with torch.no_grad():
        whole, places, tables = igpt(tokens), igpt.locate(tokens), igpt.tables()
        caches = torch.zeros(2, 2, 3, 2, 58, 16)  # (layers,2,B,heads,length,head_dim)

        def piece(a, b):
            return igpt(tokens[:, a:b], places[:, a:b], tables, caches, a)

        pieces = [piece(0, prompt)]  # prefill
        pieces += [piece(t, t + 1) for t in range(prompt, 50)]  # one token a step
        pieces.append(piece(50, 58))  # and a later chunk
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)

def test_captions_of_unlike_length_are_drawn_as_each_alone():
    tokenizer = Tokenizer(TEXTS + ["red two"], 24)
    torch.manual_seed(0)
    igpt = iGPT(tokenizer.vocab_size, 58, 32, 2, 2, 0.0).eval()
    models, how = Models(VQVAE(16, 24, 16), igpt, tokenizer), SamplingConfig(greedy=True)
    texts = [TEXTS[0], "red two", TEXTS[1]]
    alone = torch.cat([models.images([text], how) for text in texts])
    assert torch.equal(models.images(texts, how), alone)

def test_greedy_generation_is_the_uncached_argmax():
    _, tokenizer, igpt = small_models()
    row = mmgen.text_prompt(tokenizer, TEXTS[0])[None]
    out = mmgen.generate(igpt, row, 12, tokenizer.image_span, SamplingConfig(greedy=True))
    with torch.no_grad():
        for _ in range(12):
            row = torch.cat([row, igpt.eval()(row)[:, -1:, :24].argmax(-1)], 1)
    assert torch.equal(out[0], row[0, -12:])

def test_guidance_changes_logits_as_defined():
    _, tokenizer, igpt = small_models()
    igpt.eval()
    prompt, empty = (mmgen.text_prompt(tokenizer, TEXTS[0]),
                     torch.tensor([tokenizer.bos_token, tokenizer.end_of_text_token]))
    out = mmgen.generate(igpt, prompt[None], 8, tokenizer.image_span,
                         SamplingConfig(greedy=True, guidance=3.0, min_p=0.2), empty[None])
    cond, uncond = prompt[None], empty[None]
    with torch.no_grad():
        for _ in range(8):
            a, b = igpt(cond)[:, -1:, :24], igpt(uncond)[:, -1:, :24]
            plausible = a.softmax(-1) >= 0.2 * a.softmax(-1).amax(-1, keepdim=True)
            token = (a + 3 * (a - b)).where(plausible, torch.tensor(-torch.inf)).argmax(-1)
            cond, uncond = torch.cat([cond, token], 1), torch.cat([uncond, token], 1)
    assert torch.equal(out[0], cond[0, -8:])

def test_igpt_is_causal_and_knows_its_limits():
    _, tokenizer, igpt = small_models()
    tokens = torch.randint(tokenizer.vocab_size, (2, 58))
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 24
    a, b = igpt.eval()(tokens), igpt(changed)
    assert (torch.allclose(a[:, :40], b[:, :40], atol=1e-5)
            and not torch.allclose(a[:, 40:], b[:, 40:], atol=1e-5))
    with pytest.raises(InputError):
        igpt(torch.zeros(1, 59, dtype=torch.long))
    with pytest.raises(AssertionError):
        iGPT(40, 58, d_model=30, n_heads=4)

def test_a_parallel_predictor_sees_the_caption_and_no_code():
    vqvae, tokenizer, _ = small_models()
    torch.manual_seed(0)
    model = mmgen.ParallelPredictor(24, tokenizer.vocab_size, 58, 32, 2, 2, 0.0,
                                    vqvae.codebook.weight).eval()
    tokens, ids = torch.randint(24, (3, 49)), tokenizer.encode_batch(TEXTS)
    rows = make_sequences(tokens, ids, tokenizer, "text_image")
    others = make_sequences(torch.randint(24, (3, 49)), ids, tokenizer, "text_image")
    logits = model(rows[:, :-1])
    assert (logits.shape == (3, 57, tokenizer.vocab_size)
            and torch.equal(logits, model(others[:, :-1])))
    greedy = Models(vqvae, model, tokenizer).images(TEXTS, SamplingConfig(greedy=True))
    assert torch.equal(greedy, logits[:, 8:, :24].argmax(-1))
    assert not torch.allclose(logits[0, 8:], logits[1, 8:])
    with pytest.raises(InputError, match="parallel"):
        Models(vqvae, model, tokenizer).captions(tokens, SamplingConfig())

def test_a_parallel_predictor_draws_for_captions_of_any_length():
    vqvae, tokenizer, _ = small_models()
    model = mmgen.ParallelPredictor(24, tokenizer.vocab_size, 58, 32, 2, 2, 0.0,
                                    vqvae.codebook.weight).eval()
    images, captions = mmgen.make_samples(
        Options(mode="text", n=2), Models(vqvae, model, tokenizer), SamplingConfig(),
        ["red one", TEXTS[0]])
    assert images.shape == (4, 28, 28, 3) and captions == ["red one"] * 2 + [TEXTS[0]] * 2

@pytest.mark.parametrize("regime", ["multi", "single"])
def test_training_a_parallel_predictor(tmp_path, data_dir, regime):
    result = command("train", "--phase", regime, "--predictor", "parallel", "--preset", "tiny",
                     "--data", data_dir, "--run", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "results/training_curves.csv").open()))
    rows = [row for row in rows if row["phase"] in ("igpt", "single")]
    key = "test_loss" if regime == "multi" else "test_nll"
    assert float(rows[-1][key]) < float(rows[0][key])
    assert np.load(tmp_path / "results/text_conditioned_samples.npy").shape == (9, 28, 28, 3)
    result = command("eval", "--run", tmp_path, "--data", data_dir, "--json")
    assert (result.returncode == 0
            and {"code_accuracy", "recon_mse"} <= json.loads(result.stdout).keys())
    for more in (["--mode", "image"], ["--mode", "unconditional"],
                 ["--mode", "text", "--best-of", "2"]):
        result = command("sample", "--run", tmp_path, "--data", data_dir, *more)
        assert result.returncode == 2 and "parallel predictor" in result.stderr

def test_codes_alike_share_embeddings_and_the_codebook_gets_gradient():
    vqvae, tokenizer, igpt = small_models()
    assert not any(p is vqvae.codebook.weight for p in igpt.parameters())
    assert "_codebook" not in " ".join(igpt.state_dict())
    rows = make_sequences(torch.randint(24, (2, 49)), tokenizer.encode_batch(TEXTS[:2]),
                          tokenizer, "text_image")
    igpt(rows).square().mean().backward()
    assert vqvae.codebook.weight.grad.abs().sum() > 0

def test_causal_attention_counts_from_the_last_column():
    """Whatever the dtype: PyTorch's own causal flag would count from the first column."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = torch.randn(3, 1, 2, 6, 8).to(dtype).unbind(0)
        whole = mmgen.attend(q, k, v, causal=True)
        for first in (4, 5):
            part = mmgen.attend(q[:, :, first:], k, v, causal=True)
            assert torch.allclose(part, whole[:, :, first:], atol=1e-2)
        assert not torch.allclose(mmgen.attend(q, k, v, causal=False), whole, atol=1e-2)

def test_quantizer_takes_bfloat16_features():
    for ema in (0.0, 0.9):
        z_q = VectorQuantizer(5, 4, ema=ema)(torch.randn(2, 4, 3, 3).to(torch.bfloat16))
        assert z_q.shape == (2, 4, 3, 3)

def test_dropout_only_in_training():
    torch.manual_seed(0)
    igpt = iGPT(40, 58, 32, 2, 2, dropout=0.5)
    tokens = torch.randint(36, (2, 20))
    assert not torch.equal(igpt(tokens), igpt(tokens))
    igpt.eval()
    assert torch.equal(igpt(tokens), igpt(tokens))


# --- sampling -------------------------------------------------------------------------------------

def test_top_k_and_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    probs = mmgen.logits_to_probs
    assert torch.allclose(probs(logits), logits.exp())
    assert torch.allclose(probs(logits, top_k=2), torch.tensor([[0.625, 0.375, 0, 0]]))
    assert torch.allclose(probs(logits, top_p=0.6), torch.tensor([[0.625, 0.375, 0, 0]]))
    assert torch.allclose(probs(logits, top_p=0.01), torch.tensor([[1.0, 0, 0, 0]]))
    assert probs(logits, temperature=0.1).max() > probs(logits).max()
    assert mmgen.sample_token(logits, SamplingConfig(greedy=True)).tolist() == [0]

def test_unconditional_spans_never_mix():
    vqvae, tokenizer, igpt = small_models()
    seen = []
    original = igpt.forward
    igpt.forward = lambda tokens, *rest, **more: (
        seen.append(tokens) or original(tokens, *rest, **more))
    torch.manual_seed(0)
    tokens, captions = Models(vqvae, igpt, tokenizer).pairs(40, SamplingConfig(temperature=3.0))
    assert tokens.shape == (40, 49) and tokens.min() >= 0 and tokens.max() < 24
    assert len(captions) == 40 and all(set(c.split()) <= set(tokenizer.words) for c in captions)
    starts = {tuple(r[:2].tolist()) for t in seen if t.shape[1] == 2 for r in t}
    assert starts == {(tokenizer.bos_token, tokenizer.end_of_text_token),
                      (tokenizer.bos_token, tokenizer.end_of_image_token)}  # both orders occurred

def test_sampling_is_reproducible():
    vqvae, tokenizer, igpt = small_models()

    def draw(seed):
        torch.manual_seed(seed)
        return Models(vqvae, igpt, tokenizer).images(TEXTS, SamplingConfig())

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


# --- training -------------------------------------------------------------------------------------

@pytest.mark.parametrize("regime", ["two-stage", "single", "multi"])
def test_loss_falls_in_every_regime(tmp_path, regime, capsys):
    data = as_pairs(drawn(96, 16))
    cfg = tiny_config(single_steps=120, vqvae_steps=80, igpt_steps=60, finetune_steps=10)
    models = train(tmp_path, regime, cfg, data)
    vqvae, igpt, tokenizer = models.vqvae, models.igpt, models.tokenizer
    rows = mmgen.load_checkpoint(tmp_path / "checkpoints" / "state.pth", "state")["rows"]
    phases = mmgen.REGIMES[regime]
    assert list(dict.fromkeys(r["phase"] for r in rows)) == list(phases)
    mse = [r["test_recon_mse"] for r in rows if "test_recon_mse" in r]
    assert mse[-1] < 0.9 * mse[0]
    nll = [r["test_nll"] if "test_nll" in r else r["test_loss"] for r in rows
           if r["phase"] in ("igpt", phases[-1])]
    assert nll[-1] < nll[0] - 0.1
    figures = mmgen.evaluate(models, data.test_images, data.test_captions)
    assert {"recon_mse", "recon_psnr", "codebook_used", "codebook_perplexity",
            "nll_text_to_image", "nll_image_to_text", "nll_image", "nll_text", "code_accuracy",
            "caption_exact", "caption_slot_accuracy", "round_trip_exact",
            "round_trip_unguided"} <= figures.keys()
    assert all(np.isfinite(v) for v in figures.values())
    uniform = np.log(cfg.vqvae_K)
    assert figures["nll_image"] < uniform and figures["nll_text"] < np.log(len(tokenizer.words))

def joint_trainer(lambda_xent=1.0, phase="finetune"):
    vqvae, tokenizer, igpt = small_models()
    vqvae.train()
    optimizer = torch.optim.Adam([*vqvae.parameters(), *igpt.parameters()])
    x = torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = (x, tokenizer.encode_batch(TEXTS + TEXTS[:1]))
    vqvae(x)  # data-dependent initialization
    return JointTrainer(phase, Models(vqvae, igpt, tokenizer), optimizer, "cpu", 200,
                        cfg=Config(lambda_xent=lambda_xent, lambda_warmup=0.05)), batch

def test_cross_entropy_reaches_encoder_and_codebook():
    trainer, (x, text_ids) = joint_trainer()
    vqvae, igpt, tokenizer = trainer.models.vqvae, trainer.models.igpt, trainer.models.tokenizer
    z_e = vqvae.encoder(x)
    xent = trainer.cross_entropy(z_e, text_ids)
    weight = vqvae.codebook.weight
    encoder = torch.autograd.grad(xent, vqvae.encoder[0].weight, retain_graph=True)[0]
    codebook = torch.autograd.grad(xent, weight, retain_graph=True)[0]
    assert encoder.abs().sum() > 0 and codebook.abs().sum() > 0
    # Also without the codebook-linked embeddings: then only the soft targets carry it
    igpt._codebook = (weight.detach(),)
    xent = trainer.cross_entropy(z_e, text_ids)
    assert torch.autograd.grad(xent, weight)[0].abs().sum() > 0
    # And its value is the plain cross-entropy
    rows = mmgen.mixed_sequences(vqvae.get_tokens(x).flatten(1), text_ids, tokenizer, igpt.orders)
    plain = F.cross_entropy(igpt(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    assert torch.allclose(xent, plain, atol=1e-5)

def test_soft_targets_move_features_to_where_the_transformer_expects_them():
    trainer, (x, text_ids) = joint_trainer()
    vqvae, igpt = trainer.models.vqvae, trainer.models.igpt
    z_e = vqvae.encoder(x).detach().requires_grad_()
    wanted = 5
    with torch.no_grad():
        igpt.norm.weight.zero_(), igpt.norm.bias.fill_(1.0)
        igpt.code_out.weight.zero_(), igpt.head.weight.zero_()
        igpt.head.weight[wanted] = 0.3  # code 5 is now the most likely everywhere
    trainer.cross_entropy(z_e, text_ids).backward()
    step = z_e.detach() - 1e-2 * z_e.grad / z_e.grad.abs().max()

    def share_of_wanted(z):
        return F.softmax(-vqvae.codebook.distances(z.movedim(1, -1)), -1)[..., wanted].mean()

    assert share_of_wanted(step) > share_of_wanted(z_e.detach())

def test_lambda_warms_up_and_ramps():
    trainer, _ = joint_trainer(0.5, "single")  # of 200 steps: 10 warm up, 10 rise
    seen = []
    for trainer.step in range(30):
        seen.append(trainer.lambda_now())
    assert seen[:10] == [0.0] * 10 and seen[19:] == [0.5] * 11 and seen == sorted(seen)

def test_parameter_groups_have_a_slower_codebook():
    vqvae, _, igpt = small_models()
    models = {"vqvae": vqvae, "igpt": igpt}
    found = mmgen.make_optimizer(tiny_config(), models, {"codebook": 0.25})
    groups = {g["name"]: g for g in found.param_groups}
    assert groups["codebook"]["lr"] == 0.25 * groups["vqvae"]["lr"]
    for optimizer in ("adam", "muon"):
        found = mmgen.make_optimizer(tiny_config(optimizer=optimizer), models, {})
        count = sum(len(g["params"]) for g in found.param_groups)
        assert count == len(list(vqvae.parameters())) + len(list(igpt.parameters()))

def test_frozen_parts_stay_frozen(tmp_path):
    data = as_pairs(drawn(64, 16))
    cfg = tiny_config(vqvae_steps=20, igpt_steps=20, finetune_steps=20)
    train(tmp_path, "vqvae", cfg, data)
    before = mmgen.load_vqvae(tmp_path / "checkpoints" / "vqvae_model.pth").state_dict()
    models = train(tmp_path, "igpt", cfg, data)
    vqvae, igpt = models.vqvae, models.igpt
    assert all(torch.equal(before[k], v) for k, v in vqvae.state_dict().items())
    igpt_before = {k: v.clone() for k, v in igpt.state_dict().items()}
    models = train(tmp_path, "finetune", cfg, data)
    vqvae, igpt = models.vqvae, models.igpt
    assert not any(torch.equal(before[k], v) for k, v in vqvae.state_dict().items()
                   if k.endswith("weight"))
    assert not all(torch.equal(igpt_before[k], v) for k, v in igpt.state_dict().items())

def test_phases_of_other_settings_keep_the_models_loadable(tmp_path):
    """Each model's file carries the configuration it was built with, not that of the last phase."""
    data = as_pairs(drawn(40, 8))
    for phase, changes in (("vqvae", dict(vqvae_dim=8)), ("igpt", dict(d_model=16)),
                           ("finetune", {})):
        train(tmp_path, phase,
                        tiny_config(vqvae_steps=4, igpt_steps=4, finetune_steps=2, **changes),
                        data)
    vqvae = mmgen.load_vqvae(tmp_path / "checkpoints" / "vqvae_model.pth")
    igpt, _ = mmgen.load_igpt(tmp_path / "checkpoints" / "igpt_model.pth", vqvae)
    assert vqvae.encoder[0].out_channels == 8 and igpt.norm.normalized_shape == (16,)
    with pytest.raises(InputError, match="holds a run"):  # phase 1 anew would orphan the iGPT
        train(tmp_path, "vqvae", tiny_config(), data)

@pytest.mark.parametrize("done,regime,admitted,left", [
    ("vqvae", "igpt", True, "vqvae"), ("vqvae igpt", "finetune", True, "vqvae igpt"),
    ("single", "finetune", True, "single"), ("vqvae", "two-stage", False, ""),
    ("vqvae igpt finetune", "single", False, ""), ("single", "multi", False, ""),
    ("single", "vqvae", False, ""), ("single", "igpt", False, "single"),
    ("vqvae igpt finetune", "igpt", False, "vqvae"),
    ("vqvae igpt finetune", "finetune", False, "vqvae igpt"),
])
def test_what_a_finished_run_admits_and_what_is_left_of_it(tmp_path, done, regime, admitted, left):
    """A file that was made once is made anew with --overwrite only; what follows it is stale."""
    data, cfg = as_pairs(drawn(8, 8)), tiny_config()

    def run(regime, **flags):
        run = mmgen.Run(tmp_path, regime, cfg, data, **flags)
        run.lock.close()
        return run

    run("multi").save(done=done.split(), rows=[{"phase": phase} for phase in done.split()],
                      complete=True)
    for name in ("vqvae", "igpt"):
        if name in done or "single" in done:
            (tmp_path / "checkpoints" / f"{name}_model.pth").touch()
    if not admitted:
        with pytest.raises(InputError, match="holds a run"):
            run(regime)
    new = run(regime, overwrite=not admitted)
    assert new.state["done"] == left.split() == [row["phase"] for row in new.state["rows"]]
    if not admitted and regime != "finetune":  # nor without the state that tells who made the files
        new.state_path.unlink()
        with pytest.raises(InputError, match="holds a run"):
            run(regime, resume=True)

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
    weight = torch.nn.Parameter(torch.zeros(24, 60))
    bias = torch.nn.Parameter(torch.zeros(24))
    muon = mmgen.Muon([{"params": [weight], "orthogonal": True, "lr": 0.1}, {"params": [bias]}],
                      lr=0.01)
    (weight.sum() + bias.sum()).backward()
    muon.step()
    assert (torch.linalg.matrix_norm(weight, 2) < 0.13
            and torch.allclose(bias, torch.tensor(-0.01), atol=1e-4))
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
    from mmgen import DataProcessor, load_colored_mnist_text, load_pickled_data
    images = drawn(40, 1)["train_images"] // 85
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"train": images[:32], "test": images[32:]}))
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(
        (images[:32], images[32:], TEXTS * 10 + TEXTS[:2], TEXTS * 2 + TEXTS[:2])))
    device = "cpu"
    train_data, test_data = load_pickled_data(tmp_path / "a.pkl")
    train_data_mm, test_data_mm, train_texts, test_texts = load_colored_mnist_text(
        tmp_path / "b.pkl")
    train_loader, test_loader = DataProcessor.prepare_vqvae_data(
        train_data, test_data, batch_size=8)
    batch = next(iter(train_loader))
    assert batch.shape == (8, 3, 28, 28) and batch.min() >= -1 and batch.max() <= 1
    vqvae = VQVAE(dim=16, K=24, D=16).to(device)
    trainer = VQVAETrainer(vqvae, torch.optim.Adam(vqvae.parameters(), lr=1e-3), device)
    train_losses, test_losses = trainer.train(train_loader, test_loader, num_epochs=3)
    assert len(train_losses) == len(test_losses) == 3 and test_losses[-1] < test_losses[0]
    text_tokenizer = Tokenizer(train_texts, vqvae.n_embeddings)
    train_loader_igpt = create_dataset(train_data_mm, train_texts, vqvae, text_tokenizer,
                                       batch_size=8)
    test_loader_igpt = create_dataset(test_data_mm, test_texts, vqvae, text_tokenizer, batch_size=8)
    vocab_size = vqvae.n_embeddings + len(text_tokenizer.all_words)
    igpt = iGPT(vocab_size=vocab_size, context_length=58, d_model=32, n_heads=4,
                n_layers=2).to(device)
    trainer_igpt = iGPTTrainer(igpt, torch.optim.Adam(igpt.parameters(), lr=1e-3), device,
                               vocab_size, 58)
    train_losses, test_losses = trainer_igpt.train(train_loader_igpt, test_loader_igpt,
                                                   num_epochs=3)
    assert len(train_losses) == 3 and test_losses[-1] < test_losses[0]
    image = mmgen.generate_from_text(igpt, text_tokenizer, vqvae, TEXTS[0], device)
    assert image.shape == (1, 3, 28, 28)
    roomy = iGPT(vocab_size, context_length=64, d_model=32, n_heads=4, n_layers=2)
    assert mmgen.generate_from_text(roomy, text_tokenizer, vqvae, TEXTS[0], device).ndim == 4
    caption = mmgen.generate_from_image(igpt, text_tokenizer, vqvae, image[0], device)
    assert isinstance(caption, str)
    pictures, captions = mmgen.generate_unconditional(igpt, text_tokenizer, vqvae, 3, device)
    assert pictures.shape == (3, 3, 28, 28) and len(captions) == 3
    x = mmgen.normalize_images(train_data, method="vqvae")
    assert x.shape == (32, 3, 28, 28) and x.min() >= -1 and x.max() <= 1

def test_part_one_is_complete():
    """All above the banner, alone in a module, trains every regime and samples every mode."""
    source = MMGEN.read_text()
    part_one = types.ModuleType("part_one")
    sys.modules["part_one"] = part_one  # dataclasses look their module up
    exec(source[: source.index("# Part II")], part_one.__dict__)
    data = part_one.Data(**drawn(40, 8))
    steps = dict(vqvae_steps=10, igpt_steps=10, single_steps=10, finetune_steps=5)
    for regime in ("two-stage", "single", "multi"):
        cfg = part_one.Config.preset("tiny", **steps)
        models = part_one.train_regime(regime, cfg, data)
        library = models.igpt, models.tokenizer, models.vqvae
        picture = part_one.generate_from_text(*library, data.test_captions[0], "cpu")
        assert picture.shape == (1, 3, 28, 28)
        assert part_one.generate_from_image(*library, picture[0], "cpu").split()
        pictures, captions = part_one.generate_unconditional(*library, 3, "cpu")
        assert len(pictures) == len(captions) == 3
    del sys.modules["part_one"]

def test_numbers_of_numpy_become_pythons():
    cfg = Config(vqvae_lr=np.float64(1e-3), vqvae_K=np.int64(64), dropout=0)
    assert [type(v) for v in (cfg.vqvae_lr, cfg.vqvae_K, cfg.dropout)] == [float, int, float]
    for bad in (dict(vqvae_K=64.5), dict(vqvae_K=True), dict(vqvae_lr="1e-3"), dict(d_model="4")):
        with pytest.raises(InputError):
            Config(**bad)

def test_processes_draw_noise_of_their_own(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for rank in (0, 1):
        monkeypatch.setattr(mmgen, "processes", lambda rank=rank: (rank, 2))
        vqvae = VQVAE(8, 8, 4)
        trainer = VQVAETrainer(vqvae, torch.optim.Adam(vqvae.parameters()), "cpu")
        trainer.train_step(torch.rand(2, 3, 28, 28))
    assert len(set(seeds)) == 2

def test_fine_tuning_neither_restarts_codes_nor_averages_them():
    trainer, batch = joint_trainer()
    vqvae = trainer.models.vqvae
    before = copy.deepcopy(vqvae.codebook.state_dict())
    for _ in range(3):
        trainer.loss(batch)
    assert all(torch.equal(before[k], v) for k, v in vqvae.codebook.state_dict().items())
    assert vqvae.training and not vqvae.codebook.training
    assert joint_trainer(phase="single")[0].phase == "single"

def test_noise_falsifies_codes_and_no_words():
    _, tokenizer, igpt = small_models()
    tokens, ids = torch.randint(24, (300, 49)), tokenizer.encode_batch(TEXTS * 100)
    rows = make_sequences(tokens, ids, tokenizer, "text_image")
    changed = mmgen.with_noise(igpt, rows, 0.4) != rows
    assert not changed[rows >= 24].any()
    assert 0.14 < changed[rows < 24].float().mean() < 0.23  # mean share 0.2
    plain = iGPT(tokenizer.vocab_size, 58, 32, 2, 2)  # without a codebook it cannot tell
    assert torch.equal(mmgen.with_noise(plain, rows, 0.4), rows)

def test_the_augmented_copy_has_the_captions_of_its_pictures():
    data, models = as_pairs(drawn(10, 8)), Models()
    for phase in ("vqvae", "igpt"):
        models, _, (batches, _, _) = mmgen.prepare_phase(
            phase, tiny_config(augment=0.2, igpt_steps=10), data, models, torch.device("cpu"))
    assert batches.n_rows == 20
    rows, copies = batches.get(torch.tensor([3, 4])), batches.get(torch.tensor([13, 14]))
    is_code = rows < 32
    assert torch.equal(rows[~is_code], copies[~is_code])
    assert not torch.equal(rows[is_code], copies[is_code])

def test_what_a_model_was_not_trained_for_is_said(capsys):
    data = as_pairs(drawn(32, 8))
    cfg = tiny_config(vqvae_steps=2, igpt_steps=2, orders="image_text")
    with pytest.raises(InputError, match="phase igpt goes on from models"):
        mmgen.train_regime("igpt", cfg, data)
    models = mmgen.train_regime("two-stage", cfg, data)
    capsys.readouterr()
    models.images(data.test_captions[:2], SamplingConfig())
    assert "trained on image_text, not text_image" in capsys.readouterr().err
    figures = mmgen.evaluate(models, data.test_images, data.test_captions)
    assert {name for name, value in figures.items() if math.isnan(value)} == {
        "nll_text_to_image", "nll_text", "code_accuracy", "round_trip_exact",
        "round_trip_unguided"}
    with pytest.raises(InputError, match="preset is 'tinny'"):
        Config.preset("tinny")

def test_temperature_zero_is_greedy():
    logits = torch.randn(5, 9)
    greedy = mmgen.sample_token(logits, SamplingConfig(greedy=True))
    assert torch.equal(mmgen.sample_token(logits, SamplingConfig(temperature=0)), greedy)


# --- files and command line -----------------------------------------------------------------------

def test_a_run_writes_what_it_promises(trained):
    for name in ("checkpoints/vqvae_model.pth", "checkpoints/igpt_model.pth",
                 "results/training_curves.csv", "results/training_curves.ppm",
                 "results/reconstructions.ppm"):
        assert (trained / name).stat().st_size > 0
    header, *rows = (trained / "results/training_curves.csv").read_text().splitlines()
    assert {"phase", "step", "train_loss", "test_loss"} <= set(header.split(","))
    assert [r.split(",")[0] for r in rows] == ["vqvae"] * 10 + ["igpt"] * 10 + ["finetune"] * 10
    for mode in ("text_conditioned", "image_conditioned", "unconditional"):
        images = np.load(trained / f"results/{mode}_samples.npy")
        assert images.shape == (9, 28, 28, 3) and images.dtype == np.uint8
        assert len((trained / f"results/{mode}_samples.txt").read_text().splitlines()) == 9
        assert (trained / f"results/{mode}_samples.ppm").read_bytes()[:2] == b"P6"

def test_sample_text(trained, data_dir, tmp_path):
    prompts = mmgen.load_data(data_dir).test_captions[:2]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n")
    outputs = []
    for out in ("a", "b"):
        result = command("sample", "--mode", "text", "--run", trained,
                         "--prompts", tmp_path / "p.txt", "--prompt", prompts[0], "-n", 2,
                         "--out", tmp_path / out, "--seed", 3)
        assert result.returncode == 0, result.stderr
        outputs.append((tmp_path / f"{out}.npy").read_bytes())
    assert outputs[0] == outputs[1]
    assert np.load(tmp_path / "a.npy").shape == (6, 28, 28, 3)
    wanted = [prompts[0]] * 2 + [prompts[0]] * 2 + [prompts[1]] * 2
    assert (tmp_path / "a.txt").read_text().splitlines() == wanted

def test_sample_image_from_npy_and_ppm(trained, data_dir, tmp_path):
    image = mmgen.load_data(data_dir).test_images[0]
    np.save(tmp_path / "x.npy", image)
    (tmp_path / "x.ppm").write_bytes(b"P6\n# a comment\n28 28\n255\n" + image.tobytes())
    texts = []
    for name in ("x.npy", "x.ppm"):
        result = command("sample", "--mode", "image", "--run", trained,
                         "--image", tmp_path / name, "--greedy", "--out", tmp_path / "out")
        assert result.returncode == 0, result.stderr
        texts.append((tmp_path / "out.txt").read_text())
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 1

def test_sample_unconditional_shown_as_png(trained, data_dir, tmp_path):
    result = command("sample", "--mode", "unconditional", "--run", trained, "-n", 5,
                     "--out", tmp_path / "u.png", "--show")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("▀") >= 5 * 28 * 14
    assert (tmp_path / "u.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert np.load(tmp_path / "u.npy").shape == (5, 28, 28, 3)

def test_the_samples_of_a_prompt_share_a_row_of_the_grid(trained, data_dir, tmp_path):
    for n, size in ((1, (3, 3)), (4, (5, 8))):  # rows and columns for nine prompts
        images = np.zeros((9 * n, 4, 4, 3), np.uint8)
        assert mmgen.picture_grid(images, together=n).shape == (size[0] * 10, size[1] * 10, 3)
    result = command("sample", "--mode", "text", "--run", trained, "--data", data_dir, "-n", 5,
                     "--prompt", TEXTS[0], "--prompt", TEXTS[1], "--out", tmp_path / "s")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "s.ppm").read_bytes().startswith(b"P6\n290 116\n")  # 5 pictures by 2

@pytest.mark.parametrize("given,out", [("c.txt", "c"), ("x.npy", "x.png")])
def test_samples_do_not_replace_what_they_were_made_of(trained, data_dir, tmp_path, given, out):
    (tmp_path / "c.txt").write_text(TEXTS[0])
    np.save(tmp_path / "x.npy", mmgen.load_data(data_dir).test_images[:1])
    before = (tmp_path / given).read_bytes()
    inputs = (["--mode", "text", "--prompts", tmp_path / given] if out == "c" else
              ["--mode", "image", "--image", tmp_path / given])
    result = command("sample", "--run", trained, *inputs, "--out", tmp_path / out)
    assert result.returncode == 2 and "write over" in result.stderr
    assert (tmp_path / given).read_bytes() == before

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
    with pytest.raises(InputError, match="no room"):
        mmgen.finish_caption(models, TEXTS[0] + "...", how)

def test_completion_keeps_the_first_rows(trained, data_dir, tmp_path):
    images = mmgen.load_data(data_dir).test_images[:3]
    np.save(tmp_path / "x.npy", images)
    result = command("sample", "--mode", "image", "--complete", 3, "--run", trained,
                     "--image", tmp_path / "x.npy", "-n", 2, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    out = np.load(tmp_path / "out.npy")
    assert out.shape == (6, 28, 28, 3) and len((tmp_path / "out.txt").read_text().splitlines()) == 6
    vqvae = mmgen.load_vqvae(trained / "checkpoints/vqvae_model.pth")
    # The rows that were kept decode to about the upper part of the reconstruction
    whole = mmgen.decode_pictures(vqvae, mmgen.extract_tokens(vqvae, images)).repeat(2, 0)
    assert np.abs(out[:, :4].astype(int) - whole[:, :4]).mean() < 20
    result = command("sample", "--mode", "image", "--complete", 3, "--best-of", 2, "--run",
                     trained, "--image", tmp_path / "x.npy", "--out", tmp_path / "out")
    assert result.returncode == 0 and np.load(tmp_path / "out.npy").shape == (3, 28, 28, 3)
    result = command("sample", "--mode", "image", "--complete", 7, "--run", trained,
                     "--image", tmp_path / "x.npy")
    assert result.returncode == 2 and "7 rows" in result.stderr

def test_a_completed_picture_keeps_its_colors():
    torch.manual_seed(0)
    vqvae = FactoredVQVAE(16, 24, 16).eval()
    tokenizer = Tokenizer(TEXTS, 24)
    igpt = iGPT(tokenizer.vocab_size, 58, 32, 2, 2).eval()
    images = drawn(4, 6)["test_images"]
    seen = []
    decode, vqvae.decode_tokens = (vqvae.decode_tokens,
                                   lambda tokens: seen.append(tokens) or decode(tokens))
    mmgen.make_samples(Options(mode="image", n=1, complete=3),
                       Models(vqvae, igpt, tokenizer), SamplingConfig(), images)
    whole, made = mmgen.extract_tokens(vqvae, images).view(-1, 7, 7), seen[0].view(-1, 7, 7)
    assert torch.equal(made[:, :3], whole[:, :3]) and not torch.equal(made[:, 3:], whole[:, 3:])
    assert torch.equal(mmgen.corners(made), mmgen.corners(whole))

def test_likelihoods_are_those_of_the_next_token_predictions():
    vqvae, tokenizer, igpt = small_models()
    igpt.eval()
    tokens, texts = torch.randint(24, (3, 49)), [TEXTS[0], TEXTS[1], "red one"]
    drawn, read, pair, n, words = mmgen.likelihoods(Models(vqvae, igpt, tokenizer), tokens, texts)
    assert n.tolist() == [49] * 3 and words.tolist() == [6, 6, 3]  # a short caption's end counts
    with torch.no_grad():
        for i, text in enumerate(texts):
            ids = tokenizer.text_encode(text)
            prompt = mmgen.text_prompt(tokenizer, text)
            row = torch.cat([prompt, tokens[i]])
            log_p = igpt(row[None, :-1]).log_softmax(-1)[0, len(prompt) - 1 :]
            assert torch.allclose(log_p.gather(1, tokens[i][:, None]).sum(), drawn[i], atol=1e-3)
            prompt = mmgen.image_prompts(tokenizer, tokens[i : i + 1])[0]
            ids = (ids if len(ids) == 6
                   else torch.cat([ids, torch.tensor([tokenizer.end_of_text_token])]))
            row = torch.cat([prompt, ids])
            log_p = igpt(row[None, :-1]).log_softmax(-1)[0, len(prompt) - 1 :]
            assert torch.allclose(log_p.gather(1, ids[:, None]).sum(), read[i], atol=1e-3)
    assert (pair < drawn).all() and (pair < read).all()

def test_score_and_best_of(trained, data_dir, tmp_path):
    data = mmgen.load_data(data_dir)
    np.save(tmp_path / "x.npy", data.test_images[:2])
    (tmp_path / "p.txt").write_text("\n".join(data.test_captions[:2]))
    result = command("score", "--run", trained, "--image", tmp_path / "x.npy",
                     "--prompts", tmp_path / "p.txt")
    assert result.returncode == 0, result.stderr
    _, header, *rows = result.stdout.splitlines()
    assert header.split() == [*["picture|caption", "caption|picture", "pair"] * 2, "caption"]
    assert len(rows) == 2 and all(row.endswith(text) for row, text in zip(rows, data.test_captions))
    nats, bits = float(rows[0].split()[0]), float(rows[0].split()[3])
    assert nats < 0 and bits == pytest.approx(-nats / 49 / np.log(2), abs=1e-3)
    models = mmgen.load_models(trained, torch.device("cpu"))
    captions, means = data.test_captions[:4], []
    for best_of in (1, 8):
        images, texts = mmgen.make_samples(Options(mode="text", n=1, best_of=best_of),
                                           models, SamplingConfig(), captions)
        assert images.shape == (4, 28, 28, 3) and texts == captions
        tokens = mmgen.extract_tokens(models.vqvae, images)
        means.append(mmgen.likelihoods(models, tokens, texts)[1].mean())
    assert means[1] > means[0]
    images, texts = mmgen.make_samples(Options(mode="image", n=2, best_of=3), models,
                                       SamplingConfig(), data.test_images[:4])
    assert (images == np.repeat(data.test_images[:4], 2, 0)).all() and len(texts) == 8

def test_eval_json(trained, data_dir):
    result = command("eval", "--run", trained, "--data", data_dir, "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["recon_psnr"] == pytest.approx(10 * np.log10(4 / figures["recon_mse"]))
    assert 0 <= figures["caption_exact"] <= figures["caption_slot_accuracy"] <= 1

def test_a_32_pixel_run(tmp_path):
    assert command("data", "--data", tmp_path, "--train", 40, "--test", 8,
                   "--size", 32).returncode == 0
    result = command("train", "--phase", "multi", "--preset", "tiny", "--data", tmp_path,
                     "--run", tmp_path, "--vqvae-steps", 10, "--igpt-steps", 10,
                     "--finetune-epochs", 0)
    assert result.returncode == 0, result.stderr
    assert np.load(tmp_path / "results/unconditional_samples.npy").shape == (9, 32, 32, 3)
    assert "finetune" not in (tmp_path / "results/training_curves.csv").read_text()

def test_data_is_drawn_only_in_the_default_directory(tmp_path, monkeypatch):
    arrays = drawn(32, 8)
    monkeypatch.setattr(mmgen, "make_drawn", lambda *_: arrays)
    train = ["train", "--phase", "vqvae", "--preset", "tiny", "--vqvae-steps", 2]
    (tmp_path / "there").mkdir()
    for folder in ("there", "not"):  # a mistyped path is an error
        result = command(*train, "--data", folder, cwd=tmp_path)
        assert result.returncode == 2 and "no data" in result.stderr
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    assert command(*train, cwd=tmp_path).returncode == 0
    assert (tmp_path / "checkpoints/vqvae_model.pth").exists()
    assert (tmp_path / "data/drawn.npz").exists()

def test_pictures_alone_train_the_vqvae_and_nothing_else(tmp_path):
    images = drawn(32, 8)
    (tmp_path / "mnist_colored.pkl").write_bytes(pickle.dumps(
        {"train": images["train_images"], "test": images["test_images"]}))
    train = ["train", "--preset", "tiny", "--vqvae-steps", 2, "--data", tmp_path, "--run", tmp_path]
    result = command(*train, "--phase", "multi")
    assert result.returncode == 2 and "colored_mnist_with_text.pkl" in result.stderr
    assert command(*train, "--phase", "vqvae").returncode == 0
    assert not (tmp_path / "drawn.npz").exists()

@pytest.mark.parametrize("regime", ["two-stage", "single", "multi"])
def test_kill_9_at_any_moment_then_resume(tmp_path, data_dir, regime):
    """Killed again and again, the run ends with the weights of the one that never was."""
    args = ["train", "--phase", regime, "--preset", "tiny", "--optimizer", "muon",
            "--factored", "auto", "--dropout", "0.1", "--ema", "0.9", "--noise", "0.2",
            "--vqvae-steps", "40", "--igpt-steps", "40", "--finetune-steps", "10",
            "--single-steps", "40", "--data", str(data_dir)]
    assert separately(*args, "--run", tmp_path / "whole").returncode == 0
    program = f"import sys; sys.path.insert(0, {str(MMGEN.parent)!r}); import mmgen; " \
              "mmgen.SAVE_SECONDS = 0.05; " \
              f"sys.exit(mmgen.main({[*args, '--resume', '--run', str(tmp_path / 'cut')]!r}))"
    rng, kills, state = np.random.default_rng(0), 0, tmp_path / "cut" / "checkpoints" / "state.pth"
    while True:
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
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
    curves = [list(csv.DictReader((tmp_path / f / "results/training_curves.csv").open()))
              for f in ("whole", "cut")]
    assert curves[0] == curves[1]

def test_two_trainings_in_one_directory(tmp_path, data_dir):
    run = mmgen.Run(tmp_path, "vqvae", tiny_config(), mmgen.load_data(data_dir))
    with run.lock:
        result = command("train", "--phase", "vqvae", "--preset", "tiny", "--data", data_dir,
                         "--run", tmp_path)
    assert result.returncode == 2 and "another training" in result.stderr
    assert not (tmp_path / "checkpoints" / "vqvae_model.pth").exists()

@pytest.mark.parametrize("args,message", [
    (["train", "--resume", "--overwrite"], "not allowed"),
    (["train", "--phase", "never"], "never"),
    (["train", "--phase", "multi", "--vqvae-lr", "-1"], "want float 0.."),
    (["train", "--phase", "igpt", "--data", "{data}", "--run", "{tmp}"], "does not exist"),
    (["train", "--phase", "multi", "--data", "{data}", "--run", "{run}"], "holds a run"),
    (["train", "--phase", "multi", "--resume", "--preset", "tiny", "--vqvae-lr", "0.5",
      "--data", "{data}", "--run", "{run}"], "vqvae_lr"),
    (["sample", "--mode", "text", "--run", "{run}", "--prompt", "dark red sevn on light blue"],
     "did you mean"),
    (["sample", "--mode", "text", "--run", "{run}", "--prompt", ""], "has 0 words"),
    (["sample", "--mode", "text", "--run", "{tmp}"], "does not exist"),
    (["sample", "--mode", "image", "--run", "{run}", "--image", "{tmp}/none.npy"],
     "does not exist"),
    (["sample", "--mode", "image", "--run", "{run}", "--image", "{junk}"], "neither"),
    (["eval", "--run", "{run}", "--data", "{tmp}"], "no data"),
    (["data", "--size", "30", "--data", "{tmp}"], "divisible by 4"),
    (["train", "--phase", "multi", "--resume", "--overwrite"], "not allowed with"),
    (["train", "--phase", "multi", "--preset", "tiny", "--igpt-epochs", "0", "--data", "{data}",
      "--run", "{tmp}/x", "--vqvae-steps", "1"], "igpt_epochs"),
    (["train", "--phase", "vqvae", "--orders", "sideways"], "orders"),
    (["eval", "--device", "quantum", "--run", "{run}"], "quantum"),
])
def test_errors_are_one_line(args, message, trained, data_dir, tmp_path):
    (tmp_path / "junk").write_bytes(b"what is this?")
    places = dict(data=data_dir, run=trained, tmp=tmp_path, junk=tmp_path / "junk")
    result = command(*[a.format(**places) for a in args], cwd=tmp_path)
    lines = [line for line in result.stderr.splitlines()
             if not line.startswith(("preset", "pictures"))]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert (lines[-1].startswith("mmgen: error: ") and message in lines[-1]
            and len(lines) == 1), result.stderr

@pytest.mark.parametrize("number,status", [(2, 130), (15, 143)])
def test_ctrl_c_and_sigterm_save_and_exit(tmp_path, data_dir, number, status):
    process = subprocess.Popen([sys.executable, str(MMGEN), "train", "--phase", "vqvae",
                                "--preset", "tiny", "--vqvae-steps", "100000",
                                "--data", str(data_dir), "--run", str(tmp_path)],
                               stderr=subprocess.PIPE, text=True)
    state = tmp_path / "checkpoints" / "state.pth"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status and "--resume" in stderr and "Traceback" not in stderr
    assert mmgen.load_checkpoint(state, "state")["trainer"]["step"] >= 0

def test_same_seed_same_bytes(tmp_path, data_dir):
    for name in ("a", "b"):
        result = (separately if name == "a" else command)(
            "train", "--phase", "multi", "--preset", "tiny", "--vqvae-steps", 20,
            "--igpt-steps", 20, "--finetune-steps", 5, "--seed", 7, "--data", data_dir,
            "--run", tmp_path / name)
        assert result.returncode == 0, result.stderr
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    files = [p for p in files
             if p.name not in ("state.pth", "training_curves.csv")]  # these hold times
    assert len(files) >= 12
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path

def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    vqvae, _, _ = small_models()
    trainer = VQVAETrainer(vqvae, torch.optim.Adam(vqvae.parameters()), "cpu")
    vqvae.decoder[0].weight.register_hook(lambda gradient: gradient * math.nan)
    before = vqvae.encoder[0].weight.detach().clone()
    with pytest.raises(InputError, match="gradient is nan at step 0"):
        trainer.train_step(torch.rand(2, 3, 28, 28))
    assert torch.equal(vqvae.encoder[0].weight, before)

def test_the_loop_takes_the_loaders_of_torch():
    vqvae, _, _ = small_models()
    pictures = [torch.rand(3, 28, 28) for _ in range(4)]
    loader = torch.utils.data.DataLoader(pictures, 2, shuffle=True)
    trainer = VQVAETrainer(vqvae, torch.optim.Adam(vqvae.parameters()), "cpu")
    losses, _ = trainer.train(loader, loader, num_epochs=2)
    assert len(losses) == 2 and trainer.step == 4 and not vqvae.training

@pytest.mark.parametrize("in_training,step", [(True, 3), (False, 4)])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data_dir, monkeypatch, capsys,
                                                 in_training, step):
    args = ["train", "--preset", "tiny", "--data", str(data_dir), "--run", str(tmp_path), "--phase"]
    assert mmgen.main([*args, "two-stage", "--vqvae-steps", "10", "--igpt-steps", "10"]) == 0
    good = [(tmp_path / f"checkpoints/{name}_model.pth").read_bytes() for name in ("vqvae", "igpt")]
    calls, original = [], mmgen.compute_loss

    def loss(*options):
        calls.append(torch.is_grad_enabled() == in_training)
        return original(*options) * (float("nan") if sum(calls) == 4 and calls[-1] else 1)

    monkeypatch.setattr(mmgen, "compute_loss", loss)
    assert mmgen.main([*args, "finetune"]) == 2
    assert (f"mmgen: error: loss or gradient is nan at step {step} of phase finetune"
            in capsys.readouterr().err)
    assert good == [(tmp_path / f"checkpoints/{name}_model.pth").read_bytes()
                    for name in ("vqvae", "igpt")]

def test_a_full_disk_leaves_the_old_files_whole(trained, data_dir, tmp_path):
    """The limit on a file's size stands for the disk's: a write fails half-way."""
    shutil.copytree(trained, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    program = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); " \
              f"sys.path.insert(0, {str(MMGEN.parent)!r}); import mmgen; " \
              "sys.exit(mmgen.main(sys.argv[1:]))"
    for args in (["train", "--phase", "multi", "--preset", "tiny", "--overwrite"],
                 ["sample", "--mode", "text"]):
        result = subprocess.run([sys.executable, "-c", program, *args, "--data", data_dir,
                                 "--run", tmp_path / "run"], capture_output=True, text=True)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        assert result.stderr.splitlines()[-1].startswith("mmgen: error: "), result.stderr
        after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*")
                 if p.is_file() and p.name != ".lock"}
        assert after == {p: b for p, b in before.items() if p.name != ".lock"}

def test_a_damaged_state_is_refused(tmp_path, data_dir):
    cfg, data, cpu = (tiny_config(vqvae_steps=20), mmgen.load_data(data_dir),
                      torch.device("cpu"))
    run = mmgen.Run(tmp_path, "vqvae", cfg, data)
    run.lock.close()
    _, trainer, _ = mmgen.prepare_phase("vqvae", cfg, data, Models(), cpu)
    run.restore(trainer)
    good = torch.load(run.state_path, weights_only=True)
    for keys in (["settings"], ["rows"], ["trainer", "phase"], ["trainer", "step"],
                 ["trainer", "optimizer"], ["trainer", "modules", "vqvae.codebook.unused"]):
        state = copy.deepcopy(good)
        functools.reduce(dict.get, keys[:-1], state).pop(keys[-1])
        mmgen.save_checkpoint(run.state_path, "state", state)
        with pytest.raises(InputError, match="no readable"):
            train(tmp_path, "vqvae", cfg, data, resume=True)
    assert not (tmp_path / "checkpoints" / "vqvae_model.pth").exists()

def test_a_finished_run_changes_nothing(trained, data_dir):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    result = command("train", "--phase", "multi", "--preset", "tiny", "--data", data_dir,
                     "--run", trained, "--resume")
    assert result.returncode == 0 and "finished" in result.stderr
    assert before == {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}

def mutated(good, rng):
    """Bytes of a file with a few bits flipped, a piece cut out, doubled or overwritten, or the end
    missing."""
    data = bytearray(good)

    def somewhere():  # headers and directories stand at the ends, and deserve half of the damage
        near = min(len(data), 300)
        return int(rng.choice([rng.integers(len(data)), rng.integers(near),
                               len(data) - 1 - rng.integers(near)], p=[0.5, 0.25, 0.25]))

    for _ in range(rng.integers(1, 4)):
        at, length = somewhere(), int(rng.integers(1, 40))
        match rng.integers(5):
            case 0:
                for _ in range(rng.integers(1, 9)):
                    data[somewhere()] ^= 1 << int(rng.integers(8))
            case 1:
                del data[max(1, at) :]
            case 2 if len(data) > 2 * length:
                del data[at : at + length]
            case 3:
                source = somewhere()
                data[at:at] = data[source : source + length]
            case 4:
                data[at : at + 4] = bytes([int(rng.choice([0, 0x7F, 0xFF]))]) * 4
    return bytes(data)

@pytest.fixture(scope="session")
def good_files(trained, tmp_path_factory):
    """Name -> (bytes of a good file, what reads a file of that name)."""
    folder, pairs = tmp_path_factory.mktemp("good"), drawn(12, 4)
    images, test = pairs["train_images"], pairs["test_images"]
    texts = [list(map(str, pairs[f"{part}_captions"])) for part in ("train", "test")]
    files = {f"mnist/{part}-{kind}": (content,
                                      lambda path: mmgen.load_data(path.parent.parent))
             for part, n in (("train", 12), ("t10k", 4)) for kind, content in (
                 ("images-idx3-ubyte",
                  struct.pack(">4I", 0x803, n, 28, 28) + images[:n, ..., 0].tobytes()),
                 ("labels-idx1-ubyte", struct.pack(">2I", 0x801, n) + bytes(range(n // 2)) * 2))}

    def in_folder(path):
        return mmgen.load_data(path.parent)

    for protocol in (0, 2, 5):
        files[f"{protocol}/colored_mnist_with_text.pkl"] = (
            pickle.dumps((images, test, *texts), protocol), in_folder)
    files["d/colored_mnist_with_text.pkl"] = pickle.dumps(dict(
        train_images=images / 255, test_images=test / 255, train_texts=np.array(texts[0]),
        test_texts=texts[1])), in_folder
    write_pairs(folder, pairs)
    files["n/drawn.npz"] = (folder / "drawn.npz").read_bytes(), in_folder
    np.save(folder / "x.npy", images)
    files["x.npy"] = (folder / "x.npy").read_bytes(), mmgen.read_pictures
    files["x.ppm"] = b"P6\n# made by hand\n28 28\n255\n" + images[0].tobytes(), mmgen.read_pictures
    vqvae = mmgen.load_vqvae(trained / "checkpoints/vqvae_model.pth")
    for name, reader in (("vqvae_model", mmgen.load_vqvae),
                         ("igpt_model", lambda path: mmgen.load_igpt(path, vqvae)),
                         ("state", lambda path: mmgen.load_checkpoint(path, "state"))):
        files[f"c/{name}.pth"] = (trained / f"checkpoints/{name}.pth").read_bytes(), reader
    return files

def test_damaged_files_lead_to_one_clear_error(good_files, tmp_path):
    """`make fuzz` tries ten thousand: success or InputError, under 5 s and 1 GiB each."""
    import resource
    rng, tried, outcomes = np.random.default_rng(int(os.environ.get("FUZZ_SEED", 0))), 0, {}
    for name, (good, reader) in good_files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(good)
        if "mnist" not in name or name == list(good_files)[3]:
            reader(path)  # as it is, it can be read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while tried < int(os.environ.get("FUZZ_CASES", 400)):
        for name, (good, reader) in good_files.items():
            path, tried = tmp_path / name, tried + 1
            path.write_bytes(mutated(good, rng))
            started = time.monotonic()
            try:
                reader(path)
                outcome = "read"
            except InputError as error:
                outcome = "refused"
                assert str(error) and "\n" not in str(error), (tried, name, error)
            except BaseException as error:
                raise AssertionError(
                    f"case {tried}, {name}: {type(error).__name__}: {error}") from error
            outcomes[name, outcome] = outcomes.get((name, outcome), 0) + 1
            assert time.monotonic() - started < 5, (tried, name)
            path.write_bytes(good)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert all((name, "refused") in outcomes for name in good_files), outcomes
    print(tried, "cases", outcomes)

def torchrun(*args):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", "--", *map(str, args)], text=True,
                          capture_output=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})

@pytest.mark.parametrize("regime", ["multi", "single"])
def test_two_processes_train_as_one(tmp_path, data_dir, regime):
    args = ["train", "--phase", regime, "--preset", "tiny", "--single-steps", 60, "--dropout", 0,
            "--ema", 0.9, "--restart", 0, "--factored", "auto", "--data", data_dir]
    assert command(*args, "--run", tmp_path / "one").returncode == 0
    result = torchrun(MMGEN, *args, "--run", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f"trained {regime}") == 1  # the first process speaks for all
    ends = []
    for name in ("one", "two"):
        rows = list(csv.DictReader((tmp_path / name / "results/training_curves.csv").open()))
        ends.append({row["phase"]: float(row["test_loss"]) for row in rows})
    assert ends[1] == pytest.approx(ends[0], rel=0.01)
    assert len(list((tmp_path / "two/results").iterdir())) == 12

def test_processes_agree_on_codes_that_move_and_restart(tmp_path):
    (tmp_path / "program.py").write_text(f"""
import sys; sys.path.insert(0, {str(MMGEN.parent)!r})
import mmgen, types, torch, torch.distributed as dist
dist.init_process_group("gloo")
torch.manual_seed(0)
codes = mmgen.VectorQuantizer(16, 4, ema=0.9, restart=3)
torch.manual_seed(dist.get_rank())
for _ in range(12):
    codes(torch.randn(2, 4, 3, 3) + 5 * dist.get_rank())
dist.destroy_process_group()
sys.stdout.write(f"codes {{mmgen.fingerprint(types.SimpleNamespace(codebook=codes))}} \
{{int((codes.weight.mean(1) > 2.5).sum())}}\\n")
""")
    result = torchrun(tmp_path / "program.py")
    assert result.returncode == 0, result.stderr
    found = re.findall(r"codes (\w{16}) (\d+)", result.stdout)  # the processes may share a line
    assert len(found) == 2 and found[0] == found[1]
    assert 0 < int(found[0][1]) < 16  # the features of both processes attract codes

def test_a_failing_process_ends_all_with_its_reason(tmp_path, data_dir):
    result = torchrun(MMGEN, "train", "--phase", "igpt", "--preset", "tiny", "--data", data_dir,
                      "--run", tmp_path)
    assert (result.returncode != 0 and "mmgen: error:" in result.stderr
            and "does not exist" in result.stderr)

def test_other_data_and_a_file_for_a_directory_are_refused(trained, data_dir, tmp_path):
    write_pairs(tmp_path, drawn(20, 8, seed=9))
    result = command("train", "--phase", "multi", "--preset", "tiny", "--data", tmp_path,
                     "--run", trained, "--resume")
    assert result.returncode == 2 and "cannot resume, data is" in result.stderr
    result = command("train", "--phase", "vqvae", "--data", data_dir / "drawn.npz",
                     "--run", tmp_path / "run")
    assert (result.returncode == 2 and "must be a directory" in result.stderr
            and not (tmp_path / "run").exists())
    result = command("sample", "--mode", "unconditional", "--best-of", 2, "--run", trained)
    assert result.returncode == 2 and "--best-of" in result.stderr

def test_an_igpt_of_other_codes_is_refused(trained, tmp_path):
    vqvae = mmgen.load_vqvae(trained / "checkpoints" / "vqvae_model.pth")
    with torch.no_grad():
        vqvae.codebook.weight[0] += 1
    with pytest.raises(InputError, match="codes of another"):
        mmgen.load_igpt(trained / "checkpoints" / "igpt_model.pth", vqvae)

def test_a_drawn_set_of_floats_is_refused(tmp_path):
    arrays = drawn(8, 8)
    arrays["train_images"] = arrays["train_images"] / 255
    write_pairs(tmp_path, arrays)
    with pytest.raises(InputError, match="does not fit 8bit"):
        mmgen.load_data(tmp_path)

def test_heads_that_do_not_divide_the_width_are_refused_before_phase_1():
    with pytest.raises(InputError, match="d_model 32 is not divisible by 3 heads"):
        tiny_config(n_heads=3)

@pytest.mark.parametrize("words", [None, 5, "red", [], ["red", 7]])
def test_a_damaged_vocabulary_is_refused(trained, tmp_path, words):
    vqvae = mmgen.load_vqvae(trained / "checkpoints" / "vqvae_model.pth")
    content = mmgen.load_checkpoint(trained / "checkpoints" / "igpt_model.pth", "igpt")
    mmgen.save_checkpoint(tmp_path / "igpt.pth", "igpt", {**content, "words": words})
    with pytest.raises(InputError, match="igpt.pth"):
        mmgen.load_igpt(tmp_path / "igpt.pth", vqvae)

def test_a_cache_is_as_large_as_its_shape_says():
    _, tokenizer, igpt = small_models()
    caches = mmgen.Decoder(igpt, torch.full((64, 9), tokenizer.bos_token), 49, (0, 24)).caches
    assert caches.nbytes == caches.untyped_storage().nbytes() == 2 * 2 * 64 * 57 * 32 * 4

@pytest.mark.parametrize("kind", [VQVAE, FactoredVQVAE])
@pytest.mark.parametrize("linked", [True, False])
def test_models_built_by_hand_are_saved(tmp_path, kind, linked):
    vqvae, tokenizer = kind(16, 32, 16).eval(), Tokenizer(TEXTS, 32)
    igpt = iGPT(tokenizer.vocab_size, 58, 32, 2, 2,
                codebook=vqvae.codebook.weight if linked else None).eval()
    wrapped = types.SimpleNamespace(_orig_mod=vqvae)  # as torch.compile wraps a model
    for model in (vqvae, wrapped):
        mmgen.save_vqvae(tmp_path / "v.pth", model)
    mmgen.save_igpt(tmp_path / "i.pth", igpt, tokenizer, vqvae)
    again = mmgen.load_vqvae(tmp_path / "v.pth")
    igpt_again, tokenizer_again = mmgen.load_igpt(tmp_path / "i.pth", again)
    x, rows = torch.rand(2, 3, 28, 28), torch.randint(tokenizer.vocab_size, (2, 20))
    assert type(again) is kind and torch.equal(again(x)[2], vqvae(x)[2])
    assert torch.equal(igpt_again(rows), igpt(rows)) and tokenizer_again.words == tokenizer.words

def test_what_a_kill_has_left_is_written_over(tmp_path):
    (tmp_path / ".x.txt.tmp").write_text("half of it")
    mmgen.atomic_write(tmp_path / "x.txt", b"whole")
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]

def test_without_file_locks_training_goes_on(tmp_path, data_dir, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(mmgen.fcntl, "flock", flock)
    result = command("train", "--phase", "vqvae", "--preset", "tiny", "--vqvae-steps", 2,
                     "--data", data_dir, "--run", tmp_path)
    assert result.returncode == 0 and result.stderr.count("cannot be locked") == 1

def test_training_in_a_worker_thread(tmp_path, data_dir):
    """Signal handlers can be set in the main thread only."""
    args, status = ["train", "--phase", "vqvae", "--preset", "tiny", "--vqvae-steps", "2",
                    "--data", str(data_dir), "--run", str(tmp_path)], []
    thread = threading.Thread(target=lambda: status.append(mmgen.main(args)))
    thread.start()
    thread.join()
    assert status == [0]

def test_prompts_with_a_byte_order_mark_and_likelihoods_of_orders_not_trained(tmp_path, data_dir):
    args = ["--data", data_dir, "--run", tmp_path]
    assert command("train", "--phase", "two-stage", "--preset", "tiny", "--vqvae-steps", 2,
                   "--igpt-steps", 2, "--orders", "image_text", *args).returncode == 0
    data = mmgen.load_data(data_dir)
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + data.test_captions[0].encode())
    np.save(tmp_path / "x.npy", data.test_images[0])
    result = command("score", "--prompts", tmp_path / "p.txt", "--image", tmp_path / "x.npy",
                     "--run", tmp_path)
    picture, caption, pair = map(float, result.stdout.splitlines()[-1].split()[:3])
    assert math.isnan(picture) and caption < 0 and pair < caption

def test_without_a_command_the_help_is_printed():
    result = command()
    assert result.returncode == 0 and "train" in result.stdout and not result.stderr

def test_progress_is_shown_at_every_step_of_a_slow_training(tmp_path, data_dir, monkeypatch,
                                                            capsys):
    clock = iter(range(0, 10**9, 10))  # ten seconds between any two looks
    monkeypatch.setattr(mmgen.time, "monotonic", lambda: next(clock))
    assert mmgen.main(["train", "--phase", "two-stage", "--preset", "tiny", "--vqvae-steps", "20",
                       "--igpt-steps", "20", "--data", str(data_dir), "--run", str(tmp_path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    for phase in ("vqvae", "igpt"):
        shown = [line for line in lines if re.match(rf"{phase} .* left  loss \d\.\d{{4}}$", line)]
        assert len(shown) == 19  # all steps but the first

def test_importing_does_nothing():
    program = f"import sys; sys.path.insert(0, {str(MMGEN.parent)!r}); import torch; " \
              "before = torch.get_rng_state(); import mmgen; " \
              "assert (before == torch.get_rng_state()).all()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "" and result.stderr == ""


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
        return (z[..., None, :] - self.weight).square().sum(-1)

class PlainBlock(mmgen.Block):
    """A textbook block: scores, mask and softmax spelled out in float32."""

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
    prompts = mmgen.text_prompt(tokenizer, "a b c d e f").expand(64, -1)
    nothing = prompts[:, :2]
    span = tokenizer.image_span
    cached = functools.partial(mmgen.generate, igpt, prompts, 49, span, how)
    guided = functools.partial(mmgen.generate, igpt, prompts, 49, span, SamplingConfig(),
                               nothing)

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
