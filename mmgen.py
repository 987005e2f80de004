#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy"]
# ///
"""mmgen: a small multimodal generative model in one file, to run, to read and to copy from.

A VQ-VAE turns a picture into a grid of discrete tokens. An iGPT (a decoder-only transformer) models
picture tokens and caption words as ONE sequence, so one network draws a caption, captions a
picture, or makes up both.

    python mmgen.py train --phase multi    # data if there is none, VQ-VAE, iGPT, fine-tune, samples
    python mmgen.py sample --mode text --prompt "dark red seven on light blue" --show
    python mmgen.py sample --mode image    # captions for the first 9 test pictures
    python mmgen.py eval --json            # every figure over the test split

Read it from top to bottom: config - drawn digits - data - tokenizer - VQ-VAE - iGPT - sequences -
training - sampling - evaluation - files - runs - bench - command line.

Symbols of the models' shape comments (in data functions N is simply the number of pictures):
    B  batch                   H, W  picture height, width     h, w  token grid: H/4, W/4
    N  = h*w, tokens a picture    K  codes in the codebook        D  length of a code vector
    T  tokens in a sequence       L  words in the longest caption
    V  vocabulary = K codes, then the sorted caption words, then four specials (EOT, EOI, BOS, PAD)
    d  width of the transformer   z_e  encoder output    z_q  the nearest code vectors

A pair of picture and caption is a ring, IMAGE EOI TEXT EOT; a training sequence is BOS and the ring
read from some starting point. So EOI and EOT also say what comes NEXT: after EOT a picture, after
EOI a caption.

Where this departs from the two original notes, and why:
  * Their codebook never learns: both VQ terms detach z_q. Ours is mean((z_q - sg[z_e])^2), van den
    Oord's.
  * Their distances build an (N, K, D) tensor. |z-e|^2 = |z|^2 - 2 z.e + |e|^2 is a matrix product.
  * They train on BOS IMAGE ... but prompt with BOS EOI TEXT and BOS EOT IMAGE, which no training
    sequence showed. We train on the two orders that are prompted (`--orders plain` is theirs).
  * Their cache grows by concatenation at every token. Ours is allocated once, position explicit.
  * Their one-phase loss sends no gradient from the transformer to the encoder (an argmin has none).
    Ours aims the cross-entropy at softmax(-|z_e - e_k|^2 / tau), which moves with both.
  * Added for learning per second, each with its reason where it stands: a norm before the codebook,
    1x1 convolutions around it, colours coded apart from shapes, normed queries and keys, places
    counted from the last mark instead of absolute positions, the sum of the caption beside
    attention to it, guidance in sampling.
"""

import argparse
import colorsys
import contextlib
import csv
import dataclasses
import difflib
import functools
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl  # file locks; not on Windows
except ImportError:
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler


class InputError(ValueError):
    """What was given cannot be used. main() prints it as one line and exits with status 2."""


def processes():
    """(number of this process, how many train together): (0, 1) unless torchrun started us."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(tensor):
    """A tensor -> its sum over all processes that train together."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# --- Config: every setting of a run, its default, its range and its reason, in one place ----------


def knob(default, text, low=None, high=None, choices=None):
    """A dataclass field that carries what the command line needs: help text, range, choices."""
    return dataclasses.field(default=default, metadata=dict(
        help=text, low=low, high=high, choices=choices))


ORDERS = ("image_text", "text_image", "plain")  # see make_sequences


class Checked:
    """Base of the configs: a field has the type of its default and a value in its range, whether it
    comes from a flag, from a caller or from a checkpoint. Raises InputError."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            fits = isinstance(value, (int, float) if kind is float else kind)
            if not fits or isinstance(value, bool) and kind is not bool:  # True is an int, too
                raise InputError(f"{f.name} is {value!r}, no {kind.__name__}")
            low, high, choices = (f.metadata[name] for name in ("low", "high", "choices"))
            if choices and value not in choices or low is not None and not low <= value <= high:
                allowed = choices or f"the range {low} to {high}"
                raise InputError(f"{f.name} is {value}, not in {allowed}")


@dataclass
class Config(Checked):
    """The training configuration. The defaults are the original notes' (preset `full`), the other
    presets are in PRESETS. A field vqvae_dim is the flag --vqvae-dim. Lengths are in epochs, or in
    steps where *_steps is not 0."""

    # VQ-VAE
    vqvae_dim: int = knob(256, "channels of encoder and decoder; 64 is 12 times as fast", 4, 4096)
    vqvae_K: int = knob(128, "codes; more sharpen pictures and cost the iGPT time", 2, 65536)
    vqvae_D: int = knob(256, "length of a code", 2, 4096)
    attention: bool = knob(False, "self-attention on the token grid beside each residual block")
    factored: str = knob("off", "code shapes and colours apart; auto: if pictures are two-coloured",
                         choices=("off", "on", "auto"))
    beta: float = knob(0.25, "commitment weight; 0.1 to 2 work", 0, 100)
    extremes: float = knob(0.0, "weight of colour extremes in the loss; 0.1 to 0.5", 0, 100)
    ema: float = knob(0.0, "decay of EMA codes in phase 1; 0: they learn by gradient", 0, 0.9999)
    delay: int = knob(0, "first steps without quantization, at most a tenth of the phase", 0, 10**9)
    restart: int = knob(100, "restart codes unused for more batches, in the first 60 %; 0: never",
                         0, 10**9)
    vqvae_epochs: int = knob(30, "length of phase 1", 0, 10**6)
    vqvae_steps: int = knob(0, "the same in steps; 0: count epochs", 0, 10**9)
    vqvae_batch_size: int = knob(128, "pictures a step; on a CPU 32 learns most a second", 1, 10**6)
    vqvae_lr: float = knob(1e-3, "learning rate of the VQ-VAE", 0, 10)
    vqvae_decay: bool = knob(False, "warm-up and cosine decay in phase 1 as in phase 2")
    # iGPT
    d_model: int = knob(128, "width", 4, 8192)
    n_heads: int = knob(4, "attention heads; they divide the width", 1, 256)
    n_layers: int = knob(4, "blocks", 1, 256)
    dropout: float = knob(0.1, "on both branches of a block; 0 for runs of few epochs", 0, 0.9)
    said_dropout: float = knob(0.0, "share of sequences to train without the sum of what was said",
                               0, 0.9)
    predictor: str = knob("causal", "parallel: all picture tokens at once from a caption, no more",
                          choices=("causal", "parallel"))
    link: bool = knob(True, "build code embeddings and output rows from the codebook")
    orders: str = knob("image_text,text_image", "orders of sequences, comma-separated; also plain")
    caption_weight: float = knob(1.0, "weight of words after a picture; 5 to 20 read best", 0, 1e4)
    copies: int = knob(0, "augmented copies to train on, each with a plain one", 0, 1000)
    igpt_epochs: int = knob(30, "length of phase 2", 0, 10**6)
    igpt_steps: int = knob(0, "the same in steps; 0: count epochs", 0, 10**9)
    igpt_batch_size: int = knob(128, "sequences a step", 1, 10**6)
    igpt_lr: float = knob(1e-3, "learning rate of the iGPT", 0, 10)
    warmup: float = knob(0.05, "share of a phase in which its learning rate rises", 0, 1)
    # Joint training: `single` and phase 3
    single_epochs: int = knob(30, "length of `single`", 0, 10**6)
    single_steps: int = knob(0, "the same in steps; 0: count epochs", 0, 10**9)
    finetune_epochs: int = knob(3, "length of phase 3, 5-20 % of phase 1; 0 skips it", 0, 10**6)
    finetune_steps: int = knob(0, "the same in steps; 0: count epochs", 0, 10**9)
    finetune_lr: float = knob(0.01, "the VQ-VAE's rates in phase 3, relative to phase 1", 0, 10)
    finetune_igpt_lr: float = knob(0.1, "the iGPT's rates in phase 3, relative to phase 2", 0, 10)
    codebook_lr: float = knob(0.3, "the codebook's rate in joint training, relative", 0, 10)
    lambda_xent: float = knob(0.003, "weight of the cross-entropy in joint training; 0.1 and more "
                              "can collapse the codebook", 0, 1e3)
    lambda_warmup: float = knob(0.3, "share of `single` before lambda leaves 0", 0, 1)
    lambda_ramp: float = knob(0.1, "share of `single` in which lambda rises", 0, 1)
    tau: float = knob(0.5, "temperature of soft targets, in mean quantization errors", 1e-3, 1e3)
    # General
    optimizer: str = knob("adam", "muon: orthogonalized momentum for weight matrices, Adam else",
                          choices=("adam", "muon"))
    muon_lr: float = knob(0.02, "learning rate of the matrices under muon", 0, 10)
    clip: float = knob(1.0, "largest norm of the gradient", 1e-6, 1e9)
    precision: str = knob("auto", "of training: bf16 where the hardware has it, or as said",
                          choices=("auto", "fp32", "bf16"))
    compile: bool = knob(False, "torch.compile the models: a slow start, then faster on GPUs")
    value_range: str = knob("auto", "values of the pictures in pickles: 0-3, 0-255 or 0-1",
                            choices=("auto", "2bit", "8bit", "unit"))
    seed: int = knob(0, "seed of weights, batches and noise", 0, 2**31)

    def __post_init__(self):
        super().__post_init__()
        if not set(self.orders.split(",")) <= set(ORDERS):
            raise InputError(f"orders is {self.orders}, not some of {', '.join(ORDERS)}")
        if self.d_model % self.n_heads:  # said before phase 1, not after it
            raise InputError(f"d_model {self.d_model} is not divisible by {self.n_heads} heads")


PRESETS = {
    "full": {},
    # Small batches, no dropout: a laptop sees each picture a few times only, and what counts is
    # learning per second. Lengths are in steps, so that the time does not depend on the data.
    "laptop": dict(
        vqvae_dim=64, vqvae_D=64, vqvae_K=1024, attention=True, factored="auto", beta=2.0,
        extremes=0.5, delay=100, restart=50, vqvae_steps=3500, vqvae_batch_size=32, vqvae_lr=3e-3,
        vqvae_decay=True, dropout=0.0, igpt_steps=4000, igpt_batch_size=32, igpt_lr=8e-3,
        caption_weight=20.0, copies=2, single_steps=3900, finetune_steps=175, finetune_lr=0.002,
        lambda_warmup=0.15, lambda_ramp=0.05, said_dropout=0.3, optimizer="muon"),
    "tiny": dict(
        vqvae_dim=16, vqvae_D=16, vqvae_K=32, vqvae_steps=60, vqvae_batch_size=16, vqvae_lr=3e-3,
        d_model=32, n_heads=2, n_layers=2, igpt_steps=60, igpt_batch_size=16, igpt_lr=3e-3,
        single_steps=80, finetune_steps=10, precision="fp32"),
}


@dataclass
class SamplingConfig(Checked):
    """How a token is chosen; the library and the command line share these defaults."""

    temperature: float = knob(1.0, "below 1: safer, above: wilder", 1e-3, 100)
    top_k: int = knob(0, "only the k most likely tokens; 0: all", 0, 10**6)
    top_p: float = knob(1.0, "only the most likely tokens, down to this share in sum", 1e-6, 1)
    greedy: bool = knob(False, "always the most likely token")
    guidance: float = knob(3.0, "of pictures by captions; 1: more varied; 0: none", 0, 100)
    min_p: float = knob(0.1, "guided: only tokens this likely, relative to the likeliest", 0, 1)


# --- Drawn digits: the embedded data set ----------------------------------------------------------

# The ways people write each digit.  A style is the path of the pen: points "xxyy" in per cent of
# a box (x to the right, y DOWN), joined by a smooth curve in the order written.  "!" is a corner,
# where the pen stops and turns; "/" lifts the pen; ";" ends a style.  All styles are equally
# likely, so the commonest way to write a digit appears twice, a little changed.
STROKES = [
    # 0: round, open at the top, ends overlapping, with a tail
    """5500 2512 1052 2688 5099 7688 9052 7612 5000; 4008 2028 1060 2288 5099 7888 9055 8020 6202;
    6805 4003 1532 1265 4097 7890 9055 7818 5502 3512;
    8500 5503 1830 1270 4599 8080 8842 7012 3515""",
    # 1: plain, foot, flag, small flag, plain, bowed
    """5000 5050 5099; 2822 5000! 5099 / 2598 7598; 2525 5500! 5550 5599; 4212 5200! 5050 5099;
    4700 5050 5299; 5500 4830 4770 5399""",
    # 2: straight base, wavy base, loop, flat loop, tail up, z, wide loop, narrow, curled head
    """1522 3005 6002 8020 7545 4575 1097! 5097 9097; 2030 3505 6505 7535 5070 1595! 4588 6595 9088;
    1522 4503 7815 7040 3585 1893 1082 2575 5588 9594; 1520 4503 7220 5558 1588 1570 5075 9590;
    2018 5000 7518 6550 3585 1896 1088 3080 6095 9580; 1010 5505 8510! 4555 1095! 5095 9590;
    1522 4002 7508 7535 5570 2892 0885 2065 5072 7587 9299; 3012 4802 6015 5550 3595! 5595 7592;
    4040 2032 2512 5503 7520 6045 3080 1596! 5096 9094""",
    # 3: round, rolled foot, soft waist, flat top, looped waist, narrow tail
    """1515 4002 7510 7835 4248! 8060 8285 4599 1088; 2510 5503 7025 4047! 7558 8080 5098 2092 0875;
    1512 4502 7815 6538 4248 6052 8270 7592 4099 0888; 1503 5003 8003! 4040! 7552 8280 5598 0890;
    1510 5000 8018 5545 3551 5048 8270 7093 3599 1088; 1512 5002 7508 4542! 7055 7080 5599""",
    # 4: open, closed, open, closed, one line, low bar
    """2500 2022 1545! 5048 8545 / 7505 7350 7099; 6500 4030 1065! 5065 9565 / 6500 6550 6599;
    2002 1535 3052 5550 9042 / 8500 7550 7099; 7500 4525 2050! 5050 9045 / 7500 7250 6899;
    1505 1242 3555 6550 8505! 7855 7599; 3000 2222 1060! 5058 9555 / 6030 5560 5099""",
    # 5: cap last, straight tail, corners, closing, soft, small bowl, loose cap
    """3005 2845 5038 8565 7092 4099 1090 / 3005 6005 9002; 9500 4510! 3540! 6050 6872 5088 0899;
    8803 5503 2805! 2245! 5038 8465 7092 4099 1088; 7005 3010 2042! 5038 8055 7588 4599 1592 1572;
    8502 5505 3015 2840 6050 8070 6595 3599 1090; 8505 4008 3030 4542 7050 7568 6085 3092 1085;
    3510 2048! 5042 7560 7085 4598 1590 / 4010 6508 9500""",
    # 6: curled, straight back, small bowl, rolled in, narrow, crossing
    """7002 4020 1855 1585 4599 7885 7560 5048 2065; 6000 3535 1272 3098 6592 7868 5855 3062 1580;
    5000 2540 1575 3098 6095 7575 6062 4068 2080; 3000 1230 0870 3098 7598 9575 8552 5555 4070 4588;
    5500 4535 3575 4598 6095 6880 6068 4078; 8010 5502 2530 1070 4099 8085 7862 5052 1268 1585""",
    # 7: plain, barred, plain, barred low, serif, wavy, narrow, square, round
    """1008 5005 8808! 6050 4099; 1008 5005 8808! 6050 4599 / 3550 6048 8548;
    1005 5005 9005! 6050 3599; 0808 4506 7508! 5850 5599 / 2058 5055 8552;
    1225 1208! 5005 8805! 5550 4599; 0838 2014 3522 6018 9500! 6245 3599; 2510 4505 6505! 6050 5099;
    1038 1808! 5002 8505! 8050 7599; 1015 4003 7503 8522 6560 5099""",
    # 8: one line, two rings, open top, wide head, from below, s and back
    """7515 5000 2512 2835 5050 8075 5099 2078 5048 7532 7515;
    5000 2512 2535 5048 7535 7512 5000 / 5048 2065 1885 5099 8285 8065 5048;
    8512 5000 2518 5045 7878 5099 2085 5055 8518; 8515 4502 1015 2538 5050 6280 4595 4068 8515;
    2095 4055 7520 5001 2518 4548 8088 5099 2095; 8010 4503 2022 5047 7278 5099 2085 5045 8505""",
    # 9: plain, hooked, bent tail, open, closing hook, curved stick, ring on stick, narrow, big ring
    """8015 5002 2018 2042 4550 7540 8212! 8050 7599; 7812 4502 1825 3048 6545 8010! 8355 6592 2595;
    8018 5503 2018 2042 5050 7835 8215 8250 7280 3598; 8805 5008 2035 3548 6540 8515! 6550 5099;
    7815 5002 2822 4548 7815! 8055 7588 4599 2588 2875; 7005 3508 2028 3042 6035 7808! 7550 6099;
    5500 2515 2542 5550 8035 8012 5500 / 8215 7850 7099; 6008 4502 3518 4535 6025 6510! 6050 5599;
    7015 3502 0825 1058 4565 7548 8015! 8255 8899""",
]
DOTS = 96       # dots of ink along every path: under 0.7 pixel apart at 28 x 28, so no gaps show


def style_curve(style):
    """One style -> its points (K, 2) in 0..1, stroke number (K,), curve (2, D+1, K), inked (D,).

    A cubic through K points is linear in those points, so a whole style is ONE matrix, and a
    thousand wobbled copies cost one matrix product.  curve[0] turns sharply at "!", [1] softly.
    """
    words = [(word, i) for i, path in enumerate(style.split("/")) for word in path.split()]
    points = np.array([[int(word[:2]), int(word[2:4])] for word, _ in words]) / 99      # (K, 2)
    stroke = np.array([i for _, i in words])
    down = stroke[1:] == stroke[:-1]                            # (K-1,) is the pen on the paper?
    step = np.maximum(np.linalg.norm(np.diff(points, axis=0), axis=1), 1e-6)        # (K-1,)
    # The pen's speed at a point is the mean of the slopes before and after it, and the nearer
    # side weighs more: with plain means (Catmull-Rom) the curve swings out after long sides.
    eye = np.eye(len(points))
    pull = (eye[:, :-1] + eye[:, 1:]) * (down / step)           # (K, K-1) sides that touch a point
    speed = pull @ ((eye[1:] - eye[:-1]) / step[:, None]) / pull.sum(1, keepdims=True)  # (K, K)
    # Dots lie evenly along the path: side[d] is the side dot d is on, u how far along that side.
    knot = np.concatenate([[0], np.cumsum(step * down)])        # pen travel up to each point
    at = np.linspace(0, knot[-1], DOTS + 1)
    side = np.minimum(np.searchsorted(knot, at, side="right") - 1, len(step) - 1)
    u = (at - knot[side])[:, None] / step[side, None]           # (D+1, 1) in 0..1
    # Hermite's cubic: both end points and both end speeds; at a sharp corner the speed is zero.
    soft = np.array([[not word.endswith("!") for word, _ in words], [True] * len(words)])
    curve = [eye[side] * (1 - u)**2 * (1 + 2*u) + eye[side + 1] * u**2 * (3 - 2*u)
             + step[side, None] * u * (1 - u) * (v[side] * (1 - u) - v[side + 1] * u)
             for v in soft[..., None] * speed]
    # A hop from the end of one stroke to the start of the next is in the air: no ink.
    return points, stroke, np.stack(curve), stroke[side[1:]] == stroke[side[:-1]]


def write_style(style, n, rng):
    """One style, n times: dots (n, D, 2) in the unit box, length each stands for (n, D)."""
    points, stroke, curve, inked = style_curve(style)
    sloppy = np.exp(rng.normal(-0.15, 0.45, (n, 1, 1)))         # a careful or a careless hand
    # A power of x and of y keeps the box but moves waists and bars: big head, small foot ...
    p = points ** np.exp(rng.normal(0, 0.16, (n, 1, 2)))        # (n, K, 2)
    # Neighbours shake together (a 1-2-1 mean), or round bowls would come out as polygons; on
    # top of that each stroke as a whole is a little out of place.
    shake = np.pad(rng.normal(0, 0.045, p.shape), ((0, 0), (1, 1), (0, 0)), "edge")
    p += sloppy * (shake[:, :-2] + 2 * shake[:, 1:-1] + shake[:, 2:]) / 4
    p += sloppy * rng.normal(0, 0.03, (n, stroke[-1] + 1, 2))[:, stroke]
    first = np.flatnonzero(np.diff(stroke, prepend=-1))         # where each stroke starts ...
    last = np.append(first[1:], len(stroke)) - 1                # ... and stops: early or late
    ends, inner = np.append(first, last), np.append(first + 1, last - 1)
    p[:, ends] += rng.normal(0.03, 0.18, (n, len(ends), 1)) * (p[:, ends] - p[:, inner])
    rounded = rng.beta(0.7, 1.2, (n, 1, 1))                     # 0: sharp corners, 1: soft ones
    path = (1 - rounded) * (curve[0] @ p) + rounded * (curve[1] @ p)        # (n, D+1, 2)
    hop = np.diff(path, axis=1)                                 # a dot sits mid-way along each hop
    return path[:, 1:] - hop / 2, np.linalg.norm(hop, axis=2) * inked


def place(dots, length, pen, size, rng):
    """Warp, slant and turn the writing, then fit it as MNIST does: 20/28 of the side, centred by
    mass.  In: dots (n, D, 2), length (n, D), pen radius (n, 1) in boxes; out: the same, in pixels.
    """
    n = len(dots)
    d = dots - 0.5
    for _ in range(2):                  # slow waves across the paper bend the figure as a whole
        freq, phase = rng.normal(0, 4, (n, 2, 1)), rng.uniform(0, 2 * np.pi, (n, 1, 1))
        d = d + rng.normal(0, 0.03, (n, 1, 2)) * np.sin(d @ freq + phase)   # (n, D, 2)
    shear, turn = rng.normal(0.12, 0.25, (n, 1)), rng.normal(0, 0.1, (n, 1))
    wide = np.exp(rng.normal(-0.05, 0.21, (n, 1)))
    x, y = wide * d[..., 0] - shear * d[..., 1], d[..., 1]      # most hands lean to the right
    d = np.stack([np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y], 2)
    # The longer side of the ink fills the room; pen and path shrink together, as on paper, so
    # that the loops of a sprawling figure do not clog.
    room = size * 20 / 28 * rng.uniform(0.92, 1.02, (n, 1))
    scale = room / (np.ptp(d, axis=1).max(1, keepdims=True) + 2 * pen)      # (n, 1) pixels a box
    mass = (d * length[..., None]).sum(1) / length.sum(1, keepdims=True)    # (n, 2)
    centre = size / 2 + rng.normal(0, size / 60, (n, 2))
    return (d - mass[:, None]) * scale[..., None] + centre[:, None], length * scale, pen * scale


def ink_dots(xy, length, pen, size, rng):
    """Dots (n, D, 2), lengths (n, D), pen radius (n, 1), in pixels -> ink (n, size, size) uint8.

    The sum of exp(-distance^2) over the dots is about exp(-nearest^2), and exp(-dx^2 - dy^2) is a
    product, so how far every pixel is from the pen's path costs a matrix product and a log.
    """
    n, unit = len(xy), size / 28
    xy, length, pen = (a.astype(np.float32) for a in (xy, length, pen))
    # The pen presses unevenly: a slow wave along the path, and a little roughness of the edge.
    t = rng.uniform(0, 6.3, (n, 1)) + rng.uniform(2, 9, (n, 1)) * np.linspace(0, 1, DOTS)
    r = pen * (1 + rng.uniform(0, 0.22, (n, 1)) * np.sin(t) + rng.normal(0, 0.06, (n, DOTS)))
    press = length / (unit * np.pi**0.5) * np.exp((r**2 - pen**2) / unit**2)        # (n, D)
    grid = np.arange(size, dtype=np.float32)[:, None] + 0.5     # (size, 1) pixel centres
    gx = np.exp(-((grid - xy[:, None, :, 0]) / unit)**2)        # (n, size, D)
    gy = np.exp(-((grid - xy[:, None, :, 1]) / unit)**2) * press[:, None].astype(np.float32)
    near = gy @ gx.transpose(0, 2, 1)   # (n, size, D) @ (n, D, size) -> (n, size, size)
    distance = unit * np.sqrt(np.maximum(-np.log(np.maximum(near, 1e-30)), 0))
    # Inside the pen's radius is ink; the ramp of about a pixel around it keeps edges smooth.
    blur = np.minimum(rng.uniform(0.8, 1.8, (n, 1)) * unit, 2 * pen).astype(np.float32)
    edge = np.clip(0.5 + (pen[..., None] - distance) / blur[..., None], 0, 1)
    return (255 * edge * edge * (3 - 2 * edge) + 0.5).astype(np.uint8)


def draw_digits(labels, size, rng):
    """labels (N,) in 0..9, side in pixels, np Generator -> ink (N, size, size) uint8, 255 = ink."""
    labels = np.asarray(labels)
    ink = np.empty((len(labels), size, size), np.uint8)
    for start in range(0, len(labels), 2000):                   # in parts, to bound the memory
        digit = labels[start:start + 2000]
        n = len(digit)
        dots, length = np.zeros((n, DOTS, 2)), np.zeros((n, DOTS))
        hand = rng.random(n)                                    # 0..1 chooses the style
        for d, table in enumerate(STROKES):
            styles = table.split(";")
            for i, style in enumerate(styles):                  # one style at a time
                who = np.flatnonzero((digit == d) & (np.floor(hand * len(styles)) == i))
                if len(who):
                    dots[who], length[who] = write_style(style, len(who), rng)
        pen = np.clip(np.exp(rng.normal(-2.53, 0.27, (n, 1))), 0.04, 0.13)  # radius, in boxes
        ink[start:start + n] = ink_dots(*place(dots, length, pen, size, rng), size, rng)
    return ink


# --- Data: three sources, one result. Pictures stay uint8 until they are batched, to save memory --
#
# Whatever the source, the result is a Pairs: uint8 pictures and captions. Files come from outside,
# so each reader checks all it relies on and says in one line what is wrong with which field of
# which file; none of them can be made to run code or to allocate what a damaged header asks for.

DIGITS = "zero one two three four five six seven eight nine".split()

# The embedded set's palette: hue (in [0,1) round the colour wheel) by shade (saturation, value)
HUES = dict(red=0, orange=.075, yellow=.16, green=.34, cyan=.5, blue=.63, purple=.77, pink=.9)
SHADES = dict(light=(0.38, 1.0), plain=(1.0, 0.95), dark=(1.0, 0.5))


@dataclass
class Pairs:
    """What every source delivers: images uint8 (N,H,W,3) in 0..255, captions as lists of str. The
    vqvae_* pictures may be others than those of the pairs (the notes use two files)."""
    train_images: np.ndarray
    test_images: np.ndarray
    train_captions: list
    test_captions: list
    vqvae_train: np.ndarray
    vqvae_test: np.ndarray


def palette():
    """Names 'light red', ... (24) and their RGB values, uint8 (24,3)."""
    names = [f"{shade} {hue}" for shade in SHADES for hue in HUES]
    rgb = [colorsys.hsv_to_rgb(hue, *shade) for shade in SHADES.values() for hue in HUES.values()]
    return names, np.round(255 * np.array(rgb)).astype(np.uint8)  # (24,3)


def colorize(ink, labels, rng):
    """Colour grey digits and caption them: 'dark red seven on light blue'. ink uint8 (N,H,W), 255
    is ink; labels (N,) 0..9 -> images uint8 (N,H,W,3), captions (N,) unicode."""
    names, values = palette()
    far = np.abs(values[:, None].astype(int) - values).sum(-1) > 150  # (24,24): a legible pair?
    fore = rng.integers(len(names), size=len(ink))
    back = np.array([rng.choice(np.flatnonzero(far[f])) for f in fore])
    images = np.empty((*ink.shape, 3), np.uint8)
    for i in range(0, len(ink), 1000):  # in chunks: the float pictures are 12 times as large as ink
        alpha = ink[i : i + 1000, ..., None] / np.float32(255)
        a, b = (values[c[i : i + 1000]][:, None, None].astype(np.float32) for c in (fore, back))
        images[i : i + 1000] = np.round(b + (a - b) * alpha)  # a, b (n,1,1,3), alpha (n,H,W,1)
    captions = [f"{names[f]} {DIGITS[d]} on {names[b]}" for f, d, b in zip(fore, labels, back)]
    return images, np.array(captions)


N_DRAWN = 60_000, 2_000  # pairs for training and for the test that are drawn unless asked otherwise


def make_drawn(n_train, n_test, size, seed):
    """The embedded set, digits drawn from pen strokes -> the four arrays of drawn.npz:
    train_images, test_images uint8 (N,size,size,3), train_captions, test_captions (N,) unicode.
    Same arguments, same bytes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=n_train + n_test)
    images, captions = colorize(draw_digits(labels, size, rng), labels, rng)
    return dict(train_images=images[:n_train], test_images=images[n_train:],
                train_captions=captions[:n_train], test_captions=captions[n_train:])


