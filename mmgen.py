#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy"]
# ///
"""mmgen: a small multimodal generative model in one file, to run, to read and to copy from.

    python mmgen.py train                  # data if there is none, VQ-VAE, iGPT, fine-tune, samples
    python mmgen.py sample --mode text --prompt "dark red seven on light blue" --show
    python mmgen.py sample --mode image    # captions for the first 9 test pictures
    python mmgen.py eval                   # every figure over the test split

A VQ-VAE turns a picture into a grid of discrete tokens. An iGPT (a decoder-only transformer) models
picture tokens and caption words as ONE sequence. So one network draws a caption (the caption first,
then the picture), captions a picture (the reverse), or makes up both.

Part I is the complete algorithm, in the order in which the data flows; everything else is Part II.
Part I uses nothing of Part II: to copy it, take all above that banner. In brackets: what of the two
original notes a chapter implements. Notes A are the recipe of a VQ-VAE and an iGPT for coloured
MNIST, notes B the plan for training them together.

    Settings      Config, SamplingConfig: every number one may turn             [A, configuration]
    Batches       Batches: what is learned from, in an order that can be resumed
    Tokenizer     Tokenizer: codes, words and marks in one vocabulary           [A, tokens]
    VQ-VAE        VectorQuantizer, VQVAE, FactoredVQVAE, compute_loss           [A, VQ-VAE; B 1]
    Attention     attend, SelfAttention                                         [A, KV cache]
    iGPT          iGPT, ParallelPredictor                                       [A, iGPT; B 1]
    Sequences     make_sequences, text_prompt, image_prompts, extract_tokens    [A, token sequence]
    Measures      next_token_nll, measure_reconstruction, measure_prediction    [A, losses; B 6]
    Optimizers    Muon, make_optimizer, create_cosine_scheduler                 [B 4]
    Training      Trainer, VQVAETrainer, iGPTTrainer, JointTrainer              [A and B, training]
    Regimes       Data, prepare_phase, train_regime: two-stage, single, multi   [B, all of it]
    Sampling      logits_to_probs, sample_token, Decoder, generate, Models      [A, generation]
    Evaluation    evaluate
    --- Part II
    Drawn digits  STROKES, draw_digits: a data set from pen strokes
    Data          to_uint8, load_data, create_dataset: pickles, MNIST, npz      [A, data]
    Files         save_vqvae, load_igpt, save_samples: checkpoints, pictures    [A, output files]
    Runs          Run, train_run: curves, saved state, resume
    Commands      main

Symbols of the shape comments:
    B  batch                   H, W  picture height, width     h, w  token grid: H/4, W/4
    N  = h*w, tokens a picture    K  codes in the codebook        D  length of a code vector
    T  tokens in a sequence       L  words in the longest caption    d  width of the transformer
    V  vocabulary = K codes, then the sorted caption words, then the four specials
    M  rows of a data set         S  tokens that a span may hold     C  channels, copies of a set
    z_e  encoder output           z_q  the nearest code vectors      sg  stop gradient: detach
A mark is one of the specials EOT, EOI and BOS, which say what comes next in a sequence. A phase is
one training of one or both models; a regime is a list of phases.

Where this departs from the notes, and why:
  * Their codebook never learns: both VQ terms detach z_q. Ours is mean((z_q - sg[z_e])^2).
  * Their distances build an (N, K, D) tensor. |z-e|^2 = |z|^2 - 2 z.e + |e|^2 is a matrix product.
  * They train on BOS IMAGE ... but prompt with BOS EOI TEXT and BOS EOT IMAGE, which no training
    sequence showed. We train on the two orders that are prompted (`--orders plain` is theirs).
  * Their cache grows by concatenation at every token. Ours is allocated once, position explicit.
  * Their one-phase loss sends no gradient from the transformer to the encoder (an argmin has none).
    The targets of our cross-entropy have the gradient of softmax(-|z_e - e_k|^2 / tau).
  * Added because a laptop sees each picture only a few times, so that learning per step counts,
    each with its reason where it stands: a norm before the codebook, colours coded apart from
    shapes, normed queries and keys, places counted from the last mark, codes alike that share what
    is learned, noise, Muon, guidance. All phases warm up and decay, not the iGPT's alone.
"""

import difflib
import functools
import itertools
import json
import math
import numbers
import re
import sys
import time
import zlib
from collections import defaultdict, namedtuple
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

class InputError(ValueError):
    """What was given cannot be used; the message says what and why, in one line."""

def processes():
    """-> (number of this process, how many train together): (0, 1) unless torchrun started us."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def summed(tensor):
    """A tensor -> its sum over all processes that train together."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def wait_for_all():
    """Go on when all processes that train together are here."""
    if dist.is_initialized():
        dist.barrier()

def log(text, end="\n"):
    """A line for the user on stderr, from the first process alone; stdout is for results."""
    if processes()[0] == 0:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # track may have left its line
        print(clear + text, file=sys.stderr, end=end, flush=True)

def track(items, what, done=0, news=str):
    """The items one by one. On a terminal one line that changes says how far it is, how fast, how
    much longer and what news() returns; elsewhere a line every five seconds does.

    items: an iterable with a length. done: how many of the kind were done before.
    """
    live, started = sys.stderr.isatty(), time.monotonic()
    shown, total = started, done + len(items)
    for i, item in enumerate(items):
        now = time.monotonic()
        if i and now - shown > (0.2 if live else 5):
            shown, left = now, int((len(items) - i) * (now - started) / i)
            rate = f"{i / (now - started):.2f}/s  {left // 60}:{left % 60:02} left"
            log(f"{what} {done + i}/{total}  {rate}  {news()}", end="" if live else "\n")
        yield item


# ==================================================================================================
# Part I: the model
# ==================================================================================================


# --- Settings: every number one may turn, with its default, its range and its reason --------------

PRESETS = ("full", "laptop", "tiny")
ORDERS = ("image_text", "text_image", "plain")  # of a sequence, see make_sequences
Field = namedtuple("Field", "default presets limits text")

def parse(cell):
    """A cell of a table -> the int, float, bool, list or text that it spells."""
    try:
        return json.loads(cell)
    except ValueError:
        return cell

class Settings:
    """Base of the classes below. Each line of a class's `table` makes a field, and a flag of the
    command line (vqvae_dim is --vqvae-dim): name, default (or the values in all PRESETS, of which
    the first is the default), range or choices, and what to know before turning it.

    A class's attributes hold the defaults; the constructor takes others by name. Raises InputError
    for a value of another type or out of its range, TypeError for a name that is not in the table.
    """

    table, fields = "", {}

    def __init_subclass__(cls):
        cls.fields = {}
        for line in cls.table.strip().splitlines():
            name, *cells, limits, text = re.split("  +", line.strip())
            values = list(map(parse, cells))
            cls.fields[name] = Field(values[0], dict(zip(PRESETS, values)), limits, text)
            setattr(cls, name, values[0])

    def __init__(self, **values):
        for name, field in self.fields.items():
            value, kind = values.pop(name, field.default), type(field.default)
            low, dots, high = field.limits.partition("..")
            fits = isinstance(value, numbers.Real if dots else kind)
            if fits and dots:
                whole = kind is float or value % 1 == 0
                fits = whole and float(low) <= value <= float(high or "inf")
            elif fits and low != "any":
                fits = value in low.split("|")
            if not fits:
                raise InputError(f"{name} is {value!r}, want {kind.__name__} {field.limits}")
            setattr(self, name, kind(value))  # NumPy's numbers become Python's
        if values:
            raise TypeError(f"{type(self).__name__} has no {', '.join(values)}")

    def but(self, **changes):
        """The same settings but for some changes."""
        return type(self)(**vars(self) | changes)

class Config(Settings):
    """How to train. `full` is the configuration of notes A. `laptop`: a CPU sees each picture a few
    times only, so batches are small, dropout is 0 and lengths are in steps (the time then does not
    depend on the data). `tiny`: seconds, for tests. A length in steps, if not 0, goes before that
    in epochs."""

    table = """
        vqvae_dim        256     64      16      4..          channels; 64 is 12 times as fast
        vqvae_K          128     1024    32      2..          codes; more: sharper, slower iGPT
        vqvae_D          256     64      16      2..          length of a code vector
        factored         off     auto    off     off|on|auto  code shapes apart from colours
        beta             0.25    2.0     0.25    0..          commitment weight; 0.1 to 2 work
        extremes         0.0     0.1     0.0     0..          weight of extreme colours; 0 to 0.5
        ema              0.0     0.0     0.0     0..0.9999    decay of EMA codes in phase 1; 0: none
        restart          100     50      100     0..          restart codes unused for longer; 0: no
        vqvae_epochs     30      30      30      1..          length of phase 1
        vqvae_steps      0       3500    60      0..          the same in steps
        vqvae_lr         1e-3    3e-3    3e-3    0..          learning rate of the VQ-VAE
        d_model          128     128     32      4..          width of the iGPT
        n_heads          4       4       2       1..          heads; they divide the width
        n_layers         4       4       2       1..          blocks
        dropout          0.1     0.0     0.1     0..0.9       in blocks; 0 for runs of few epochs
        predictor        causal  causal  causal  causal|parallel  parallel: all codes at once
        orders           image_text,text_image   any          of sequences, with commas; also plain
        caption_weight   1.0     20.0    1.0     0..          of words after a picture; 5 to 20
        noise            0.0     0.3     0.0     0..1         picture tokens falsified at the input
        augment          0.0     0.07    0.0     0..1         warp of a second copy; 0: no such copy
        igpt_epochs      30      30      30      1..          length of phase 2
        igpt_steps       0       4000    60      0..          the same in steps
        igpt_lr          1e-3    8e-3    3e-3    0..          learning rate of the iGPT
        single_epochs    30      30      30      1..          length of `single`
        single_steps     0       3900    80      0..          the same in steps
        finetune_epochs  3       3       3       0..          of phase 3, 5-20 % of phase 1; 0: none
        finetune_steps   0       175     10      0..          the same in steps
        finetune_lr      0.01    0.002   0.01    0..          VQ-VAE's rates in phase 3, relative
        lambda_xent      0.003   0.003   0.003   0..          of cross-entropy; 0.1: codes collapse
        lambda_warmup    0.3     0.15    0.3     0..1         share of `single` in which that is 0
        batch_size       128     32      16      1..          32 learns most a second on a CPU
        optimizer        adam    muon    adam    adam|muon    muon: orthogonal steps for matrices
        precision        auto    auto    fp32    auto|fp32|bf16  of products; auto: bf16 if fast
        seed             0       0       0       0..2147483648   of weights, batches and noise
    """

    def __init__(self, **values):
        super().__init__(**values)
        if not set(self.orders.split(",")) <= set(ORDERS):
            raise InputError(f"orders is {self.orders}, not some of {', '.join(ORDERS)}")
        if self.d_model % self.n_heads:
            raise InputError(f"d_model {self.d_model} is not divisible by {self.n_heads} heads")

    @classmethod
    def preset(cls, preset, **changes):
        """The Config of one of the PRESETS, but for some changes. A length that is given in epochs
        replaces the preset's in steps."""
        if preset not in PRESETS:
            raise InputError(f"preset is {preset!r}, not one of {', '.join(PRESETS)}")
        values = {}
        for name, field in cls.fields.items():
            values[name] = field.presets.get(preset, field.default)
            if name.replace("_steps", "_epochs") in changes:
                values[name] = field.default
        return cls(**values | changes)

class SamplingConfig(Settings):
    """How a token is chosen; the library and the command line share these defaults."""

    table = """
        temperature  1.0    0..      below 1: safer, above: wilder; 0: greedy
        top_k        0      0..      only the k most likely tokens; 0: all
        top_p        1.0    1e-6..1  only the most likely tokens, down to this share in sum
        greedy       false  any      always the most likely token
        guidance     1.0    0..      of pictures by captions; 3: truer, less varied; 0: none
        min_p        0.1    0..1     guided: only tokens this likely, relative to the likeliest
    """


# --- Batches: what is learned from, in an order that can be resumed -------------------------------
#
# Pictures are uint8 (M,H,W,3) in memory, and floats (B,3,H,W) in [-1,1], four times as large, only
# in a batch.

class Batches:
    """Batch number `step` as a function of (seed, step) alone, so that training can go on from any
    step. (A shuffled DataLoader hides its place in a generator's state.) Rows are permuted anew in
    every epoch; a PASS, what one iteration yields and len() counts, need not be an epoch.

    get: row numbers int64 (B,) -> a batch. n_rows: how many rows there are. seed None: in order,
    and not shared out between processes. per_pass: batches a pass (default: an epoch).
    """

    def __init__(self, get, n_rows, batch_size, seed=None, per_pass=None):
        self.get, self.n_rows, self.batch_size, self.seed = get, n_rows, batch_size, seed
        self.per_epoch = math.ceil(n_rows / batch_size)
        self.per_pass, self.next_step = per_pass or self.per_epoch, 0
        self.permutation = functools.lru_cache(1)(self.permutation)  # of the current epoch

    def permutation(self, epoch):
        """Row numbers in an epoch's order, int64 (n_rows,)."""
        chance = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.n_rows, generator=chance)

    def __len__(self):
        return self.per_pass

    def __iter__(self):
        self.next_step += self.per_pass  # a plain `for` sees another order each time
        return map(self.__getitem__, range(self.next_step - self.per_pass, self.next_step))

    def __getitem__(self, step):
        epoch, batch = divmod(step, self.per_epoch)
        part = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        if self.seed is None:
            return self.get(torch.arange(self.n_rows)[part])
        rows, (rank, world) = self.permutation(epoch)[part], processes()
        # Several processes share a batch in equal parts; what is lacking is taken twice
        size = math.ceil(len(rows) / world)
        return self.get(rows.repeat(world)[rank * size : (rank + 1) * size])

def to_float(images):
    """uint8 tensor (B,H,W,3) -> float (B,3,H,W) in [-1,1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1

def denormalize(x):
    """The way back: (B,3,H,W) in [-1,1] -> uint8 array (B,H,W,3)."""
    x = (x.clamp(-1, 1) + 1) * 127.5
    return x.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

def random_affine(x, strength):
    """Turn, slant, zoom and shift each picture (B,3,H,W) a bit, at random: each number of an affine
    map is off by about `strength`. Nothing is mirrored, no colour changed, the border continued."""
    theta = torch.eye(2, 3) + strength * torch.randn(len(x), 2, 3)  # (B,2,3)
    grid = F.affine_grid(theta.to(x), x.shape, align_corners=False)  # (B,H,W,2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

def picture_batches(images, batch_size, text_ids=None, **options):
    """uint8 pictures (M,H,W,3) -> Batches of (B,3,H,W) in [-1,1]; with text ids (M,L+1) of pairs
    (pictures, text ids (B,L+1))."""
    pixels = torch.from_numpy(images)

    def get(rows):
        x = to_float(pixels[rows])
        return x if text_ids is None else (x, text_ids[rows])

    return Batches(get, len(images), batch_size, **options)


# --- Tokenizer: one vocabulary for codes, words and marks -----------------------------------------
#
# Codes and words share one vocabulary, so that one network with one softmax can speak both. Ids
# are laid out so that each kind of token is one range, and "only codes may come here" is a slice
# of the logits:
#     0 ... K-1 codes | K ... V-5 sorted words | V-4 EOT | V-3 EOI | V-2 BOS | V-1 PAD

def specials(vocab_size):
    """-> ids of EOT (end of text), EOI (end of image), BOS (beginning) and PAD (padding)."""
    return range(vocab_size - 4, vocab_size)

class Tokenizer:
    """Words to token ids and back (notes A, "multimodal token processing").

    texts: the captions whose words make the vocabulary. n_embeddings: K. caption_length: L, by
    default that of the longest caption. Raises InputError if there is no word.
    """

    def __init__(self, texts, n_embeddings, caption_length=None):
        captions = [text.split() for text in texts]
        self.words = sorted(set().union(*captions))  # sorted: the same ids in every process
        if not self.words:
            raise InputError("the captions hold no words")
        self.n_embeddings = n_embeddings
        self.caption_length = caption_length or max(map(len, captions))  # L
        self.all_words = [*self.words, "<eot>", "<eoi>", "<bos>", "<pad>"]
        self.vocab_size = n_embeddings + len(self.all_words)  # V
        (self.end_of_text_token, self.end_of_image_token, self.bos_token,
         self.pad_token) = specials(self.vocab_size)
        # The ids that each span of a sequence may hold, [low, high): sampling is restricted to them
        self.image_span = 0, n_embeddings
        self.text_span = n_embeddings, self.end_of_image_token  # a word, or the caption's end
        self.start_span = self.end_of_text_token, self.bos_token  # EOT: a picture, EOI: a caption

    def text_encode(self, text):
        """A caption -> its word ids, int64 (words,), no specials. Raises InputError for no words,
        more than L, or an unknown one (naming the nearest it knows)."""
        words = text.split()
        for word in words:
            if word not in self.words:
                near = difflib.get_close_matches(word, self.words, n=1, cutoff=0.0)[0]
                raise InputError(f"unknown word {word!r} in {text!r}: did you mean {near!r}?")
        if not 1 <= len(words) <= self.caption_length:
            raise InputError(f"{text!r} has {len(words)} words, not 1 to {self.caption_length}")
        return self.n_embeddings + torch.tensor([self.words.index(word) for word in words])

    def text_decode(self, tokens):
        """Token ids (tensor or list of ints) -> the caption they spell, up to the first EOT."""
        ids = itertools.takewhile(lambda i: i != self.end_of_text_token, map(int, tokens))
        K = self.n_embeddings
        return " ".join(self.all_words[i - K] for i in ids if i >= K)

    def encode_batch(self, texts):
        """B captions -> int64 (B,L+1): the words, one EOT, PAD up to the longest caption."""
        ids = torch.full((len(texts), self.caption_length + 1), self.pad_token)
        for row, text in zip(ids, texts):
            words = self.text_encode(text)
            row[: len(words)] = words
            row[len(words)] = self.end_of_text_token
        return ids


# --- VQ-VAE: picture -> features z_e (B,D,h,w) -> nearest codes z_q (B,D,h,w) -> picture ----------
#
# An encoder shrinks the picture to a grid of features, a codebook replaces each feature by the
# nearest of K learned vectors (its number is the token), and a decoder paints the picture from
# these vectors. The replacement has no gradient, so the decoder's gradient is handed to the encoder
# as if nothing had been replaced ("straight through"), and two more loss terms keep features and
# codes together. What goes wrong in practice is that most codes are never the nearest and die: see
# the norm before the codebook, and `restart`.

class VectorQuantizer(nn.Module):
    """The codebook, K vectors of length D, and the search for the nearest (van den Oord 2017).

    ema 0: the codebook learns by gradient, through the codebook term of compute_loss. ema in (0,1):
    each code is a moving average, of this decay, of the features it was the nearest to, and gets no
    gradient. restart: a code unused for more than this many training batches is put onto a feature,
    as are all codes that the first batch does not use (0: never). In eval mode nothing moves.
    """

    def __init__(self, K, D, ema=0.0, restart=100):
        super().__init__()
        self.K, self.ema, self.restart = K, ema, restart or math.inf
        self.weight = nn.Parameter(torch.empty(K, D).uniform_(-1 / K, 1 / K), requires_grad=not ema)
        # Buffers travel in checkpoints, so a resumed run goes on as if it had never stopped
        self.register_buffer("unused", torch.full((K,), float(self.restart)))  # for so many batches
        self.register_buffer("ema_count", torch.ones(K))
        self.register_buffer("ema_sum", self.weight.detach().clone())

    def distances(self, z):
        """Features (...,D) -> squared distances to all codes (...,K), as |z|^2 - 2 z.e + |e|^2: a
        matrix product, no (...,K,D) tensor."""
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would pick codes by luck
            flat, e = z.float().flatten(0, -2), self.weight
            near = torch.addmm(e.square().sum(1), flat, e.t(), alpha=-2)
            near = near + flat.square().sum(1, keepdim=True)
            return near.view(*z.shape[:-1], self.K)

    @torch.no_grad()
    def nearest(self, z_e):
        """Features z_e (B,D,h,w) -> tokens, the numbers of the nearest codes, int64 (B,h,w)."""
        return self.distances(z_e.movedim(1, -1)).argmin(-1)

    def forward(self, z_e):
        """Features z_e (B,D,h,w) -> the nearest codes z_q (B,D,h,w), with gradient to them."""
        tokens = self.nearest(z_e)  # (B,h,w)
        z_q = F.embedding(tokens, self.weight).movedim(-1, 1)  # (B,D,h,w)
        if self.training:
            z = z_e.detach().float().movedim(1, -1)  # (B,h,w,D)
            self.update(z.flatten(0, 2), tokens.flatten())
        return z_q

    @torch.no_grad()
    def update(self, z, tokens):
        """After a training batch of features (B*h*w,D), coded as (B*h*w,): move EMA codes (appendix
        A of the paper), restart dead ones."""
        count = summed(torch.bincount(tokens, minlength=self.K).float())  # (K,)
        if self.ema:
            total = summed(torch.zeros_like(self.ema_sum).index_add_(0, tokens, z))  # (K,D)
            self.ema_count.lerp_(count, 1 - self.ema)
            self.ema_sum.lerp_(total, 1 - self.ema)
            self.weight.copy_(self.ema_sum / self.ema_count.clamp(min=1e-30)[:, None])
        self.unused = torch.where(count > 0, 0, self.unused + 1)
        dead = self.unused > self.restart  # (K,)
        if dead.any():
            # A feature's chance is its squared distance from the nearest code, as in k-means++
            # (Arthur and Vassilvitskii 2007): what is rare, but badly coded, gets codes, too
            error = self.distances(z).amin(1).clamp(min=1e-9)
            rows = z[error.multinomial(int(dead.sum()), replacement=True)]
            rows = rows + 0.01 * z.std() * torch.randn_like(rows)  # a bit off: none coincide
            if dist.is_initialized():
                dist.broadcast(rows, 0)  # all processes restart a code at the same place
            self.weight[dead] = self.ema_sum[dead] = rows
            self.ema_count[dead], self.unused[dead] = 1.0, 0

class ResidualBlock(nn.Sequential):
    """x + conv1x1(relu(conv3x3(relu(x)))), the VQ-VAE paper's block. (B,C,h,w) -> (B,C,h,w)."""

    def __init__(self, dim):
        super().__init__(
            nn.ReLU(), nn.Conv2d(dim, dim, 3, 1, 1),
            nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, x):
        return x + super().forward(x)

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell. (B,C,h,w) -> (B,C,h,w)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1).float()).movedim(-1, 1)

class VQVAE(nn.Module):
    """Pictures to tokens and back. VQVAE(dim=256, K=128, D=256) is the configuration of notes A.

    dim: channels. K: codes. D: length of a code. size: (H, W) of the pictures, for which flat rows
    of tokens are folded; pictures of other sizes pass, too. ema, restart: see VectorQuantizer.
    Raises InputError for a size not divisible by 4.
    """

    def __init__(self, dim=256, K=128, D=256, size=(28, 28), ema=0.0, restart=100):
        super().__init__()
        if size[0] % 4 or size[1] % 4:
            raise InputError(f"picture size {size}: height and width must be divisible by 4")
        # What builds this model again, for checkpoints
        self.options = dict(dim=dim, K=K, D=D, size=tuple(size), ema=ema, restart=restart)
        self.n_embeddings, self.size = K, tuple(size)
        self.grid = size[0] // 4, size[1] // 4  # (h, w)
        self.n_tokens = math.prod(self.grid)  # N
        self.encoder = nn.Sequential(
            nn.Conv2d(3, dim, 4, 2, 1),  # (B,dim,H/2,W/2)
            nn.ReLU(),
            nn.Conv2d(dim, dim, 4, 2, 1),  # (B,dim,h,w)
            ResidualBlock(dim),
            ResidualBlock(dim),
            nn.ReLU(),
            nn.Conv2d(dim, D, 1),  # (B,D,h,w); the notes' pre_quantization_conv
            # Without a norm the scale of the features runs away from the codes, which lag and die
            ChannelNorm(D),
        )
        self.codebook = VectorQuantizer(K, D, ema, restart)
        self.decoder = nn.Sequential(
            nn.Conv2d(D, dim, 1),  # (B,dim,h,w)
            ResidualBlock(dim),
            ResidualBlock(dim),
            nn.ReLU(),
            nn.ConvTranspose2d(dim, dim, 4, 2, 1),  # (B,dim,H/2,W/2)
            nn.ReLU(),
            nn.ConvTranspose2d(dim, 3, 4, 2, 1),  # (B,3,H,W)
        )
        self.to(memory_format=torch.channels_last)  # less reordering in convolutions: 4 % of a step

    def encode(self, x):
        """Pictures (B,3,H,W) in [-1,1] -> features z_e (B,D,h,w)."""
        return self.encoder(x)

    def decode(self, z):
        """Code vectors (B,D,h,w) of any grid -> pictures (B,3,4h,4w)."""
        return self.decoder(z)

    def forward(self, x):
        """x (B,3,H,W) in [-1,1] -> z_e (B,D,h,w), z_q (B,D,h,w), recon_x (B,3,H,W)."""
        z_e = self.encode(x)
        z_q = self.codebook(z_e)
        # In value z_q, in gradient z_e: straight through the codebook (Bengio et al. 2013)
        return z_e, z_q, self.decode(z_e + (z_q - z_e).detach())

    @torch.no_grad()
    def get_tokens(self, x):
        """Pictures (B,3,H,W) in [-1,1] -> tokens int64 (B,h,w). Moves no code, in training too."""
        return self.codebook.nearest(self.encode(x))

    def decode_tokens(self, tokens):
        """Tokens (B,h,w) of any grid, or flat (B,N) of the model's own -> pictures (B,3,4h,4w).
        Raises InputError for other lengths and for ids that are no codes."""
        if tokens.dim() == 2:
            if tokens.shape[1] != self.n_tokens:
                raise InputError(f"{tokens.shape[1]} tokens do not make a grid of {self.grid}")
            tokens = tokens.view(-1, *self.grid)
        if ((tokens < 0) | (tokens >= self.n_embeddings)).any():
            raise InputError(f"picture tokens must be in 0..{self.n_embeddings - 1}")
        return self.decode(F.embedding(tokens, self.codebook.weight).movedim(-1, 1))

def split_colors(x):
    """Pictures (B,3,H,W) of two colours and their blends -> mask (B,1,H,W), 0 where the ground is
    and 1 where the ink is, and colors (B,2,3), ground and ink. So a red seven on blue and a white
    one on black have the same mask.

    The ink is the pixel farthest from the picture's mean (for the ground, the larger part, draws
    the mean to itself), the ground the pixel farthest from the ink, and the mask how far each pixel
    has come along the straight line from one to the other.
    """
    pixels = x.float().flatten(2).mT  # (B,H*W,3)

    def farthest(point):  # (B,1,3) -> the pixel farthest from it, (B,1,3)
        index = (pixels - point).square().sum(2).argmax(1)  # (B,)
        return pixels[torch.arange(len(x)), index][:, None]

    ink = farthest(pixels.mean(1, keepdim=True))
    ground = farthest(ink)
    way = ink - ground  # (B,1,3)
    mask = ((pixels - ground) * way).sum(2) / way.square().sum(2).clamp(min=1e-3)  # (B,H*W)
    return mask.view(len(x), 1, *x.shape[2:]), torch.cat([ground, ink], 1)

def join_colors(mask, colors):
    """The way back: mask (B,1,H,W), colors (B,2,3) -> pictures (B,3,H,W)."""
    ground, ink = colors[..., None, None].unbind(1)  # (B,3,1,1) each
    return ground + mask * (ink - ground)

def two_colored(images):
    """Pictures uint8 (M,H,W,3) -> are they two colours and their blends, each? So that split and
    joined again they lose less than 1 % of their variance."""
    x = to_float(torch.from_numpy(images[:: math.ceil(len(images) / 1000)].copy()))
    lost = (join_colors(*split_colors(x)) - x).square().mean()
    return bool(lost + 1e-6 < 0.01 * (x - x.mean((2, 3), keepdim=True)).square().mean())

def corners(z):
    """The four corner cells of grids (...,h,w), h and w at least 2: a view (...,2,2)."""
    return z[..., :: z.shape[-2] - 1, :: z.shape[-1] - 1]

class FactoredVQVAE(VQVAE):
    """A VQVAE that codes shapes apart from colours, for pictures that are two_colored and of 8 x 8
    pixels at least.

    A plain one learns combinations: every token tells the colours of ground and ink again, and
    few bits are left for the stroke. Here encoder and decoder work on masks, and the two colours
    travel in the four corner tokens, added to what these say of their corner. On handwriting in 29
    colours the same training leads to a fifth of the error.
    """

    def __init__(self, dim=256, K=128, D=256, *options, **more):
        super().__init__(dim, K, D, *options, **more)
        self.colors_in = nn.Sequential(nn.Linear(6, dim), nn.ReLU(), nn.Linear(dim, 4 * D))
        self.colors_out = nn.Sequential(nn.Linear(4 * D, dim), nn.ReLU(), nn.Linear(dim, 6))
        self.norm = ChannelNorm(D)  # of shape and colour together, in the corners

    def encode(self, x):
        mask, colors = split_colors(x)
        z = self.encoder(2 * mask.expand_as(x) - 1)  # (B,D,h,w)
        corner = corners(z)  # (B,D,2,2)
        corner += self.colors_in(colors.flatten(1)).view(corner.shape)
        return self.norm(z)

    def decode(self, z):
        mask = self.decoder(z).float().mean(1, keepdim=True)  # (B,1,4h,4w) in [-1,1]
        colors = self.colors_out(corners(z).flatten(1)).float()  # (B,6)
        return join_colors((mask + 1) / 2, colors.view(-1, 2, 3))

def compute_loss(x, recon_x, z_e, z_q, beta=Config.beta, extremes=0.0):
    """The VQ-VAE's loss: reconstruction + codebook + beta * commitment, each a mean over elements.

    x, recon_x (B,3,H,W); z_e, z_q (B,D,h,w) as VQVAE.forward returns them -> scalar. The codebook
    term pulls codes to features, the commitment term features to codes: so each detaches the OTHER
    side (equation 3 of van den Oord et al. 2017; the notes detach z_q in both). extremes: weight of
    the colours' extremes, see below.
    """
    recon, codebook = F.mse_loss(recon_x, x), F.mse_loss(z_q, z_e.detach())
    if extremes:
        # A thin stroke is a few pixels, and mean squared error would rather blur its colour than
        # miss its place. The extremes of each window have no place, only a colour.
        for sign in (1, -1):
            a, b = (F.max_pool2d(sign * y, 7, ceil_mode=True) for y in (recon_x, x))
            recon = recon + extremes * F.mse_loss(a, b)
    return recon + codebook + beta * F.mse_loss(z_e, z_q.detach())


# --- Attention: queries, keys, values, and a cache of the latter two ------------------------------
#
# When tokens are generated one by one, keys and values of those before are the same at every step.
# They are kept in a tensor that is allocated once, and whoever writes says at which position. (The
# notes' cache grew by concatenation, which copies all of it at every token.)