class SafeUnpickler(pickle._Unpickler):  # in Python: C's allocates what a damaged index asks for
    """Unpickles arrays, containers, strings and numbers, and nothing that could run code.

    A pickle is a program: it may name any importable function and call it. So find_class, the one
    door to names, knows NumPy's array constructors (old and new module paths) and refuses the rest.
    """

    ALLOWED = {"_reconstruct", "scalar", "ndarray", "dtype", "_frombuffer", "encode"}
    MODULES = {"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric",
               "numpy._core.numeric", "_codecs"}

    def find_class(self, module, name):
        """The object called `name` in `module`; raises InputError unless a data set needs it."""
        if module not in self.MODULES or name not in self.ALLOWED:
            raise InputError(f"it asks for {module}.{name}, which no picture data needs: refused")
        # An array is made empty and then filled by __setstate__, which compares its shape with the
        # bytes at hand. Made by the pickle's own words, it could ask for any number of gigabytes
        if name == "_reconstruct":
            return lambda *_: np.ndarray(0, np.uint8)
        if name == "ndarray":
            return None  # nothing but an argument of _reconstruct
        if np.__version__ < "2":  # NumPy 2 writes numpy._core, which NumPy 1 calls numpy.core
            module = module.replace("numpy._core", "numpy.core")
        return super().find_class(module, name)

    def load_bytearray8(self):
        """The one opcode that would allocate what it is told before it reads."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}


def unpickle(path):
    """The content of a pickle of arrays and texts. Raises InputError if it is broken or hostile."""
    try:
        file = io.BytesIO(Path(path).read_bytes())  # whose read() allocates no more than there is
        return SafeUnpickler(file).load()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:  # a damaged pickle can raise almost anything
        raise InputError(f"{path}: no readable pickle ({type(error).__name__}: {error})") from None


def to_uint8(images, name="images", value_range="auto"):
    """Bring pictures of any accepted value range to 0..255 -> (uint8 array, name of the range).

    images (N,H,W,3): integers {0..3} (two bits a channel) or 0..255, or floats in [0,1].
    value_range: 'auto' (look at the largest value), '2bit', '8bit' or 'unit'. Raises InputError for
    anything else: wrong shape, H or W not divisible by 4, values outside the range, NaN.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype.kind not in "uif":
        raise InputError(f"{name}: want numbers (N,H,W,3), found {images.dtype} {images.shape}")
    if 0 in images.shape or images.shape[1] % 4 or images.shape[2] % 4:
        raise InputError(f"{name}: want pictures, H and W divisible by 4, found {images.shape}")
    low, high, limits = images.min(), images.max(), {"2bit": 3, "8bit": 255, "unit": 1}
    if value_range not in ("auto", *limits):
        raise InputError(f"unknown value range {value_range!r}: auto, {', '.join(limits)}")
    if value_range == "auto":
        unit = images.dtype.kind == "f" and high <= 1
        value_range = "unit" if unit else "2bit" if high <= 3 else "8bit"
    limit = limits[value_range]
    if not (low >= 0 and high <= limit):  # written so that NaN fails, too
        raise InputError(f"{name}: {low} to {high} does not fit {value_range} (0 to {limit})")
    if value_range == "8bit" and images.dtype == np.uint8:
        return np.ascontiguousarray(images), value_range
    out = np.empty(images.shape, np.uint8)
    for i in range(0, len(images), 1000):  # chunks, so that no float copy of the whole set is made
        out[i : i + 1000] = np.round(images[i : i + 1000] * np.float32(255 / limit))
    return out, value_range


def normalize_images(images, method="vqvae", value_range="auto"):
    """Pictures (N,H,W,3) in any accepted range -> float tensor (N,3,H,W), in [-1,1] for method
    'vqvae' and [0,1] for method 'unit'. Raises InputError as to_uint8 does."""
    if method not in ("vqvae", "unit"):
        raise InputError(f"unknown method {method!r}: 'vqvae' gives [-1,1], 'unit' gives [0,1]")
    pictures, _ = to_uint8(images, value_range=value_range)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()  # (N,3,H,W)
    return x / 127.5 - 1 if method == "vqvae" else x / 255


def denormalize(x):
    """Float tensor (N,3,H,W) in [-1,1] -> uint8 array (N,H,W,3) in 0..255."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).cpu().numpy()


def load_pickled_data(path, value_range="auto", log=None):
    """mnist_colored.pkl: a dict with 'train' and 'test' -> two uint8 arrays (N,H,W,3) in 0..255."""
    data = unpickle(path)
    if not isinstance(data, dict) or not {"train", "test"} <= data.keys():
        raise InputError(f"{path}: want a dict with 'train' and 'test', not {type(data).__name__}")
    train, found = _pictures(data["train"], f"{path}: train", value_range, log)
    return train, _pictures(data["test"], f"{path}: test", found, log)[0]


def load_colored_mnist_text(path, value_range="auto", log=None):
    """colored_mnist_with_text.pkl, a 4-tuple or a dict with the keys below -> train and test
    pictures uint8 (N,H,W,3) in 0..255, train and test texts. Raises InputError for all else."""
    data = unpickle(path)
    keys = ("train_images", "test_images", "train_texts", "test_texts")
    if isinstance(data, dict) and set(keys) <= data.keys():
        data = tuple(data[k] for k in keys)
    if not isinstance(data, (tuple, list)) or len(data) != 4:
        raise InputError(f"{path}: want a 4-tuple or a dict with {', '.join(keys)}, "
                         f"found {type(data).__name__}")
    return _checked_pairs(data, keys, path, value_range, log)


def _checked_pairs(data, keys, path, value_range, log):
    """Train and test pictures, train and test captions, each checked under its name in `keys`."""
    train, found = _pictures(data[0], f"{path}: {keys[0]}", value_range, log)
    images = train, _pictures(data[1], f"{path}: {keys[1]}", found, log)[0]  # one range for both
    return *images, *(_captions(data[i + 2], images[i], f"{path}: {keys[i + 2]}") for i in (0, 1))


def _pictures(images, name, value_range, log):
    if not isinstance(images, np.ndarray):
        raise InputError(f"{name}: want a NumPy array (N,H,W,3), found {type(images).__name__}")
    pictures, found = to_uint8(images, name, value_range)
    if log:
        log(f"{name}: {pictures.shape}, values {found}")
    return pictures, found


def _captions(texts, images, name):
    try:
        texts = [" ".join(t.split()) if isinstance(t, str) else None for t in texts]
    except TypeError:
        raise InputError(f"{name}: want a list of captions, found {type(texts).__name__}") from None
    if None in texts:
        raise InputError(f"{name}: caption {texts.index(None)} is no text")
    if "" in texts:
        raise InputError(f"{name}: caption {texts.index('')} holds no word")
    if len(texts) != len(images):
        raise InputError(f"{name}: {len(texts)} captions for {len(images)} pictures")
    return texts


def read_idx(path):
    """A raw MNIST file (yann.lecun.com/exdb/mnist), .gz or not -> uint8 array of its own shape."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            raw = file.read(2**30)  # a small .gz can hold any number of zeros
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    # Header: two zero bytes, type (8 = uint8), number of axes, each length as big-endian 32 bits
    axes = raw[3] if len(raw) > 3 else 0
    start = 4 + 4 * axes
    if raw[:3] != b"\0\0\x08" or axes not in (1, 3) or len(raw) < start:
        raise InputError(f"{path}: not an IDX file of bytes")
    shape = struct.unpack(f">{axes}I", raw[4:start])
    if math.prod(shape) != len(raw) - start or 0 in shape:
        raise InputError(f"{path}: its header promises {shape}, it holds {len(raw) - start} bytes")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def parse_npy(raw, name):
    """The bytes of a .npy file -> its array. np.load allocates all that a header asks for."""
    try:
        file = io.BytesIO(raw)
        read_header = (np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(file)[0] == 1
                       else np.lib.format.read_array_header_2_0)
        shape, fortran, dtype = read_header(file)
        start = file.tell()
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(raw) - start:
            raise ValueError(f"{dtype} {shape} in the header, {len(raw) - start} bytes after it")
        array = np.frombuffer(raw, dtype, offset=start).reshape(shape, order="FC"[not fortran])
        return array.copy()  # of its own, so that torch may write to it
    except Exception as error:  # the header is Python text, and a damaged one can raise anything
        raise InputError(f"{name}: no readable .npy ({error})".replace("\n", " ")) from None


def read_npz(path):
    """A .npz file -> dict of its arrays."""
    try:
        with zipfile.ZipFile(path) as file:
            members = {name.removesuffix(".npy"): file.read(name) for name in file.namelist()}
    except Exception as error:  # zipfile raises nearly anything for damaged bytes
        raise InputError(f"{path}: no readable .npz ({error})") from None
    return {name: parse_npy(raw, f"{path}: {name}") for name, raw in members.items()}


def load_mnist(folder, seed=0):
    """The four raw MNIST files, coloured and captioned by us -> the four arrays of drawn.npz."""
    folder, arrays, rng = Path(folder), {}, np.random.default_rng(seed)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        found = []
        for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
            paths = [p for n in (name, name.replace("-idx", ".idx"))
                     for p in (folder / n, folder / f"{n}.gz") if p.exists()]
            if not paths:
                raise InputError(f"{folder}: no {name} (or .gz)")
            found.append(read_idx(paths[0]))
        ink, labels = found
        if ink.ndim != 3 or labels.ndim != 1 or len(ink) != len(labels) or labels.max() > 9:
            raise InputError(f"{folder}: {part} pictures {ink.shape}, labels {labels.shape}")
        arrays[f"{part}_images"], arrays[f"{part}_captions"] = colorize(ink, labels, rng)
    return arrays


SOURCES = ("colored_mnist_with_text.pkl", "mnist", "drawn.npz")  # the first one found is taken


def load_data(folder, value_range="auto", log=print):
    """The data of a folder as Pairs: the two pickles, else raw MNIST in mnist/, else drawn.npz.
    Raises InputError if there is none, if picture sizes differ, and when the readers above do."""
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"{folder} is a file: name the directory that holds the data")
    pairs_file, mnist, drawn = (folder / name for name in SOURCES)
    vqvae_file = folder / "mnist_colored.pkl"
    if pairs_file.exists():
        pairs = load_colored_mnist_text(pairs_file, value_range, log)
        both = vqvae_file.exists()
        vqvae = load_pickled_data(vqvae_file, value_range, log) if both else pairs[:2]
        data = Pairs(*pairs, *vqvae)
    elif mnist.is_dir():
        data = _pairs(load_mnist(mnist), mnist, log)
    elif drawn.exists():
        data = _pairs(read_npz(drawn), drawn, log)
    else:
        raise InputError(f"no data in {folder}: `mmgen.py data --data {folder}` draws some")
    sizes = {a.shape[1:] for a in vars(data).values() if isinstance(a, np.ndarray)}
    if len(sizes) > 1:
        raise InputError(f"{folder}: the pictures have unlike sizes: {sorted(sizes)}")
    return data


def _pairs(arrays, name, log):
    keys = ("train_images", "test_images", "train_captions", "test_captions")
    if set(keys) - arrays.keys():
        raise InputError(f"{name}: lacks {', '.join(sorted(set(keys) - arrays.keys()))}")
    unlike = [f"{k} is {arrays[k].dtype}" for k in keys[:2] if arrays[k].dtype != np.uint8]
    if unlike:
        raise InputError(f"{name}: want pictures of uint8, {unlike[0]}")
    pairs = _checked_pairs([arrays[k] for k in keys], keys, name, "8bit", log)
    return Pairs(*pairs, *pairs[:2])


def random_affine(x, shift=0.04, angle=0.1, zoom=0.07):
    """Shift (share of the side), turn (radians) and zoom each picture (B,3,H,W) a bit, at random.
    Nothing is mirrored, no colour changed, the border continued: mild enough for any picture."""
    B = len(x)
    turn, scale = angle * torch.randn(B), 1 + zoom * torch.randn(B)
    move = 2 * shift * torch.randn(B, 2)  # affine_grid counts the side as 2
    cos, sin = scale * turn.cos(), scale * turn.sin()
    theta = torch.stack([cos, -sin, move[:, 0], sin, cos, move[:, 1]], 1).view(B, 2, 3).to(x)
    grid = F.affine_grid(theta, x.shape, align_corners=False)  # (B,H,W,2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


class Pictures(Dataset):
    """uint8 pictures (N,H,W,3) that become floats (B,3,H,W) in [-1,1] only when a batch is due."""

    def __init__(self, images, text_ids=None):
        self.images = torch.from_numpy(np.ascontiguousarray(images))  # (N,H,W,3) uint8
        self.text_ids = text_ids  # (N,L+1) int64 or None: with them a batch is (pictures, text ids)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        x = self.images[rows].movedim(-1, -3).float() / 127.5 - 1
        return x if self.text_ids is None else (x, self.text_ids[rows])