def attend(q, k, v, causal):
    """softmax(q k^T / sqrt(head_dim)) v (Vaswani et al. 2017).

    q (B,heads,T,head_dim), k and v (B,heads,columns,head_dim) -> like q. causal: the last query
    sees all columns, each one before it a column less. Written out: for sequences as short as ours
    F.scaled_dot_product_attention is no faster.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B,heads,T,columns)
    T, columns = scores.shape[-2:]
    if causal and T > 1:
        hidden = torch.ones(T, columns, dtype=torch.bool, device=q.device).triu(columns - T + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ v

class SelfAttention(nn.Module):
    """Multi-head self-attention: (B,T,d) -> (B,T,d). Queries and keys are normalized (Henry et al.
    2020), so that large learning rates cannot blow the scores up."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        assert d_model % n_heads == 0, f"width {d_model} is not divisible by {n_heads} heads"
        self.n_heads, head_dim = n_heads, d_model // n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)  # one product instead of three
        self.q_norm, self.k_norm = nn.LayerNorm(head_dim), nn.LayerNorm(head_dim)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, causal=True, cache=None, position=0):
        """x (B,T,d) -> (B,T,d). cache: (2,B,heads,length,head_dim), of which the first `position`
        columns hold keys and values of what came before x; x's own are added."""
        B, T, d = x.shape
        # (B,T,3d) -> (B,T,3,heads,head_dim) -> (3,B,heads,T,head_dim) -> three (B,heads,T,head_dim)
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            cache[:, :, :, position : position + T] = torch.stack([k, v])
            k, v = cache[:, :, :, : position + T]
        y = attend(q, k, v, causal)  # (B,heads,T,head_dim)
        return self.out(y.transpose(1, 2).reshape(B, T, d))


# --- iGPT: a causal transformer over picture tokens and words -------------------------------------
#
# The usual decoder-only transformer (GPT-2's pre-norm block), with two things of its own: places
# are counted from the last mark, and the tables of the picture tokens are built from the codebook.

class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). (B,T,d) -> (B,T,d)."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = SelfAttention(d_model, n_heads)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, *context):  # context: see SelfAttention
        x = x + self.dropout(self.attention(self.norm1(x), *context))
        return x + self.dropout(self.mlp(self.norm2(x)))

class iGPT(nn.Module):
    """Next-token logits over the joint vocabulary: tokens int64 (B,T) -> (B,T,V).

    vocab_size: V = K codes + len(Tokenizer.all_words). context_length: the longest sequence.
    codebook (K,D), optional: the VQ-VAE's codebook.weight. With it a code's embedding and output
    row are its own vector plus a learned linear map of its standardized code vector: codes that
    look alike share what is learned about one of them, and gradient can reach the codebook. It is
    referred to, not owned: neither among parameters() nor in state_dict(). orders: of the sequences
    it is to be trained on, so what it can be asked.
    """

    causal = True  # a position sees itself and what came before

    def __init__(self, vocab_size, context_length, d_model=128, n_heads=4, n_layers=4, dropout=0.1,
                 codebook=None, orders=ORDERS[:2]):
        super().__init__()
        # What builds this model again, for checkpoints
        self.options = dict(vocab_size=vocab_size, context_length=context_length, d_model=d_model,
                            n_heads=n_heads, n_layers=n_layers, dropout=dropout, orders=orders)
        self.vocab_size, self.context_length = vocab_size, context_length
        self.n_heads, self.orders = n_heads, orders
        self.embedding = nn.Embedding(vocab_size, d_model)
        # A token's place is its distance from the last mark (BOS, EOT, EOI): the top left cell of a
        # picture has ONE place in both orders, so what one order learns of pictures holds in both
        self.places = nn.Embedding(2 * context_length, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self._codebook = (codebook,)  # in a tuple nn.Module does not look for parameters
        if codebook is not None:
            self.code_in = nn.Linear(codebook.shape[1], d_model, bias=False)
            self.code_out = nn.Linear(codebook.shape[1], d_model, bias=False)
        # Branches and output start small: the first loss is log V, the first gradients are calm
        for name, weight in self.named_parameters():
            if name.endswith(("out.weight", "mlp.2.weight", "head.weight")):
                nn.init.normal_(weight, std=0.02)
            elif name.startswith(("embedding", "places")):
                nn.init.normal_(weight, std=0.3)

    def tables(self):
        """Embedding table and output matrix, both (V,d), with the codebook's share, if any."""
        (codebook,), embedding, output = self._codebook, self.embedding.weight, self.head.weight
        if codebook is None:
            return embedding, output
        codes = (codebook - codebook.mean(0)) / (codebook.std(0) + 1e-5)  # (K,D), all on one scale
        below = (0, 0, 0, self.vocab_size - len(codes))  # words and specials get nothing
        return (embedding + F.pad(self.code_in(codes), below),
                output + F.pad(self.code_out(codes), below))

    def locate(self, tokens):
        """Tokens (B,T) -> places (B,T): how far the last mark is, plus the context length where
        that mark is an EOI, for a caption's places are others than a picture's."""
        eot, eoi, _, pad = specials(self.vocab_size)
        index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        is_mark = (tokens >= eot) & (tokens < pad)  # EOT, EOI or BOS
        last = torch.where(is_mark, index, 0).cummax(1).values  # (B,T): where the last mark stands
        return index - last + self.context_length * (tokens.gather(1, last) == eoi)

    def forward(self, tokens, places=None, tables=None, caches=None, position=0):
        """tokens int64 (B,T) -> logits (B,T,V). The rest is for generation, see Decoder:

        places (B,T): if the last mark stands before these tokens. tables: what tables() returned,
        computed once; of the output matrix some rows will do. caches: one for each layer, which
        hold the `position` tokens before these. Raises InputError beyond the context.
        """
        length = position + tokens.shape[1]
        if length > self.context_length:
            raise InputError(f"{length} tokens, the context holds {self.context_length}")
        embedding, output = tables or self.tables()
        if places is None:
            places = self.locate(tokens)
        x = F.embedding(tokens, embedding) + self.places(places)  # (B,T,d)
        for i, block in enumerate(self.blocks):
            x = block(x, self.causal, None if caches is None else caches[i], position)
        return F.linear(self.norm(x), output)

class ParallelPredictor(iGPT):
    """The transformer of notes B taken literally: a caption in, logits of all picture tokens out,
    in one pass. An iGPT whose positions all see each other and whose picture tokens are blank.

    It trains on sequences in the order text_image like any iGPT. No token knows what its neighbours
    have chosen, which is fast, and tells what an autoregressive model is good for.
    n_embeddings: K; the rest as for iGPT.
    """

    causal = False

    def __init__(self, n_embeddings, *options, **more):
        super().__init__(*options, **more)
        self.options["n_embeddings"] = self.n_embeddings = n_embeddings

    def forward(self, tokens):
        """text_image sequences (B,T) -> logits (B,T,V), of use where the next token is a code."""
        blank = tokens.masked_fill(tokens < self.n_embeddings, self.vocab_size - 1)  # PAD
        return super().forward(blank)


# --- Sequences: pairs to rows of tokens. Every prompt for sampling is the start of such a row -----
#
# BOS says "begin", EOT "a picture comes next", EOI "a caption comes next". A pair is the ring
# IMAGE EOI TEXT EOT, and the orders differ in where they enter it:
#     image_text  BOS EOT IMAGE EOI TEXT      prompts image -> text
#     text_image  BOS EOI TEXT EOT IMAGE      prompts text -> image
#     plain       BOS IMAGE EOI TEXT EOT      the table of notes A
# BOS + EOT + IMAGE + EOI + TEXT: 1+1+49+1+6 = 58 for 28x28 pictures and six words, or N+L+3.

def make_sequences(tokens, text_ids, tokenizer, order):
    """Picture tokens (B,N) and captions (B,L+1) from Tokenizer.encode_batch -> sequences
    int64 (B,N+L+3) in one of the ORDERS.

    Where a caption is shorter than L, an EOT closes it in every order; PAD fills the row's end.
    """
    marks = tokens.new_tensor(specials(tokenizer.vocab_size)).expand(len(tokens), 4)
    eot, eoi, bos, pad = marks.split(1, dim=1)  # (B,1) each
    if order == "image_text":  # a caption of length L needs no EOT: nothing comes after it
        row = [bos, eot, tokens, eoi, text_ids[:, :-1]]
    elif order == "text_image":  # text_ids hold the EOT
        row = [bos, eoi, text_ids, tokens]
    else:
        row = [bos, tokens, eoi, text_ids]
    row = torch.cat(row, 1)
    # A picture follows its caption at once: sort PAD to the end and leave the rest as it stands
    return row.gather(1, (row == pad).byte().argsort(dim=1, stable=True))

def mixed_sequences(tokens, text_ids, tokenizer, orders):
    """A batch dealt out to several orders, in about equal parts: (B,N), (B,L+1) -> (B,T)."""
    n, parts = len(orders), []
    first = processes()[0] % n  # processes may have a row each
    orders = [*orders[first:], *orders[:first]]
    for order, some, ids in zip(orders, tokens.tensor_split(n), text_ids.tensor_split(n)):
        parts.append(make_sequences(some, ids, tokenizer, order))
    return torch.cat(parts)

def sequence_batches(tokenizer, orders, tokens, batch_size, text_ids, **options):
    """Picture tokens (C*M,N), C copies of M pictures one after the other, and captions (M,L+1) ->
    Batches of sequences (B,T), each batch in equal parts of the orders."""

    def get(rows):
        return mixed_sequences(tokens[rows], text_ids[rows % len(text_ids)], tokenizer, orders)

    return Batches(get, len(tokens), batch_size, **options)

def text_prompt(tokenizer, caption):
    """BOS EOI TEXT EOT, a text_image sequence whose picture is still to come -> int64 (T,)."""
    ids = F.pad(tokenizer.text_encode(caption), (0, 1), value=tokenizer.end_of_text_token)
    return make_sequences(ids.new_empty(1, 0), ids[None], tokenizer, "text_image")[0]

def image_prompts(tokenizer, tokens):
    """BOS EOT IMAGE EOI, image_text sequences before their captions: (B,N) -> (B,N+3)."""
    return make_sequences(tokens, tokens.new_empty(len(tokens), 0), tokenizer, "image_text")

@torch.no_grad()
def extract_tokens(vqvae, images, augment=0.0):
    """Run pictures uint8 (M,H,W,3) through the encoder once, not in every epoch (notes B: offline)
    -> tokens int64 (M,N) on the CPU. augment: strength of a random_affine before."""
    device, out = vqvae.codebook.weight.device, []
    for x in track(picture_batches(images, 250), "extracting tokens"):
        x = random_affine(x, augment) if augment else x
        out.append(vqvae.get_tokens(x.to(device)).flatten(1).cpu())
    return torch.cat(out)

@torch.no_grad()
def decode_pictures(vqvae, tokens):
    """The way back: tokens int64 (M,N) -> pictures uint8 (M,H,W,3), as they are shown and saved."""
    parts = tokens.to(vqvae.codebook.weight.device).split(250)
    return np.concatenate([denormalize(vqvae.decode_tokens(part)) for part in parts])


# --- Measures: how well is a token predicted, a picture reconstructed? ----------------------------

def next_token_nll(logits, sequences):
    """Logits (B,T-1,V) of a model that was fed sequences[:, :-1] -> nats that each of the targets
    sequences[:, 1:] costs, (B,T-1)."""
    targets = sequences[:, 1:]
    nll = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return nll.view_as(targets)

def weighted_mean(nll, sequences, vocab_size, caption_weight=1.0):
    """Nats (B,T-1) of the targets sequences[:, 1:] -> the loss, a scalar. PAD counts nothing.

    The words of a caption that FOLLOWS a picture count caption_weight: they are 6 targets of 57, in
    half of the rows, but all there is to captioning.
    """
    _, eoi, _, pad = specials(vocab_size)
    captioning = ((sequences[:, :-1] == eoi).cumsum(1) > 0) & (sequences[:, 1:2] != eoi)
    weight = torch.where(captioning, caption_weight, 1.0) * (sequences[:, 1:] != pad)  # (B,T-1)
    return (nll * weight).sum() / weight.sum()

@torch.no_grad()
def measure_prediction(igpt, batches):
    """Over batches of sequences (B,T): mean nats a token, all tokens but PAD alike."""
    total = n = 0
    for rows in batches:
        rows = rows.to(igpt.head.weight.device)
        nll = next_token_nll(igpt(rows[:, :-1]), rows)  # (B,T-1)
        real = rows[:, 1:] != specials(igpt.vocab_size)[3]  # no PAD
        total += nll[real].sum().item()
        n += real.sum().item()
    return total / n

@torch.no_grad()
def measure_reconstruction(vqvae, batches, *weights):
    """Over batches (B,3,H,W): loss (of these weights, see compute_loss), recon_mse ([-1,1] units),
    recon_psnr (dB; values span 2), codebook_used (share of codes chosen at all) and
    codebook_perplexity (exp of their use's entropy). For a model in eval mode; in training mode its
    codebook would take part."""
    loss = mse = n = counts = 0
    for x in batches:
        x = x.to(vqvae.codebook.weight.device)
        z_e, z_q, recon_x = vqvae(x)
        loss += compute_loss(x, recon_x, z_e, z_q, *weights).item() * len(x)
        mse += F.mse_loss(recon_x, x).item() * len(x)
        n += len(x)
        tokens = vqvae.codebook.nearest(z_e)  # (B,h,w)
        counts += torch.bincount(tokens.flatten(), minlength=vqvae.n_embeddings)
    entropy = torch.special.entr(counts / counts.sum()).sum()
    return {"loss": loss / n, "recon_mse": mse / n,
            "recon_psnr": 10 * math.log10(4 / max(mse / n, 1e-12)),
            "codebook_used": (counts > 0).float().mean().item(),
            "codebook_perplexity": entropy.exp().item()}


# --- Optimizers: Adam or Muon, learning rates by group, warm-up and decay -------------------------

class Muon(torch.optim.Adam):
    """Adam, but in groups that say orthogonal=True the update is the momentum's nearest orthogonal
    matrix (Jordan et al. 2024), so that all directions of a matrix learn alike. Such a group holds
    weights of one shape, of two or more axes; its momentum is 0.95 (betas are Adam's).

    torch.optim.Muon computes in bfloat16 one matrix at a time, which takes seconds on a CPU without
    bfloat16 units. Here autocast decides, and products are batched over a group: a fifth of a step,
    for twice the learning.
    """

    LR = 0.02  # such an update has all singular values near 1, whatever the width

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all groups; sets the gradients of the orthogonal groups to None."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group.get("orthogonal") or not params:
                continue
            grads = torch.stack([p.grad.flatten(1) for p in params])  # (n,rows,columns)
            state = self.state[params[0]]
            if not state:  # Adam's load_state_dict looks for a step
                state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(grads))
            momentum = state["momentum"].lerp_(grads, 0.05)
            update = self.orthogonalize(grads.lerp(momentum, 0.95))  # Nesterov's look ahead
            lr = group["lr"] * max(1, grads.shape[1] / grads.shape[2]) ** 0.5
            for p, direction in zip(params, update):
                p.sub_(direction.view_as(p), alpha=lr)
                p.grad = None  # so that Adam passes it by
        super().step(closure)

    @classmethod
    def orthogonalize(cls, x):
        """Matrices (n,rows,columns) -> about U V^T of their decompositions U S V^T: five rounds of
        X <- aX + (b XX^T + c (XX^T)^2) X, which bring all singular values near 1."""
        if x.shape[1] > x.shape[2]:  # the products below are then the smaller ones
            return cls.orthogonalize(x.mT).mT
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        a, b, c = 3.4445, -4.7750, 2.0315
        for _ in range(5):
            gram = x @ x.mT  # (n,rows,rows)
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.float()

def make_optimizer(cfg, modules, factors):
    """Adam or Muon over the parameters of modules, a dict of 'vqvae', 'igpt' or both, but for
    frozen ones.

    One group each for VQ-VAE, codebook and transformer, under muon also for their matrices, by
    shape. factors: dict of what multiplies the Config's learning rates of 'vqvae', 'codebook' and
    'igpt'.
    """
    groups, rates = {}, dict(vqvae=cfg.vqvae_lr, codebook=cfg.vqvae_lr, igpt=cfg.igpt_lr)
    for kind, module in modules.items():
        for name, p in module.named_parameters():
            part = "codebook" if name == "codebook.weight" else kind
            # Muon is for linear maps and convolutions; rows of embeddings and outputs belong to
            # tokens, and filters on three colours are no matrices to speak of
            inside = name.startswith(("blocks", "encoder", "decoder", "colors"))
            matrix = cfg.optimizer == "muon" and inside and p.dim() > 1 and min(p.shape[:2]) > 3
            rate = (Muon.LR if matrix else rates[part]) * factors.get(part, 1.0)
            group = {"params": [], "name": part, "lr": rate, "orthogonal": matrix}
            if p.requires_grad:
                groups.setdefault((part, matrix and p.shape), group)["params"].append(p)
    if cfg.optimizer == "adam":
        return torch.optim.Adam(groups.values(), fused=True)  # one kernel for all parameters
    return Muon(groups.values(), betas=(0.9, 0.95), eps=1e-10, fused=True)

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


# --- Training: one loop. The regimes differ in the loss, the parameters and the batches -----------
#
# Everything random in a step follows from (seed, phase, step, process), so a run that was killed
# can be taken up at any step and ends with the same weights, to the bit.

class Trainer:
    """The training loop that the library and the command line share. A subclass has `phase`, a
    name, loss(batch) -> a scalar with gradient, and test(batches) -> dict of floats with 'loss'.

    modules: dict name -> nn.Module. optimizer: any torch optimizer over their parameters. cfg: a
    Config with the loss' weights and the seed. scheduler: stepped once a step, or None. bf16:
    matrix products in bfloat16. Under torchrun the processes share each batch, and
    DistributedDataParallel averages the gradients.
    """

    CLIP = 1.0  # largest norm of the whole gradient

    def __init__(self, modules, optimizer, device, cfg=Config(), scheduler=None, bf16=False):
        self.modules, self.optimizer = nn.ModuleDict(modules), optimizer
        self.device, self.cfg, self.scheduler = torch.device(device), cfg, scheduler
        self.bf16, self.step, self.pass_losses = bf16, 0, []
        self.train_losses, self.test_losses = [], []
        self.shared_loss = LossModule(self)
        if dist.is_initialized():
            self.shared_loss = DistributedDataParallel(
                self.shared_loss, forward_sync_buffers=False,
                find_unused_parameters=len(modules) > 1)  # `single` begins without the iGPT

    def train(self, train_loader, test_loader, num_epochs, on_step=None, on_pass=None):
        """Train until num_epochs passes of the loader are done, going on from self.step; then the
        modules are in eval mode.

        Loaders are Batches, or any iterables of batches with a length; what the notes call an epoch
        is a pass of the loader. The test loss is without caption weights and noise.
        on_step(trainer) is called before each step, on_pass(row) after each pass with a dict of its
        figures. Returns (train_losses, test_losses), a float a pass each. Raises InputError when a
        loss or a gradient is not finite.
        """
        n, batches = len(train_loader), None
        steps = range(self.step, n * num_epochs)
        for step in track(steps, self.phase, self.step, lambda: f"loss {self.pass_losses[-1]:.4f}"):
            if batches is None or step % n == 0:
                self.modules.train()
                self.pass_losses = self.pass_losses[: step % n]
                if isinstance(train_loader, Batches):  # a resumed run may begin within a pass
                    batches = map(train_loader.__getitem__, range(step, steps.stop))
                else:
                    batches = iter(train_loader)
            if on_step:
                on_step(self)
            self.train_step(next(batches))
            if self.step % n == 0:
                row = self.end_pass(test_loader)
                figures = [f"{name} {value:.4f}" for name, value in row.items() if "_" in name]
                log(f"{self.phase} {self.step}/{n * num_epochs}  {'  '.join(figures)}")
                if on_pass:
                    on_pass(row)
        return self.train_losses, self.test_losses

    def train_step(self, batch):
        """Forward, backward, clip, update."""
        noise = f"{self.cfg.seed} {self.phase} {self.step} {processes()[0]}"
        torch.manual_seed(zlib.crc32(noise.encode()))
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        with autocast:
            loss = self.shared_loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.modules.parameters(), self.CLIP)
        self.require_finite(loss.item() + norm.item())
        with autocast:  # for Muon's products
            self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        self.step += 1
        self.pass_losses.append(loss.item())

    def require_finite(self, value):
        """Raises InputError unless loss and gradient are numbers, before they do harm."""
        if not math.isfinite(value):
            raise InputError(f"loss or gradient is {value} at step {self.step} of phase "
                             f"{self.phase}: try a lower learning rate")

    def end_pass(self, test_loader):
        """Test -> a dict of the pass' figures."""
        self.modules.eval()
        with torch.no_grad():
            measured = self.test(test_loader)
        self.require_finite(measured["loss"])  # the last step may have broken the weights
        mean = torch.tensor(self.pass_losses, device=self.device).mean() / processes()[1]
        self.train_losses.append(summed(mean).item())
        self.test_losses.append(measured["loss"])
        return {"phase": self.phase, "pass": len(self.test_losses), "step": self.step,
                "lr": self.optimizer.param_groups[0]["lr"], "train_loss": self.train_losses[-1],
                **{f"test_{name}": value for name, value in measured.items()}}

    def state_dict(self):
        """All that the rest of the training depends on."""
        return {"phase": self.phase, "step": self.step,
                "losses": [self.pass_losses, self.train_losses, self.test_losses],
                "modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler and self.scheduler.state_dict()}

    def load_state_dict(self, state):
        """Take up training where state_dict() was called."""
        self.step = state["step"]
        self.pass_losses, self.train_losses, self.test_losses = state["losses"]
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])

class LossModule(nn.Module):
    """A trainer's loss as the forward pass that DistributedDataParallel wants to wrap."""

    def __init__(self, trainer):
        super().__init__()
        self.parts, self.forward = trainer.modules, trainer.loss

class VQVAETrainer(Trainer):
    """Phase 1: batches are pictures (B,3,H,W) in [-1,1]. options: Trainer's."""

    phase = "vqvae"

    def __init__(self, model, optimizer, device, **options):
        super().__init__({"vqvae": model}, optimizer, device, **options)
        self.model, self.weights = model, (self.cfg.beta, self.cfg.extremes)

    def loss(self, x):
        x = x.to(self.device)
        z_e, z_q, recon_x = self.model(x)
        return compute_loss(x, recon_x.float(), z_e, z_q, *self.weights)

    def test(self, batches):
        return measure_reconstruction(self.model, batches, *self.weights)

class iGPTTrainer(Trainer):
    """Phase 2: batches are sequences int64 (B,T), see sequence_batches. options: Trainer's. Raises
    InputError if vocab_size or sequence_length do not fit the model."""

    phase = "igpt"

    def __init__(self, model, optimizer, device, vocab_size, sequence_length, **options):
        super().__init__({"igpt": model}, optimizer, device, **options)
        self.model = model
        # The last token of a sequence is a target only
        if vocab_size != model.vocab_size or sequence_length > model.context_length + 1:
            raise InputError(f"{sequence_length} tokens of {vocab_size} do not fit the model")

    def loss(self, rows):
        rows = rows.to(self.device)
        logits = self.model(with_noise(self.model, rows[:, :-1], self.cfg.noise))  # (B,T-1,V)
        nll = next_token_nll(logits, rows)
        return weighted_mean(nll, rows, self.model.vocab_size, self.cfg.caption_weight)

    def test(self, batches):
        return {"loss": measure_prediction(self.model, batches)}

def with_noise(igpt, inputs, most):
    """Sequences (B,T) -> the same, but of each row's picture tokens a share, drawn from 0 to
    `most`, are codes from elsewhere in the batch: a model that draws reads its own errors, and
    should rather heed the caption. Codes are told from words by the codebook, if there is one."""
    codebook, = igpt._codebook
    if not most or codebook is None:
        return inputs
    is_code = inputs < len(codebook)  # (B,T)
    share = most * torch.rand(len(inputs), 1, device=inputs.device)
    replace = is_code & (torch.rand(inputs.shape, device=inputs.device) < share)
    codes = inputs[is_code]
    others = codes[torch.randint(len(codes), inputs.shape, device=inputs.device)]  # (B,T)
    return torch.where(replace, others, inputs)

class JointTrainer(Trainer):
    """`single` and phase 3: all at once. Batches are (pictures (B,3,H,W), captions (B,L+1)).

    L = recon + codebook + beta * commit + lambda * xent. The decoder always gets the encoder's own
    codes. In `single` lambda is 0 at first, while there are no codes worth predicting, then rises.
    A small lambda does: Adam and Muon learn the transformer as fast, and a large one makes the
    codes predictable instead of exact.

    models: Models. total: steps of the phase. options: Trainer's.
    """

    TAU = 0.5  # temperature of the soft targets, in mean squared quantization errors
    RAMP = 0.05  # share of `single` in which lambda rises

    def __init__(self, phase, models, optimizer, device, total, **options):
        modules = {"vqvae": models.vqvae, "igpt": models.igpt}
        super().__init__(modules, optimizer, device, **options)
        self.phase, self.models, self.weights = phase, models, (self.cfg.beta, self.cfg.extremes)
        self.warmup, self.ramp = 0, 1
        if phase == "single":
            self.warmup = int(self.cfg.lambda_warmup * total)
            self.ramp = max(1, int(self.RAMP * total))

    def lambda_now(self):
        """lambda at the current step."""
        return self.cfg.lambda_xent * min(1, max(0, (self.step + 1 - self.warmup) / self.ramp))

    def loss(self, batch):
        x, text_ids = (part.to(self.device) for part in batch)
        # In phase 3 the iGPT knows these codes: none is restarted or a moving average
        self.models.vqvae.codebook.train(self.phase == "single")
        z_e, z_q, recon_x = self.models.vqvae(x)
        loss = compute_loss(x, recon_x.float(), z_e, z_q, *self.weights)
        if self.lambda_now():  # else the transformer need not even run
            loss = loss + self.lambda_now() * self.cross_entropy(z_e, text_ids)
        return loss

    def cross_entropy(self, z_e, text_ids):
        """Features z_e (B,D,h,w) and captions (B,L+1) -> the sequences' cross-entropy, a scalar.

        The target of a picture token is onehot(code) + soft - sg[soft], where soft is
        softmax(-|z_e - e_k|^2 / tau): in value the code, so the transformer learns the tokens it
        will be asked for; in gradient the soft assignment, so features and codes move to where the
        transformer expects them. (Soft values would teach it to be as unsure as they are.)
        """
        igpt, K = self.models.igpt, self.models.vqvae.n_embeddings
        distance = self.models.vqvae.codebook.distances(z_e.movedim(1, -1)).flatten(1, 2)  # (B,N,K)
        rows = mixed_sequences(distance.argmin(-1), text_ids, self.models.tokenizer, igpt.orders)
        logits = igpt(with_noise(igpt, rows[:, :-1], self.cfg.noise)).float()  # (B,T-1,V)
        error = summed(distance.detach().amin(-1).mean()) / processes()[1]
        soft = F.softmax(-distance / (self.TAU * error.clamp(min=1e-6)), dim=-1)  # (B,N,K)
        is_code = rows[:, 1:] < K  # (B,T-1), N a row, in the order of the features
        log_p = F.log_softmax(logits[is_code].detach(), dim=-1)[:, :K]  # (B*N,K)
        expected = -((soft - soft.detach()).flatten(0, 1) * log_p).sum(1)  # (B*N,), of value 0
        nll = next_token_nll(logits, rows)  # (B,T-1)
        nll = nll + torch.zeros_like(nll).masked_scatter(is_code, expected)
        return weighted_mean(nll, rows, igpt.vocab_size, self.cfg.caption_weight)

    def test(self, batches):
        vqvae, igpt, rows = self.models.vqvae, self.models.igpt, []
        pictures, ids = zip(*batches)
        out = measure_reconstruction(vqvae, pictures, *self.weights)
        for x, text_ids in zip(pictures, ids):
            tokens = vqvae.get_tokens(x.to(self.device)).flatten(1).cpu()
            rows.append(mixed_sequences(tokens, text_ids, self.models.tokenizer, igpt.orders))
        out["nll"], out["lambda"] = measure_prediction(igpt, rows), self.lambda_now()
        return out | {"loss": out["loss"] + out["lambda"] * out["nll"]}


# --- Regimes: which phases train which models on what (notes B) -----------------------------------
#
#     two-stage  VQ-VAE, then the iGPT on tokens that are extracted once
#     single     everything at once
#     multi      as two-stage, then a short fine-tuning of everything (the third phase)

REGIMES = {
    "two-stage": ("vqvae", "igpt"), "single": ("single",), "multi": ("vqvae", "igpt", "finetune"),
    "vqvae": ("vqvae",), "igpt": ("igpt",), "finetune": ("finetune",),
}
WARMUP = 0.05  # share of a phase in which its learning rates rise
CODEBOOK, IGPT = 0.3, 0.1  # relative learning rates: codebook in joint training, iGPT in phase 3
FEW = slice(0, 500)  # test pairs for the figures during training; `eval` takes all

@dataclass
class Data:
    """What the models learn from: pictures uint8 (M,H,W,3), captions lists of str. The VQ-VAE may
    have pictures of its own (the notes keep two files); by default it takes the pairs'."""

    train_images: np.ndarray
    test_images: np.ndarray
    train_captions: list
    test_captions: list
    vqvae_train: np.ndarray = None
    vqvae_test: np.ndarray = None

    def __post_init__(self):
        if self.vqvae_train is None:
            self.vqvae_train = self.train_images
        if self.vqvae_test is None:
            self.vqvae_test = self.test_images

def new_vqvae(cfg, images, ema):
    """The VQ-VAE of a Config for pictures uint8 (M,H,W,3)."""
    build, size = VQVAE, images.shape[1:3]
    # Factored colours lie in the four corner tokens, so there must be four
    if min(size) >= 8 and (cfg.factored == "on" or cfg.factored == "auto" and two_colored(images)):
        build = FactoredVQVAE
    torch.manual_seed(cfg.seed)
    return build(cfg.vqvae_dim, cfg.vqvae_K, cfg.vqvae_D, size, ema, cfg.restart)

def new_igpt(cfg, vqvae, tokenizer):
    """The iGPT, or parallel predictor, of a Config that fits a VQ-VAE and a Tokenizer."""
    options = dict(
        vocab_size=tokenizer.vocab_size, codebook=vqvae.codebook.weight,
        context_length=vqvae.n_tokens + tokenizer.caption_length + 3,
        d_model=cfg.d_model, n_heads=cfg.n_heads, n_layers=cfg.n_layers, dropout=cfg.dropout)
    torch.manual_seed(cfg.seed + 1)
    if cfg.predictor == "parallel":
        return ParallelPredictor(vqvae.n_embeddings, orders=["text_image"], **options)
    return iGPT(orders=cfg.orders.split(","), **options)

def use_bf16(precision, device):
    """Train with bfloat16 products? 'auto': where the processor has units for it. -> bool"""
    if precision == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if precision == "auto" and device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    return precision == "bf16"

def prepare_phase(phase, cfg, data, models, device):
    """Models that the phases before have left -> the Models of a phase, its Trainer, and what
    Trainer.train wants: training batches, test batches and number of passes."""
    vqvae, igpt, tokenizer = models.vqvae, models.igpt, models.tokenizer
    if phase == "igpt" and not vqvae or phase == "finetune" and not igpt:
        raise InputError(f"phase {phase} goes on from models, and there are none")
    if phase == "vqvae":
        vqvae = new_vqvae(cfg, data.vqvae_train, cfg.ema).to(device)
    elif phase == "single":  # its codes learn by gradient: the transformer has a say in them
        vqvae = new_vqvae(cfg, data.train_images, ema=0.0).to(device)
    if phase in ("igpt", "single"):
        tokenizer = Tokenizer(data.train_captions + data.test_captions, vqvae.n_embeddings)
        igpt = new_igpt(cfg, vqvae, tokenizer).to(device)
    if phase in ("igpt", "finetune"):  # phase 2 leaves encoder and codebook as they are
        vqvae.requires_grad_(phase == "finetune")
    models = Models(vqvae, igpt, tokenizer)

    # A length in steps is rounded up to about ten whole passes
    size, passes, order = cfg.batch_size, getattr(cfg, f"{phase}_epochs"), dict(seed=cfg.seed)
    steps = getattr(cfg, f"{phase}_steps")
    if steps:
        order["per_pass"] = math.ceil(steps / 10)
        passes = math.ceil(steps / order["per_pass"])
    if phase == "vqvae":
        loaders = (picture_batches(data.vqvae_train, size, **order),
                   picture_batches(data.vqvae_test[FEW], 125), passes)
    else:
        ids = tokenizer.encode_batch(data.train_captions)
        test_ids = tokenizer.encode_batch(data.test_captions[FEW])
        images, test_images = data.train_images, data.test_images[FEW]
        make = picture_batches
        if phase == "igpt":
            whole, test_images = extract_tokens(vqvae, images), extract_tokens(vqvae, test_images)
            if cfg.augment:  # a second copy, against learning a few thousand shapes by heart
                torch.manual_seed(cfg.seed)
                whole = torch.cat([whole, extract_tokens(vqvae, images, cfg.augment)])
            images = whole  # (M,N) or (2*M,N)
            make = functools.partial(sequence_batches, tokenizer, igpt.orders)
        loaders = make(images, size, ids, **order), make(test_images, 125, test_ids), passes
    trainer = phase_trainer(phase, cfg, models, device, len(loaders[0]) * passes)
    return models, trainer, loaders