class BatchOrder(Sampler):
    """Batches of row numbers that depend on (seed, step) alone, so that any step can be resumed.

    A plain RandomSampler hides its position in the generator's state. Here step s is batch
    s % per_epoch of permutation number s // per_epoch. One pass of the loader is `steps` batches
    (default: the whole set); set_epoch (as in torch's DistributedSampler) moves to another pass.
    """

    def __init__(self, n_rows, batch_size, shuffle=True, seed=0, steps=None, total=None):
        self.n_rows, self.batch_size, self.shuffle, self.seed = n_rows, batch_size, shuffle, seed
        self.per_epoch = -(-n_rows // batch_size)
        self.steps = steps or self.per_epoch
        self.total = total or sys.maxsize  # the last pass stops here: 15 steps in passes of 2
        self.epoch, self.skip = 0, 0

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch):
        """Make the next iteration pass number `epoch`; set `skip` then to leave out its first
        batches."""
        self.epoch, self.skip = epoch, 0

    def __iter__(self):
        first, known = self.epoch * self.steps, None
        for step in range(first + self.skip, min(first + self.steps, self.total)):
            epoch, batch = divmod(step, self.per_epoch)
            if epoch != known:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = (torch.randperm(self.n_rows, generator=generator) if self.shuffle
                         else torch.arange(self.n_rows))
                known = epoch
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            # Several processes share a batch in equal parts; what is lacking is taken twice
            rank, world = processes() if self.shuffle else (0, 1)
            share = -(-len(rows) // world)
            yield rows.repeat(world)[rank * share : (rank + 1) * share]
        self.epoch, self.skip = self.epoch + 1, 0  # for loops that never call set_epoch


def make_loader(dataset, batch_size, shuffle=True, seed=0, steps=None, total=None):
    """A DataLoader whose sampler hands whole batches of rows to the data set: batch_size=None stops
    it from fetching and stacking 128 single pictures, which costs more than the small layers do."""
    order = BatchOrder(len(dataset), batch_size, shuffle, seed, steps, total)
    return DataLoader(dataset, sampler=order, batch_size=None)


class DataProcessor:
    """The notes' name for the step from arrays to loaders."""

    @staticmethod
    def prepare_vqvae_data(train_data, test_data, batch_size=128, seed=0):
        """Two arrays (N,H,W,3) in any accepted range -> two loaders of (B,3,H,W) in [-1,1]."""
        train, found = to_uint8(train_data)
        test, _ = to_uint8(test_data, value_range=found)
        return (make_loader(Pictures(train), batch_size, seed=seed),
                make_loader(Pictures(test), batch_size, shuffle=False))


# --- Tokenizer: one vocabulary for codes, words and marks -----------------------------------------
#
# Codes and words share one vocabulary, so that one network with one softmax can speak both. Ids
# are laid out so that each kind of token is one range: "only codes may come here" is then a slice
# of the logits.


# The specials' ids, counted from the end of the vocabulary: its size V is enough to find them
EOT, EOI, BOS, PAD = -4, -3, -2, -1


class Tokenizer:
    """Words to token ids and back. Ids 0..K-1 are codes; then the sorted words, EOT, EOI, BOS, PAD.

    EOT follows the words, so that "a word or the end of the caption" is one range of ids. As in the
    notes, `all_words` ends with the specials. n_embeddings: K. Raises InputError for no words.
    """

    SPECIALS = ("<eot>", "<eoi>", "<bos>", "<pad>")

    def __init__(self, texts, n_embeddings):
        split = [t.split() for t in texts]
        self.words = sorted({w for words in split for w in words})  # the same ids in every process
        if not self.words:
            raise InputError("the captions hold no words")
        self.n_embeddings = n_embeddings
        self.caption_length = max(map(len, split))  # L
        self.all_words = self.words + list(self.SPECIALS)
        V = self.vocab_size = n_embeddings + len(self.all_words)
        self.word_to_id = {w: n_embeddings + i for i, w in enumerate(self.words)}
        self.end_of_text_token, self.end_of_image_token = V + EOT, V + EOI
        self.bos_token, self.pad_token = V + BOS, V + PAD
        # The ids each span may hold, as ranges [low, high): what sampling is restricted to
        self.image_span, self.text_span = (0, n_embeddings), (n_embeddings, V + EOI)
        self.start_span = (V + EOT, V + BOS)  # EOT: a picture comes first, EOI: a caption

    def text_encode(self, text):
        """A caption -> its word ids, int64 (words,), no specials. Raises InputError for no words,
        more than L, or an unknown one (naming the nearest it knows)."""
        words = text.split()
        for word in words:
            if word not in self.word_to_id:
                near = difflib.get_close_matches(word, self.words, n=1, cutoff=0.0)[0]
                raise InputError(f"unknown word {word!r} in {text!r}: did you mean {near!r}?")
        if not 1 <= len(words) <= self.caption_length:
            raise InputError(f"{text!r} has {len(words)} words, not 1 to {self.caption_length}")
        return torch.tensor([self.word_to_id[w] for w in words])

    def text_decode(self, tokens):
        """Token ids (tensor or list of ints) -> the caption they spell, up to the first EOT."""
        words = []
        for token in map(int, tokens):
            if token == self.end_of_text_token:
                break
            if self.n_embeddings <= token < self.end_of_text_token:
                words.append(self.words[token - self.n_embeddings])
        return " ".join(words)

    def encode_batch(self, texts):
        """Captions -> int64 (B,L+1): the words, one EOT, PAD up to the longest caption's length."""
        ids = torch.full((len(texts), self.caption_length + 1), self.pad_token)
        for row, text in zip(ids, texts):
            words = self.text_encode(text)
            row[: len(words)], row[len(words)] = words, self.end_of_text_token
        return ids


# --- VQ-VAE: picture -> features z_e (B,D,h,w) -> nearest codes z_q (B,D,h,w) -> picture ----------
#
# Three parts: an encoder that shrinks the picture to a grid of features, a codebook that replaces
# each feature by the nearest of K learned vectors (its number is the token), and a decoder that
# paints the picture from these vectors. The replacement has no gradient, so the decoder's gradient
# is handed to the encoder as if nothing had been replaced ("straight through"), and two more loss
# terms keep features and codes together. What goes wrong in practice is that most codes are never
# the nearest and die: see the norm before the codebook, `delay` and `restart`. FactoredVQVAE frees
# most tokens from repeating the colours. Copied, the section wants InputError, processes and summed
# from the top of the file; parameters stay float32 (for bfloat16 use autocast).


class VectorQuantizer(nn.Module):
    """The codebook, K vectors of length D, and the search for the nearest (van den Oord 2017).

    ema 0: the codebook learns by gradient, through the codebook term of compute_loss. ema in (0,1):
    each code is a moving average, of this decay, of the features it was the nearest to, and gets no
    gradient. delay: training batches that pass unquantized; in the first one after them (0: in the
    very first) all codes are put onto features. restart: a code unused for more than this many
    training batches is put onto a feature (0: never), until batch number restart_until, which is
    for the training loop to set.
    """

    def __init__(self, K, D, ema=0.0, delay=0, restart=100):
        super().__init__()
        self.K, self.ema, self.delay, self.restart = K, ema, delay, restart
        self.restart_until = math.inf  # training batch; late codes are codes no decoder has learned
        self.weight = nn.Parameter(torch.empty(K, D).uniform_(-1 / K, 1 / K), requires_grad=not ema)
        # Buffers travel in checkpoints, so a resumed run goes on as if it had never stopped
        self.register_buffer("batches", torch.tensor(0))  # training batches seen
        self.register_buffer("idle", torch.zeros(K))  # training batches since a code was last used
        self.register_buffer("ema_count", torch.ones(K))
        self.register_buffer("ema_sum", self.weight.detach().clone())

    @torch.autocast("cpu", enabled=False)  # in bfloat16 the nearest code would be a matter of luck
    @torch.autocast("cuda", enabled=False)
    def compare(self, flat):
        """Features (M,D) -> (M,K): |e|^2 - 2 z.e, which is |z-e|^2 but for the |z|^2 that all codes
        share. One matrix product; no (M,K,D) tensor."""
        return torch.addmm(self.weight.square().sum(1), flat.float(), self.weight.t(), alpha=-2)

    def nearest(self, flat):
        """Features (M,D) -> the nearest codes, int64 (M,)."""
        return self.compare(flat).argmin(1)

    def distances(self, flat):
        """Features (M,D) -> squared distances (M,K)."""
        return self.compare(flat) + flat.float().square().sum(1, keepdim=True)

    def forward(self, z_e):
        """z_e (B,D,h,w) -> z_q (B,D,h,w), with gradient to the codebook; tokens int64 (B,h,w). In
        training mode this counts as a training batch: codes may be restarted or move."""
        B, D, h, w = z_e.shape
        flat = z_e.detach().float().movedim(1, -1).reshape(-1, D)  # (B*h*w, D)
        if self.training:
            self.batches += 1
            if self.batches <= self.delay:
                return z_e.detach(), self.nearest(flat).view(B, h, w)
            if self.batches == self.delay + 1:
                self._replace(torch.ones_like(self.idle, dtype=torch.bool), flat)
        tokens = self.nearest(flat)  # (B*h*w,)
        if self.training:
            self._track(flat, tokens)
        z_q = F.embedding(tokens, self.weight).view(B, h, w, D).movedim(-1, 1)  # (B,D,h,w)
        return z_q, tokens.view(B, h, w)

    @torch.no_grad()
    def _track(self, flat, tokens):
        """In EMA mode move the codes (appendix A of the paper); restart the dead."""
        count = summed(torch.bincount(tokens, minlength=self.K).float())  # (K,)
        self.idle.add_(1).masked_fill_(count > 0, 0)
        if self.ema:
            total = summed(torch.zeros_like(self.ema_sum).index_add_(0, tokens, flat))  # (K,D)
            self.ema_count.lerp_(count, 1 - self.ema)
            self.ema_sum.lerp_(total, 1 - self.ema)
            live = self.ema_count > 1e-3  # an unused code keeps its place: its mean is 0/0 by now
            self.weight[live] = (self.ema_sum / self.ema_count[:, None])[live]
        dead = self.idle > self.restart
        if self.restart and self.batches < self.restart_until and dead.any():
            self._replace(dead, flat)

    @torch.no_grad()
    def _replace(self, which, flat):
        """Put the codes of a mask (K,) onto features, a bit off, so that none coincide. A feature's
        chance is its squared distance from the nearest code, as in k-means++ (Arthur and
        Vassilvitskii 2007): what is rare in a picture, but badly coded, gets codes, too."""
        if dist.is_initialized():
            parts = [torch.empty_like(flat) for _ in range(processes()[1])]
            dist.all_gather(parts, flat.contiguous())
            flat = torch.cat(parts)  # the features of the whole batch
        error = self.distances(flat).amin(1).clamp(min=1e-9)
        rows = flat[error.multinomial(int(which.sum()), replacement=True)]
        rows = rows + 0.01 * flat.std() * torch.randn_like(rows)
        if dist.is_initialized():
            dist.broadcast(rows, 0)  # all processes restart a code at the same place
        self.weight[which] = self.ema_sum[which] = rows
        self.ema_count[which], self.idle[which] = 1.0, 0.0


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), the VQ-VAE paper's block. (B,C,h,w) -> (B,C,h,w)."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(
            nn.ReLU(), nn.Conv2d(dim, dim, 3, 1, 1), nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, x):
        return x + self.net(x)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell. (B,C,h,w) -> (B,C,h,w)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1).float()).movedim(-1, 1)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017): (B,T,d) -> (B,T,d).

    Queries and keys are normalized (Henry et al. 2020), so that large learning rates cannot blow
    the scores up. Raises InputError if the width is not divisible by the number of heads.
    """

    def __init__(self, d_model, n_heads):
        super().__init__()
        if d_model % n_heads:
            raise InputError(f"width {d_model} is not divisible by {n_heads} heads")
        self.n_heads, head_dim = n_heads, d_model // n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)  # one product instead of three
        self.q_norm, self.k_norm = nn.LayerNorm(head_dim), nn.LayerNorm(head_dim)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, causal=False, mask=None, cached=None):
        """x (B,T,d) -> (B,T,d). mask bool (B or 1,1,T,columns): True where a query may look.
        cached: a function that stores the new keys and values and returns those of all columns."""
        B, T, d = x.shape
        # (B,T,3d) -> (B,T,3,heads,head_dim) -> (3,B,heads,T,head_dim) -> three (B,heads,T,head_dim)
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if cached:
            k, v = cached(k, v)
        y = attend(q, k, v, causal, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, d))


def attend(q, k, v, causal, mask=None):
    """softmax(q k^T / sqrt(head_dim)) v. q (B,heads,T,head_dim), k and v (B,heads,columns,head_dim)
    -> like q. mask as in SelfAttention, and instead of causal, which wants T == columns.
    """
    B, heads, T, head_dim = q.shape
    if q.device.type != "cpu" or T > 1 and q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None)
    # Where the kernel of PyTorch for CPUs is slow, plain products: five times as fast backward in
    # bfloat16, and 1.5 times as fast for a single query, as in every step of sampling
    if mask is None and causal and T > 1:
        mask = torch.ones(1, 1, T, k.shape[2], dtype=torch.bool).tril(k.shape[2] - T)
    hide = torch.zeros(1, 1, 1, dtype=q.dtype)  # added to the scores
    if mask is not None:  # (B or 1,1,T,columns) -> (B*heads or 1,T,columns)
        hide = hide.masked_fill(~mask, -math.inf)
        hide = (hide.expand(B, heads, -1, -1) if len(mask) > 1 else hide).flatten(0, 1)
    scores = torch.baddbmm(hide, q.flatten(0, 1), k.flatten(0, 1).mT,
                           alpha=head_dim**-0.5)  # (B*heads,T,columns)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(B, heads, T, head_dim)


class GridAttention(nn.Module):
    """One self-attention layer over the h*w cells of the latent grid, added to its input.

    3x3 convolutions see a neighbourhood; the ground's colour and the slant of a digit concern the
    whole picture. With a global look a token need not repeat what all its neighbours know.
    """

    def __init__(self, dim, grid, n_heads=4):
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(1, dim, *grid))
        self.norm, self.attention = nn.LayerNorm(dim), SelfAttention(dim, n_heads)

    def forward(self, x):
        """(B,C,h,w) -> the same shape."""
        x = x + F.interpolate(self.place, x.shape[2:], mode="bilinear")  # for grids of other sizes
        cells = x.flatten(2).transpose(1, 2)  # (B,h*w,C)
        return x + self.attention(self.norm(cells)).transpose(1, 2).reshape(x.shape)


class VQVAE(nn.Module):
    """Pictures to tokens and back. VQVAE(dim=256, K=128, D=256) is the configuration of the notes.

    dim: channels. K: codes. D: length of a code. attention: a GridAttention beside each residual
    block. size: (H, W) of the pictures: where attention learns places, and how flat rows of tokens
    fold. The rest: see VectorQuantizer. Raises InputError for a size not divisible by 4.
    """

    def __init__(self, dim=256, K=128, D=256, attention=False, size=(28, 28), ema=0.0, delay=0,
                 restart=100):
        super().__init__()
        if size[0] % 4 or size[1] % 4:
            raise InputError(f"picture size {size}: height and width must be divisible by 4")
        self.n_embeddings, self.size = K, tuple(size)
        self.grid = size[0] // 4, size[1] // 4  # (h, w)

        def look():
            return [GridAttention(dim, self.grid)] if attention else []

        self.encoder = nn.Sequential(
            nn.Conv2d(3, dim, 4, 2, 1),  # (B,dim,H/2,W/2)
            nn.ReLU(),
            nn.Conv2d(dim, dim, 4, 2, 1),  # (B,dim,h,w)
            ResidualBlock(dim), *look(), ResidualBlock(dim), *look(),
            nn.ReLU(),
            nn.Conv2d(dim, D, 1),  # (B,D,h,w); the notes' pre_quantization_conv
            # Without a norm the features' scale runs away from the codes, which then lag or die:
            # after 100 s of training 18 codes of 512 were in use, and with the norm all of them
            ChannelNorm(D),
        )
        self.codebook = VectorQuantizer(K, D, ema, delay, restart)
        self.decoder = nn.Sequential(
            nn.Conv2d(D, dim, 1),  # (B,dim,h,w)
            *look(), ResidualBlock(dim), *look(), ResidualBlock(dim),
            nn.ReLU(),
            nn.ConvTranspose2d(dim, dim, 4, 2, 1),  # (B,dim,H/2,W/2)
            nn.ReLU(),
            nn.ConvTranspose2d(dim, 3, 4, 2, 1),  # (B,3,H,W)
        )
        self.to(memory_format=torch.channels_last)  # less reordering in convolutions: 4 % of a step

    def forward(self, x):
        """x (B,3,H,W) in [-1,1] -> z_e (B,D,h,w), z_q (B,D,h,w), recon_x (B,3,H,W)."""
        return self.forward_with_tokens(x)[:3]

    def forward_with_tokens(self, x):
        """As forward, and the tokens int64 (B,h,w)."""
        z_e = self.encode(x)
        z_q, tokens = self.codebook(z_e)
        # In value z_q, in gradient z_e: straight through the codebook (Bengio et al. 2013)
        return z_e, z_q, self.decode(z_e + (z_q - z_e).detach()), tokens

    def encode(self, x):
        """Pictures (B,3,H,W) in [-1,1] -> features z_e (B,D,h,w)."""
        return self.encoder(x)

    def decode(self, z):
        """Code vectors (B,D,h,w) of any grid -> pictures (B,3,4h,4w)."""
        return self.decoder(z)

    @torch.no_grad()
    def get_tokens(self, x):
        """Pictures (B,3,H,W) in [-1,1] -> tokens int64 (B,h,w). Tracks nothing, in training too."""
        z_e = self.encode(x).movedim(1, -1)  # (B,h,w,D)
        return self.codebook.nearest(z_e.flatten(0, 2)).view(z_e.shape[:3])

    def decode_tokens(self, tokens):
        """Tokens (B,h,w) of any grid, or flat (B,h*w) of the model's own -> pictures (B,3,4h,4w).
        Raises InputError for other lengths and for ids that are no codes."""
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.n_embeddings:
            raise InputError(f"picture tokens must be in 0..{self.n_embeddings - 1}")
        if tokens.dim() == 2:
            if tokens.shape[1] != math.prod(self.grid):
                raise InputError(f"{tokens.shape[1]} tokens do not make a grid of {self.grid}")
            tokens = tokens.view(-1, *self.grid)
        return self.decode(F.embedding(tokens, self.codebook.weight).movedim(-1, 1))


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def own_colors(x):
    """Pictures (B,3,H,W) -> the same in colours of their own, y (B,3,H,W) in [-1,1], and the way
    back, colors (B,3,4): a pixel of x is colors @ (1, its three values in y). No gradient to x.

    The axes of y are the principal axes of the picture's pixels in RGB (the Karhunen-Loeve colour
    transform, here of each picture by itself), each stretched to its range and turned so that the
    mean lies below the middle. So a red seven on blue and a white one on black have the same y. An
    axis of a range below 0.1 is not stretched as far, and one below 0.02 is left out: its direction
    would be that of rounding errors.
    """
    pixels = x.float().flatten(2)  # (B,3,H*W)
    mean = pixels.mean(2, keepdim=True)  # (B,3,1)
    centred = pixels - mean
    cov = centred @ centred.mT / pixels.shape[2]  # (B,3,3)
    axes = torch.linalg.eigh(cov).eigenvectors.flip(2)  # (B,3,3), a column each, the longest first
    along = axes.mT @ centred  # (B,3,H*W), of mean 0 on each axis
    high, low = along.amax(2, keepdim=True), along.amin(2, keepdim=True)  # (B,3,1)
    middle, half = (high + low) / 2, ((high - low) / 2).clamp(min=0.05)
    turn = torch.where(middle < 0, -1.0, 1.0)  # the mean, 0, shall lie below the middle
    turn = turn * (high - low >= 0.02)
    axes, along, middle = axes * turn.mT, along * turn, middle * turn
    y = ((along - middle) / half).view_as(x)
    return y, torch.cat([mean + axes @ middle, axes * half.mT], 2)


def two_colored(images):
    """NumPy pictures uint8 (M,H,W,3) -> do they, taken together, vary along one axis of RGB each
    (with 95 % of their variance), as between two colours? In busier pictures the axes themselves
    are unsteady, and to factor them does harm: with digits over a gradient and an ellipse 1,500
    steps led to an error of 0.054 instead of 0.026."""
    some = np.ascontiguousarray(images[:: -(-len(images) // 1000)])
    some = torch.from_numpy(some).flatten(1, 2).float()  # (m,H*W,3)
    some = some - some.mean(1, keepdim=True)
    spread = torch.linalg.eigvalsh(some.mT @ some).sum(0)  # (3,), ascending
    return bool(spread[2] > 0.95 * spread.sum())


def corners(z):
    """The four corner cells of grids (...,h,w), h and w at least 2: a view (...,2,2)."""
    return z[..., :: z.shape[-2] - 1, :: z.shape[-1] - 1]


class FactoredVQVAE(VQVAE):
    """A VQVAE that codes shapes apart from colours. Constructor and calls are VQVAE's.

    A plain one learns combinations: of the 9.8 bits of a token in the middle of a coloured digit,
    2.1 tell the ground's colour and 1.7 the ink's, again in every token. Here encoder and decoder
    see pictures in their own_colors, and the way back to RGB, twelve numbers, travels in the four
    corner tokens, added to what they say of their corner. On handwriting in 29 colours 4,000 steps
    led to an error of 0.0035 instead of 0.0233, and the iGPT's captions profit as much. For
    pictures that are two_colored. Raises InputError also for a grid of a single row or column.
    """

    def __init__(self, dim=256, K=128, D=256, *options, **more):
        super().__init__(dim, K, D, *options, **more)
        if min(self.grid) < 2:
            raise InputError(f"picture size {self.size}: the tokens have no four corners")
        self.colors_in = nn.Sequential(nn.Linear(12, dim), nn.ReLU(), nn.Linear(dim, 4 * D))
        self.colors_out = nn.Sequential(nn.Linear(4 * D, dim), nn.ReLU(), nn.Linear(dim, 12))
        with torch.no_grad():  # at first the picture is about y itself
            self.colors_out[2].bias.copy_(torch.eye(3, 4).roll(1, 1).flatten())
        self.norm = ChannelNorm(D)  # of shape and colour together, in the corners

    def encode(self, x):
        y, colors = own_colors(x)
        z = self.encoder(y)  # (B,D,h,w)
        corner = corners(z)  # (B,D,2,2)
        corner += self.colors_in(colors.flatten(1)).view(corner.shape)
        return self.norm(z)

    def decode(self, z):
        y = self.decoder(z).float()
        colors = self.colors_out(corners(z).flatten(1)).float().view(-1, 3, 4)
        with torch.autocast(z.device.type, enabled=False):
            return (colors[..., 1:] @ y.flatten(2) + colors[..., :1]).view_as(y)


def compute_loss(x, recon_x, z_e, z_q, beta=0.25, extremes=0.0):
    """The VQ-VAE's loss: reconstruction + codebook + beta * commitment, each a mean over elements.

    x, recon_x (B,3,H,W); z_e, z_q (B,D,h,w) as VQVAE.forward returns them -> scalar. The codebook
    term pulls codes to features, the commitment term features to codes: so each detaches the OTHER
    side (equation 3 of van den Oord et al. 2017; the notes detach z_q in both). extremes: weight of
    the colours' extremes, see below.
    """
    recon = F.mse_loss(recon_x, x)
    if extremes:
        # A thin stroke is a few pixels, and mean squared error would rather blur its colour than
        # miss its place. The extremes of each window have no place, only a colour.
        peaks = functools.partial(F.max_pool2d, kernel_size=7, ceil_mode=True)
        recon = recon + extremes * sum(
            F.mse_loss(peaks(s * recon_x), peaks(s * x)) for s in (1, -1))
    return recon + F.mse_loss(z_q, z_e.detach()) + beta * F.mse_loss(z_e, z_q.detach())


# --- iGPT: a causal transformer over picture tokens and words, with a KV cache --------------------
#
# The usual decoder-only transformer (GPT-2's pre-norm block), with three things of its own: places
# are counted from the last mark, one vector tells what the span before that mark said, and the
# tables of the picture tokens are built from the codebook. To copy it, take InputError,
# EOT ... PAD, SelfAttention and attend from above with it; to sample, the section Sampling down to
# generate, whose `how` may be anything with the fields of SamplingConfig.


class KVCache:
    """Keys and values of the tokens so far: two tensors (layers,B,heads,length,head_dim), allocated
    once; 2 * layers * B * length * d numbers.

    The cache does not know how full it is: whoever writes says at which position. pad int64 (B,) or
    None: how many columns at a row's left are padding, for prompts of unlike length in one batch.
    """

    def __init__(self, n_layers, batch, n_heads, length, head_dim, device=None, pad=None,
                 dtype=torch.float32):
        shape = (n_layers, batch, n_heads, length, head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")
        self.pad = pad

    def write(self, layer, position, k, v):
        """Store k, v (B,heads,T,head_dim) from column `position` on; return all columns so far."""
        end = position + k.shape[2]
        self.k[layer, :, :, position:end] = k
        self.v[layer, :, :, position:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def byte_dropout(x, p):
    """F.dropout(x, p) in training, at a sixth of its cost on a CPU: a random byte an element, drawn
    eight at a time, instead of a random number each. p, below 0.998, is rounded to 1/256."""
    drop = round(256 * p)
    if not drop:
        return x
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    keep = words.random_(-(2**63), None).view(torch.uint8)[: x.numel()].view(x.shape) >= drop
    return x * keep.to(x.dtype).mul_(256 / (256 - drop))  # x * keep would convert keep twice


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). (B,T,d) -> (B,T,d)."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = SelfAttention(d_model, n_heads)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))
        self.dropout = dropout

    def forward(self, x, causal=True, mask=None, cached=None):
        p = self.dropout * self.training
        x = x + byte_dropout(self.attention(self.norm1(x), causal, mask, cached), p)
        return x + byte_dropout(self.mlp(self.norm2(x)), p)


class iGPT(nn.Module):
    """Next-token logits over the joint vocabulary: tokens int64 (B,T) -> (B,T,V).

    vocab_size: V = K codes + len(Tokenizer.all_words); the last four ids are EOT, EOI, BOS and PAD.
    context_length: the longest sequence.
    codebook (K,D), optional: the VQ-VAE's codebook.weight. With it a code's embedding and output
    row are its own vector plus a learned linear map of its standardized code vector: codes that
    look alike share what is learned about one of them, and gradient can reach the codebook. It is
    referred to, not owned: neither among parameters() nor in state_dict(); .to() leaves it where it
    is, a deepcopy gets one of its own, and it gathers gradient unless frozen. said_dropout: share
    of the sequences that train without the sum of the span before, see below.
    """

    causal = True  # a position sees itself and what came before

    def __init__(self, vocab_size, context_length, d_model=128, n_heads=4, n_layers=4, dropout=0.1,
                 codebook=None, said_dropout=0.0):
        super().__init__()
        self.said_dropout = said_dropout
        self.vocab_size, self.context_length, self.n_heads = vocab_size, context_length, n_heads
        self.embedding = nn.Embedding(vocab_size, d_model)
        # A token's place is its distance from the last mark (BOS, EOT, EOI): the top left cell of a
        # picture has ONE place in both orders, so what one order learns of pictures holds in both
        self.places = nn.Embedding(2 * context_length, d_model)
        # What the span before said, as one vector: the sum over its tokens of token * place. Every
        # token of the next span gets it: a picture its caption, a caption its picture. Attention
        # finds all that, too, but late, for the strokes next door say more about a stroke than the
        # caption does: the sum took the pictures that show their caption's digit from 78 to 97 %.
        # Its table is not built from the codebook: that reads better after 1,000 steps (68 % of
        # digits against 40 %) and worse after 3,000 (85 % against 89 %). Some sequences train
        # without the sum, so that attention learns to read as well: test loss 1.490 -> 1.472
        self.said_token = nn.Embedding(vocab_size, d_model)
        self.said_place = nn.Embedding(context_length, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self._codebook = (codebook,)  # in a tuple, where nn.Module does not look for parameters
        if codebook is not None:
            self.code_in = nn.Linear(codebook.shape[1], d_model, bias=False)
            self.code_out = nn.Linear(codebook.shape[1], d_model, bias=False)
            nn.init.normal_(self.code_out.weight, std=0.02)
        for table in (self.embedding, self.places, self.said_token):
            nn.init.normal_(table.weight, std=0.3)
        # Branches and output start small: the first loss is log V, the first gradients are calm
        nn.init.normal_(self.head.weight, std=0.02)
        for block in self.blocks:
            nn.init.normal_(block.attention.out.weight, std=0.02)
            nn.init.normal_(block.mlp[2].weight, std=0.02)

    def tables(self):
        """Embedding table and output matrix, both (V,d), with the codebook's share, if any."""
        codebook = self._codebook[0]
        if codebook is None:
            return self.embedding.weight, self.head.weight
        codes = (codebook - codebook.mean(0)) / (codebook.std(0) + 1e-5)  # (K,D), all on one scale
        below = (0, 0, 0, self.vocab_size - len(codes))  # words and specials get nothing
        return (self.embedding.weight + F.pad(self.code_in(codes), below),
                self.head.weight + F.pad(self.code_out(codes), below))

    def locate(self, tokens):
        """Tokens (B,T) -> places (B,T), how far the last mark is, after an EOI plus the context
        length; and said (B,T,d), the sum over all words and codes before that mark. A
        sequence has one span before its last mark: what the other is to follow."""
        (B, T), V = tokens.shape, self.vocab_size
        index = torch.arange(T, device=tokens.device).expand(B, T)
        is_mark = (tokens >= V + EOT) & (tokens < V + PAD)  # EOT, EOI or BOS
        last = torch.where(is_mark, index, 0).cummax(1).values  # (B,T): where the last mark stands
        after_eoi = tokens.gather(1, last) == V + EOI
        speaks = tokens < V + EOT  # neither marks nor PAD
        said = self.said_token(tokens) * self.said_place(index - last)  # (B,T,d)
        said = (said * speaks[..., None]).cumsum(1).gather(1, last[..., None].expand_as(said))
        if self.training and self.said_dropout:
            said = said * (torch.rand(B, 1, 1, device=said.device) >= self.said_dropout)
        return index - last + self.context_length * after_eoi, said

    def forward(self, tokens, located=None, cache=None, position=0, tables=None, span=None):
        """tokens int64 (B,T) -> logits (B,T,V). The rest is for generation:

        located: places and said, if what precedes the tokens is not among them. cache: a KVCache
        with the columns before `position`; gets those of these tokens. tables: what tables()
        returned, to compute it once. span (low, high): these rows of V only -> (B,T,high-low).
        Raises InputError for more tokens than the context.
        """
        B, T = tokens.shape
        assert position == 0 or cache is not None and located is not None, "what came before?"
        if position + T > self.context_length:
            raise InputError(f"{position + T} tokens, the context holds {self.context_length}")
        embedding, output = tables or self.tables()
        places, said = located or self.locate(tokens)
        x = F.embedding(tokens, embedding) + self.places(places) + said  # (B,T,d)
        mask = None if cache is None else self._mask(T, position, cache.pad, x.device)
        for i, block in enumerate(self.blocks):
            cached = functools.partial(cache.write, i, position) if cache is not None else None
            x = block(x, causal=self.causal and position == 0, mask=mask, cached=cached)
        low, high = span or (0, self.vocab_size)
        return F.linear(self.norm(x), output[low:high])

    def new_cache(self, batch, length, pad=None):
        """A KVCache that fits, for `length` tokens in each of `batch` rows."""
        head_dim = self.norm.normalized_shape[0] // self.n_heads
        weight = self.norm.weight
        return KVCache(len(self.blocks), batch, self.n_heads, length, head_dim, weight.device, pad,
                       weight.dtype)

    @staticmethod
    def _mask(T, position, pad, device):
        """Where the T new tokens may look, bool (B or 1,1,T,position+T); None where sdpa's own
        causal mask (a first chunk) or no mask at all (a single token) does the same."""
        if pad is None and (T == 1 or position == 0):
            return None
        columns = torch.arange(position + T, device=device)
        rows = columns[position:, None]
        mask = (columns <= rows)[None, None]  # (1,1,T,columns)
        if pad is not None:
            # Padding is hidden from all but itself: a row that may look nowhere would be 0/0
            mask = mask & ((columns >= pad[:, None, None, None]) | (columns == rows))
        return mask