def phase_trainer(phase, cfg, models, device, total):
    """The Trainer of a phase of `total` steps."""
    vqvae, igpt = models.vqvae, models.igpt
    modules, factors = {"vqvae": vqvae, "igpt": igpt}, {"codebook": CODEBOOK}
    if phase == "finetune":
        factors = dict(vqvae=cfg.finetune_lr, codebook=cfg.finetune_lr * CODEBOOK, igpt=IGPT)
    elif phase in modules:
        modules, factors = {phase: modules[phase]}, {}
    optimizer = make_optimizer(cfg, modules, factors)
    scheduler = create_cosine_scheduler(optimizer, int(WARMUP * total), total)
    options = dict(cfg=cfg, scheduler=scheduler, bf16=use_bf16(cfg.precision, device))
    if phase == "vqvae":
        return VQVAETrainer(vqvae, optimizer, device, **options)
    if phase == "igpt":
        return iGPTTrainer(igpt, optimizer, device, igpt.vocab_size, igpt.context_length, **options)
    return JointTrainer(phase, models, optimizer, device, total, **options)

def train_regime(regime, cfg, data, models=None, device="cpu"):
    """Train one of REGIMES as a Config says, on Data -> Models. models: for a phase alone, what the
    phases before it have left. Nothing is written to disk: Part II's Run does that.

        data = Data(images, test_images, captions, test_captions)
        models = train_regime("multi", Config.preset("laptop"), data)
        tokens = models.images(["red seven"], SamplingConfig())
        pictures = decode_pictures(models.vqvae, tokens)  # uint8 (1,H,W,3)
    """
    models = models or Models()
    for phase in REGIMES[regime]:
        models, trainer, loaders = prepare_phase(phase, cfg, data, models, torch.device(device))
        trainer.train(*loaders)
    return models


# --- Sampling: logits -> probabilities -> a token; prefill and decode; captions, pictures, pairs --
#
# From the inside out: logits become probabilities, probabilities a token, tokens a span
# (generate), and spans captions, pictures and pairs. Which span comes next is known at every
# point, so no sample can hold a word in the middle of a picture. Chance is torch's own:
# torch.manual_seed, after training (which seeds every step), makes samples repeatable.

def logits_to_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits (B,S) -> probabilities (B,S). top_k 0 and top_p 1 keep everything."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:  # everything below the k-th largest logit goes
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p < 1:
        # Keep the fewest tokens that hold top_p of the mass (Holtzman et al. 2019): a token goes if
        # those ahead of it hold that much without it; so the first always stays.
        ordered, index = probs.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    return probs / probs.sum(-1, keepdim=True)

def sample_token(logits, how):
    """logits (B,S) -> index into the S, int64 (B,), drawn as the SamplingConfig `how` says."""
    if how.greedy or how.temperature == 0:
        return logits.argmax(-1)
    probs = logits_to_probs(logits, how.temperature, how.top_k, how.top_p)
    # torch.multinomial draws a number for every token of the vocabulary; one a row is enough.
    # Doubles, so that rounding cannot lead to a token that was ruled out
    cdf = probs.double().cumsum(-1)
    u = torch.rand(len(cdf), 1, device=cdf.device, dtype=torch.float64)
    token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=cdf.shape[1] - 1)

class Decoder:
    """B sequences that grow by a token at a time; each token passes through the model once.

    prompts: int64 (B,T). n_new: how many tokens are to follow. span: (low, high), the ids whose
    logits are wanted. Creating one reads the prompts in a single pass ("prefill"); `logits`
    (B,high-low) then tell their first successors. Raises InputError beyond the context.
    """

    def __init__(self, model, prompts, n_new, span):
        B, T = prompts.shape
        length = T + n_new - 1  # nothing follows the last token: it is not fed
        if length > model.context_length:
            raise InputError(f"{length} tokens, the context holds {model.context_length}")
        self.model, self.position, heads = model, T, model.n_heads
        size = len(model.norm.weight) // heads  # of a head
        self.caches = model.norm.weight.new_zeros(len(model.blocks), 2, B, heads, length, size)
        embedding, output = model.tables()
        self.tables = embedding, output[slice(*span)]  # the same at every step
        places = model.locate(prompts)
        self.place = places[:, -1:]  # (B,1)
        self.logits = model(prompts, places, self.tables, self.caches)[:, -1]

    def step(self, tokens):
        """The next token of each row, int64 (B,) -> logits (B,high-low) after it; of no meaning
        after a mark, since places go on as of one span."""
        self.place = self.place + 1
        logits = self.model(tokens[:, None], self.place, self.tables, self.caches, self.position)
        self.position += 1
        return logits[:, -1]

def guide(cond, uncond, how):
    """Guidance without a classifier (Ho & Salimans 2022): logits (B,S) with and without a condition
    -> cond + guidance * (cond - uncond).

    Guidance may lift a token that is merely rare without the condition: only what the condition
    makes plausible takes part (min-p, on the branch that knows it).
    """
    hopeless = cond < cond.amax(1, keepdim=True) + math.log(max(how.min_p, 1e-9))
    return (cond + how.guidance * (cond - uncond)).masked_fill(hopeless, -math.inf)

@torch.no_grad()
def generate(model, prompts, n_new, span, how, unconditional=None, closing=False):
    """Continue prompts by n_new tokens, all from one span of the vocabulary -> int64 (B,n_new). The
    model is in eval mode afterwards.

    prompts: int64 (B,T). span: (low, high), the only ids allowed. n_new: at least 1. how: a
    SamplingConfig. unconditional: for guidance, the prompts without their condition, int64 (B,T').
    closing: the span's last id ends a row, so it is not the first; what follows it is of no
    meaning. Raises InputError for a ParallelPredictor and beyond the context.
    """
    if not model.causal:
        raise InputError("a parallel predictor draws pictures from captions and does nothing else")
    decoders, new = [Decoder(model.eval(), prompts, n_new, span)], []
    if unconditional is not None and how.guidance:
        decoders.append(Decoder(model, unconditional, n_new, span))
    branches = [decoder.logits for decoder in decoders]
    for i in range(n_new):
        logits = branches[0] if len(branches) == 1 else guide(*branches, how)
        if closing and i == 0:
            logits[:, -1] = -math.inf
        new.append(span[0] + sample_token(logits, how))  # (B,)
        if i + 1 < n_new:  # the last token's successor is not wanted
            branches = [decoder.step(new[-1]) for decoder in decoders]
    return torch.stack(new, 1)

@dataclass
class Models:
    """What has been trained, and what it can make. The tokenizer belongs to the iGPT. Prompts must
    be the beginnings of sequences of the orders that the iGPT was trained on."""

    vqvae: VQVAE = None
    igpt: iGPT = None
    tokenizer: Tokenizer = None

    @property
    def device(self):
        """Where the models are."""
        return self.vqvae.codebook.weight.device

    def expect(self, order):
        """Warn if the iGPT was not trained on an order of sequences that it is asked for."""
        if order not in self.igpt.orders:
            log(f"warning: the model was trained on {', '.join(self.igpt.orders)}, not {order}")

    def continue_images(self, prompts, n_new, how, unconditional=None):
        """Prompts (B,T) in a picture's span -> its next tokens int64 (B,n_new)."""
        return generate(self.igpt, prompts, n_new, self.tokenizer.image_span, how, unconditional)

    def continue_captions(self, prompts, n_words, how):
        """Prompts (B,T) in a caption's span -> list of B texts of 1 to n_words words."""
        span = self.tokenizer.text_span
        rows = generate(self.igpt, prompts, n_words, span, how, closing=True)
        return [self.tokenizer.text_decode(row) for row in rows]

    @torch.no_grad()
    def images(self, captions, how):
        """B captions -> picture tokens int64 (B,N). Raises InputError as text_encode does."""
        self.expect("text_image")
        t, N, by_length = self.tokenizer, self.vqvae.n_tokens, defaultdict(list)
        if not self.igpt.causal:  # a ParallelPredictor draws all tokens at once
            blanks = torch.zeros(len(captions), N, dtype=torch.int64)
            rows = make_sequences(blanks, t.encode_batch(captions), t, "text_image").to(self.device)
            logits = self.igpt(rows[:, :-1])[rows[:, 1:] < t.n_embeddings]  # (B*N,V)
            return sample_token(logits[:, : t.n_embeddings], how).view(-1, N)
        for row, caption in enumerate(captions):  # a batch of prompts is of one length
            by_length[len(caption.split())].append(row)
        out = torch.empty(len(captions), N, dtype=torch.int64, device=self.device)
        for rows in by_length.values():
            prompts = torch.stack([text_prompt(t, captions[row]) for row in rows]).to(self.device)
            nothing = None
            if "image_text" in self.igpt.orders:  # BOS EOT, a picture that no caption precedes
                nothing = image_prompts(t, prompts[:, :0])[:, :2]
            out[rows] = self.continue_images(prompts, N, how, nothing)
        return out

    def captions(self, tokens, how):
        """Picture tokens (B,N) -> list of B captions."""
        self.expect("image_text")
        prompts = image_prompts(self.tokenizer, tokens.to(self.device))
        return self.continue_captions(prompts, self.tokenizer.caption_length, how)

    def pairs(self, n, how):
        """n pairs from nothing but BOS -> picture tokens (n,N), list of n captions.

        The model first chooses between EOT, a picture and then its caption, and EOI, the reverse. A
        picture made first had no guidance, and many show no clear digit: it serves as a draft, its
        caption is read, and the pair's picture is drawn from that. Guidance makes pairs clearer
        than the model's own: this is no exact sample of its joint distribution.
        """
        t = self.tokenizer
        bos = torch.full((n, 1), t.bos_token, device=self.device)
        mark = generate(self.igpt, bos, 1, t.start_span, how)
        prompts, captions = torch.cat([bos, mark], 1), []  # (n,2)
        picture_first = mark[:, 0] == t.end_of_text_token  # (n,)
        if picture_first.any():
            drafts = self.continue_images(prompts[picture_first], self.vqvae.n_tokens, how)
            captions += self.captions(drafts, how)
        if not picture_first.all():
            captions += self.continue_captions(prompts[~picture_first], t.caption_length, how)
        return self.images(captions, how), captions

@torch.no_grad()
def generate_from_text(model, tokenizer, vqvae, prompt, device, how=SamplingConfig()):
    """A caption -> a picture (1,3,H,W) in [-1,1] on the device. Raises InputError as text_encode
    does."""
    tokens = Models(vqvae, model, tokenizer).images([prompt], how)
    return vqvae.decode_tokens(tokens).to(device)

def generate_from_image(model, tokenizer, vqvae, image, device, how=SamplingConfig()):
    """A picture (3,H,W) in [-1,1] -> its caption."""
    tokens = vqvae.get_tokens(image[None].to(device)).flatten(1)  # (1,N), on the models' device
    return Models(vqvae, model, tokenizer).captions(tokens, how)[0]

@torch.no_grad()
def generate_unconditional(model, tokenizer, vqvae, n_samples, device, how=SamplingConfig()):
    """n_samples pairs -> pictures (n,3,H,W) in [-1,1] and a list of n captions."""
    tokens, captions = Models(vqvae, model, tokenizer).pairs(n_samples, how)
    return vqvae.decode_tokens(tokens).to(device), captions


# --- Evaluation: what the two models are worth, over the whole test split -------------------------

@torch.no_grad()
def span_sums(models, tokens, captions, order, n_first=None):
    """Teacher forcing over B pictures' tokens (B,N) and captions in one of the ORDERS, by a model
    in eval mode -> nats, hits and number of the picture's targets, and of the caption's, (2,3,B).

    The caption's targets are its words and, where it is short, the EOT that ends it; marks whose
    place is certain count nowhere. n_first: of a picture count no more than the first tokens.
    """
    t = models.tokenizer
    rows = make_sequences(tokens, t.encode_batch(captions).to(tokens.device), t, order)
    logits, targets = models.igpt(rows[:, :-1]), rows[:, 1:]
    image = targets < t.n_embeddings  # (B,T-1)
    if n_first:
        image &= image.cumsum(1) <= n_first
    word = (rows >= t.n_embeddings) & (rows < t.end_of_text_token)  # (B,T)
    short = word.sum(1, keepdim=True) < t.caption_length
    text = word[:, 1:] | (targets == t.end_of_text_token) & word[:, :-1] & short
    counts = next_token_nll(logits, rows), logits.argmax(-1) == targets, torch.ones_like(targets)
    spans = torch.stack([image, text])[:, None]  # (2,1,B,T-1)
    return (spans * torch.stack(counts)).sum(-1)

def compare_captions(found, wanted):
    """Two lists of captions -> share wholly alike, share of the wanted words found in place."""
    right = total = 0
    for a, b in zip(found, wanted):
        right += sum(map(str.__eq__, a.split(), b.split()))
        total += len(b.split())
    return sum(map(str.__eq__, found, wanted)) / len(wanted), right / total

def evaluate(models, images, captions, how=SamplingConfig(), seed=0):
    """What both models are worth: all figures of `eval`, over pictures uint8 (M,H,W,3) and M
    captions -> dict of floats, NaN where the model was not trained for what is asked."""
    vqvae, igpt, device = models.vqvae.eval(), models.igpt.eval(), models.device
    out = dict.fromkeys((
        "recon_mse", "recon_psnr", "codebook_used", "codebook_perplexity", "nll_text_to_image",
        "nll_text", "code_accuracy", "nll_image", "nll_image_to_text", "caption_exact",
        "caption_slot_accuracy", "round_trip_exact", "round_trip_unguided"), math.nan)
    out |= measure_reconstruction(vqvae, track(picture_batches(images, 250), "reconstructing"))
    del out["loss"]
    torch.manual_seed(seed)
    sums, texts = defaultdict(float), defaultdict(list)
    for start in track(range(0, len(images), 250), "evaluating"):
        wanted = captions[start : start + 250]
        tokens = extract_tokens(vqvae, images[start : start + 250]).to(device)
        for order in igpt.orders:
            sums[order] += span_sums(models, tokens, wanted, order).double().sum(2)  # (2,3)
        if "image_text" not in igpt.orders:
            continue  # it does not read
        texts["caption_exact"] += models.captions(tokens, how.but(greedy=True))
        drawings = dict(round_trip_exact=how, round_trip_unguided=how.but(guidance=0.0))
        for name, drawing in drawings.items() if "text_image" in igpt.orders else ():
            # Through pixels: what we read is what a person would be shown
            made = decode_pictures(vqvae, models.images(wanted, drawing))
            texts[name] += models.captions(extract_tokens(vqvae, made), how.but(greedy=True))
    for order, image, text in (("text_image", "nll_text_to_image", "nll_text"),
                               ("image_text", "nll_image", "nll_image_to_text")):
        if order in sums:
            (out[image], hits, _), (out[text], _, _) = (sums[order] / sums[order][:, 2:]).tolist()
            if order == "text_image":
                out["code_accuracy"] = hits
    if not igpt.causal:
        out["nll_text"] = math.nan  # a ParallelPredictor is shown the words that it would predict
    for name, found in texts.items():
        out[name], slots = compare_captions(found, captions)
        if name == "caption_exact":
            out["caption_slot_accuracy"] = slots
    return out