class ParallelPredictor(iGPT):
    """The second note's transformer taken literally: a caption in, logits of all picture tokens
    out, in one pass. An iGPT whose positions all see each other and whose picture tokens are blank.

    It trains on sequences in the order text_image like any iGPT. No token knows what its neighbours
    have chosen, which is fast, and tells what an autoregressive model is good for.
    n_embeddings: K; the rest as for iGPT.
    """

    causal = False

    def __init__(self, n_embeddings, *options, **more):
        super().__init__(*options, **more)
        self.n_embeddings = n_embeddings

    def forward(self, tokens):
        """text_image sequences (B,T) -> logits (B,T,V), of use where the next token is a code."""
        blank = tokens.masked_fill(tokens < self.n_embeddings, self.vocab_size + PAD)
        return super().forward(blank)

    def predict(self, prompts, n_tokens):
        """Prompts BOS EOI TEXT EOT (B,T), all of one length -> logits (B,N,K)."""
        blank = prompts.new_zeros(len(prompts), n_tokens - 1)
        logits = self(torch.cat([prompts, blank], 1))  # the EOT's position predicts the first token
        return logits[:, prompts.shape[1] - 1 :, : self.n_embeddings]


# --- Sequences: pairs to rows of tokens. Every prompt for sampling is the start of such a row -----
#
# BOS says "begin", EOT "a picture comes next", EOI "a caption comes next". The three orders differ
# in where they enter the ring IMAGE EOI TEXT EOT, and nothing else.


def sequence_length(n_tokens, tokenizer):
    """BOS + IMAGE + EOI + TEXT + EOT: 1+49+1+6+1 = 58 for 28x28 pictures and six words."""
    return n_tokens + tokenizer.caption_length + 3


def make_sequences(tokens, text_ids, tokenizer, order):
    """Picture tokens (B,N) and captions (B,L+1) from Tokenizer.encode_batch -> sequences
    int64 (B,N+L+3).

        image_text  BOS EOT IMAGE EOI TEXT     plain  BOS IMAGE EOI TEXT EOT
        text_image  BOS EOI TEXT EOT IMAGE

    Where a caption is shorter than L, an EOT closes it in every order; PAD fills the row's end.
    """
    t = tokenizer
    bos, eoi, eot = (torch.full((len(tokens), 1), mark, device=tokens.device)
                     for mark in (t.bos_token, t.end_of_image_token, t.end_of_text_token))
    if order == "image_text":  # a caption of full length needs no EOT here: nothing comes after it
        return torch.cat([bos, eot, tokens, eoi, text_ids[:, :-1]], 1)
    if order == "plain":
        return torch.cat([bos, tokens, eoi, text_ids], 1)
    if order != "text_image":
        raise InputError(f"unknown order {order!r}: choose from {', '.join(ORDERS)}")
    row = torch.cat([bos, eoi, text_ids, tokens], 1)
    # The picture follows its caption at once: sort PAD to the end and leave the rest as it stands
    return row.gather(1, (row == t.pad_token).to(torch.uint8).argsort(dim=1, stable=True))


def mixed_sequences(tokens, text_ids, tokenizer, orders):
    """A batch dealt out to several orders: row i is in orders[i % len(orders)], where i counts
    through the shares of all processes. (B,N), (B,L+1) -> (B,T)."""
    rows = tokens.new_empty(len(tokens), sequence_length(tokens.shape[1], tokenizer))
    first = processes()[0] * len(tokens)  # this share's first row
    for i, order in enumerate(orders):
        part = slice((i - first) % len(orders), None, len(orders))
        rows[part] = make_sequences(tokens[part], text_ids[part], tokenizer, order)
    return rows


class Sequences(Dataset):
    """Picture tokens (C*M,N), C copies of M pictures one after the other, and captions
    (M,L+1), handed out as batches of sequences (B,T) in the given orders: index it with all rows of
    a batch at once, as make_loader does."""

    def __init__(self, tokens, text_ids, tokenizer, orders):
        self.tokens, self.text_ids = tokens, text_ids
        self.tokenizer, self.orders = tokenizer, orders

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        texts = self.text_ids[rows % len(self.text_ids)]
        return mixed_sequences(self.tokens[rows], texts, self.tokenizer, self.orders)


@torch.no_grad()
def extract_tokens(vqvae, images, batch_size=250, augment=None):
    """Run pictures uint8 (M,H,W,3) through the encoder once, not in every epoch -> tokens int64
    (M,N) on the CPU. augment: a function (B,3,H,W) -> (B,3,H,W) applied before."""
    device, out = next(vqvae.parameters()).device, []
    for x in make_loader(Pictures(images), batch_size, shuffle=False):
        x = x.to(device)
        out.append(vqvae.get_tokens(augment(x) if augment else x).flatten(1).cpu())
    return torch.cat(out)


@torch.no_grad()
def decode_pictures(vqvae, tokens, batch_size=250):
    """The way back: tokens int64 (M,N) -> pictures uint8 (M,H,W,3), as they are shown and saved."""
    device = next(vqvae.parameters()).device
    return np.concatenate([denormalize(vqvae.decode_tokens(t.to(device)))
                           for t in tokens.split(batch_size)])


def create_dataset(images, texts, vqvae, tokenizer, batch_size=128, orders=ORDERS[:2], seed=0):
    """Pictures (M,H,W,3) in any accepted range and M captions -> a loader of sequences int64 (B,T),
    shuffled anew each epoch, each batch in about equal parts of the orders. Raises InputError for
    pictures or captions that do not fit."""
    images = to_uint8(images)[0]
    if len(images) != len(texts):
        raise InputError(f"{len(texts)} captions for {len(images)} pictures")
    tokens, text_ids = extract_tokens(vqvae, images), tokenizer.encode_batch(texts)
    rows = Sequences(tokens, text_ids, tokenizer, orders)
    return make_loader(rows, batch_size, seed=seed)


def text_prompt(tokenizer, caption):
    """BOS EOI TEXT EOT, as before every picture of the text_image order -> int64 (T,)."""
    t = tokenizer
    return torch.tensor([t.bos_token, t.end_of_image_token, *t.text_encode(caption),
                         t.end_of_text_token])


def image_prompts(tokenizer, tokens):
    """BOS EOT IMAGE EOI, as before every caption of the image_text order: (B,N) -> (B,N+3)."""
    rows = F.pad(tokens, (2, 1), value=tokenizer.end_of_image_token)
    rows[:, 0], rows[:, 1] = tokenizer.bos_token, tokenizer.end_of_text_token
    return rows


# --- Training: one loop. The regimes differ in the loss, the parameters and the loader. -----------
#
# A Trainer owns the loop; a subclass says what the loss of a batch is and what to measure.
# Everything random in a step follows from (seed, phase, step), so a run that was killed can be
# taken up at any step and ends with the same weights, to the bit.