# ==================================================================================================
# Part II: everything else
# ==================================================================================================

import argparse
import codecs
import colorsys
import contextlib
import csv
import hashlib
import io
import os
import pickle
import pickletools
import shutil
import signal
import struct
import threading
from pathlib import Path

try:
    import fcntl  # file locks; not on Windows
except ImportError:
    fcntl = None


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

def write_style(style, n, rng):
    """One style of STROKES in n hands -> dots of ink (n,DOTS,2) in about the unit box, and the
    length of path that each stands for (n,DOTS)."""
    sloppy = np.exp(rng.normal(-0.2, 0.45, (n, 1, 1)))  # a careful or a careless hand
    bend = np.exp(rng.normal(0, 0.16, (n, 1, 2)))  # moves waists and bars: big head, small foot ...
    dots, length = [], []
    for stroke in style.split("/"):
        words = stroke.split()
        p = np.array([[int(word[:2]), int(word[2:4])] for word in words]) / 99  # (P,2)
        # Neighbours shake together (a 1-2-1 mean), or round bowls would come out as polygons
        shake = rng.normal(0, 0.045, (n, len(words) + 2, 2))
        shake = (shake[:, :-2] + 2 * shake[:, 1:-1] + shake[:, 2:]) / 4
        p = p**bend + sloppy * (shake + rng.normal(0, 0.03, (n, 1, 2)))  # (n,P,2)
        early = rng.normal(0.03, 0.18, (n, 2, 1))  # where the stroke starts and stops
        p[:, [0, -1]] += early * (p[:, [0, -1]] - p[:, [1, -2]])
        # A smooth path: the corners of the polygon are cut off, and those of what is left, three
        # times (Chaikin 1974). Where a point stands twice, at ends and corners, nothing is cut off
        sharp = np.array([word.endswith("!") for word in words]) & (rng.random() < 0.7)
        sharp[[0, -1]] = True
        p = np.repeat(p, 1 + sharp, axis=1)
        for _ in range(3):
            a, b = p[:, :-1], p[:, 1:]
            p = np.stack([3 * a + b, a + 3 * b], 2).reshape(n, 2 * a.shape[1], 2) / 4
        dots.append((p[:, 1:] + p[:, :-1]) / 2)
        length.append(np.linalg.norm(np.diff(p, axis=1), axis=2))
    return np.concatenate(dots, 1), np.concatenate(length, 1)

def place(dots, length, pen, size, rng):
    """Warp and slant the writing, then fit it as MNIST does: 20/28 of the side, centred by mass.
    In: dots (n,DOTS,2), length (n,DOTS), pen radius (n,1) in boxes; out: the same in pixels."""
    n = len(dots)
    d = dots - 0.5
    waves = d @ rng.normal(0, 4, (n, 2, 2)) + rng.uniform(0, 6, (n, 1, 2))
    d = d + 0.06 * np.sin(waves)
    lean = np.array([[0.95, 0], [-0.15, 1]])
    d = d @ (lean + rng.normal(0, 0.18, (n, 2, 2)))
    # The longer side of the ink fills the room; pen and path shrink together, as on paper, so
    # that the loops of a sprawling figure do not clog
    room = size * 20 / 28 * rng.uniform(0.92, 1.02, (n, 1))
    scale = room / (np.ptp(d, axis=1).max(1, keepdims=True) + 2 * pen)  # (n,1) pixels a box
    d = d - np.average(d, axis=1, weights=np.repeat(length[..., None], 2, 2), keepdims=True)
    centre = size / 2 + rng.normal(0, size / 60, (n, 1, 2))
    return d * scale[..., None] + centre, length * scale, pen * scale

def ink_dots(xy, length, pen, size, rng):
    """Dots (n,DOTS,2), lengths (n,DOTS), pen radius (n,1), in pixels -> ink (n,size,size) uint8.

    The sum of exp(-distance^2) over the dots is about exp(-nearest^2), and exp(-dx^2 - dy^2) is a
    product, so how far every pixel is from the pen's path costs a matrix product and a log.
    """
    unit = size / 28
    grid = np.arange(size, dtype=np.float32)[:, None] + 0.5  # (size,1) pixel centres
    near = np.exp(-(((grid - xy.astype(np.float32).transpose(2, 0, 1)[:, :, None]) / unit) ** 2))
    weights = (length / (unit * np.pi**0.5)).astype(np.float32)[:, None]  # (n,1,DOTS)
    near = (near[1] * weights) @ near[0].mT  # (n,size,DOTS) @ (n,DOTS,size) -> (n,size,size)
    distance = unit * np.sqrt(-np.log(near.clip(1e-30, 1)))
    # Inside the pen's radius is ink; the ramp of about a pixel around it keeps edges smooth
    blur = np.minimum(rng.uniform(0.8, 1.8, pen.shape) * unit, 2 * pen)[..., None]  # (n,1,1)
    edge = (0.5 + (pen[..., None] - distance) / blur).clip(0, 1)
    return (255 * edge * edge * (3 - 2 * edge) + 0.5).astype(np.uint8)

def draw_digits(labels, size, rng):
    """labels (M,) in 0..9, side in pixels, Generator -> ink (M,size,size) uint8, 255 is ink."""
    ink, hand = np.empty((len(labels), size, size), np.uint8), rng.random(len(labels))
    for digit, table in enumerate(STROKES):
        styles = table.split(";")
        for i, style in enumerate(styles):
            mine = (labels == digit) & ((hand * len(styles)).astype(int) == i)
            for rows in np.array_split(mine.nonzero()[0], 1 + mine.sum() // 1000):  # less memory
                pen = np.exp(rng.normal(-2.53, 0.27, (len(rows), 1))).clip(0.04, 0.13)  # in boxes
                placed = place(*write_style(style, len(rows), rng), pen, size, rng)
                ink[rows] = ink_dots(*placed, size, rng)
    return ink

DIGITS = "zero one two three four five six seven eight nine".split()
# The embedded set's palette: hue (in [0,1) round the colour wheel) by shade (saturation, value)
HUES = dict(red=0, orange=.075, yellow=.16, green=.34, cyan=.5, blue=.63, purple=.77, pink=.9)
SHADES = dict(light=(0.38, 1.0), plain=(1.0, 0.95), dark=(1.0, 0.5))

def colorize(ink, labels, rng):
    """Colour grey digits and caption them: 'dark red seven on light blue'. ink uint8 (M,H,W), 255
    is ink; labels (M,) 0..9 -> images uint8 (M,H,W,3), captions, a list of str."""
    names = list(itertools.product(SHADES, HUES))
    values = [colorsys.hsv_to_rgb(HUES[hue], *SHADES[shade]) for shade, hue in names]
    values = np.round(255 * np.array(values, np.float32))  # (24,3)
    legible = np.argwhere(np.abs(values[:, None] - values).sum(-1) > 150)  # (pairs,2)
    images, captions = np.empty((*ink.shape, 3), np.uint8), []
    for i, digit in enumerate(labels):
        fore, back = rng.choice(legible)
        alpha = ink[i, ..., None] / np.float32(255)  # (H,W,1)
        images[i] = np.round(values[back] + (values[fore] - values[back]) * alpha)
        captions.append(" ".join([*names[fore], DIGITS[digit], "on", *names[back]]))
    return images, captions

def make_drawn(n_train, n_test, size, seed):
    """The embedded set, digits drawn from pen strokes -> the arrays of drawn.npz: train_images,
    test_images uint8 (M,size,size,3), train_captions, test_captions. Same arguments, same bytes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=n_train + n_test)
    images, captions = colorize(draw_digits(labels, size, rng), labels, rng)
    return dict(train_images=images[:n_train], test_images=images[n_train:],
                train_captions=captions[:n_train], test_captions=captions[n_train:])


# --- Data: three sources, one result --------------------------------------------------------------
#
# Every source gives training pictures, test pictures and the captions of both, as load_data's Data.
# Files come from outside: none can run code, and what is wrong with one is said in a line.

@contextlib.contextmanager
def reading(path, kind):
    """Within: whatever a missing or damaged file raises becomes an InputError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # damaged bytes can lead to nearly anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path}: no readable {kind} ({why})") from None

class SafeUnpickler(pickle.Unpickler):
    """Unpickles arrays, containers, strings and numbers, and nothing that could run code.

    A pickle is a program: it may name any importable function and call it. So find_class, the one
    door to names, knows those with which NumPy pickles arrays, and has its own idea of them: arrays
    are made of bytes that are there, never of a size that the pickle only names.
    """

    KNOWN = {
        "_reconstruct": lambda *_: np.ndarray(0, np.uint8),  # its state, shape and bytes, follows
        "_frombuffer": lambda raw, dtype, shape, order: np.frombuffer(raw, dtype).reshape(
            shape, order=order),
        "scalar": lambda dtype, raw: np.frombuffer(raw, dtype)[0],
        "dtype": np.dtype, "encode": codecs.encode, "OrderedDict": dict,
        "ndarray": None, "memmap": None,  # no more than arguments of _reconstruct
    }

    def find_class(self, module, name):
        if module.split(".")[0] in ("numpy", "_codecs", "collections") and name in self.KNOWN:
            return self.KNOWN[name]
        raise InputError(f"it asks for {module}.{name}, which no picture data needs: refused")

def unpickle(path):
    """The content of a pickle of arrays and texts. Raises InputError if it is broken or hostile."""
    with reading(path, "pickle"):
        raw = Path(path).read_bytes()
        for opcode, number, _ in pickletools.genops(raw):  # refuses lengths beyond the file's end
            if opcode.name.endswith("PUT") and number > len(raw):
                raise ValueError(f"memo {number}")  # the unpickler would make room for as many
        return SafeUnpickler(io.BytesIO(raw)).load()

def to_uint8(images, value_range="auto", name="images"):
    """Pictures (M,H,W,3) of any accepted value range -> uint8 in 0..255, and the range's name.

    Integers 0..3 ('2bit', two bits a channel) or 0..255 ('8bit'), or floats in [0,1] ('unit');
    'auto' takes the first that the largest value fits. Raises InputError for all else: another
    shape, H or W not divisible by 4, NaN, fractions above 1.
    """
    dtype, shape = getattr(images, "dtype", np.dtype("O")), getattr(images, "shape", ())
    fits = dtype.kind in "uif" and len(shape) == 4 and 0 not in shape
    if not fits or any(np.mod(shape[1:], (4, 4, 3))):
        raise InputError(f"{name}: want numbers (N,H,W,3), H and W divisible by 4, found {dtype} "
                         f"{shape}")
    floats, low, high = dtype.kind == "f", images.min(), images.max()
    slack = 1e-3 if floats else 0  # an antialiased resize makes 1.0000002
    if value_range == "auto":
        value_range = "2bit" if high <= 3 else "8bit"
        if floats and high <= 1 + slack:
            value_range = "unit"
    limit = {"unit": 1, "2bit": 3, "8bit": 255}[value_range]
    fits = -slack <= low and high <= limit + slack  # False for NaN, too
    if floats and limit > 1:
        fits = fits and np.abs(images - images.round()).max() <= slack
    if not fits:
        raise InputError(f"{name}: {low} to {high} does not fit {value_range} (0 to {limit})")
    factor = 255 // limit
    if floats:
        images, factor = np.round(images.clip(0, limit) * factor), 1
    images = np.ascontiguousarray(images, np.uint8)  # no copy of what is so already
    if factor > 1:
        images = images * np.uint8(factor)
    return images, value_range

def check_images(train, test, value_range="auto"):
    """Training and test pictures as to_uint8 has them, the latter in the range of the former."""
    train, value_range = to_uint8(train, value_range, "training pictures")
    test, _ = to_uint8(test, value_range, "test pictures")
    log(f"pictures: {train.shape} to train on, {test.shape} to test, values {value_range}")
    if train.shape[1:] != test.shape[1:]:
        raise InputError("pictures of unlike sizes")
    return train, test

def check_captions(texts, images, name="texts"):
    """A list, tuple or array of captions, one a picture -> list of str, blanks made single."""
    if not isinstance(texts, (list, tuple, np.ndarray)) or len(texts) != len(images):
        raise InputError(f"{name}: want a list of {len(images)} captions, one a picture, found "
                         f"{type(texts).__name__} {np.shape(texts)}")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.split():
            raise InputError(f"{name}: caption {i} is {text!r}, no text of words")
    return [" ".join(text.split()) for text in texts]

PAIRS = ("train_images", "test_images", "train_texts", "test_texts")

def check_pairs(data, value_range="auto"):
    """Four arrays, or a dict of PAIRS -> the same, checked."""
    if isinstance(data, dict):
        data = [data[key] for key in PAIRS]
    train, test, texts, test_texts = data
    train, test = check_images(train, test, value_range)
    return (train, test, check_captions(texts, train, "training texts"),
            check_captions(test_texts, test, "test texts"))

def load_pickled_data(path, value_range="auto"):
    """mnist_colored.pkl: a dict with 'train' and 'test' -> two uint8 arrays (M,H,W,3) in 0..255."""
    data = unpickle(path)
    with reading(path, "dict with 'train' and 'test'"):
        return check_images(data["train"], data["test"], value_range)

def load_colored_mnist_text(path, value_range="auto"):
    """colored_mnist_with_text.pkl, a 4-tuple or a dict of PAIRS -> train and test pictures uint8
    (M,H,W,3) in 0..255, train and test texts. Raises InputError for all else."""
    data = unpickle(path)
    with reading(path, f"4-tuple or dict with {', '.join(PAIRS)}"):
        return check_pairs(data, value_range)

def load_mnist(folder):
    """The four raw MNIST files (yann.lecun.com/exdb/mnist), gzipped or not, anywhere in a folder,
    coloured and captioned by us -> as load_colored_mnist_text."""
    found, rng = {}, np.random.default_rng(0)
    for name in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        paths = [path for path in sorted(folder.rglob(f"{name}?idx*")) if path.is_file()]
        path = paths[0] if paths else folder / f"{name}-idx"
        with reading(path, "IDX file"):
            raw = path.read_bytes()
            if raw[:2] == b"\x1f\x8b":  # whatever its name says; a small file can hold many zeros
                raw = zlib.decompressobj(31).decompress(raw, 2**30)
            # Header: two zero bytes, type (8 = uint8), number of axes, each length in 32 bits
            shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
            if raw[:3] != b"\0\0\x08" or 0 in shape:
                raise InputError(f"not an IDX file of bytes: {raw[:3]}, {shape}")
            found[name] = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    with reading(folder, "MNIST: labels and pictures do not fit each other"):
        train, texts = colorize(found["train-images"], found["train-labels"], rng)
        test, test_texts = colorize(found["t10k-images"], found["t10k-labels"], rng)
    return train, test, texts, test_texts

SOURCES = ("colored_mnist_with_text.pkl", "mnist_colored.pkl", "mnist", "drawn.npz")  # in order

def load_data(folder, value_range="auto"):
    """The data of a folder: the two pickles, else raw MNIST in mnist/, else drawn.npz -> Data,
    without captions if only the pictures of the VQ-VAE are there. Raises InputError if there is
    nothing, if picture sizes differ, and when the readers above do."""
    pairs, pictures, mnist, drawn = (Path(folder) / name for name in SOURCES)
    own = load_pickled_data(pictures, value_range) if pictures.exists() else ()
    if pairs.exists():
        data = load_colored_mnist_text(pairs, value_range)
    elif own:
        data = (*own, [], [])
    elif mnist.is_dir():
        data = load_mnist(mnist)
    elif drawn.exists():
        with reading(drawn, ".npz"), np.load(drawn, allow_pickle=False) as arrays:
            data = check_pairs([arrays[key.replace("texts", "captions")] for key in PAIRS], "8bit")
    else:
        raise InputError(f"no data in {folder}, which must be a directory that holds some: "
                         f"`mmgen.py data --data {folder}` draws them")
    if own and own[0].shape[1:] != data[0].shape[1:]:
        raise InputError(f"{folder}: pictures of unlike sizes: {own[0].shape}, {data[0].shape}")
    return Data(*data, *own)

def normalize_images(images, method="vqvae", value_range="auto"):
    """Pictures (M,H,W,3) in any accepted range -> float tensor (M,3,H,W), in [-1,1] for method
    'vqvae' and [0,1] for method 'unit'. Raises InputError as to_uint8 does."""
    if method not in ("vqvae", "unit"):
        raise InputError(f"unknown method {method!r}: 'vqvae' gives [-1,1], 'unit' gives [0,1]")
    x = to_float(torch.from_numpy(to_uint8(images, value_range)[0]))
    return x if method == "vqvae" else (x + 1) / 2

class DataProcessor:
    """The notes' name for the step from arrays to loaders."""

    @staticmethod
    def prepare_vqvae_data(train_data, test_data, batch_size=128, seed=0):
        """Two arrays (M,H,W,3) in any accepted range -> two Batches of (B,3,H,W) in [-1,1]."""
        train, test = check_images(train_data, test_data)
        return picture_batches(train, batch_size, seed=seed), picture_batches(test, batch_size)

def create_dataset(images, texts, vqvae, tokenizer, batch_size=128, orders=ORDERS[:2], seed=0):
    """Pictures (M,H,W,3) in any accepted range and M captions -> Batches of sequences int64 (B,T).
    Raises InputError for pictures or captions that do not fit."""
    images, _ = to_uint8(images)
    text_ids = tokenizer.encode_batch(check_captions(texts, images))
    tokens = extract_tokens(vqvae, images)
    return sequence_batches(tokenizer, orders, tokens, batch_size, text_ids, seed=seed)


# --- Files: checkpoints and pictures --------------------------------------------------------------
#
# Every file is written beside its place and renamed when it is whole; every checkpoint is read
# without running code and says what it is and what it fits to.

FORMAT = 4  # of checkpoints; raise it whenever an old file would be misread
VQVAE_FILE, IGPT_FILE = "checkpoints/vqvae_model.pth", "checkpoints/igpt_model.pth"  # of a run

def atomic_write(path, data):
    """Write bytes beside their place, flush to disk, rename: one sees the old file or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if processes()[0]:
        return  # the first process writes for all
    beside = path.with_name(f".{path.name}.tmp")  # what a kill has left is written over next time
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
        raise InputError(f"{path} does not exist: train it, --resume what was stopped, or name "
                         "another --run")
    with reading(path, "checkpoint"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if (content["kind"], content["format"]) != (kind, FORMAT):
            raise InputError(f"not a {kind} checkpoint of format {FORMAT}")
        return content

def describe(model, **more):
    """A model, also one that torch.compile has wrapped -> what rebuild needs, and more."""
    model = getattr(model, "_orig_mod", model)
    return {"class": type(model).__name__, "options": model.options, "model": model.state_dict(),
            **more}

def rebuild(content, **more):
    """What describe told -> the model in eval mode. more: what options cannot hold."""
    known = {build.__name__: build for build in (VQVAE, FactoredVQVAE, iGPT, ParallelPredictor)}
    with torch.device("meta"):  # shapes without memory: a damaged file cannot ask for gigabytes
        model = known[content["class"]](**content["options"], **more)
    model.load_state_dict(content["model"], assign=True)
    return model.float().eval()

def save_vqvae(path, vqvae):
    """checkpoints/vqvae_model.pth: constructor arguments and weights."""
    save_checkpoint(path, "vqvae", describe(vqvae))

def load_vqvae(path, device="cpu"):
    """-> VQVAE in eval mode. Raises InputError if it is missing, damaged or of another kind."""
    content = load_checkpoint(path, "vqvae")
    with reading(path, "checkpoint"):
        return rebuild(content).to(device)

def fingerprint(vqvae):
    """The first 16 hex digits of the SHA-256 of the codebook's bytes."""
    return hashlib.sha256(vqvae.codebook.weight.detach().cpu().numpy()).hexdigest()[:16]

def save_igpt(path, igpt, tokenizer, vqvae):
    """checkpoints/igpt_model.pth: also the vocabulary, and which codebook its tokens refer to."""
    save_checkpoint(path, "igpt", describe(
        igpt, words=tokenizer.words, caption_length=tokenizer.caption_length,
        codebook=fingerprint(vqvae)))

def load_igpt(path, vqvae, device="cpu", any_codes=False):
    """-> iGPT in eval mode and its Tokenizer. Raises InputError also if made for other codes."""
    content, codebook = load_checkpoint(path, "igpt"), vqvae.codebook.weight
    with reading(path, "checkpoint"):
        if not any_codes and content["codebook"] != fingerprint(vqvae):
            raise InputError("was trained on the codes of another VQ-VAE: train the iGPT anew")
        tokenizer = Tokenizer([" ".join(content["words"])], vqvae.n_embeddings,
                              content["caption_length"])
        linked = "code_in.weight" in content["model"]
        igpt = rebuild(content, codebook=codebook if linked else None)
        if tokenizer.vocab_size != igpt.vocab_size:
            raise InputError("its vocabulary is damaged")
        return igpt.to(device), tokenizer

def encode_picture(image, suffix=".ppm"):
    """uint8 (H,W,3) -> a file: a binary PPM or, for suffix .png, a PNG (header, compressed rows,
    each behind filter type 0, end)."""
    height, width, _ = image.shape
    if suffix != ".png":
        return b"P6\n%d %d\n255\n" % (width, height) + image.tobytes()
    rows = np.pad(image.reshape(height, -1), ((0, 0), (1, 0)))  # (H,1+3W)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    out = b"\x89PNG\r\n\x1a\n"
    for chunk in b"IHDR" + head, b"IDAT" + zlib.compress(rows.tobytes(), 9), b"IEND":
        out += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return out

def read_pictures(path):
    """--image: .npy uint8 (H,W,3) or (N,H,W,3), or a binary PPM (P6, 8 bits) -> uint8 (N,H,W,3)."""
    with reading(path, "picture"):
        raw = Path(path).read_bytes()
        # P6, width, height, largest value, a blank, pixels; in between blanks and comment lines
        gap = rb"(?:\s|#[^\n]*\n)+"
        header = re.match(rb"P6" + (gap + rb"(\d{1,5})") * 2 + gap + rb"255\s", raw)
        if header:
            shape = int(header[2]), int(header[1]), 3
            images = np.frombuffer(raw, np.uint8, math.prod(shape), header.end()).reshape(shape)
        elif raw[:6] == b"\x93NUMPY":
            images = np.load(path, allow_pickle=False)
        else:
            raise InputError("neither .npy nor a binary PPM (P6)")
        images = images[None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.shape[3:] != (3,) or not images.size:
            raise InputError(f"want uint8 (N,H,W,3), found {images.dtype} {images.shape}")
        return images.copy()

def picture_grid(images, scale=2, together=1):
    """uint8 (N,H,W,3) -> one about square picture, each enlarged `scale` times, on grey. together:
    so many neighbours, the samples of one prompt, are not torn apart by the end of a row."""
    N, H, W, _ = images.shape
    columns = together * math.ceil(math.sqrt(N) / together)
    rows = math.ceil(N / columns)
    tiles = np.full((rows * columns, H * scale + 2, W * scale + 2, 3), 128, np.uint8)
    tiles[:N, 1:-1, 1:-1] = images.repeat(scale, 1).repeat(scale, 2)
    tiles = tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2)  # (rows,h,columns,w,3)
    return tiles.reshape(rows * tiles.shape[1], -1, 3)

def sample_paths(prefix):
    """--out PREFIX -> PREFIX.ppm (PREFIX itself, if it ends in .png), PREFIX.npy, PREFIX.txt."""
    base, suffix = re.fullmatch(r"(.*?)(\.png|\.ppm)?", str(prefix)).groups(".ppm")
    return tuple(Path(base + end) for end in (suffix, ".npy", ".txt"))

def save_samples(prefix, images, captions, together=1):
    """Write a picture_grid, the pictures uint8 (N,H,W,3) and a caption a line to sample_paths.
    Returns the grid's path."""
    buffer, (grid, pictures, texts) = io.BytesIO(), sample_paths(prefix)
    np.save(buffer, images)
    atomic_write(grid, encode_picture(picture_grid(images, together=together), grid.suffix))
    atomic_write(pictures, buffer.getvalue())
    atomic_write(texts, "".join(f"{caption}\n" for caption in captions).encode())
    return grid

def show_in_terminal(images, captions):
    """Draw pictures uint8 (N,H,W,3), two pixels a character (upper half block), captions below."""
    column = max(images.shape[2], *map(len, captions)) + 2
    per_row = max(1, shutil.get_terminal_size((100, 24)).columns // column)
    for start in range(0, len(images), per_row):
        for y in range(0, images.shape[1], 2):
            line = ""
            for image in images[start : start + per_row]:
                for upper, lower in zip(image[y].tolist(), image[y + 1].tolist()):
                    line += "\x1b[38;2;%d;%d;%dm\x1b[48;2;%d;%d;%dm▀" % (*upper, *lower)
                line += "\x1b[0m" + " " * (column - image.shape[1])
            print(line)
        print("".join(text.ljust(column) for text in captions[start : start + per_row]) + "\n")


# --- Runs: a directory with checkpoints, curves and the state for --resume ------------------------

# Which files each phase makes anew, and on whose work a phase can go on
MAKES = dict(vqvae=[VQVAE_FILE], igpt=[IGPT_FILE], single=[VQVAE_FILE, IGPT_FILE], finetune=[])
FOLLOWS = dict(igpt=("vqvae", "single"), finetune=("vqvae", "single", "igpt"))
SAVE_SECONDS = 15  # how often the state for --resume is written: what a kill costs at most

class Run:
    """A run directory during training. checkpoints/state.pth holds all that the rest of the run
    depends on: the settings, the phases that are done, the rows of the curves' table, the trainer's
    state, and whether the run is complete.

    Raises InputError if the directory holds a run and neither resume nor overwrite are given, if
    the settings of the run to resume are others, and if another training is at work there.
    """

    def __init__(self, folder, regime, cfg, data, resume=False, overwrite=False):
        self.folder, self.state_path = Path(folder), Path(folder) / "checkpoints" / "state.pth"
        texts = "\n".join(data.train_captions + data.test_captions).encode()
        data_hash = zlib.crc32(data.vqvae_train, zlib.crc32(data.train_images, zlib.crc32(texts)))
        settings = {"regime": regime, **vars(cfg), "data": data_hash}
        state = {"settings": None, "done": [], "rows": [], "trainer": None, "complete": True}
        with reading(folder, "run"):
            if self.state_path.exists():
                loaded = load_checkpoint(self.state_path, "state")
                state = {key: loaded[key] for key in state}
            if resume and state["settings"]:
                for key, value in settings.items():
                    if value != state["settings"].get(key):
                        raise InputError(f"cannot resume, {key} is {value}, the run's is "
                                         f"{state['settings'].get(key)}: repeat flags and data")
            else:
                self.start_anew(state, REGIMES[regime], overwrite)
        self.state, self.signal, self.saved = state | {"settings": settings}, 0, time.monotonic()
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.state_path.with_name(".lock"), "w")  # a kill frees it
        try:
            if fcntl and processes()[0] == 0:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another training is at work in {folder}") from None
        except OSError as error:  # not every file system has locks
            log(f"warning: {folder} cannot be locked ({error.strerror})")

    def start_anew(self, state, phases, overwrite):
        """Prepare an old state for a new run, unless that would replace anything unasked."""
        names = itertools.chain(*(MAKES[phase] for phase in phases))
        taken = any((self.folder / name).exists() for name in names)
        if not overwrite and (taken or not state["complete"] or set(phases) & {*state["done"]}):
            raise InputError("holds a run that this would replace: --resume it, --overwrite it, "
                             "or choose another --run")
        # A run may be made one phase at a time: what came before is left, the rest is stale
        before = FOLLOWS.get(phases[0], ())
        state["done"] = [phase for phase in state["done"] if phase in before]
        state["rows"] = [row for row in state["rows"] if row["phase"] in before]
        state.update(trainer=None, complete=False)

    def save(self, **changes):
        """Write the state, some of it new."""
        self.saved, self.state = time.monotonic(), self.state | changes
        save_checkpoint(self.state_path, "state", self.state)

    def restore(self, trainer):
        """Hand the saved state to the trainer, if it is of this phase."""
        state = self.state["trainer"]
        with reading(self.state_path, "state, --overwrite starts anew"):
            if state and state["phase"] == trainer.phase:
                trainer.load_state_dict(state)
                log(f"resumed {trainer.phase} at step {trainer.step}")
        self.save(trainer=trainer.state_dict())

    def stop(self, number, frame):
        """A signal's handler: let the step end and save; a second signal ends the process."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        log("stopping after this step; once more to stop at once")

    def on_step(self, trainer):
        """Before each step: save from time to time, and when asked to stop."""
        if dist.is_initialized():  # all processes stop after the same step
            number = torch.tensor(self.signal, device=trainer.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.signal = int(number)
        if self.signal or time.monotonic() - self.saved > SAVE_SECONDS:
            self.save(trainer=trainer.state_dict())
        self.stop_if_asked()

    def stop_if_asked(self):
        """After Ctrl-C or SIGTERM: exit with the status the shell expects."""
        if self.signal:
            log(f"stopped, {self.folder} is saved: --resume goes on from here")
            raise SystemExit(128 + self.signal)

    def on_pass(self, row):
        """After each pass: write the table and the picture of the curves."""
        rows, text = self.state["rows"], io.StringIO()
        rows.append(row)
        writer = csv.DictWriter(text, dict.fromkeys(itertools.chain(*rows)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        curves = self.folder / "results" / "training_curves"
        atomic_write(curves.with_suffix(".csv"), text.getvalue().encode())
        atomic_write(curves.with_suffix(".ppm"), encode_picture(draw_curves(rows)))

    def train(self, cfg, data, device, compiled=False):
        """Train the phases that are not done yet -> Models."""
        models, done, regime = None, self.state["done"], self.state["settings"]["regime"]
        for phase in REGIMES[regime]:
            if phase in done:
                continue
            started = time.monotonic()
            if models is None:  # a kill while both were written can leave a pair that does not fit;
                any_codes = self.state["trainer"] is not None  # the state then replaces both
                models = load_models(self.folder, device, phase, any_codes)
                check_size(models, data.train_images)
            models, trainer, loaders = prepare_phase(phase, cfg, data, models, device)
            self.restore(trainer)
            if compiled:
                try_compile(trainer.modules)
            trainer.train(*loaders, self.on_step, self.on_pass)
            if phase != "igpt":
                save_vqvae(self.folder / VQVAE_FILE, models.vqvae)
            if phase != "vqvae":
                save_igpt(self.folder / IGPT_FILE, models.igpt, models.tokenizer, models.vqvae)
            done.append(phase)
            self.save(trainer=None)
            if phase != "igpt":
                report_codebook(models.vqvae, data.vqvae_test, self.folder / "results")
            log(f"{phase}: {trainer.step} steps, {time.monotonic() - started:.0f} s")
            self.stop_if_asked()
        # Perhaps all that was left to do is to finish
        return models or load_models(self.folder, device, "igpt" if regime == "vqvae" else None)

def try_compile(modules):
    """torch.compile the modules in place, or say in one line why not."""
    try:
        torch.compile(abs)(torch.zeros(1))  # fails here if there is no compiler
        for module in modules.values():
            module.compile()
    except Exception as error:  # every backend fails in its own way
        log(f"--compile: not here ({type(error).__name__}); going on without")

def draw_curves(rows, height=300, width=24):
    """Training (grey) and test loss (red) of each pass, every phase on its own scale and parted
    from the next by a line -> uint8 (height,passes*width,3)."""
    canvas = np.full((height, width * len(rows), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        left, phase = i * width, [r for r in rows if r["phase"] == row["phase"]]
        losses = [r[name] for r in phase for name in ("train_loss", "test_loss")]
        if row is phase[0]:
            canvas[:, left] = 0
        for name, color in ("train_loss", 140), ("test_loss", (200, 40, 40)):
            y = (max(losses) - row[name]) / max(np.ptp(losses), 1e-9) * (height - 4)
            canvas[int(y) : int(y) + 4, left + 1 : left + width] = color
    return canvas

def report_codebook(vqvae, images, folder):
    """After a phase that trained the VQ-VAE: is it good enough to go on? Over the whole test set;
    32 originals, each with its reconstruction at its right, go to folder/reconstructions.ppm."""
    m = measure_reconstruction(vqvae, track(picture_batches(images, 250), "measuring the VQ-VAE"))
    log(f"VQ-VAE over {len(images)} test pictures: recon MSE {m['recon_mse']:.4f} (PSNR "
        f"{m['recon_psnr']:.1f} dB), {m['codebook_used']:.0%} of the codes used, perplexity "
        f"{m['codebook_perplexity']:.1f}")
    if m["codebook_used"] < 0.05 or m["codebook_perplexity"] < min(4, vqvae.n_embeddings / 2):
        log("warning: the codebook collapsed: lower --vqvae-lr (in joint training --lambda-xent), "
            "raise --beta, or try --ema 0.99 (in phase 1)")
    some = images[:32]
    pairs = np.stack([some, decode_pictures(vqvae, extract_tokens(vqvae, some))], 1)
    grid = picture_grid(pairs.reshape(-1, *some.shape[1:]), together=2)
    atomic_write(folder / "reconstructions.ppm", encode_picture(grid))

def check_size(models, images):
    """Raises InputError unless pictures uint8 (M,H,W,3) are as large as the VQ-VAE's, if any."""
    if models.vqvae and images.shape[1:3] != models.vqvae.size:
        raise InputError(f"the model knows {models.vqvae.size} pictures, not {images.shape[1:3]}")

def load_models(folder, device, phase=None, any_codes=False):
    """What is in a run directory, or what of it a phase goes on from -> Models. any_codes: see
    load_igpt."""
    if phase in ("vqvae", "single"):
        return Models()
    vqvae = load_vqvae(Path(folder, VQVAE_FILE), device)
    if phase == "igpt":
        return Models(vqvae)
    return Models(vqvae, *load_igpt(Path(folder, IGPT_FILE), vqvae, device, any_codes))


# --- Commands: flags become Settings, the work is done by the functions above ---------------------
#
# Whatever the user got wrong ends as one line and status 2.

SAMPLE_NAMES = dict(text="text_conditioned_samples", image="image_conditioned_samples",
                    unconditional="unconditional_samples")

class Options(Settings):
    """The flags of all commands beside those of Config and SamplingConfig."""

    table = """
        data         data   any      directory of the data
        run          .      any      directory of the run
        device       auto   any      cpu, cuda ...; auto: cuda if there is any
        threads      0      0..1024  CPU threads; 0: torch's choice, one a core
        value_range  auto   auto|2bit|8bit|unit  values of the pictures in pickles
        train        60000  1..      pairs to train on
        test         2000   1..      pairs to test on
        size         28     16..256  height and width, divisible by 4
        seed         0      0..2147483648  same seed, same bytes
        phase        multi  two-stage|single|multi|vqvae|igpt|finetune  regime, or a phase alone
        preset       auto   auto|full|laptop|tiny  auto: full with a GPU, laptop without
        resume       false  any      go on where the run in --run stopped
        overwrite    false  any      start anew over the run in --run
        compile      false  any      torch.compile: a slow start, then faster on GPUs
        mode         text   text|image|unconditional  captions to pictures, the reverse, pairs
        n            0      0..      samples per prompt or picture, or pairs; 0: 1, and 9 pairs
        prompt       []     any      a caption; may be repeated; "red ..." is finished
        prompts      ""     any      file with a caption a line
        image        ""     any      .npy uint8 (H,W,3) or (N,H,W,3), or a binary PPM
        out          ""     any      prefix of .ppm, .npy, .txt; with .png the grid is a PNG
        complete     0      0..      keep so many rows of tokens, draw the rest (mode image)
        best_of      1      1..      keep that sample which makes its prompt the likeliest
        show         false  any      draw the pictures in the terminal
        json         false  any      JSON instead of a table
    """

    def pick_device(self):
        """-> torch.device. Raises InputError if it is not there."""
        name = self.device
        if self.threads:
            torch.set_num_threads(self.threads)
        if name == "auto" and not torch.cuda.is_available():
            name = "cpu"
        if name in ("auto", "cuda"):
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: a GPU for each process
        try:
            torch.empty(1, device=name, dtype=torch.float64)  # sampling adds up probabilities in it
            return torch.device(name)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise InputError(f"device {name!r} cannot be used: {error}") from None

class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and status 2; sub-parsers are of the same class."""

    def error(self, message):
        raise InputError(message)

def build_parser():
    """All subcommands with the flags in COMMANDS. One that is not given leaves no trace."""
    parser = Parser(prog="mmgen.py", description="A small multimodal model: VQ-VAE and iGPT.")
    commands = parser.add_subparsers(dest="command")
    for command, (function, names, more) in COMMANDS.items():
        p = commands.add_parser(command, help=function.__doc__, description=function.__doc__,
                                allow_abbrev=False)
        fields = {name: Options.fields[name] for name in names.split()} | more.fields
        for name, field in fields.items():
            flag = "--" + name.replace("_", "-") if len(name) > 1 else "-" + name
            default = f"default {field.default}"
            if len(field.presets) > 1:
                default = ", ".join(f"{k} {v}" for k, v in field.presets.items())
            if ".." in field.limits:
                default = f"{field.limits}; {default}"
            kind = dict(type=type(field.default))
            if "|" in field.limits:
                kind = dict(choices=field.limits.split("|"))
            elif kind["type"] is bool:
                kind = dict(action=argparse.BooleanOptionalAction)
            elif kind["type"] is list:
                kind = dict(action="append")
            p.add_argument(flag, default=argparse.SUPPRESS, **kind,
                           help=f"{field.text} ({default})".replace("%", "%%"))
    return parser

def command_data(options, _):
    """Draw the embedded data set, drawn.npz."""
    if options.size % 4:
        raise InputError(f"--size {options.size}: must be divisible by 4")
    buffer, path = io.BytesIO(), Path(options.data, "drawn.npz")
    np.savez_compressed(buffer, **make_drawn(options.train, options.test, options.size,
                                             options.seed))
    atomic_write(path, buffer.getvalue())
    log(f"wrote {options.train} + {options.test} pairs to {path}")

def command_train(options, flags):
    """Train a regime or a single phase."""
    if options.resume and options.overwrite:
        raise InputError("--resume is not allowed with --overwrite")
    device, started, preset = options.pick_device(), time.monotonic(), options.preset
    if preset == "auto":
        preset = "laptop" if device.type == "cpu" else "full"
        log(f"preset {preset} (device {device.type})")
    cfg = Config.preset(preset, **flags)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    found = any(Path(options.data, name).exists() for name in SOURCES)
    if options.data == Options.data and not found:
        log(f"no data in {options.data}: drawing the embedded set")
        command_data(Options(), {})
    wait_for_all()  # the first process has written the data
    data = load_data(options.data, options.value_range)
    if options.phase != "vqvae" and not data.train_captions:
        raise InputError(f"--phase {options.phase} needs captions: there is no {SOURCES[0]}")
    run = Run(options.run, options.phase, cfg, data, options.resume, options.overwrite)
    wait_for_all()  # all have read the state before the first process writes a new one
    if run.state["complete"]:
        return log(f"the run in {options.run} is finished")
    if threading.current_thread() is threading.main_thread():  # no other can have handlers
        signal.signal(signal.SIGINT, run.stop)
        signal.signal(signal.SIGTERM, run.stop)
    with run.lock:
        models = run.train(cfg, data, device, options.compile)
        for mode, prompts in (("text", data.test_captions[:9]), ("image", data.test_images[:9]),
                              ("unconditional", None)):
            if models.igpt and (models.igpt.causal or mode == "text"):
                samples = make_samples(options.but(mode=mode), models, SamplingConfig(), prompts)
                path = save_samples(Path(options.run, "results", SAMPLE_NAMES[mode]), *samples)
                log(f"wrote {path}")
        run.save(complete=True)
    log(f"trained {options.phase} in {time.monotonic() - started:.0f} s")

def make_samples(options, models, how, prompts):
    """What `sample` writes: pictures uint8 (M,H,W,3) and M captions.

    prompts: captions for mode 'text', those that end in "..." to be finished; pictures uint8
    (M,H,W,3) for 'image'. best_of: of so many samples keep the one from which the prompt (of a
    completed picture the rows that were kept) is the most likely.
    """
    torch.manual_seed(options.seed)
    vqvae, (h, w), best_of = models.vqvae, models.vqvae.grid, options.best_of
    if options.mode == "unconditional":
        tokens, captions = models.pairs(options.n or 9, how)
        return decode_pictures(vqvae, tokens), captions
    prompts = [prompt for prompt in prompts for _ in range((options.n or 1) * best_of)]
    kept = options.complete * w
    if options.mode == "text":
        captions = [finish_caption(models, prompt, how) for prompt in prompts]
        tokens = models.images(captions, how)
    else:
        pictures = np.stack(prompts)
        whole = extract_tokens(vqvae, pictures).to(models.device)
        tokens = whole.clone()
        if kept:
            beginning = image_prompts(models.tokenizer, tokens[:, :kept])[:, :-1]  # no EOI
            tokens[:, kept:] = models.continue_images(beginning, h * w - kept, how)
            if isinstance(vqvae, FactoredVQVAE):  # the picture's colours stay as they are
                corners(tokens.view(-1, h, w)).copy_(corners(whole.view(-1, h, w)))
        captions = models.captions(tokens, how)
    best = list(range(len(captions)))
    if best_of > 1:
        drawn, read, *_ = likelihoods(models, tokens, captions, kept)
        score = (read if options.mode == "text" else drawn).view(-1, best_of)
        best = (score.argmax(1).cpu() + torch.arange(0, len(captions), best_of)).tolist()
    captions = [captions[i] for i in best]
    if options.mode == "image" and not kept:
        return pictures[best], captions
    return decode_pictures(vqvae, tokens[best]), captions

def likelihoods(models, tokens, captions, n_first=None):
    """B pictures' tokens (B,N) and captions -> nats of log p(picture | caption), log p(caption |
    picture) and log p(pair), each (B,), and numbers of picture and caption targets (B,). NaN where
    the model was not trained on the order that could tell. n_first: see span_sums.

    The pair's probability is the mean over the orders in which the model may make it, for it was
    trained on each as often as on the others.
    """
    if not models.igpt.causal:
        raise InputError("a parallel predictor cannot tell how likely a caption is")
    known = {order: span_sums(models, tokens, captions, order, n_first)
             for order in models.igpt.orders}
    sums = known[models.igpt.orders[0]]
    unknown = torch.full_like(sums, math.nan)
    drawn = -known.get("text_image", unknown)[0, 0]
    read = -known.get("image_text", unknown)[1, 0]
    pairs = torch.stack([-both[:, 0].sum(0) for both in known.values()])  # (orders,B)
    return drawn, read, pairs.logsumexp(0) - math.log(len(known)), sums[0, 2], sums[1, 2]

def finish_caption(models, caption, how):
    """A caption -> itself, or, if it ends in "...", what the model makes of its beginning: at least
    a word more. Raises InputError where there is no room for one."""
    begun, t = caption.removesuffix("...").split(), models.tokenizer
    if not caption.endswith("..."):
        return caption
    if len(begun) >= t.caption_length:
        raise InputError(f"{caption!r} leaves no room for a word")
    prompt = torch.tensor([[t.bos_token, t.end_of_image_token]])
    if begun:
        prompt = text_prompt(t, " ".join(begun))[None, :-1]  # no EOT: the caption goes on
    room = t.caption_length - len(begun)
    return " ".join(begun + models.continue_captions(prompt.to(models.device), room, how))

def command_sample(options, flags):
    """Sample pictures, captions or pairs."""
    mode, how, prompts = options.mode, SamplingConfig(**flags), options.prompt
    if (prompts or options.prompts) and mode != "text":
        raise InputError("--prompt and --prompts belong to --mode text")
    if (options.image or options.complete) and mode != "image":
        raise InputError("--image and --complete belong to --mode image")
    if options.best_of > 1 and mode == "unconditional":
        raise InputError("--best-of needs a prompt or a picture to be true to")
    out = options.out or Path(options.run, "results", SAMPLE_NAMES[mode])
    read = [Path(name).resolve() for name in (options.prompts, options.image) if name]
    if {*read} & {path.resolve() for path in sample_paths(out)}:
        raise InputError(f"--out {out} would write over what was given to read")
    models = load_models(options.run, options.pick_device())
    if options.prompts:
        prompts = prompts + read_captions(options.prompts)
    if options.image:
        prompts = read_pictures(options.image)
    elif not prompts and mode != "unconditional":
        data = load_data(options.data, options.value_range)
        prompts = (data.test_captions if mode == "text" else data.test_images)[:9]
    if mode == "image":
        check_size(models, prompts)
    if options.complete >= models.vqvae.grid[0]:
        raise InputError(f"--complete {options.complete}: pictures have {models.vqvae.grid[0]} "
                         "rows of tokens")
    images, captions = make_samples(options, models, how, prompts)
    path = save_samples(out, images, captions, 1 if mode == "unconditional" else options.n or 1)
    print("\n".join(captions))
    if options.show:
        show_in_terminal(images, captions)
    log(f"wrote {path}")

def read_captions(path):
    """A text file -> its lines that are not blank."""
    with reading(path, "text file"):
        captions = [c for c in Path(path).read_text("utf-8-sig").splitlines() if c.strip()]
        if not captions:
            raise InputError("holds no caption")
        return captions

def command_score(options, _):
    """Log p of pictures and captions under the model."""
    if not options.prompts or not options.image:
        raise InputError("score wants --prompts and --image")
    captions, images = read_captions(options.prompts), read_pictures(options.image)
    M = max(len(images), len(captions))
    if not {len(images), len(captions)} <= {1, M}:
        raise InputError(f"{len(captions)} captions for {len(images)} pictures")
    models = load_models(options.run, options.pick_device())
    check_size(models, images)
    tokens = extract_tokens(models.vqvae, images).to(models.device).expand(M, -1)
    captions = captions * (M // len(captions))
    *nats, n, words = likelihoods(models, tokens, captions)  # (M,) each
    bits = [-x / k / math.log(2) for x, k in zip(nats, (n, words, n + words))]
    print(f"{'log p in nats':>41}{'bits a token':>41}")
    print(f"{'picture|caption':>16}{'caption|picture':>16}{'pair':>9}" * 2 + "  caption")
    for *row, caption in zip(*nats, *bits, captions):
        print(("{:16.3f}{:16.3f}{:9.3f}" * 2).format(*row) + "  " + caption)

def command_eval(options, flags):
    """Measure both models over the test split."""
    how, models = SamplingConfig(**flags), load_models(options.run, options.pick_device())
    data = load_data(options.data, options.value_range)
    check_size(models, data.test_images)
    log(f"measuring over {len(data.test_images)} test pairs ...")
    figures = evaluate(models, data.test_images, data.test_captions, how, options.seed)
    if options.json:
        return print(json.dumps(figures).replace("NaN", "null"))
    for name, value in figures.items():
        print(f"{name:24}{value:10.4f}".replace("nan", "  -"))

PLACE = "data run device threads value_range"
COMMANDS = {  # name: function, names of its Options, further flags
    "data": (command_data, "data train test size seed", Settings),
    "train": (command_train, f"phase preset resume overwrite compile {PLACE}", Config),
    "sample": (command_sample, "mode n prompt prompts image out complete best_of show seed "
               + PLACE, SamplingConfig),
    "score": (command_score, f"prompts image {PLACE}", Settings),
    "eval": (command_eval, f"json seed {PLACE}", SamplingConfig),
}

def main(argv=None):
    """The command line; returns the exit status."""
    try:
        parser = build_parser()
        flags = vars(parser.parse_args(argv))
        command = flags.pop("command")
        if command is None:
            parser.print_help()
            return 0
        function, names, _ = COMMANDS[command]
        options = Options(**{name: flags.pop(name) for name in names.split() if name in flags})
        function(options, flags)
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