class Muon(torch.optim.Adam):
    """Adam, but in groups that say orthogonal=True the update is the momentum's nearest orthogonal
    matrix (Jordan et al. 2024), so that all directions of a matrix learn alike. Such groups hold
    weights of two or more axes only, a momentum of 0.95 (betas are Adam's) and no weight decay.
    Muon([{"params": matrices, "orthogonal": True, "lr": 0.02}, {"params": others}], lr=1e-3)

    torch.optim.Muon computes in bfloat16 one matrix at a time, which takes seconds on a CPU without
    bfloat16 units. Here the products are of the dtype asked for and batched over matrices of one
    shape: a fifth of a step, for twice the learning.
    """

    # "Polar Express" (Amsel et al. 2025): X <- aX + (b XX^T + c (XX^T)^2) X, five times, brings all
    # singular values near 1
    COEFFICIENTS = ((8.28721, -23.59589, 17.30039), (4.10706, -2.94785, 0.54484),
                    (3.94869, -2.90890, 0.55182), (3.31842, -2.48849, 0.51005),
                    (2.30065, -1.66890, 0.41881))

    def __init__(self, groups, lr=1e-3, dtype=torch.float32, **options):
        super().__init__(groups, lr=lr, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all groups; sets the gradients of the orthogonal groups to None."""
        assert closure is None, "closures are for line searches, which this is not"
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"] if group.get("orthogonal") else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:  # Adam's names, so that its state_dict knows what it sees
                    state["step"], state["exp_avg"] = torch.tensor(0.0), torch.zeros_like(p)
                average = state["exp_avg"].lerp_(p.grad, 1 - 0.95)
                update = p.grad.lerp(average, 0.95)  # Nesterov: a look ahead
                p.grad = None  # so that Adam passes it by
                by_shape.setdefault(p.flatten(1).shape, []).append((p, update.flatten(1)))
            for (rows, columns), pairs in by_shape.items():
                stack = torch.stack([u for _, u in pairs])  # (n,rows,columns)
                stack = self.orthogonalize(stack, self.dtype).float()
                for (p, _), update in zip(pairs, stack):
                    scale = max(1, rows / columns) ** 0.5
                    p.add_(update.view_as(p), alpha=-group["lr"] * scale)
        super().step()

    @classmethod
    def orthogonalize(cls, x, dtype=torch.float32):
        """Matrices (n,rows,columns) -> about U V^T of their decompositions U S V^T."""
        if x.shape[1] > x.shape[2]:  # the products below are then the smaller ones
            return cls.orthogonalize(x.mT, dtype).mT
        x = (x / (1.02 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
        for a, b, c in cls.COEFFICIENTS:
            x = x / 1.02  # beyond 1 the polynomials explode, and rounding can lead there
            gram = x @ x.mT  # (n,rows,rows)
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x


def is_matrix(name, p):
    """Does Muon handle this parameter? Weights of linear maps and convolutions inside the network;
    not embeddings and outputs, whose rows belong to tokens, nor filters on three colours."""
    layer = name.split(".")[0] in ("blocks", "encoder", "decoder", "colors_in", "colors_out")
    return layer and p.dim() in (2, 4) and min(p.shape[:2]) > 3


def make_optimizer(cfg, groups, bf16=False):
    """Adam, or Muon, over parameter_groups. fused: one kernel for all parameters, not five each."""
    if cfg.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Muon(groups, dtype=dtype, betas=(0.9, 0.95), eps=1e-10, fused=True)


def create_cosine_scheduler(optimizer, warmup_steps=1000, total_steps=14_070):
    """A torch scheduler, to be stepped once a training step: all learning rates rise linearly for
    warmup_steps, then fall as half a cosine to 0 at total_steps (default: 30 epochs of 60,000 rows
    in batches of 128, as in the notes)."""

    def factor(step):
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Trainer:
    """The training loop that the library and the command line share.

    modules: dict name -> nn.Module. optimizer: any torch optimizer over their parameters.
    scheduler: stepped once a step, or None. clip: largest norm of the whole gradient. seed: if
    given, a step's noise follows from (seed, phase, step), so a resumed run sees what the unbroken
    one saw. bf16: matrix products in bfloat16. on_step(trainer) and on_epoch(trainer, row), which
    may be replaced, are called before each step and after each pass of the loader.

    Subclasses say what the loss of a batch is and what to measure on the test loader. Under
    torchrun the processes share each batch, and DistributedDataParallel averages the gradients.
    """

    phase = "train"

    def __init__(self, modules, optimizer, device, scheduler=None, clip=1.0, seed=None, bf16=False):
        self.modules, self.optimizer = nn.ModuleDict(modules), optimizer
        self.device, self.scheduler, self.clip = torch.device(device), scheduler, clip
        self.seed, self.bf16 = seed, bf16
        self.on_step, self.on_epoch = lambda trainer: None, lambda trainer, row: None
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.step, self.last_loss, self.sums = 0, math.nan, {}  # sums: of this pass's losses
        self.shared_loss = self.loss
        if dist.is_initialized():
            self.shared_loss = DistributedDataParallel(
                LossModule(self), forward_sync_buffers=False, find_unused_parameters=True)
        self.train_losses, self.test_losses = [], []

    def loss(self, batch):
        """A batch -> (scalar loss with gradient, dict of more scalars to average over the pass)."""
        raise NotImplementedError

    def test(self, test_loader):
        """Measurements over the test loader: a dict of floats with at least 'loss'."""
        raise NotImplementedError

    def train(self, train_loader, test_loader, num_epochs):
        """Train until num_epochs passes of the loader are done, going on from self.step.

        Returns (train_losses, test_losses), a float a pass each. Raises InputError when a loss or a
        gradient is not finite.
        """
        per_epoch = len(train_loader)
        for epoch in range(self.step // per_epoch, num_epochs):
            sampler = getattr(train_loader, "sampler", None)
            if hasattr(sampler, "set_epoch"):  # as torch's DistributedSampler has it, too
                sampler.set_epoch(epoch)
                sampler.skip = self.step % per_epoch  # a BatchOrder can begin within a pass
            self.modules.train()
            for batch in train_loader:
                self.on_step(self)
                self.train_step(batch)
            self._end_epoch(epoch, test_loader)
        return self.train_losses, self.test_losses

    def train_step(self, batch):
        """Forward, backward, clip, update."""
        if self.seed is not None:
            torch.manual_seed(zlib.crc32(f"{self.seed} {self.phase} {self.step}".encode()))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss, parts = self.shared_loss(to_device(batch, self.device))
        self.last_loss = self.finite(loss.item())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.finite(nn.utils.clip_grad_norm_(self.parameters, self.clip).item(), "gradient's norm")
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        self.step += 1
        for name, value in {"loss": self.last_loss, **parts}.items():
            total, n = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + float(value), n + 1)

    def finite(self, value, name="loss"):
        """The value, if it is a number; else raises InputError, before anything is saved."""
        if math.isfinite(value):
            return value
        raise InputError(f"the {name} is {value} at step {self.step} of phase {self.phase}: "
                         "try a lower learning rate")

    def _end_epoch(self, epoch, test_loader):
        self.modules.eval()
        with torch.no_grad():
            measured = self.test(test_loader)
        self.finite(measured["loss"])  # the last step may have broken the weights
        row = {"phase": self.phase, "epoch": epoch + 1, "step": self.step,
               "lr": self.optimizer.param_groups[0]["lr"]}
        row |= {f"train_{name}": total / n for name, (total, n) in self.sums.items()}
        row |= {f"test_{name}": value for name, value in measured.items()}
        self.sums = {}
        self.train_losses.append(row.get("train_loss", math.nan))
        self.test_losses.append(measured["loss"])
        self.on_epoch(self, row)

    def state_dict(self):
        """All that the rest of the training depends on."""
        return {
            "phase": self.phase, "step": self.step, "sums": self.sums,
            "train_losses": self.train_losses, "test_losses": self.test_losses,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
        }

    def load_state_dict(self, state):
        """Take up training where state_dict() was called."""
        self.step, self.sums = state["step"], dict(state["sums"])
        self.train_losses, self.test_losses = state["train_losses"], state["test_losses"]
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])


class LossModule(nn.Module):
    """A trainer's loss as the forward pass that DistributedDataParallel wants to wrap."""

    def __init__(self, trainer):
        super().__init__()
        self.parts, self.forward = trainer.modules, trainer.loss


def use_bf16(precision, device):
    """Train with bfloat16 products? 'auto': where the processor has units for it. -> bool"""
    if precision == "auto" and device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    if precision == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def to_device(batch, device):
    """A tensor or a tuple of tensors -> the same on the device."""
    several = isinstance(batch, (tuple, list))
    return tuple(t.to(device) for t in batch) if several else batch.to(device)


class VQVAETrainer(Trainer):
    """Phase 1: batches are pictures (B,3,H,W) in [-1,1]."""

    phase = "vqvae"

    def __init__(self, model, optimizer, device, beta=Config.beta, extremes=Config.extremes,
                 **options):
        super().__init__({"vqvae": model}, optimizer, device, **options)
        self.model, self.beta, self.extremes = model, beta, extremes

    def loss(self, batch):
        z_e, z_q, recon_x = self.model(batch)
        return compute_loss(batch, recon_x.float(), z_e, z_q, self.beta, self.extremes), {}

    def test(self, test_loader):
        """The loss and measure_reconstruction's figures."""
        return measure_reconstruction(self.model, test_loader, self.beta, self.extremes)


@torch.no_grad()
def measure_reconstruction(vqvae, batches, beta=Config.beta, extremes=Config.extremes):
    """Over batches (B,3,H,W): loss, recon_mse ([-1,1] units), recon_psnr (dB; values span 2),
    codebook_used (share of codes chosen at all), codebook_perplexity (exp of their use's
    entropy). For a model in eval mode; in training mode its codebook would take part."""
    loss = mse = n = counts = 0
    for x in batches:
        x = x.to(vqvae.codebook.weight.device)
        z_e, z_q, recon_x, tokens = vqvae.forward_with_tokens(x)
        loss += compute_loss(x, recon_x, z_e, z_q, beta, extremes).item() * len(x)
        mse += F.mse_loss(recon_x, x).item() * len(x)
        n += len(x)
        counts += torch.bincount(tokens.flatten(), minlength=vqvae.n_embeddings)
    share = counts / counts.sum()
    return {
        "loss": loss / n,
        "recon_mse": mse / n,
        "recon_psnr": 10 * math.log10(4 / max(mse / n, 1e-12)),
        "codebook_used": (counts > 0).float().mean().item(),
        "codebook_perplexity": torch.special.entr(share).sum().exp().item(),
    }


def target_weights(sequences, vocab_size, caption_weight):
    """How much each prediction counts: sequences (B,T) -> (B,T-1), for targets sequences[:, 1:].

    PAD counts nothing. The words of a caption that FOLLOWS a picture count caption_weight: they are
    6 targets of 57, in half of the rows, but all there is to captioning.
    """
    pad, eoi = vocab_size + PAD, vocab_size + EOI
    captioning = ((sequences[:, :-1] == eoi).cumsum(1) > 0) & (sequences[:, 1:2] != eoi)
    return torch.where(captioning, caption_weight, 1.0) * (sequences[:, 1:] != pad)


@torch.no_grad()
def measure_prediction(igpt, batches):
    """Over batches of sequences (B,T): loss (nats a token, unweighted, without PAD) and accuracy
    (share of tokens that are the most likely one)."""
    total = right = n = 0
    for rows in batches:
        rows = rows.to(igpt.head.weight.device)
        logits, targets = igpt(rows[:, :-1]), rows[:, 1:]
        real = targets != igpt.vocab_size + PAD
        total += F.cross_entropy(logits[real], targets[real], reduction="sum").item()
        right += (logits.argmax(-1) == targets)[real].sum().item()
        n += real.sum().item()
    return {"loss": total / n, "accuracy": right / n}


class iGPTTrainer(Trainer):
    """Phase 2: batches are sequences int64 (B,T), as create_dataset makes them; the last id is PAD.

    Raises InputError if sequence_length does not fit the model's context.
    """

    phase = "igpt"

    def __init__(self, model, optimizer, device, vocab_size, sequence_length,
                 caption_weight=Config.caption_weight, **options):
        super().__init__({"igpt": model}, optimizer, device, **options)
        self.model, self.vocab_size, self.caption_weight = model, vocab_size, caption_weight
        if sequence_length > model.context_length + 1:
            raise InputError(f"sequences of {sequence_length} do not fit the model's context")

    def loss(self, batch):
        """Weighted next-token cross-entropy, nats."""
        logits = self.model(batch[:, :-1]).float()  # (B,T-1,V)
        nll = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        weight = target_weights(batch, self.vocab_size, self.caption_weight).flatten()  # (B*(T-1),)
        return (nll * weight).sum() / weight.sum(), {}

    def test(self, test_loader):
        return measure_prediction(self.model, test_loader)


class JointTrainer(Trainer):
    """`single` and phase 3: all at once. Batches are (pictures (B,3,H,W), captions (B,L+1)).

    L = recon + codebook + beta * commit + lambda * xent. The decoder always gets the encoder's own
    codes. lambda is 0 for lambda_warmup steps, while there are no codes worth predicting, then
    rises for lambda_ramp steps. tau: temperature of the soft targets, in mean squared quantization
    errors. A small lambda does: Adam and Muon learn the transformer as fast, and a large one makes
    the codes predictable instead of exact. `single` on handwriting, colours not factored: with 0.1
    a perplexity of 115, 81 % of reconstructions read right and 76 % of pictures by captions; with
    0.003 330, 95 and 96. With colours factored 0.003 gives 97 and 99.
    """

    def __init__(self, phase, vqvae, igpt, tokenizer, optimizer, device, beta=Config.beta,
                 extremes=Config.extremes, lambda_xent=Config.lambda_xent, lambda_warmup=0,
                 lambda_ramp=0, tau=Config.tau, orders=ORDERS[:2],
                 caption_weight=Config.caption_weight, **options):
        super().__init__({"vqvae": vqvae, "igpt": igpt}, optimizer, device, **options)
        self.phase, self.vqvae, self.igpt, self.tokenizer = phase, vqvae, igpt, tokenizer
        self.beta, self.extremes, self.tau = beta, extremes, tau
        self.orders, self.caption_weight = orders, caption_weight
        self.lambda_xent, self.warmup, self.ramp = lambda_xent, lambda_warmup, lambda_ramp
        self.first_tokens = None  # the test pictures' tokens before, to measure drift

    def lambda_now(self):
        """lambda at the current step."""
        return self.lambda_xent * min(1, max(0, (self.step + 1 - self.warmup) / max(1, self.ramp)))

    def loss(self, batch):
        """The joint loss; while lambda is 0 the transformer is not even run."""
        x, text_ids = batch
        z_e, z_q, recon_x, tokens = self.vqvae.forward_with_tokens(x)
        loss = compute_loss(x, recon_x.float(), z_e, z_q, self.beta, self.extremes)
        weight = self.lambda_now()
        if not weight:
            return loss, {"vqvae": loss.item(), "lambda": 0.0}
        rows = mixed_sequences(tokens.flatten(1), text_ids, self.tokenizer, self.orders)  # (B,T)
        xent = self.cross_entropy(rows, z_e)
        return loss + weight * xent, {"vqvae": loss.item(), "xent": xent.item(), "lambda": weight}

    def cross_entropy(self, rows, z_e):
        """Cross-entropy of sequences (B,T) whose picture tokens came from z_e (B,D,h,w) -> scalar.

        The target of a picture token is onehot(code) + soft - sg[soft], where soft is
        softmax(-|z_e - e_k|^2 / tau): in value the code, so the transformer learns the tokens it
        will be asked for; in gradient the soft assignment, so features and codes move to where the
        transformer expects them. (Soft values would teach it to be as unsure as they are.)
        """
        targets = rows[:, 1:]
        log_p = F.log_softmax(self.igpt(rows[:, :-1]).float(), dim=-1)  # (B,T-1,V)
        nll = -log_p.gather(2, targets[..., None])[..., 0]  # (B,T-1)
        flat = z_e.float().movedim(1, -1).flatten(0, 2)  # (B*N,D), in the order of the tokens
        distance = self.vqvae.codebook.distances(flat)  # (B*N,K)
        error = summed(distance.detach().amin(1).mean()) / processes()[1]
        scale = self.tau * error.clamp(min=1e-6)
        soft = F.softmax(-distance / scale, dim=1)
        is_code = targets < self.vqvae.n_embeddings  # (B,T-1), N a row
        log_p = log_p[is_code][:, : self.vqvae.n_embeddings]  # (B*N,K)
        expected = -((soft - soft.detach()) * log_p.detach()).sum(1)  # (B*N,), of value 0
        nll = nll + torch.zeros_like(nll).masked_scatter(is_code, expected)
        weight = target_weights(rows, self.igpt.vocab_size, self.caption_weight)
        return (nll * weight).sum() / weight.sum()

    def test(self, test_loader):
        """Figures of both models, and the drift: the share of test tokens that have changed."""
        batches = [to_device(b, self.device) for b in test_loader]
        tokens = [self.vqvae.get_tokens(x).flatten(1) for x, _ in batches]
        rows = (mixed_sequences(t, text_ids, self.tokenizer, self.orders)
                for t, (_, text_ids) in zip(tokens, batches))
        out = measure_reconstruction(self.vqvae, (x for x, _ in batches), self.beta, self.extremes)
        prediction = measure_prediction(self.igpt, rows)
        tokens = torch.cat(tokens).cpu()  # (test pictures, N)
        self.first_tokens = tokens if self.first_tokens is None else self.first_tokens
        out["loss"] += self.lambda_now() * prediction["loss"]
        return out | {"nll": prediction["loss"], "accuracy": prediction["accuracy"],
                      "drift": (tokens != self.first_tokens).float().mean().item()}

    def state_dict(self):
        """As of every trainer, and the tokens that drift is measured from."""
        return super().state_dict() | {"first_tokens": self.first_tokens}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.first_tokens = state["first_tokens"]


# --- Sampling: logits, probabilities, a token; prefill and decode; captions, pictures, pairs ------
#
# From the inside out: logits become probabilities, probabilities a token, tokens a span
# (generate), and spans captions, pictures and pairs. Which span comes next is known at every
# point, so no sample can hold a word in the middle of a picture.


def logits_to_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits (B,S) -> probabilities (B,S). top_k 0 and top_p 1 keep everything."""
    logits = logits / max(temperature, 1e-5)
    if 0 < top_k < logits.shape[-1]:  # everything below the k-th largest logit goes
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p < 1:
        # Keep the fewest tokens that hold top_p of the mass (Holtzman et al. 2019): a token goes if
        # those ahead of it hold that much without it; so the first always stays.
        ordered, index = probs.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sample_token(logits, how, generator=None):
    """logits (B,S) -> index into the S, int64 (B,), drawn as the SamplingConfig `how` says."""
    if how.greedy:
        return logits.argmax(-1)
    probs = logits_to_probs(logits, how.temperature, how.top_k, how.top_p)
    # torch.multinomial draws a number for every token of the vocabulary; one a row is enough.
    # Doubles, so that rounding cannot lead to a token that was ruled out
    cdf = probs.double().cumsum(-1)
    u = cdf[:, -1:] * torch.rand(len(cdf), 1, generator=generator, device=cdf.device,
                                 dtype=torch.float64)
    return torch.searchsorted(cdf, u, right=True).clamp_(max=cdf.shape[1] - 1)[:, 0]


@torch.no_grad()
def generate(model, prompts, n_new, span, how, generator=None, unconditional=None, stop=None):
    """Continue prompts by n_new tokens, all from one span of the vocabulary -> int64 (B,n_new).

    prompts: list of int64 (T_i,), of any lengths. span: (low, high), the only ids allowed; a mark
    may be among them only as `stop` or if n_new is 1, since what follows is placed as of one span.
    n_new: at least 1. how: a SamplingConfig. generator: on the model's device. unconditional: a
    prompt (T,) for guidance without a classifier (Ho & Salimans 2022), logits = cond + w * (cond -
    uncond); both share a batch and a cache. stop: a token, never the first, after which the rest of
    a row is that token. Raises InputError for a ParallelPredictor and beyond the context.
    """
    if not model.causal:
        raise InputError("a parallel predictor draws pictures from captions and does nothing else")
    if len(prompts) > 256:  # small enough for the cache and large enough for the matrix products
        parts = (prompts[i : i + 256] for i in range(0, len(prompts), 256))
        return torch.cat([generate(model, part, n_new, span, how, generator, unconditional, stop)
                          for part in parts])
    was_training, device, B = model.training, next(model.parameters()).device, len(prompts)
    guided = unconditional is not None and how.guidance > 0
    prompts = prompts + [unconditional] * B * guided
    tokens = nn.utils.rnn.pad_sequence(  # aligned at the right
        prompts, batch_first=True, padding_value=model.vocab_size + PAD, padding_side="left")
    tokens, (rows, T) = tokens.to(device), tokens.shape
    pad = torch.tensor([T - len(p) for p in prompts], device=device)
    pad = pad if pad.any() else None
    length = T + n_new - 1  # nothing follows the last token: it is not fed
    if length > model.context_length:
        raise InputError(f"{length} tokens, the context holds {model.context_length}")
    model.eval()
    cache = model.new_cache(rows, length, pad)
    tables, (places, said) = model.tables(), model.locate(tokens)
    logits = model(tokens, (places, said), cache, 0, tables, span)[:, -1]  # prefill: all at once
    place, said, new = places[:, -1:], said[:, -1:], []
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for i in range(n_new):
        if guided:
            cond, uncond = logits.chunk(2)
            # Guidance may lift a code that is merely rare without the caption: only what the
            # caption makes plausible takes part (min-p, on the branch that knows the caption)
            hopeless = cond < cond.amax(1, keepdim=True) + math.log(max(how.min_p, 1e-9))
            logits = (cond + how.guidance * (cond - uncond)).masked_fill(hopeless, -math.inf)
        if stop is not None and i == 0:  # a caption has at least one word
            logits[:, stop - span[0]] = -math.inf
        token = span[0] + sample_token(logits, how, generator)  # (B,)
        if stop is not None:
            token = torch.where(ended, stop, token)
            ended |= token == stop
        new.append(token)
        if i + 1 < n_new:  # the last token's successor is not wanted
            place = place + 1
            column = torch.cat([token, token] if guided else [token])[:, None]  # (rows,1)
            logits = model(column, (place, said), cache, T + i, tables, span)[:, -1]
    model.train(was_training)
    return torch.stack(new, 1)


@torch.no_grad()
def sample_images(model, tokenizer, n_tokens, captions, how, generator=None):
    """B captions -> picture tokens int64 (B,n_tokens). Raises InputError as text_encode does."""
    prompts = [text_prompt(tokenizer, c) for c in captions]
    if not model.causal:  # a ParallelPredictor: each token is drawn by itself
        device = next(model.parameters()).device
        logits = (model.predict(p[None].to(device), n_tokens)[0] for p in prompts)  # (N,K) each
        return torch.stack([sample_token(rows, how, generator) for rows in logits])
    unconditional = torch.tensor([tokenizer.bos_token, tokenizer.end_of_text_token])
    return generate(model, prompts, n_tokens, tokenizer.image_span, how, generator, unconditional)


def sample_captions(model, tokenizer, tokens, how, generator=None):
    """Picture tokens (B,N) -> list of B captions."""
    prompts = list(image_prompts(tokenizer, tokens.cpu()))
    return _continue_captions(model, tokenizer, prompts, how, generator)


def complete_images(model, tokenizer, tokens, n_tokens, how, generator=None):
    """The first M picture tokens (B,M) -> all of them (B,n_tokens), the rest sampled."""
    prompts = list(image_prompts(tokenizer, tokens.cpu())[:, :-1])  # the picture goes on: no EOI
    rest = generate(model, prompts, n_tokens - tokens.shape[1], tokenizer.image_span, how,
                    generator)
    return torch.cat([tokens, rest.to(tokens.device)], 1)


def complete_captions(model, tokenizer, captions, how, generator=None):
    """Captions of which some are only begun -> whole captions. One after which the model thinks
    its end most likely is left as it is. Raises InputError as text_encode does."""
    t, out, likeliest = tokenizer, list(captions), dataclasses.replace(how, greedy=True)
    prompts = [text_prompt(t, c)[:-1] for c in captions]  # BOS EOI and the words
    for n_words in range(1, t.caption_length):
        alike = {i: p for i, p in enumerate(prompts) if len(p) == n_words + 2}
        if not alike:
            continue
        part = list(alike.values())
        next_word = generate(model, part, 1, t.text_span, likeliest)[:, 0]
        more = generate(model, part, t.caption_length - n_words, t.text_span, how, generator,
                        stop=t.end_of_text_token)
        for i, word, row in zip(alike, next_word, more):
            if word != t.end_of_text_token:
                out[i] = " ".join([*captions[i].split(), t.text_decode(row)])
    return out


def _continue_captions(model, tokenizer, prompts, how, generator):
    """Prompts that end in EOI -> the captions that follow."""
    rows = generate(model, prompts, tokenizer.caption_length, tokenizer.text_span, how, generator,
                    stop=tokenizer.end_of_text_token)
    return [tokenizer.text_decode(row) for row in rows]


def sample_pairs(model, tokenizer, n_tokens, n, how, generator=None):
    """n pairs from nothing but BOS -> picture tokens (n,n_tokens), list of n captions.

    The model first chooses between EOT, a picture and then its caption, and EOI, the reverse. A
    picture made first had no guidance, and many show no clear digit: it serves as a draft, its
    caption is read, and the pair's picture is drawn from that. Guidance makes pairs clearer than
    the model's own: this is no exact sample of its joint distribution.
    """
    t, captions = tokenizer, [""] * n
    bos = [torch.tensor([t.bos_token])] * n
    first = generate(model, bos, 1, t.start_span, how, generator)[:, 0].tolist()
    for mark in sorted(set(first)):
        mine = [row for row, choice in enumerate(first) if choice == mark]
        prompts = [torch.tensor([t.bos_token, mark])] * len(mine)
        if mark == t.end_of_text_token:
            draft = generate(model, prompts, n_tokens, t.image_span, how, generator)
            texts = sample_captions(model, t, draft, how, generator)
        else:
            texts = _continue_captions(model, t, prompts, how, generator)
        for row, text in zip(mine, texts):
            captions[row] = text
    return sample_images(model, t, n_tokens, captions, how, generator), captions


@torch.no_grad()
def generate_from_text(model, tokenizer, vqvae, prompt, device, how=None, generator=None):
    """A caption -> a picture (1,3,H,W) in [-1,1]. Raises InputError as text_encode does."""
    n_tokens, how = math.prod(vqvae.grid), how or SamplingConfig()
    tokens = sample_images(model, tokenizer, n_tokens, [prompt], how, generator)
    return vqvae.decode_tokens(tokens.to(device))


def generate_from_image(model, tokenizer, vqvae, image, device, how=None, generator=None):
    """A picture (3,H,W) in [-1,1] -> its caption."""
    tokens = vqvae.get_tokens(image.unsqueeze(0).to(device)).flatten(1)  # (1,N)
    return sample_captions(model, tokenizer, tokens, how or SamplingConfig(), generator)[0]


@torch.no_grad()
def generate_unconditional(model, tokenizer, vqvae, n_samples, device, how=None, generator=None):
    """n_samples pairs -> pictures (n,3,H,W) in [-1,1] and a list of n captions."""
    n_tokens, how = math.prod(vqvae.grid), how or SamplingConfig()
    tokens, captions = sample_pairs(model, tokenizer, n_tokens, n_samples, how, generator)
    return vqvae.decode_tokens(tokens.to(device)), captions


# --- Evaluation: what the two models are worth, over the whole test split -------------------------


@torch.no_grad()
def span_nll(model, tokenizer, rows, batch_size=250):
    """Teacher forcing over sequences (M,T): nats, hits and number of picture and caption targets,
    by a model in eval mode.

    Returns {'image': (3,M), 'text': (3,M)}. The caption's targets are its words and, where it is
    short, the EOT that ends it; marks whose place is certain count nowhere.
    """
    device, out = next(model.parameters()).device, {"image": [], "text": []}
    for batch in rows.to(device).split(batch_size):
        logits, targets = model(batch[:, :-1]), batch[:, 1:]
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        nll = nll.view_as(targets)  # (B,T-1)
        hit = logits.argmax(-1) == targets
        word = (batch >= tokenizer.n_embeddings) & (batch < tokenizer.end_of_text_token)  # (B,T)
        short = word.sum(1, keepdim=True) < tokenizer.caption_length
        text = word[:, 1:] | (targets == tokenizer.end_of_text_token) & word[:, :-1] & short
        for name, here in (("image", targets < tokenizer.n_embeddings), ("text", text)):
            out[name].append(torch.stack([(x * here).sum(1) for x in (nll, hit, here)]))  # (3,B)
    return {name: torch.cat(parts, 1) for name, parts in out.items()}


def both_ways_nll(model, tokenizer, tokens, captions):
    """Pictures' tokens (M,N), M captions -> span_nll of the orders text_image and image_text."""
    ids = tokenizer.encode_batch(captions)
    return [span_nll(model, tokenizer, make_sequences(tokens.cpu(), ids, tokenizer, order))
            for order in ("text_image", "image_text")]


def likelihoods(model, tokenizer, tokens, captions):
    """M pictures' tokens (M,N) and captions -> nats of log p(picture | caption), log p(caption |
    picture) and log p(pair), each (M,), and numbers of picture and caption targets (M,).

    The pair's probability is the sum over the two orders in which the model may make it, each as
    likely as the other: half of the training sequences are in either.
    """
    if not model.causal:
        raise InputError("a parallel predictor cannot tell how likely a caption is")
    drawn, read = both_ways_nll(model, tokenizer, tokens, captions)
    both = -torch.stack([drawn["image"][0] + drawn["text"][0], read["image"][0] + read["text"][0]])
    pair = both.logsumexp(0) - math.log(2)
    return -drawn["image"][0], -read["text"][0], pair, drawn["image"][2], read["text"][2]


@torch.no_grad()
def evaluate(vqvae, igpt, tokenizer, images, captions, how, seed=0):
    """Every figure of `eval --json` over pictures uint8 (M,H,W,3), M captions -> dict of floats."""
    device = next(vqvae.parameters()).device
    vqvae.eval(), igpt.eval()
    generator = torch.Generator(device).manual_seed(seed)
    out = measure_reconstruction(vqvae, make_loader(Pictures(images), 250, shuffle=False))
    del out["loss"]
    tokens = extract_tokens(vqvae, images)
    drawn, read = both_ways_nll(igpt, tokenizer, tokens, captions)
    nats, hits, n = drawn["image"].double().sum(1).tolist()
    out |= {"nll_text_to_image": nats / n, "code_accuracy": hits / n}
    if not igpt.causal:  # it knows captions to pictures only
        return out
    for name, spans in (("image_to_text", read["text"]), ("image", read["image"]),
                        ("text", drawn["text"])):
        nats, _, n = spans.double().sum(1).tolist()
        out[f"nll_{name}"] = nats / n
    greedy = dataclasses.replace(how, greedy=True)
    out["caption_exact"], out["caption_slot_accuracy"] = compare_captions(
        sample_captions(igpt, tokenizer, tokens, greedy), captions)
    # Text -> picture -> text goes through pixels: what we read is what a person would be shown
    made = sample_images(igpt, tokenizer, tokens.shape[1], captions, how, generator)
    seen = extract_tokens(vqvae, decode_pictures(vqvae, made))  # (M,N)
    texts = sample_captions(igpt, tokenizer, seen, greedy)
    out["round_trip_exact"] = compare_captions(texts, captions)[0]
    return out


def compare_captions(found, wanted):
    """Two lists of captions -> share wholly alike, share of the wanted words found in place."""
    pairs = [(a.split(), b.split()) for a, b in zip(found, wanted)]
    right = sum(x == y for a, b in pairs for x, y in zip(a, b))
    return sum(a == b for a, b in pairs) / len(pairs), right / sum(len(b) for _, b in pairs)


# --- Files: checkpoints, pictures, curves ---------------------------------------------------------
#
# Every file is written beside its place and renamed when it is whole; every checkpoint is read
# without running code and says what it is and what it fits to.

FORMAT = 2  # of checkpoints; raise it whenever an old file would be misread
VQVAE_FILE, IGPT_FILE = "checkpoints/vqvae_model.pth", "checkpoints/igpt_model.pth"  # of a run
# What using the content of a damaged checkpoint may raise
DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def atomic_write(path, data):
    """Write bytes beside their place, flush to disk, rename: one sees the old file or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if processes()[0]:
        return  # the first process writes for all
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(path, kind, content):
    """A dict of tensors, numbers, strings and containers -> a .pth file that says what it is."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "kind": kind, **content}, buffer)
    atomic_write(path, buffer.getvalue())


def load_checkpoint(path, kind):
    """What save_checkpoint wrote, read without running any code. Raises InputError."""
    if not Path(path).exists():
        raise InputError(f"{path} does not exist: train first")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    found = (content.get("kind"), content.get("format")) if isinstance(content, dict) else None
    if found != (kind, FORMAT):
        raise InputError(f"{path}: not a {kind} checkpoint of format {FORMAT}")
    return content


def fingerprint(tensor):
    """The first 16 hex digits of the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def build_vqvae(cfg, size):
    """The VQ-VAE of a Config, which it carries as .config, for pictures of size (H, W)."""
    if cfg.factored == "auto":
        raise InputError("factored is auto: whether on or off is for two_colored(pictures) to say")
    build = FactoredVQVAE if cfg.factored == "on" else VQVAE
    vqvae = build(cfg.vqvae_dim, cfg.vqvae_K, cfg.vqvae_D, attention=cfg.attention, size=size,
                  ema=cfg.ema, delay=cfg.delay, restart=cfg.restart)
    vqvae.config = cfg
    return vqvae


def build_igpt(cfg, vqvae, tokenizer):
    """The iGPT of a Config, which it carries as .config, that fits a VQ-VAE and a Tokenizer."""
    length = sequence_length(math.prod(vqvae.grid), tokenizer)
    build = iGPT
    if cfg.predictor == "parallel":
        build = functools.partial(ParallelPredictor, vqvae.n_embeddings)
    igpt = build(tokenizer.vocab_size, length, cfg.d_model, cfg.n_heads, cfg.n_layers, cfg.dropout,
                 vqvae.codebook.weight if cfg.link else None, cfg.said_dropout)
    igpt.config = cfg
    return igpt


def save_vqvae(path, vqvae):
    """checkpoints/vqvae_model.pth: configuration, picture size, weights."""
    save_checkpoint(path, "vqvae", {"config": dataclasses.asdict(vqvae.config), "size": vqvae.size,
                                    "model": vqvae.state_dict()})


def save_igpt(path, igpt, tokenizer, vqvae):
    """checkpoints/igpt_model.pth: also the vocabulary, and which codebook its tokens refer to."""
    save_checkpoint(path, "igpt", {
        "config": dataclasses.asdict(igpt.config), "words": tokenizer.words,
        "caption_length": tokenizer.caption_length,
        "codebook": fingerprint(vqvae.codebook.weight), "model": igpt.state_dict()})


def rebuild(path, content, build):
    """The model that `build` makes of the checkpoint's Config, with its weights, in eval mode."""
    try:
        with torch.device("meta"):  # shapes without memory: a damaged file cannot ask for gigabytes
            model = build(Config(**content["config"]))
        model.load_state_dict(content["model"], assign=True)
        return model.float().eval()
    except DAMAGE as error:
        why = str(error).splitlines()[0][:200]
        raise InputError(f"{path}: does not fit this version of mmgen ({why})") from None


def load_vqvae(path, device="cpu"):
    """-> VQVAE in eval mode. Raises InputError if it is missing, damaged or of another kind."""
    content = load_checkpoint(path, "vqvae")
    return rebuild(path, content, lambda cfg: build_vqvae(cfg, content["size"])).to(device)


def load_igpt(path, vqvae, device="cpu", any_codes=False):
    """-> iGPT in eval mode and its Tokenizer. Raises InputError also if made for other codes."""
    content = load_checkpoint(path, "igpt")
    if not any_codes and content.get("codebook") != fingerprint(vqvae.codebook.weight):
        raise InputError(f"{path}: was trained on the codes of another VQ-VAE than this one")
    words, length = content.get("words"), content.get("caption_length")
    listed = isinstance(words, list) and words and all(isinstance(w, str) for w in words)
    if not listed or not isinstance(length, int):
        raise InputError(f"{path}: its vocabulary is damaged")
    tokenizer = Tokenizer([" ".join(words)], vqvae.n_embeddings)
    tokenizer.caption_length = length
    igpt = rebuild(path, content, lambda cfg: build_igpt(cfg, vqvae, tokenizer))
    return igpt.to(device), tokenizer


def ppm_bytes(image):
    """uint8 (H,W,3) -> a binary PPM file."""
    return b"P6\n%d %d\n255\n" % (image.shape[1], image.shape[0]) + image.tobytes()


def png_bytes(image):
    """uint8 (H,W,3) -> a PNG file: header, compressed rows (each behind filter type 0), end."""
    def chunk(name, data):
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    rows = np.pad(image.reshape(len(image), -1), ((0, 0), (1, 0)))  # (H, 1+3W)
    head = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, 0)  # 8 bits, RGB
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
            + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b""))


def read_pictures(path):
    """--image: .npy uint8 (H,W,3) or (N,H,W,3), or a binary PPM (P6, 8 bits) -> uint8 (N,H,W,3)."""
    if not Path(path).exists():
        raise InputError(f"{path} does not exist")
    raw = Path(path).read_bytes()
    if raw[:2] == b"P6":
        # P6, width, height, largest value, a blank, pixels; in between blanks and comment lines
        header = re.match(rb"P6" + rb"(?:\s|#[^\n]*\n)+(\d{1,5})" * 3 + rb"\s", raw)
        if not header or header[3] != b"255":
            raise InputError(f"{path}: want a PPM header `P6 width height 255`, found {raw[:20]!r}")
        width, height, at = int(header[1]), int(header[2]), header.end()
        if len(raw) - at != 3 * width * height:
            raise InputError(f"{path}: want {width}x{height} pixels, found {len(raw) - at} bytes")
        images = np.frombuffer(raw, np.uint8, offset=at).reshape(1, height, width, 3).copy()
    elif raw[:6] == b"\x93NUMPY":
        images = parse_npy(raw, path)
        images = images[None] if images.ndim == 3 else images
    else:
        raise InputError(f"{path}: neither a .npy file nor a binary PPM (P6)")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise InputError(f"{path}: want uint8 (H,W,3) or (N,H,W,3), "
                         f"found {images.dtype} {images.shape}")
    return images


def picture_grid(images, scale=2, together=1):
    """uint8 (N,H,W,3) -> one about square picture, each enlarged `scale` times, on grey. together:
    so many neighbours, the samples of one prompt, are not torn apart by the end of a row."""
    N, H, W, _ = images.shape
    columns = together * math.ceil(math.sqrt(N) / together)
    rows = -(-N // columns)
    canvas = np.full((rows * columns, H * scale + 2, W * scale + 2, 3), 128, np.uint8)
    canvas[:N, 1:-1, 1:-1] = images.repeat(scale, 1).repeat(scale, 2)
    # (rows,columns,h,w,3) -> (rows,h,columns,w,3) -> (rows*h, columns*w, 3)
    tiles = canvas.reshape(rows, columns, *canvas.shape[1:]).swapaxes(1, 2)
    return tiles.reshape(rows * canvas.shape[1], -1, 3)


def sample_paths(prefix):
    """--out PREFIX -> PREFIX.ppm (PREFIX itself, if it ends in .png), PREFIX.npy, PREFIX.txt."""
    base = str(prefix).removesuffix(".png").removesuffix(".ppm")
    suffix = ".png" if str(prefix).endswith(".png") else ".ppm"
    return tuple(Path(base + end) for end in (suffix, ".npy", ".txt"))


def save_samples(prefix, images, captions, together=1):
    """Write a picture_grid, the pictures uint8 (N,H,W,3) and a caption a line to sample_paths.
    Returns the grid's path."""
    buffer, (grid, pictures, texts) = io.BytesIO(), sample_paths(prefix)
    np.save(buffer, images)
    encode = png_bytes if grid.suffix == ".png" else ppm_bytes
    atomic_write(grid, encode(picture_grid(images, together=together)))
    atomic_write(pictures, buffer.getvalue())
    atomic_write(texts, "".join(c + "\n" for c in captions).encode())
    return grid


def show_in_terminal(images, captions):
    """Draw pictures uint8 (N,H,W,3), two pixels a character (upper half block), captions below."""
    height, width = images.shape[1:3]
    column = max(width, *map(len, captions)) + 2
    wide = os.get_terminal_size().columns if sys.stdout.isatty() else 100
    a_row = max(1, wide // column)
    for start in range(0, len(images), a_row):
        for y in range(0, height, 2):  # height is divisible by 4
            print("".join("".join(
                "\x1b[38;2;%d;%d;%dm\x1b[48;2;%d;%d;%dm▀" % (*top, *low)
                for top, low in zip(image[y], image[y + 1])) + "\x1b[0m" + " " * (column - width)
                for image in images[start : start + a_row]))
        print("".join(f"{c:<{column}}" for c in captions[start : start + a_row]) + "\n")


# --- Runs: regimes as sequences of phases, with progress, saved state and curves ------------------
#
# A regime is a list of phases. Each phase is prepared (data, optimizer, trainer), trained by the
# loop above, and saved. Run is the trainer's companion: it prints, saves the state for --resume,
# notices Ctrl-C, and writes the table and the picture of the curves.

REGIMES = {
    "two-stage": ("vqvae", "igpt"),
    "single": ("single",),
    "multi": ("vqvae", "igpt", "finetune"),
    "vqvae": ("vqvae",),
    "igpt": ("igpt",),
    "finetune": ("finetune",),
}
# Which files each phase makes anew, and which phases' work igpt and finetune alone go on from
MAKES = dict(vqvae=(VQVAE_FILE,), igpt=(IGPT_FILE,), single=(VQVAE_FILE, IGPT_FILE), finetune=())
FOLLOWS = dict(igpt=("vqvae", "single"), finetune=("vqvae", "single", "igpt"))
SAVE_SECONDS = 15  # how often the state for --resume is written: what a kill costs at most


def log(text):
    """A line for the user on stderr; stdout is for results."""
    if processes()[0] == 0:
        print(text, file=sys.stderr, flush=True)


class Run:
    """A run directory during training: what is done, what is shown, what is saved.

    checkpoints/state.pth holds all that the rest of the run depends on; --resume goes on from it.
    """

    def __init__(self, folder, regime, cfg, data):
        self.folder, self.regime, self.cfg = Path(folder), regime, cfg
        self.state_path = self.folder / "checkpoints" / "state.pth"  # what --resume reads
        parts = "\n".join(data.train_captions).encode(), data.train_images, data.vqvae_train
        self.data_hash = functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0)
        self.done, self.rows, self.trainer_state = [], [], None
        self.signal, self.live = 0, sys.stderr.isatty() and processes()[0] == 0

    def begin(self, resume, overwrite):
        """Decide between a new run and the rest of an old one -> is there anything to do?

        Raises InputError if there is a run and neither flag was given, or its settings are others.
        """
        phases = REGIMES[self.regime]
        replaces = any((self.folder / name).exists() for phase in phases for name in MAKES[phase])
        if not self.state_path.exists():
            if replaces and not overwrite:
                raise InputError(f"{self.folder} holds a model that this would replace: "
                                 "--overwrite it, or choose another --run")
            if resume:
                log(f"nothing to resume in {self.folder}: starting anew")
            return True
        state = load_checkpoint(self.state_path, "state")
        lacking = {"regime", "config", "data", "done", "rows", "complete", "trainer"} - state.keys()
        if lacking:
            raise InputError(f"{self.state_path}: damaged, it lacks {', '.join(sorted(lacking))}")
        if not resume:
            again = replaces or set(phases) & set(state["done"])
            if not overwrite and (not state["complete"] or again):
                raise InputError(f"{self.folder} holds a run ({state['regime']}): --resume it, "
                                 "--overwrite it, or choose another --run")
            # A run may be made one phase at a time: what came before is left, the rest is stale
            before = FOLLOWS.get(phases[0], ())
            self.done = [phase for phase in state["done"] if phase in before]
            self.rows = [row for row in state["rows"] if row["phase"] in self.done]
            return True
        if state["data"] != self.data_hash:
            raise InputError(f"cannot resume {self.folder}: it was trained on other data")
        mine = {"regime": self.regime, **dataclasses.asdict(self.cfg)}
        theirs = {"regime": state["regime"], **state["config"]}
        unlike = [f"{k} is {mine.get(k)}, the run's is {theirs.get(k)}"
                  for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
        if unlike:
            raise InputError(f"cannot resume {self.folder}: {'; '.join(unlike)} (repeat its flags)")
        self.done, self.rows, self.trainer_state = state["done"], state["rows"], state["trainer"]
        if state["complete"]:
            log(f"the run in {self.folder} is finished")
        return not state["complete"]

    def save(self, trainer=None, complete=False):
        """Write the state: of the trainer at its step, or between phases."""
        save_checkpoint(self.state_path, "state", {
            "regime": self.regime, "config": dataclasses.asdict(self.cfg), "data": self.data_hash,
            "done": self.done, "rows": self.rows, "complete": complete,
            "trainer": trainer.state_dict() if trainer else None,
        })
        self.saved = time.monotonic()

    def start_phase(self, trainer, total):
        """Hook the run into a trainer, and the saved state, if it is of this phase."""
        trainer.on_step, trainer.on_epoch, self.total = self.on_step, self.on_epoch, total
        if self.trainer_state and self.trainer_state["phase"] == trainer.phase:
            try:
                trainer.load_state_dict(self.trainer_state)
            except DAMAGE as error:
                why = str(error).splitlines()[0][:200]
                raise InputError(f"{self.state_path}: damaged ({why}); --overwrite starts anew"
                                 ) from None
            log(f"resumed {trainer.phase} at step {trainer.step}")
        self.trainer_state = None
        self.save(trainer)
        self.started, self.first_step, self.shown = time.monotonic(), trainer.step, 0.0
        self.header = False

    def pace(self, trainer):
        """-> phase, step, steps a second and time left as text."""
        rate = (trainer.step - self.first_step) / max(time.monotonic() - self.started, 1e-9)
        left = int((self.total - trainer.step) / rate) if rate else 0
        step = f"{trainer.step}/{self.total}"
        return f"{trainer.phase:8} {step:>15} {rate:8.2f}/s {left // 60:4}:{left % 60:02}"

    def stop_if_asked(self):
        """After Ctrl-C or SIGTERM: exit with the status the shell expects."""
        if self.signal:
            log(f"\nstopped, {self.folder} is saved: --resume goes on from here")
            raise SystemExit(128 + self.signal)

    def on_step(self, trainer):
        """Signals, state, progress."""
        if dist.is_initialized():  # all processes stop after the same step
            signal_anywhere = torch.tensor(self.signal, device=trainer.device)
            dist.all_reduce(signal_anywhere, dist.ReduceOp.MAX)
            self.signal = int(signal_anywhere)
        if self.signal:
            self.save(trainer)
            self.stop_if_asked()
        now = time.monotonic()
        if now - self.saved > SAVE_SECONDS:
            self.save(trainer)
        if self.live and now - self.shown > 0.2:
            self.shown = now
            sys.stderr.write(f"\r{self.pace(trainer)}  loss {trainer.last_loss:.4f}\x1b[K")
            sys.stderr.flush()

    def on_epoch(self, trainer, row):
        """One row of the table of figures, and the curves."""
        figures = {k.removeprefix("test_").removeprefix("codebook_"): v for k, v in row.items()
                   if k == "train_loss" or k.startswith("test_")}
        clear = "\r\x1b[K" if self.live else ""
        if not self.header:
            self.header = True
            log(f"{clear}{'phase':8} {'step':>15} {'pace':>10} {'left':>7}"
                + "".join(f" {k:>11}" for k in figures))
        log(clear + self.pace(trainer) + "".join(f" {v:11.4f}" for v in figures.values()))
        self.rows.append({**row, "seconds": round(time.monotonic() - self.started, 1)})
        columns = list(dict.fromkeys(k for row in self.rows for k in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write(self.folder / "results" / "training_curves.csv", text.getvalue().encode())
        curves = ppm_bytes(draw_curves(self.rows))
        atomic_write(self.folder / "results" / "training_curves.ppm", curves)

    @contextlib.contextmanager
    def alone(self):
        """Within: no other process may train in this directory; raises InputError if one does. The
        system frees the lock of a process that was killed."""
        path = self.folder / "checkpoints" / ".lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            if fcntl and processes()[0] == 0:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise InputError(f"another training is at work in {self.folder}") from None
            yield

    @contextlib.contextmanager
    def interruptible(self):
        """Within: Ctrl-C and SIGTERM let the step end, save, and exit with 130 or 143; a second one
        exits at once."""

        def handler(number, frame):
            if self.signal:
                raise SystemExit(128 + number)
            self.signal = number
            log("\nstopping after this step; once more to stop at once")

        old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, previous in old.items():
                signal.signal(number, previous)


# A glyph is five rows of three pixels, an octal digit each: 7 is all three, 4 the left one
FONT = dict(zip("0123456789.-aefgilnopqrstuv", (
    "75557 26227 71747 71717 55711 74717 74757 71111 75757 75717 00002 00700 25755 74647 74644 "
    "74557 72227 44447 65555 75557 75744 75571 65655 34216 72222 55557 55552").split()))


def write_text(canvas, x, y, text, color=(0, 0, 0), scale=2):
    """Write on a picture uint8 (H,W,3), with the upper left corner at (x, y)."""
    for letter in text:
        rows = [[int(row) >> shift & 1 for shift in (2, 1, 0)] for row in FONT.get(letter, "00000")]
        ink = np.array(rows, bool).repeat(scale, 0).repeat(scale, 1)
        canvas[y : y + 5 * scale, x : x + 3 * scale][ink] = color
        x += 4 * scale


def draw_curves(rows, height=300, panel=360):
    """Training (grey) and test loss (red), a panel a phase, each on its own scale, with its
    smallest and largest loss and its last step at the axes -> uint8 (height,width,3). (With a
    caption weight the iGPT's training loss weighs words more; the test loss never does.)"""
    phases = list(dict.fromkeys(r["phase"] for r in rows))
    canvas = np.full((height, panel * len(phases), 3), 255, np.uint8)
    for i, phase in enumerate(phases):
        here = [r for r in rows if r["phase"] == phase]
        losses = np.array([[r["train_loss"], r["test_loss"]] for r in here]).T  # (2,passes)
        left, right, top, bottom = i * panel + 60, (i + 1) * panel - 16, 30, height - 24
        canvas[np.linspace(top, bottom, 5).astype(int), left:right] = 225
        canvas[top:bottom, left] = canvas[bottom, left:right] = 0
        low, high = losses.min(), losses.max()
        for value, y in ((high, top), (low, bottom - 10)):
            write_text(canvas, left - 56, y, f"{value:.4f}"[:6])
        last = str(here[-1]["step"])
        write_text(canvas, left, bottom + 8, "0")
        write_text(canvas, right - 8 * len(last), bottom + 8, last)
        write_text(canvas, left, 8, phase)
        xs = np.arange(left + 1, right)
        ends = np.array([r["step"] for r in here]) / here[-1]["step"]  # of each pass, in the panel
        for curve, name, color, at in zip(losses, ("train", "test"), ((140,) * 3, (200, 40, 40)),
                                          (right - 84, right - 36)):
            write_text(canvas, at, 8, name, color)
            ys = np.interp(np.linspace(0, 1, len(xs)), ends, curve)
            ys = (bottom - 2 - (ys - low) / max(high - low, 1e-9) * (bottom - top - 4)).astype(int)
            for x, y, before in zip(xs, ys, np.concatenate([ys[:1], ys])):
                canvas[min(y, before) : max(y, before) + 2, x] = color  # a steep piece is tall
    return canvas


def parameter_groups(cfg, vqvae=None, igpt=None, factor=1.0, codebook_factor=1.0, igpt_factor=1.0):
    """The optimizer's groups: VQ-VAE, codebook (slower in joint training), transformer; under muon
    the matrices of each are a group of their own. -> list of dicts with params, lr, name."""
    groups = {}
    for model, lr, scale in ((vqvae, cfg.vqvae_lr, factor), (igpt, cfg.igpt_lr, igpt_factor)):
        kind = "vqvae" if model is vqvae else "igpt"
        for name, p in model.named_parameters() if model else ():
            matrix, code = cfg.optimizer == "muon" and is_matrix(name, p), name == "codebook.weight"
            key = f"{kind}_matrices" if matrix else "codebook" if code else kind
            rate = (cfg.muon_lr if matrix else lr * codebook_factor if code else lr) * scale
            group = groups.setdefault(key, {"params": [], "lr": rate, "name": key,
                                            "orthogonal": matrix})
            group["params"] += [p] if p.requires_grad else []
    return [g for g in groups.values() if g["params"]]


def phase_length(cfg, phase, n_rows, batch_size):
    """-> steps a pass, passes, steps in all. What is counted in steps has about ten passes."""
    steps = getattr(cfg, f"{phase}_steps")
    if steps:
        a_pass = -(-steps // 10)
        return a_pass, -(-steps // a_pass), steps
    a_pass, epochs = -(-n_rows // batch_size), getattr(cfg, f"{phase}_epochs")
    return a_pass, epochs, a_pass * epochs


def training_orders(cfg):
    """The orders of the sequences that the predictor trains on -> list of names."""
    return ["text_image"] if cfg.predictor == "parallel" else cfg.orders.split(",")


FEW = slice(0, 500)  # test pictures for the curves; `eval` takes all


def prepare(phase, cfg, data, vqvae, igpt, tokenizer, device):
    """A phase -> trainer, train loader, test loader, passes, steps in all."""
    if phase == "vqvae":
        return prepare_vqvae(cfg, data, vqvae, device)
    if phase == "igpt":
        return prepare_igpt(cfg, data, vqvae, igpt, tokenizer, device)
    return prepare_joint(phase, cfg, data, vqvae, igpt, tokenizer, device)


def prepare_vqvae(cfg, data, vqvae, device):
    """Phase 1 -> as prepare."""
    train_set, test_set = Pictures(data.vqvae_train), Pictures(data.vqvae_test[FEW])
    *loaders, passes, total, equipment = equip(
        "vqvae", cfg, train_set, test_set, parameter_groups(cfg, vqvae), device)
    vqvae.codebook.delay = min(cfg.delay, total // 10)
    vqvae.codebook.restart_until = int(0.6 * total)
    trainer = VQVAETrainer(vqvae, device=device, beta=cfg.beta, extremes=cfg.extremes, **equipment)
    return trainer, *loaders, passes, total


def prepare_igpt(cfg, data, vqvae, igpt, tokenizer, device):
    """Phase 2, all of the VQ-VAE frozen -> as prepare."""
    vqvae.requires_grad_(False).eval()
    torch.manual_seed(cfg.seed)
    # As often the pictures as they are as augmented: enough against learning a few thousand shapes
    # by heart, and not so much that the model draws what augmentation made
    copies, seen = cfg.copies, cfg.igpt_steps * cfg.igpt_batch_size  # seen: sequences, if it says
    if seen:  # what no step would come to use is not made
        copies = min(copies, math.ceil(seen / (2 * len(data.train_images))))
    tokens = [extract_tokens(vqvae, data.train_images)] * max(1, copies)
    tokens += [extract_tokens(vqvae, data.train_images, augment=random_affine)
               for _ in range(copies)]
    test_tokens, orders = extract_tokens(vqvae, data.test_images[FEW]), training_orders(cfg)
    train_set, test_set = (
        Sequences(t, tokenizer.encode_batch(texts), tokenizer, orders) for t, texts in (
            (torch.cat(tokens), data.train_captions), (test_tokens, data.test_captions[FEW])))
    *loaders, passes, total, equipment = equip(
        "igpt", cfg, train_set, test_set, parameter_groups(cfg, igpt=igpt), device)
    trainer = iGPTTrainer(igpt, device=device, vocab_size=tokenizer.vocab_size,
                          sequence_length=igpt.context_length, caption_weight=cfg.caption_weight,
                          **equipment)
    return trainer, *loaders, passes, total


def prepare_joint(phase, cfg, data, vqvae, igpt, tokenizer, device):
    """`single` or phase 3 -> as prepare."""
    single = phase == "single"
    # Here the codes learn by gradient, EMA or not: the transformer has a say in them
    vqvae.requires_grad_(True)
    train_set, test_set = (
        Pictures(images, tokenizer.encode_batch(texts)) for images, texts in (
            (data.train_images, data.train_captions),
            (data.test_images[FEW], data.test_captions[FEW])))
    factors = (1.0, 1.0) if single else (cfg.finetune_lr, cfg.finetune_igpt_lr)
    groups = parameter_groups(cfg, vqvae, igpt, factors[0], cfg.codebook_lr, factors[1])
    *loaders, passes, total, equipment = equip(phase, cfg, train_set, test_set, groups, device)
    vqvae.codebook.ema, vqvae.codebook.delay = 0.0, min(cfg.delay, total // 10) * single
    vqvae.codebook.restart_until = int(0.6 * total) * single  # phase 3: the iGPT knows these codes
    trainer = JointTrainer(
        phase, vqvae, igpt, tokenizer, device=device, beta=cfg.beta, extremes=cfg.extremes,
        lambda_xent=cfg.lambda_xent, lambda_warmup=int(total * cfg.lambda_warmup) * single,
        lambda_ramp=int(total * cfg.lambda_ramp) * single, tau=cfg.tau, orders=training_orders(cfg),
        caption_weight=cfg.caption_weight, **equipment)
    if not single:
        trainer.first_tokens = extract_tokens(vqvae, data.test_images[FEW])
    return trainer, *loaders, passes, total


def equip(phase, cfg, train_set, test_set, groups, device):
    """What every phase needs -> train loader, test loader, passes, steps in all, and a dict of the
    trainer's optimizer, scheduler, clip, seed and bf16."""
    batch_size = cfg.igpt_batch_size if phase == "igpt" else cfg.vqvae_batch_size
    a_pass, passes, total = phase_length(cfg, phase, len(train_set), batch_size)
    train_loader = make_loader(train_set, batch_size, seed=cfg.seed, steps=a_pass, total=total)
    bf16 = use_bf16(cfg.precision, device)
    optimizer, scheduler = make_optimizer(cfg, groups, bf16), None
    if phase != "vqvae" or cfg.vqvae_decay:
        scheduler = create_cosine_scheduler(optimizer, int(cfg.warmup * total), total)
    return train_loader, make_loader(test_set, 125, shuffle=False), passes, total, dict(
        optimizer=optimizer, scheduler=scheduler, clip=cfg.clip, seed=cfg.seed, bf16=bf16)


def settle_factored(cfg, data):
    """A Config whose factored may be 'auto' -> the same, with what suits the pictures instead."""
    if cfg.factored != "auto":
        return cfg
    apart = two_colored(data.vqvae_train) and min(data.train_images.shape[1:3]) >= 8  # four corners
    return dataclasses.replace(cfg, factored="on" if apart else "off")


def train_run(folder, regime, cfg, data, device, resume=False, overwrite=False, finish=None):
    """Train the phases of a regime into a run directory -> vqvae, igpt, tokenizer (the latter two
    None if only the VQ-VAE was trained), or None if the run was complete already.
    finish(vqvae, igpt, tokenizer) is called before the run counts as complete."""
    phases = REGIMES[regime]
    empty = [phase for phase in phases if not phase_length(cfg, phase, 1, 1)[2]]
    if empty and empty != ["finetune"]:
        raise InputError(f"--{empty[0]}-epochs 0: only finetune can be skipped")
    asked, cfg = cfg.factored, settle_factored(cfg, data)
    run = Run(folder, regime, cfg, data)
    if not run.begin(resume, overwrite):
        return None
    if dist.is_initialized():
        dist.barrier()  # all have read the state before the first process writes a new one
    torch.manual_seed(cfg.seed)
    vqvae_path, igpt_path = run.folder / VQVAE_FILE, run.folder / IGPT_FILE
    size, igpt, tokenizer = tuple(data.train_images.shape[1:3]), None, None
    fresh = phases[0] in ("vqvae", "single") and not set(phases) & set(run.done)
    vqvae = build_vqvae(cfg, size).to(device) if fresh else load_vqvae(vqvae_path, device)
    if fresh and asked == "auto":
        log(f"--factored {cfg.factored}, by the size and the colours of the pictures")
    if tuple(vqvae.size) != size:
        raise InputError(f"{vqvae_path}: was trained on {vqvae.size} pictures, these are {size}")
    with run.alone(), run.interruptible():
        for phase in phases:
            if phase in run.done or phase in empty:
                continue
            if phase == "finetune" and igpt is None:
                # A kill while both were being written can leave a pair that does not fit; the state
                # then replaces their weights
                igpt, tokenizer = load_igpt(igpt_path, vqvae, device, bool(run.trainer_state))
            elif phase != "vqvae" and igpt is None:
                tokenizer = Tokenizer(data.train_captions + data.test_captions, vqvae.n_embeddings)
                torch.manual_seed(cfg.seed + 1)
                igpt = build_igpt(cfg, vqvae, tokenizer).to(device)
            started = time.monotonic()
            trainer, *loaders, passes, total = prepare(phase, cfg, data, vqvae, igpt, tokenizer,
                                                       device)
            run.start_phase(trainer, total)
            if cfg.compile:
                try_compile([vqvae.encoder, vqvae.decoder] + [igpt] * (igpt is not None))
            trainer.train(*loaders, passes)
            if phase != "igpt":
                save_vqvae(vqvae_path, vqvae)
            if phase != "vqvae":
                save_igpt(igpt_path, igpt, tokenizer, vqvae)
            run.done.append(phase)
            run.save()
            if phase != "igpt":
                report_codebook(vqvae, data.vqvae_test, device,
                                run.folder / "results" / "reconstructions.ppm")
            log(f"{phase}: {total} steps in {time.monotonic() - started:.0f} s")
            run.stop_if_asked()
    if igpt is None and phases[-1] != "vqvae":  # all that was left to do is to finish
        igpt, tokenizer = load_igpt(igpt_path, vqvae, device)
    models = vqvae.eval(), igpt and igpt.eval(), tokenizer
    if finish:
        finish(*models)
    run.save(complete=True)
    return models


def try_compile(modules):
    """torch.compile the modules in place, or say in one line why not."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1))  # fails here if there is no compiler
        for module in modules:
            module.compile()
    except Exception as error:  # every backend fails in its own way
        log(f"--compile: not here ({type(error).__name__}); going on without")


def peak_memory(device):
    """The most memory this process ever held, on the GPU or in all, as text."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB of GPU memory"
    try:
        import resource  # not on Windows
    except ImportError:
        return "an unknown amount"
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB"


@torch.no_grad()
def report_codebook(vqvae, images, device, path):
    """After a phase that trained the VQ-VAE: is it good enough to go on? Over the whole test set;
    32 originals, each with its reconstruction at its right, go to a picture at `path`."""
    m = measure_reconstruction(vqvae.eval(), make_loader(Pictures(images), 250, shuffle=False))
    log(f"VQ-VAE over {len(images)} test pictures: recon MSE {m['recon_mse']:.4f} (PSNR "
        f"{m['recon_psnr']:.1f} dB), {m['codebook_used']:.0%} of the codes used, perplexity "
        f"{m['codebook_perplexity']:.1f}")
    if m["codebook_used"] < 0.05 or m["codebook_perplexity"] < min(4, vqvae.n_embeddings / 2):
        log("warning: the codebook collapsed: lower --vqvae-lr (in joint training --lambda-xent), "
            "raise --beta, or try --ema 0.99 (in phase 1)")
    some = images[:32]
    recon_x = denormalize(vqvae(Pictures(some)[:].to(device))[2])
    pairs = np.stack([some, recon_x], 1).reshape(-1, *some.shape[1:])  # (2n,H,W,3), alternating
    atomic_write(path, ppm_bytes(picture_grid(pairs, together=2)))


# --- Bench: mmgen against plain code and against the machine, timed in turn -----------------------
#
# Absolute times say more about the machine than about the code, so every row is a ratio of two
# things timed in the same rounds: mmgen's way and the plain way, or mmgen and the machine's own
# limit.


def timed_in_turn(*functions, rounds=5):
    """Median seconds of each function; they take turns, so a slow moment hits all alike."""
    seconds = [[] for _ in functions]
    for i in range(rounds + 1):
        for f, out in zip(functions, seconds):
            start = time.perf_counter()
            f()
            if i:  # the first round warms caches up
                out.append(time.perf_counter() - start)
    return [float(np.median(s)) for s in seconds]


class DistanceTensor(VectorQuantizer):
    """The notes' quantizer: every difference of a feature and a code is written to memory."""

    def nearest(self, flat):
        """Features (M,D) -> the nearest codes, int64 (M,), by way of (M,K,D)."""
        return (flat[:, None] - self.weight[None]).square().sum(-1).argmin(1)


class PlainBlock(Block):
    """A textbook block: scores and softmax spelled out, dropout by a random number an element."""

    def forward(self, x, causal=True, mask=None, cached=None):
        B, T, d = x.shape
        layer = self.attention
        qkv = layer.qkv(self.norm1(x)).view(B, T, 3, layer.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B,heads,T,head_dim) each
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B,heads,T,T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights = F.dropout(scores.masked_fill(future, -math.inf).softmax(-1), self.dropout)
        y = layer.out((weights @ v).transpose(1, 2).reshape(B, T, d))
        x = x + F.dropout(y, self.dropout)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout)


def training_steps(pairs, batch):
    """[(model, its trainer's class and arguments)] -> functions that make one training step each:
    ours, in the precision that `train` would choose, and the other, in float32."""
    steps = []
    for i, (model, trainer_class, *options) in enumerate(pairs):
        optimizer = make_optimizer(Config(), [{"params": model.parameters()}])
        bf16 = i == 0 and use_bf16("auto", torch.device("cpu"))
        trainer = trainer_class(model.train(), optimizer, "cpu", *options, bf16=bf16)
        steps.append(functools.partial(trainer.train_step, batch))
    return steps


def bench_quantizer():
    """6272 features of length 256, forward and backward -> rows of the table."""
    z = torch.randn(128, 7, 7, 256).movedim(-1, 1).requires_grad_()  # laid out as the encoder's

    def both_ways(quantizer):
        z_q, _ = quantizer(z)
        (F.mse_loss(z_q, z.detach()) + F.mse_loss(z, z_q.detach())).backward()

    ours, large, plain = timed_in_turn(*(functools.partial(both_ways, q.eval()) for q in (
        VectorQuantizer(128, 256), VectorQuantizer(1024, 256), DistanceTensor(128, 256))))
    return [("quantizer, K 128, both ways", ours, plain, "(N,K,D) tensor"),
            ("quantizer, K 1024, both ways", large, ours, "K 128")]


def bench_vqvae():
    """Training steps and token extraction of the notes' VQ-VAE, batch 128 -> rows of the table."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, and used only here

    x, vqvae, plain_vqvae = torch.rand(128, 3, 28, 28) * 2 - 1, VQVAE(), VQVAE()
    plain_vqvae.codebook = DistanceTensor(128, 256)
    steps = training_steps([(vqvae, VQVAETrainer), (plain_vqvae, VQVAETrainer)], x)
    # The machine's limit: the convolutions' multiply-adds, of inputs' and weights' gradients, too,
    # at the speed of a large matrix product timed in the same rounds
    with FlopCounterMode(display=False) as counter:
        steps[0]()
    flops = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "conv" in str(op))
    matrix = torch.randn(2048, 2048)
    ours, plain, product = timed_in_turn(*steps, lambda: matrix @ matrix, rounds=3)
    limit = product * flops / (2 * 2048**3)
    images = (127.5 * (x.permute(0, 2, 3, 1).numpy() + 1)).astype(np.uint8)

    @torch.no_grad()
    def encode():
        vqvae.encoder(x)

    extract, encoded = timed_in_turn(lambda: extract_tokens(vqvae, images, 128), encode)
    return [("VQ-VAE step, dim 256, batch 128", ours, plain, "(N,K,D) tensor"),
            ("the same step", ours, limit, "its products at peak float32"),
            ("token extraction", extract, encoded, "encoder's forward pass")]


def bench_igpt():
    """Training steps of the notes' iGPT, batch 128, V 165, 57 tokens -> rows of the table."""
    igpt, plain = iGPT(165, 58), iGPT(165, 58)
    plain.blocks = nn.ModuleList(PlainBlock(128, 4, 0.1) for _ in range(4))
    steps = training_steps([(m, iGPTTrainer, 165, 58) for m in (igpt, plain)],
                           torch.randint(165, (128, 58)))
    return [("iGPT step, batch 128", *timed_in_turn(*steps), "plain attention and dropout")]


def bench_sampling():
    """64 pictures of 49 tokens after 9 of prompt -> rows of the table."""
    tokenizer, how = Tokenizer(["a b c d e f"], 128), SamplingConfig(guidance=0)
    igpt = iGPT(tokenizer.vocab_size, 58).eval()
    prompts = [text_prompt(tokenizer, "a b c d e f")] * 64

    cached = functools.partial(generate, igpt, prompts, 49, tokenizer.image_span, how)

    @torch.no_grad()
    def uncached():
        row = torch.stack(prompts)
        for _ in range(49):
            row = torch.cat([row, sample_token(igpt(row)[:, -1, :128], how)[:, None]], 1)

    cache, tables = igpt.new_cache(64, 58), igpt.tables()
    token = torch.zeros(64, 1, dtype=torch.int64)

    @torch.no_grad()
    def token_at(position):
        igpt(token, igpt.locate(token), cache, position, tables, tokenizer.image_span)

    last, first = timed_in_turn(lambda: token_at(57), lambda: token_at(9), rounds=50)
    size = (cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes()) / 2**20
    return [("sampling 64 pictures", *timed_in_turn(cached, uncached), "no cache"),
            ("the last of their tokens", last, first, "the first"),
            ("their cache", size, 2 * 4 * 64 * 58 * 128 * 4 / 2**20, "as computed", "MiB")]


def bench_start():
    """`mmgen.py --help` in a fresh process -> rows of the table."""
    run = functools.partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    seconds = timed_in_turn(lambda: run([sys.executable, __file__, "--help"]),
                            lambda: run([sys.executable, "-c", "import torch"]))
    return [("mmgen.py --help", *seconds, "import torch")]


def bench():
    """-> rows of the table, one by one: dicts of what, ours, other, unit, ratio (other to ours: how
    many times better ours is) and what the other is."""
    torch.manual_seed(0)
    for part in (bench_quantizer, bench_vqvae, bench_igpt, bench_sampling, bench_start):
        for what, ours, other, name, *unit in part():
            scale = 1 if unit else 1e3
            yield {"what": what, "ours": ours * scale, "other": other * scale,
                   "unit": unit[0] if unit else "ms", "ratio": other / ours, "against": name}


# --- Command line ---------------------------------------------------------------------------------
#
# A thin layer: flags become a Config or a SamplingConfig, the work is done by the functions above,
# and whatever the user got wrong ends as one line and status 2.


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and status 2; sub-parsers are of the same class."""

    def error(self, message):
        raise InputError(message)


def checked(cast, low, high):
    """An argparse type: cast the text, refuse what is outside [low, high]."""
    def convert(text):
        value = cast(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in the range {low} to {high}")
        return value
    convert.__name__ = cast.__name__  # argparse names the type in its message
    return convert


def add_config_flags(parser, config_class):
    """A flag for each field of a config dataclass; flags not given leave no trace."""
    for f in dataclasses.fields(config_class):
        kind, meta, laptop = type(f.default), f.metadata, PRESETS["laptop"].get(f.name)
        other = "" if laptop is None else f"; laptop: {laptop}"
        options = dict(default=argparse.SUPPRESS,
                       help=f"{meta['help']} (default: {f.default}{other})".replace("%", "%%"))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif meta["choices"]:
            options["choices"] = meta["choices"]
        else:
            options |= dict(type=kind, metavar=kind.__name__.upper())  # its range: see Checked
        parser.add_argument(f"--{f.name.replace('_', '-')}", **options)


def given(args, config_class):
    """The fields of a config dataclass that were given as flags."""
    names = [f.name for f in dataclasses.fields(config_class)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def add_sample_flags(p):
    """The flags of `sample`."""
    p.add_argument("--mode", choices=tuple(SAMPLE_NAMES), required=True,
                   help="text: captions to pictures; image: the reverse; unconditional: pairs")
    p.add_argument("-n", type=checked(int, 1, 10**6),
                   help="samples per prompt or picture (default 1), or pairs (9)")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="a caption; may be repeated")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="a caption a line")
    p.add_argument("--image", type=Path, metavar="FILE",
                   help=".npy uint8 (H,W,3) or (N,H,W,3), or a binary PPM")
    p.add_argument("--out", metavar="PREFIX", help="for .ppm, .npy, .txt; PREFIX.png writes a PNG "
                                                   "(default: results/..._samples in --run)")
    p.add_argument("--complete", type=checked(int, 1, 64), default=0, metavar="ROWS",
                   help="keep so many rows of a picture's tokens, draw the rest (mode image)")
    p.add_argument("--best-of", type=checked(int, 1, 1000), default=1, metavar="N",
                   help="of N samples keep the one that makes its prompt the most likely")
    p.add_argument("--show", action="store_true", help="draw the pictures in the terminal")
    add_config_flags(p, SamplingConfig)


def build_parser():
    """All subcommands and flags."""
    parser = Parser(prog="mmgen.py", description="A small multimodal model: VQ-VAE and iGPT.")
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="{data,train,sample,score,eval,bench}")
    count, folder = checked(int, 1, 10**7), dict(type=Path, metavar="DIR")
    seed = dict(type=checked(int, 0, 2**31), default=0, help="(default: 0)")

    def command(name, text, run=True):
        p = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        p.add_argument("--data", default=Path("data"), help="data (default: data)", **folder)
        if run:
            p.add_argument("--run", default=Path("."), help="run (default: .)", **folder)
            p.add_argument("--threads", type=checked(int, 1, 1024), metavar="N",
                           help="CPU threads (default: torch's choice, one a core)")
            p.add_argument("--device", default="auto", help="cpu, cuda ... (default: cuda if any)")
        return p

    p = command("data", "make a data set, drawn.npz", run=False)
    for name, n in zip(("--train", "--test"), N_DRAWN):
        p.add_argument(name, type=count, metavar="N",
                       help=f"pairs (default: {n} drawn, or all there are of MNIST)")
    p.add_argument("--source", choices=("drawn", "mnist"), default="drawn",
                   help="draw the digits (default), or colour and caption raw MNIST")
    p.add_argument("--mnist", help="the four IDX files, gzipped or not", **folder)
    p.add_argument("--size", type=checked(int, 16, 256), default=28, metavar="PIXELS",
                   help="height and width, divisible by 4 (default: 28)")
    p.add_argument("--seed", **seed)
    p = command("train", "train a regime or a single phase")
    p.add_argument("--phase", choices=REGIMES, required=True,
                   help="regime, or one phase from the checkpoints in --run")
    p.add_argument("--preset", choices=("auto", *PRESETS), default="auto",
                   help="full: as the notes; laptop: minutes on two cores; tiny: seconds; auto "
                        "(default): full with a GPU, laptop without")
    group = p.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on where the run in --run stopped")
    group.add_argument("--overwrite", action="store_true", help="start anew over the run in --run")
    add_config_flags(p, Config)
    p = command("sample", "sample pictures, captions or pairs")
    add_sample_flags(p)
    p.add_argument("--seed", **seed)
    p = command("score", "log p of pictures and captions under the model")
    p.add_argument("--prompts", type=Path, metavar="FILE", required=True, help="a caption a line")
    p.add_argument("--image", type=Path, metavar="FILE", required=True,
                   help="as many pictures as captions, or one of either")
    p = command("eval", "measure both models over the test split")
    p.add_argument("--seed", **seed)
    add_config_flags(p, SamplingConfig)
    for p in (p, commands.add_parser("bench", help="time mmgen against plain implementations")):
        p.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser


def pick_device(args):
    """--device and --threads -> torch.device. Raises InputError if it is not there."""
    name = args.device
    if args.threads:
        torch.set_num_threads(args.threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: a GPU for each process
    try:
        torch.empty(1, device=name, dtype=torch.float64)  # sampling adds up probabilities in it
        return torch.device(name)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def write_pairs(folder, arrays):
    """The four arrays of a data set -> folder/drawn.npz."""
    buffer, path = io.BytesIO(), folder / "drawn.npz"
    np.savez_compressed(buffer, **arrays)
    atomic_write(path, buffer.getvalue())
    log(f"wrote {sum(len(a) for n, a in arrays.items() if 'images' in n)} pairs to {path}")


def command_data(args):
    """mmgen.py data"""
    if args.size % 4:
        raise InputError(f"--size {args.size}: must be divisible by 4")
    if (args.source == "mnist") != (args.mnist is not None):
        raise InputError("--source mnist and --mnist DIR belong together")
    if args.mnist and args.size != 28:
        raise InputError(f"--size {args.size}: MNIST's pictures are what they are")
    if args.source == "drawn":
        arrays = make_drawn(args.train or N_DRAWN[0], args.test or N_DRAWN[1], args.size, args.seed)
    else:
        arrays = load_mnist(args.mnist, args.seed)
        arrays = {name: a[: getattr(args, name.split("_")[0])] for name, a in arrays.items()}
    write_pairs(args.data, arrays)


def command_train(args):
    """mmgen.py train"""
    device, preset = pick_device(args), args.preset
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if preset == "auto":
        preset = "full" if device.type != "cpu" else "laptop"
        log(f"preset {preset} (device {device.type})")
    flags = given(args, Config)
    # A length given in epochs replaces the preset's length in steps
    lengths = {k.replace("_epochs", "_steps"): 0 for k in flags if k.endswith("_epochs")}
    cfg = Config(**{**PRESETS[preset], **lengths, **flags})
    if not args.data.is_file() and not any((args.data / name).exists() for name in SOURCES):
        log(f"no data in {args.data}: drawing the embedded set")
        write_pairs(args.data, make_drawn(*N_DRAWN, 28, 0))
    if dist.is_initialized():
        dist.barrier()  # the first process has written the data
    data, started = load_data(args.data, cfg.value_range, log), time.monotonic()

    def finish(vqvae, igpt, tokenizer):
        for mode in () if igpt is None else SAMPLE_NAMES if igpt.causal else ("text",):
            prompts = dict(text=data.test_captions[:9], image=data.test_images[:9]).get(mode)
            samples = make_samples(mode, vqvae, igpt, tokenizer, SamplingConfig(), prompts,
                                   9 if prompts is None else 1, cfg.seed)
            log(f"wrote {save_samples(args.run / 'results' / SAMPLE_NAMES[mode], *samples)}")

    if train_run(args.run, args.phase, cfg, data, device, args.resume, args.overwrite, finish):
        log(f"trained {args.phase} in {time.monotonic() - started:.0f} s; peak memory "
            f"{peak_memory(device)}")


SAMPLE_NAMES = dict(text="text_conditioned_samples", image="image_conditioned_samples",
                    unconditional="unconditional_samples")


def check_size(vqvae, images):
    """Raise InputError unless pictures uint8 (M,H,W,3) are as large as those of the training."""
    if images.shape[1:3] != tuple(vqvae.size):
        raise InputError(f"the model knows {vqvae.size} pictures, not {images.shape[1:3]}")


def make_samples(mode, vqvae, igpt, tokenizer, how, prompts, n=1, seed=0, complete=0, best_of=1):
    """What `sample` writes: pictures uint8 (M,H,W,3) and M captions.

    prompts: captions, whole or begun, for mode 'text'; pictures uint8 (M,H,W,3) for 'image'. n:
    samples per prompt, or pairs. complete: keep so many rows of each picture's tokens and draw the
    rest. best_of: of so many samples keep the one from which the prompt is the most likely.
    """
    device = next(igpt.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    n_tokens, (h, w) = math.prod(vqvae.grid), vqvae.grid
    if mode == "unconditional":
        tokens, captions = sample_pairs(igpt, tokenizer, n_tokens, n, how, generator)
    elif mode == "text":
        captions = np.repeat(prompts, n).tolist()
        if igpt.causal:
            captions = complete_captions(igpt, tokenizer, captions, how, generator)
        captions = np.repeat(captions, best_of).tolist()
        tokens = sample_images(igpt, tokenizer, n_tokens, captions, how, generator)
    else:
        check_size(vqvae, prompts)
        if not 0 <= complete < h:
            raise InputError(f"--complete {complete}: pictures have {h} rows of tokens")
        tokens = extract_tokens(vqvae, prompts).repeat_interleave(n * best_of, 0)
        if complete:
            whole = tokens
            tokens = complete_images(igpt, tokenizer, whole[:, : complete * w], n_tokens, how,
                                     generator)
            if isinstance(vqvae, FactoredVQVAE):  # the picture's colours stay as they are
                corners(tokens.view(-1, h, w)).copy_(corners(whole.view(-1, h, w)))
        captions = sample_captions(igpt, tokenizer, tokens, how, generator)
    if best_of > 1 and mode != "unconditional":
        drawn, read, *_ = likelihoods(igpt, tokenizer, tokens, captions)
        best = (read if mode == "text" else drawn).view(-1, best_of).argmax(1).cpu()
        best += best_of * torch.arange(len(best))
        tokens, captions = tokens[best], [captions[i] for i in best]
    if mode == "image" and not complete:
        return np.repeat(prompts, n, 0), captions
    return decode_pictures(vqvae, tokens), captions


def load_models(args):
    """-> VQ-VAE, iGPT and Tokenizer of the run in --run, on --device."""
    device = pick_device(args)
    vqvae = load_vqvae(args.run / VQVAE_FILE, device)
    return vqvae, *load_igpt(args.run / IGPT_FILE, vqvae, device)


def load_test_split(args, vqvae):
    """The data in --data, read as it was for training. Raises InputError if the sizes differ."""
    data = load_data(args.data, vqvae.config.value_range, log=None)
    check_size(vqvae, data.test_images)
    return data


def command_sample(args):
    """mmgen.py sample"""
    models, how = load_models(args), SamplingConfig(**given(args, SamplingConfig))
    prompts = (args.prompt or []) + (read_captions(args.prompts) if args.prompts else [])
    if (prompts and args.mode != "text") or (args.image or args.complete) and args.mode != "image":
        raise InputError("--prompt and --prompts belong to --mode text, --image and --complete to "
                         "--mode image")
    out = args.out or args.run / "results" / SAMPLE_NAMES[args.mode]
    given_files = [path.resolve() for path in (args.prompts, args.image) if path]
    for path in sample_paths(out):
        if path.resolve() in given_files:
            raise InputError(f"--out {out} would write over {path}, which was given to read")
    if args.best_of > 1 and args.mode == "unconditional":
        raise InputError("--best-of needs a prompt or a picture to be true to")
    if args.image:
        prompts = read_pictures(args.image)
    elif not prompts and args.mode != "unconditional":
        data = load_test_split(args, models[0])
        prompts = (data.test_captions if args.mode == "text" else data.test_images)[:9]
    n = args.n or (9 if args.mode == "unconditional" else 1)
    images, captions = make_samples(args.mode, *models, how, prompts, n, args.seed, args.complete,
                                    args.best_of)
    path = save_samples(out, images, captions, 1 if args.mode == "unconditional" else n)
    print("\n".join(captions))
    if args.show:
        show_in_terminal(images, captions)
    log(f"wrote {path}")


def read_captions(path):
    """A text file -> its lines that are not blank."""
    try:
        captions = [c for c in path.read_text(encoding="utf-8").splitlines() if c.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file") from None
    if not captions:
        raise InputError(f"{path} holds no caption")
    return captions


def command_score(args):
    """mmgen.py score"""
    vqvae, igpt, tokenizer = load_models(args)
    captions, images = read_captions(args.prompts), read_pictures(args.image)
    check_size(vqvae, images)
    if 1 not in (len(images), len(captions)) and len(images) != len(captions):
        raise InputError(f"{len(captions)} captions for {len(images)} pictures")
    tokens, M = extract_tokens(vqvae, images), max(len(images), len(captions))
    tokens, captions = tokens.expand(M, -1), captions * (M // len(captions))
    drawn, read, pair, n, words = (x.cpu() for x in likelihoods(igpt, tokenizer, tokens, captions))
    bits = [-x / k / math.log(2) for x, k in ((drawn, n), (read, words), (pair, n + words))]
    print(f"{'log p in nats':>41}{'bits a token':>41}")
    print(f"{'picture|caption':>16}{'caption|picture':>16}{'pair':>9}" * 2 + "  caption")
    for row in zip(drawn, read, pair, *bits, captions):
        print("{:16.2f}{:16.3f}{:9.2f}{:16.3f}{:16.3f}{:9.3f}  {}".format(*row))


def command_eval(args):
    """mmgen.py eval"""
    models, how = load_models(args), SamplingConfig(**given(args, SamplingConfig))
    data = load_test_split(args, models[0])
    log(f"measuring over {len(data.test_images)} test pairs ...")
    figures = evaluate(*models, data.test_images, data.test_captions, how, args.seed)
    if args.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:24}{value:10.4f}" for name, value in figures.items()))


def command_bench(args):
    """mmgen.py bench"""
    if args.json:
        print(json.dumps(list(bench())))
        return
    bf16 = use_bf16("auto", torch.device("cpu"))
    print(f"mmgen's training steps in {'bfloat16' if bf16 else 'float32'}, all else in float32")
    print(f"{'what':34}{'mmgen':>9}{'other':>9}{'':6}{'ratio':>7}  other")
    for row in bench():
        print("{what:34}{ours:9.1f}{other:9.1f} {unit:5}{ratio:6.2f}x  {against}".format(**row),
              flush=True)


def main(argv=None):
    """The command line; returns the exit status."""
    try:
        args = build_parser().parse_args(argv)
        dict(data=command_data, train=command_train, sample=command_sample, score=command_score,
             eval=command_eval, bench=command_bench)[args.command](args)
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"mmgen: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
