#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "numpy"]
# ///
"""mmgen: a small multimodal generative model in one file, to run, to read and to copy from.

    python mmgen.py train                  # data if there is none, VQ-VAE, iGPT, fine-tune, samples
    python mmgen.py sample --mode text --prompt "dark red seven on light blue" --show
    python mmgen.py sample --mode image    # captions for the first 9 test pictures
    python mmgen.py eval                   # every figure over the test split

A VQ-VAE turns a picture into a grid of discrete tokens. An iGPT (a decoder-only transformer) models
picture tokens and caption words as ONE sequence. So one network draws what a caption says (caption
first, then picture), captions a picture (the reverse), or makes up both.

Part I is the complete algorithm, in the order in which the data flows; to copy it, take all above
the banner of Part II. In brackets: what of the two original notes a chapter implements. Notes A are
the recipe of a VQ-VAE and an iGPT for coloured MNIST, notes B the plan for training them together.

    Settings      Config, SamplingConfig: the numbers of a run                  [A, configuration]
    Batches       Batches: what is learned from, in an order that can be resumed
    Tokenizer     Tokenizer: codes, words and marks in one vocabulary           [A, tokens]
    VQ-VAE        VectorQuantizer, VQVAE, FactoredVQVAE, compute_loss           [A, VQ-VAE; B 1]
    Attention     linear, SelfAttention                                         [A, KV cache]
    iGPT          iGPT, ParallelPredictor                                       [A, iGPT; B 1]
    Sequences     make_sequences, text_prompts, image_prompts, extract_tokens   [A, token sequence]
    Losses        vqvae_loss, igpt_loss, with_noise, measure_reconstruction     [A, losses; B 6]
    Optimizers    Muon, make_optimizer, create_cosine_scheduler                 [B 4]
    Training      Trainer, VQVAETrainer, iGPTTrainer, JointTrainer              [A and B, training]
    Regimes       Data, prepare_phase, train_regime: two-stage, single, multi   [B, all of it]
    Sampling      logits_to_probs, sample_token, generate, Models               [A, generation]
    Evaluation    span_sums, compare_captions, evaluate
    --- Part II
    Drawn digits  STROKES, draw_digits: a data set from pen strokes
    Data          to_uint8, load_data: pickles, MNIST, npz                      [A, data]
    Library       normalize_images, create_dataset, generate_from_text          [A, custom training]
    Files         save_vqvae, load_igpt, save_samples: checkpoints, pictures    [A, output files]
    Runs          Run: phases, curves, saved state, resume
    Commands      main

Symbols of the shape comments:
    B  batch                   H, W  picture height, width     h, w  token grid: H/4, W/4
    N  = h*w, tokens a picture    K  codes in the codebook        D  length of a code vector
    T  tokens in a sequence       L  words in the longest caption    d  width of the transformer
    V  vocabulary = K codes, then the sorted caption words, then the three marks
    M  rows of a data set         S  ids that a span may hold        C  channels
    z_e  encoder output           z_q  the nearest code vectors      sg  stop gradient: detach
A mark, EOT, EOI or BOS, says what comes next in a sequence. A phase is one training of one or both
models; a regime is a list of phases.

Where this departs from the notes, and why:
  * Their codebook never learns: both VQ terms detach z_q. Our term is mean((z_q - sg[z_e])^2).
  * They train on BOS IMAGE ... but prompt with BOS EOI TEXT and BOS EOT IMAGE, which no training
    sequence showed. We train on the two orders that are prompted (`--orders plain` is theirs).
  * Their one-phase loss sends no gradient from the transformer to the encoder (an argmin has none).
    The targets of our cross-entropy have the gradient of softmax(-|z_e - e_k|^2 / tau).
  * No (N, K, D) tensor of distances; a cache that is allocated once; all phases warm up and decay.
  * A laptop sees each picture a few times only, so learning per step counts. Hence, with reasons
    where they stand: a norm before the codebook, colours coded apart, shared keys, normed keys and
    queries, distances instead of places, links of codes to the codebook, noise, warped pictures,
    weights of targets, Muon. And drawings of which the model is unsure are made again.
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
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

class InputError(ValueError):
    """What was given cannot be used; the message says what and why, in one line."""

def log(text, end="\n"):
    """A line for the user on stderr; stdout is for results."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # track may have left its line
    print(clear + text, file=sys.stderr, end=end, flush=True)

def track(items, what, done=0, news=str):
    """The items (an iterable with a length, after `done` others) one by one. On a terminal a line
    that changes says how far it is, how fast, how much longer and what news() returns; elsewhere a
    line every five seconds does."""
    live, started, shown = sys.stderr.isatty(), time.monotonic(), 0
    for i, item in enumerate(items):
        seconds = time.monotonic() - started
        if i and seconds - shown > (0.2 if live else 5):
            shown, left = seconds, int((len(items) - i) * seconds / i)
            log(f"{what} {done + i}/{done + len(items)}  {i / seconds:.2f}/s  "
                f"{left // 60}:{left % 60:02} left  {news()}", end="" if live else "\n")
        yield item

# ===== Part I: the model ==========================================================================

# --- Settings: every number one may turn, with its default, its range and its reason --------------

PRESETS = ("full", "laptop", "tiny")
ORDERS = ("image_text", "text_image", "plain")  # of a sequence, see make_sequences
Field = namedtuple("Field", "default presets limits text group")

def parse(cell):
    """A cell of a table -> the int, float, bool, list or text that it spells."""
    try:
        return json.loads(cell)
    except ValueError:
        return cell

class Settings:
    """Base of the classes below. Each line of a class's `table` makes a field, and a flag of the
    command line (vqvae_dim is --vqvae-dim): name, default (or the values in all PRESETS, of which
    the first is the default), range, choices or a word, and what to know before turning it, with
    two blanks or more between them. A line of one cell heads a group. A class holds the defaults,
    an object its own values, given by name. Raises InputError for a value of another type or out of
    its range, TypeError for a name that is not in the table."""
    table, fields = "", {}
    def __init_subclass__(cls):
        cls.fields, group = {}, ""
        for line in cls.table.strip().splitlines():
            name, *cells = re.split("  +", line.strip())
            if not cells:
                group = name
                continue
            *values, limits, text = map(parse, cells)
            cls.fields[name] = Field(values[0], dict(zip(PRESETS, values)), limits, text, group)
            setattr(cls, name, values[0])

    def __init__(self, **values):
        for name, field in self.fields.items():
            value, kind = values.pop(name, field.default), type(field.default)
            low, dots, high = field.limits.partition("..")
            if dots:
                fits = isinstance(value, numbers.Real)
                fits = fits and float(low) <= value <= float(high or 1e12) and kind(value) == value
            elif "|" not in low:  # a word for the help
                fits = isinstance(value, kind)
            else:
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
    """How to train. `full` is the configuration of notes A. `laptop`: small batches, no dropout and
    lengths in steps (the time then does not depend on the data), for a CPU. `tiny`: seconds, for
    tests. A length in steps, if not 0, goes before that in epochs."""
    table = """
        VQ-VAE
        vqvae_dim        256     64      16      4..          channels; 64 is 12 times as fast
        vqvae_K          128     512     32      2..          codes; more: sharper, slower iGPT
        vqvae_D          256     64      16      3..          length of a code vector
        factored         off     on      off     off|on       code shapes apart from colours
        beta             0.25    2.0     0.25    0..          commitment weight; 0.1 to 2 work
        ema              0.0     0.0     0.0     0..0.9999    codes as moving averages, decay; 0: no
        restart          100     50      100     0..          restart codes unused for longer; 0: no
        vqvae_epochs     30      30      30      1..          length of phase 1
        vqvae_steps      0       1750    60      0..          the same in steps; 0: in epochs
        vqvae_lr         1e-3    3e-3    3e-3    0..          VQ-VAE's rate; muon: but for matrices
        iGPT
        d_model          128     128     32      4..          width of the iGPT
        n_heads          4       4       2       1..          heads; twice this divides d_model
        n_layers         4       4       2       1..          blocks
        dropout          0.1     0.0     0.1     0..0.9       in blocks; 0 for runs of few epochs
        predictor        causal  causal  causal  causal|parallel  parallel: all codes at once
        orders           image_text,text_image   names        of training sequences; or plain
        caption_weight   1.0     6.0     1.0     0..          of words after a picture; 5 to 20
        image_weight     1.0     0.1     1.0     0..          of picture tokens before a caption
        noise            0.0     0.3     0.0     0..1         at most this share of codes is random
        augment          0.0     0.07    0.0     0..1         by how much pictures are warped
        igpt_epochs      30      30      30      1..          length of phase 2
        igpt_steps       0       3100    60      0..          the same in steps; 0: in epochs
        igpt_lr          1e-3    8e-3    3e-3    0..          iGPT's rate; muon: but for matrices
        joint training
        single_epochs    30      30      30      1..          length of `single`
        single_steps     0       3100    80      0..          the same in steps; 0: in epochs
        finetune_epochs  3       3       3       0..          length of phase 3; 0: none
        finetune_steps   0       20      10      0..          the same in steps; 0: in epochs
        finetune_lr      0.01    0.0001  0.01    0..          VQ-VAE's rates in phase 3, relative
        lambda_xent      0.003   0.003   0.003   0..          of cross-entropy; 0.1: codes collapse
        lambda_warmup    0.3     0.15    0.3     0..1         share of `single` in which that is 0
        general
        batch_size       128     64      16      3..          64 learns most; guidance wants 32
        optimizer        adam    muon    adam    adam|muon    muon: orthogonal steps for matrices
        precision        auto    auto    fp32    auto|fp32|bf16  of products; auto: bf16 if fast
        seed             0       0       0       0..2147483648   of weights, batches and noise
    """
    def __init__(self, **values):
        super().__init__(**values)
        if not set(self.orders.split(",")) <= set(ORDERS):
            raise InputError(f"orders is {self.orders}, not some of {', '.join(ORDERS)}")

    @classmethod
    def preset(cls, preset, **changes):
        """One of the PRESETS, but for some changes; a length in epochs replaces that in steps."""
        if preset not in PRESETS:
            raise InputError(f"preset is {preset!r}, not one of {', '.join(PRESETS)}")
        values = {}
        for name, field in cls.fields.items():
            if name.replace("_steps", "_epochs") not in changes:
                values[name] = field.presets.get(preset, field.default)
        return cls(**values | changes)

class SamplingConfig(Settings):
    """How a token is chosen; the library and the command line share these defaults."""
    table = """
        temperature  1.0    0..      below 1: safer, above: wilder; 0: greedy
        top_k        0      0..      only the k most likely tokens; 0: all
        top_p        1.0    1e-6..1  only the most likely tokens, down to this share in sum
        greedy       false  switch   always the most likely token
        guidance     0.0    0..      exaggerates captions; 1: truer, less varied pictures; 0: none
        redraw       2      0..      draw anew what is not surely read, so often at most
    """

# --- Batches: what is learned from, in an order that can be resumed -------------------------------
#
# Pictures are uint8 (M,H,W,3) in memory; floats (B,3,H,W) in [-1,1], 4 times as large, in a batch.

@functools.lru_cache(1)
def shuffled(n_rows, seed):
    """The numbers of all rows in random order, int64 (n_rows,)."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))

class Batches:
    """Batch number `step` as a function of (seed, step) alone, so that training can go on from any
    step. (A shuffled DataLoader hides its place in a generator's state.) Rows are shuffled anew in
    every epoch; a PASS, what one iteration yields (the next goes on there) and len() counts, need
    not be an epoch. get: row numbers int64 (B,), fewer at an epoch's end, -> a batch. n_rows: how
    many there are. seed None: in order. per_pass: batches a pass (0: an epoch)."""
    def __init__(self, get, n_rows, batch_size, seed=None, per_pass=0):
        self.get, self.n_rows, self.batch_size, self.seed = get, n_rows, batch_size, seed
        self.per_epoch = math.ceil(n_rows / batch_size)
        self.per_pass, self.steps = per_pass or self.per_epoch, itertools.count()

    def __len__(self):
        return self.per_pass

    def __iter__(self):
        return map(self.__getitem__, itertools.islice(self.steps, self.per_pass))

    def __getitem__(self, step):
        epoch, batch = divmod(step, self.per_epoch)
        rows = torch.arange(self.n_rows) if self.seed is None else shuffled(
            self.n_rows, self.seed * 1_000_003 + epoch)
        return self.get(rows[batch * self.batch_size :][: self.batch_size])

def to_float(images):
    """uint8 tensor (B,H,W,3) -> float (B,3,H,W) in [-1,1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1

def denormalize(x):
    """The way back: (B,3,H,W) in [-1,1] -> uint8 array (B,H,W,3)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

CHUNK = 250  # so many rows at a time where no gradient is wanted, for the memory's sake

def random_affine(x, strength):
    """Turn, slant, zoom and shift each picture (B,3,H,W) a bit, at random: each number of an affine
    map is off by about `strength`. Nothing is mirrored, no colour changed, the border continued."""
    theta = torch.eye(2, 3) + strength * torch.randn(len(x), 2, 3)  # (B,2,3)
    grid = F.affine_grid(theta.to(x), x.shape, align_corners=False)  # (B,H,W,2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

def picture_batches(images, batch_size, text_ids=None, **options):
    """uint8 pictures (M,H,W,3) -> Batches of x (B,3,H,W) in [-1,1]; given text ids (M,L+1), too, of
    pairs (x, text ids (B,L+1))."""
    def get(rows):
        x = to_float(torch.from_numpy(images[rows.numpy()]))
        return x if text_ids is None else (x, text_ids[rows])
    return Batches(get, len(images), batch_size, **options)

# --- Tokenizer: one vocabulary for codes, words and marks -----------------------------------------
#
# Codes and words share one vocabulary, so that one network with one softmax can speak both. Ids
# are laid out so that each kind of token is one range, and "only codes may come here" is a slice
# of the logits:
#     0 ... K-1 codes | K ... V-4 sorted words | V-3 EOT | V-2 EOI | V-1 BOS

def specials(vocab_size):
    """-> the ids of EOT (end of text), EOI (end of image) and BOS (beginning)."""
    return range(vocab_size - 3, vocab_size)

class Tokenizer:
    """Words to token ids and back (notes A, "multimodal token processing"). texts: the captions
    whose words make the vocabulary. n_embeddings: K. caption_length: L, if it is not that of the
    longest of the texts. Raises InputError if there is no word."""
    def __init__(self, texts, n_embeddings, caption_length=0):
        captions = [text.split() for text in texts]
        self.words = sorted(set().union(*captions))  # sorted: the same ids in every process
        if not self.words:
            raise InputError("the captions hold no words")
        self.n_embeddings = n_embeddings
        self.caption_length = caption_length or max(map(len, captions))  # L
        self.all_words = [*self.words, "<eot>", "<eoi>", "<bos>"]
        self.vocab_size = n_embeddings + len(self.all_words)  # V
        self.end_of_text_token, self.end_of_image_token, self.bos_token = specials(self.vocab_size)
        # The ids that each span of a sequence may hold, [low, high): sampling is restricted to them
        self.image_span = 0, n_embeddings
        self.text_span = n_embeddings, self.end_of_image_token  # a word, or the caption's end

    def text_encode(self, text):
        """A caption -> its word ids, int64 (words,), no specials. Raises InputError for no words,
        more than L, or an unknown one (naming the nearest it knows)."""
        words = text.split()
        for word in words:
            if word not in self.words:
                near = difflib.get_close_matches(word, self.words, n=1, cutoff=0.0)[0]
                raise InputError(f"unknown word {word!r} in {text!r}: nearest known is {near!r}")
        if not 1 <= len(words) <= self.caption_length:
            raise InputError(f"{text!r} has {len(words)} words, not 1 to {self.caption_length}")
        return self.n_embeddings + torch.tensor([self.words.index(word) for word in words])

    def text_decode(self, tokens):
        """Token ids (tensor or list of ints) -> the caption they spell, up to the first EOT."""
        ids = itertools.takewhile(lambda i: i != self.end_of_text_token, map(int, tokens))
        K = self.n_embeddings
        return " ".join(self.all_words[i - K] for i in ids if i >= K)

    def encode_batch(self, texts):
        """B captions -> int64 (B,L+1): words, then EOTs up to that length. None: only EOTs."""
        ids = torch.full((len(texts), self.caption_length + 1), self.end_of_text_token)
        for row, text in zip(ids, texts):
            if text is not None:
                words = self.text_encode(text)
                row[: len(words)] = words
        return ids

# --- VQ-VAE: picture -> features z_e (B,D,h,w) -> nearest codes z_q (B,D,h,w) -> picture ----------
#
# An encoder shrinks the picture to a grid of features, a codebook replaces each feature by the
# nearest of K learned vectors (its number is the token), and a decoder paints the picture from
# these vectors. The replacement has no gradient, so the decoder's gradient is handed to the encoder
# as if nothing had been replaced ("straight through"), and two more loss terms keep features and
# codes together. What goes wrong in practice is that most codes are never the nearest and die: see
# the norm before the codebook, and `restart`.

class VectorQuantizer(nn.Embedding):
    """The codebook, K vectors of length D, and the search for the nearest (van den Oord 2017).
    ema 0: the codebook learns by gradient, through the codebook term of compute_loss. ema in (0,1):
    each code is a moving average, of this decay, of the features it was the nearest to (simpler
    than appendix A of the paper; in phase 3 by gradient). restart: a code unused for more than so
    many batches is put onto a feature, as are all that the first batch does not use (0: never). In
    eval mode nothing moves."""
    def __init__(self, K, D, ema=0.0, restart=100):
        super().__init__(K, D)  # self.weight (K,D), normal numbers, like the normed features
        self.weight.requires_grad_(not ema)
        self.ema, self.restart = ema, restart or math.inf
        # Batches since each code's last use; a buffer, so that it travels in checkpoints
        self.register_buffer("unused", torch.full((K,), float(self.restart)))

    def distances(self, z):
        """Features (B,D,...) -> squared distances to all codes (B,...,K), as |z|^2 - 2 z.e + |e|^2:
        a matrix product (linear: see Attention), no (...,K,D) tensor."""
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would pick codes by luck
            z, e = z.movedim(1, -1).float(), self.weight
            return linear(-2 * z, e, e.square().sum(1)).add_(z.square().sum(-1, keepdim=True))

    def forward(self, z_e):
        """Features z_e (B,D,h,w) -> the nearest codes z_q (B,D,h,w), with gradient to them."""
        tokens = self.distances(z_e.detach()).argmin(-1)  # (B,h,w)
        if self.training:
            self.update(z_e.movedim(1, -1).flatten(0, 2).float(), tokens.flatten())
        return super().forward(tokens).movedim(-1, 1)

    @torch.no_grad()
    def update(self, z, tokens):
        """With a training batch of features (B*h*w,D), coded as (B*h*w,): move the codes if they
        are moving averages, restart dead ones."""
        count = tokens.bincount(minlength=self.num_embeddings)[:, None]  # (K,1)
        if self.ema:
            total = torch.zeros_like(self.weight).index_add_(0, tokens, z)  # (K,D)
            self.weight.lerp_(total / count.clamp(min=1), (1 - self.ema) * (count > 0))
        self.unused += 1
        self.unused[count[:, 0] > 0] = 0
        dead = self.unused > self.restart  # (K,)
        if dead.any():
            # A feature's chance is its squared distance from the nearest code, as in k-means++
            # (Arthur and Vassilvitskii 2007): what is rare, but badly coded, gets codes, too
            error = self.distances(z).amin(1).clamp(min=1e-9).nan_to_num(1)  # NaN is told later
            rows = error.multinomial(int(dead.sum()), replacement=True)
            self.weight[dead], self.unused[dead] = z[rows], 0

class ResidualBlock(nn.Sequential):
    """x + conv1x1(relu(conv3x3(relu(x)))), the VQ-VAE paper's block. (B,C,h,w) -> (B,C,h,w)."""
    def __init__(self, dim):
        super().__init__(nn.ReLU(), nn.Conv2d(dim, dim, 3, 1, 1), nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, x):
        return x + super().forward(x)

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell. (B,C,h,w) -> (B,C,h,w)."""
    def forward(self, x):
        return super().forward(x.movedim(1, -1).float()).movedim(-1, 1)

class VQVAE(nn.Module):
    """Pictures to tokens and back. VQVAE(dim=256, K=128, D=256) is the configuration of notes A.
    dim: channels. K: codes. D: length of a code. size: (H, W) of the pictures, by which flat rows
    of tokens are folded; others pass, all divisible by 4. codes: VectorQuantizer's options."""
    channels = 3  # C
    def __init__(self, dim=256, K=128, D=256, size=(28, 28), **codes):
        super().__init__()
        # What builds this model again, for checkpoints
        self.options = dict(dim=dim, K=K, D=D, size=size, **codes)
        self.n_embeddings, self.size = K, tuple(size)
        self.grid = size[0] // 4, size[1] // 4  # (h, w)
        self.n_tokens = math.prod(self.grid)  # N
        self.encoder = nn.Sequential(
            nn.Conv2d(self.channels, dim, 4, 2, 1), nn.ReLU(),  # (B,dim,H/2,W/2)
            nn.Conv2d(dim, dim, 4, 2, 1),  # (B,dim,h,w)
            ResidualBlock(dim), ResidualBlock(dim), nn.ReLU(),
            nn.Conv2d(dim, D, 1),  # (B,D,h,w); the notes' pre_quantization_conv
            # Without a norm the scale of the features runs away from the codes, which lag and die
            ChannelNorm(D))
        self.codebook = VectorQuantizer(K, D, **codes)
        self.decoder = nn.Sequential(
            nn.Conv2d(D, dim, 1), ResidualBlock(dim), ResidualBlock(dim), nn.ReLU(),  # (B,dim,h,w)
            nn.ConvTranspose2d(dim, dim, 4, 2, 1), nn.ReLU(),  # (B,dim,H/2,W/2)
            nn.ConvTranspose2d(dim, self.channels, 4, 2, 1))  # (B,C,H,W)
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
        return self.codebook.distances(self.encode(x)).argmin(-1)

    def decode_tokens(self, tokens):
        """Tokens (B,h,w) of any grid, or flat (B,N) of the model's own -> pictures (B,3,4h,4w)."""
        if tokens.dim() == 2:
            tokens = tokens.unflatten(1, self.grid)
        return self.decode(F.embedding(tokens, self.codebook.weight).movedim(-1, 1))

def split_colors(x):
    """Pictures (B,3,H,W) -> the shares (B,4,H,W) that four colours have in each pixel, in sum 1,
    and these colors (B,4,3), a row of red, green, blue each: two of the ground, the ink, and one
    more, as all colours are mixtures of four (with shares below 0 or above 1, where need be). So a
    red seven on blue and a white seven on black have equal shares."""
    # What is on the edge is ground: take a light colour there and a dark one, but not the lightest
    # and darkest, which may be strokes that touch the edge. The light one is called the ground
    edge = torch.cat([x[:, :, [0, -1]].flatten(2), x[..., [0, -1]].flatten(2)], 2)
    luma = (edge * edge.new_tensor([[0.3], [0.6], [0.1]])).sum(1, keepdim=True)  # (B,1,2H+2W)
    some = luma.argsort(2)[..., [-luma.shape[2] // 20, luma.shape[2] // 20]]
    ground, second = edge.take_along_dim(some, 2).split(1, 2)  # (B,3,1) each
    # With the ground as origin a colour is an axis, and inverse(axes) @ points are a pixel's shares
    inverse = functools.partial(torch.linalg.pinv, atol=0.2, rtol=0.0)  # shorter axes count as none
    points, axes = x.flatten(2) - ground, second - ground  # (B,3,H*W), (B,3,1)
    for _ in range(2):  # the ink is farthest from the grounds' line, the last from their plane
        off = points - axes @ (inverse(axes) @ points)  # (B,3,H*W)
        squared, far = off.square().sum(1, keepdim=True).max(2, keepdim=True)  # (B,1,1) each
        axes = torch.cat([axes, points.take_along_dim(far, 2) * (squared > 0.04)], 2)
    shares = inverse(axes) @ points  # (B,3,3) @ (B,3,H*W)
    shares = torch.cat([1 - shares.sum(1, keepdim=True), shares], 1).unflatten(2, x.shape[2:])
    return shares, (ground + F.pad(axes, (1, 0))).mT

def join_colors(shares, colors):
    """The way back: shares (B,4,H,W), colors (B,4,3) -> pictures (B,3,H,W)."""
    return (colors.mT @ shares.flatten(2)).unflatten(2, shares.shape[2:])

# Index: grids (...,h,w) -> the corner cells of the ground, its second colour, the ink, the last
CORNERS = ..., [0, -1, 0, -1], [0, 0, -1, -1]

class FactoredVQVAE(VQVAE):
    """A VQVAE that codes shapes apart from colours, for pictures of 8 x 8 pixels at least. In a
    plain one every token tells the colours of ground and ink again, and few bits are left for the
    stroke. Here encoder and decoder work on the colours' shares, and each of the four corner tokens
    says a colour, which is added to the features of its cell. Arguments: VQVAE's."""
    channels = 4
    def __init__(self, *sizes, **codes):
        super().__init__(*sizes, **codes)
        dim, D = self.options["dim"], self.options["D"]
        self.colors_in = nn.Sequential(nn.Linear(3, dim), nn.ReLU(), nn.Linear(dim, D))
        self.colors_out = nn.Sequential(nn.Linear(D, dim), nn.ReLU(), nn.Linear(dim, 3))

    def encode(self, x):
        shares, colors = split_colors(x)
        z = self.encoder(shares)  # (B,D,h,w)
        z[CORNERS] += self.colors_in(colors).mT  # (B,D,4), of numbers in [-1,1]: needs no norm
        return z

    def decode(self, z):
        shares = self.decoder(z).float()  # (B,4,4h,4w)
        shares[:, 0] = 1 - shares[:, 1:].sum(1)  # what the decoder says of the ground is not used
        return join_colors(shares, self.colors_out(z[CORNERS].mT).float())

def compute_loss(x, recon_x, z_e, z_q, beta=Config.beta):
    """The VQ-VAE's loss: reconstruction + codebook + beta * commitment, each a mean over elements.
    x, recon_x (B,3,H,W); z_e, z_q (B,D,h,w) as VQVAE.forward returns them -> scalar. The codebook
    term pulls codes to features, the commitment term features to codes: so each detaches the OTHER
    side (equation 3 of van den Oord et al. 2017; the notes detach z_q in both)."""
    loss = F.mse_loss(recon_x, x) + F.mse_loss(z_q, z_e.detach())
    return loss + beta * F.mse_loss(z_e, z_q.detach())

# --- Attention: fast products; queries, keys, values, and a cache of the latter two ---------------
#
# When tokens are generated one by one, keys and values of those before are the same at every step.
# They are kept in a tensor that is allocated once, and whoever writes says at which position.

def linear(x, weight, bias=None):
    """F.linear: x (...,rows,in), weight (out,in), bias (out,) -> (...,rows,out). On a CPU the rows
    of a large x are taken as pixels and multiplied by a convolution of width 1: torch has oneDNN
    compute these, in float32, too, which may take half the time of MKL's products."""
    if x.device.type != "cpu" or x.numel() < 50_000:
        return F.linear(x, weight, bias)
    pixels = x.flatten(0, -2)[None, None].movedim(3, 1)  # (1,in,1,rows), in memory as before
    y = F.conv2d(pixels, weight[:, :, None, None], bias)  # (1,out,1,rows)
    return y.movedim(1, 3).view(*x.shape[:-1], -1)

class Linear(nn.Linear):
    """nn.Linear by the function above, for large x."""
    def forward(self, x):
        return linear(x, self.weight, self.bias)

class SelfAttention(nn.Module):
    """Self-attention (Vaswani et al. 2017): (B,T,d) -> (B,T,d). Each head has its queries, all
    share keys and values (Shazeer 2019): one product serves all, and the cache is small. Queries
    and keys are normed (Dehghani et al. 2023), so that large rates cannot blow the scores up."""
    def __init__(self, d_model, n_heads):
        super().__init__()
        if d_model % (2 * n_heads):
            raise InputError(f"d_model {d_model} is not divisible by twice {n_heads} heads")
        self.n_heads, head_dim = n_heads, d_model // n_heads
        self.qkv = Linear(d_model, d_model + 2 * head_dim, bias=False)
        self.norm = nn.LayerNorm(head_dim)
        self.out = Linear(d_model, d_model, bias=False)

    def forward(self, x, turns, bias, cache=None, position=0):
        """x (B,T,d) -> (B,T,d). turns: complex (T,1,head_dim/2), by which pairs of a query's or
        key's numbers, taken as complex ones, are multiplied. bias (T*heads,position+T) is added to
        scores; -inf where a token must not look. cache: (2,B,context_length,head_dim), of which the
        first `position` places hold keys and values of what came before x; x's own come next."""
        end = position + x.shape[1]
        qkv = self.qkv(x).unflatten(2, (self.n_heads + 2, -1))  # (B,T,heads+2,head_dim)
        qk, v = self.norm(qkv[:, :, :-1]), qkv[:, :, -1]
        qk = torch.view_as_complex(qk.float().unflatten(3, (-1, 2))) * turns  # (..., head_dim/2)
        qk = torch.view_as_real(qk).flatten(3)
        q, k = qk[:, :, :-1], qk[:, :, -1]  # (B,T,heads,head_dim), (B,T,head_dim) like v
        if cache is not None:
            cache[:, :, position:end] = torch.stack([k, v])
            k, v = cache[:, :, :end]
        # softmax(q k^T / sqrt(head_dim) + bias) v, a token's queries one below the other.
        # F.scaled_dot_product_attention, made for much longer sequences, is slower here
        scores = (q * q.shape[-1] ** -0.5).flatten(1, 2) @ k.mT + bias  # (B,T*heads,end)
        y = scores.softmax(-1) @ v  # (B,T*heads,head_dim)
        return self.out(y.view_as(x))

# --- iGPT: a causal transformer over picture tokens and words -------------------------------------
#
# The usual decoder-only transformer, of GPT-2's pre-norm blocks, but with distances instead of
# places, shared keys and values, and tables of picture tokens that are built from the codebook.

class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). (B,T,d) -> (B,T,d)."""
    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = SelfAttention(d_model, n_heads)
        self.mlp = nn.Sequential(
            Linear(d_model, 4 * d_model), nn.GELU(), Linear(4 * d_model, d_model))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, *rest):  # rest: see SelfAttention
        x = x + self.dropout(self.attention(self.norm1(x), *rest))
        return x + self.dropout(self.mlp(self.norm2(x)))

class iGPT(nn.Module):
    """Next-token logits over the joint vocabulary: tokens int64 (B,T) -> (B,T,V).
    vocab_size: V = K codes + len(Tokenizer.all_words). context_length: the longest sequence.
    codebook (K,D), optional: the VQ-VAE's codebook.weight. With it a code's embedding and output
    row are its own vector plus a learned linear map of its standardized code vector: codes that
    look alike share what is learned about one of them, and gradient can reach the codebook. It is
    referred to, not owned: neither among parameters() nor in state_dict(). orders: of the sequences
    it is to be trained on, so what it can be asked."""
    causal = True  # a position sees itself and what came before
    def __init__(self, vocab_size, context_length, d_model=128, n_heads=4, n_layers=4, dropout=0.1,
                 codebook=None, orders=ORDERS[:2]):
        super().__init__()
        # What builds this model again, for checkpoints; each is an attribute, too
        self.options = dict(vocab_size=vocab_size, context_length=context_length, d_model=d_model,
                            n_heads=n_heads, n_layers=n_layers, dropout=dropout, orders=orders)
        vars(self).update(self.options)
        self.n_codes = 0 if codebook is None else len(codebook)  # K, as far as it is known
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.back = nn.Parameter(torch.zeros(n_layers, n_heads, context_length))  # added to scores
        self.blocks = nn.ModuleList(Block(d_model, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)  # its weight: see tables
        self._codebook = (codebook,)  # in a tuple nn.Module does not look for parameters
        if codebook is not None:
            self.code_in = nn.Linear(codebook.shape[1], d_model, bias=False)
            self.code_out = nn.Linear(codebook.shape[1], d_model, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.3)
        # Branches and output start small: the first gradients are calm
        for name, weight in self.named_parameters():
            if name.endswith(("out.weight", "mlp.2.weight", "head.weight")):
                nn.init.normal_(weight, std=0.02)

    def tables(self):
        """Embedding table and output matrix, both (V,d), with the codebook's share, if any."""
        (codebook,), embedding, output = self._codebook, self.embedding.weight, self.head.weight
        if codebook is None:
            return embedding, output
        codes = (codebook - codebook.mean(0)) / (codebook.std(0) + 1e-5)  # (K,D), all on one scale
        codes = F.pad(codes, (0, 0, 0, self.vocab_size - len(codes)))  # words and marks get nothing
        return embedding + self.code_in(codes), output + self.code_out(codes)

    def forward(self, tokens, tables=None, caches=itertools.repeat(None), position=0):
        """tokens int64 (B,T) -> logits (B,T,V). Raises InputError beyond the context. The rest is
        for generate(): tables, kept from tables(), the output's rows perhaps cut; a cache a layer,
        which holds `position` tokens before these."""
        length = position + tokens.shape[1]
        if length > self.context_length:
            raise InputError(f"{length} tokens, the context holds {self.context_length}")
        embedding, output = tables or self.tables()
        x = F.embedding(tokens, embedding)  # (B,T,d)
        # Attention is told distances, in two ways: queries and keys are turned in proportion to
        # their place, so that products depend on the distance (rotary, Su et al. 2021), and each
        # head learns how much it likes what lies so far off (T5's bias, Raffel et al. 2020). So
        # what is learned about a neighbour holds all over the picture and in both orders
        places = torch.arange(length, device=x.device)
        here = places[position:, None]  # of the tokens that are given, (T,1)
        # About a quarter turn a token is the fastest, a hundredth of it the slowest
        speeds = 100 ** -torch.linspace(0, 1, self.d_model // self.n_heads // 2, device=x.device)
        turns = (1.5j * here * speeds).exp()[:, None]  # (T,1,head_dim/2)
        away = here - places  # (T,length); below 0: ahead
        bias = self.back[..., away.abs()]  # (layers,heads,T,length)
        if self.causal:
            bias = bias.masked_fill(away < 0, -math.inf)
        bias = bias.transpose(1, 2).flatten(1, 2)  # (layers,T*heads,length)
        for block, b, cache in zip(self.blocks, bias, caches):
            x = block(x, turns, b, cache, position)
        return linear(self.norm(x), output)

class ParallelPredictor(iGPT):
    """The transformer of notes B taken literally: a caption in, logits of all picture tokens out,
    in one pass. An iGPT (with a codebook, or it cannot tell codes) whose positions all see each
    other and whose picture tokens are blank, that trains on text_image sequences. No token knows
    what its neighbours have chosen: fast, and it shows what an autoregressive model is good for."""
    causal = False
    def forward(self, tokens):
        """text_image sequences (B,T) -> logits (B,T,V), of use where the next token is a code."""
        blank = tokens.masked_fill(tokens < self.n_codes, 0)  # one code stands for all
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
    int64 (B,N+L+3) in one of the ORDERS. A caption shorter than L is filled up with EOTs,
    so that all captions are equally long, and a picture follows the last EOT."""
    marks = tokens.new_tensor(specials(tokenizer.vocab_size)).expand(len(tokens), 3)
    eot, eoi, bos = marks.split(1, 1)  # (B,1) each
    rows = {  # text_ids end in an EOT: image_text leaves it out, and plain, as the notes, keeps it
        "image_text": [bos, eot, tokens, eoi, text_ids[:, :-1]],
        "text_image": [bos, eoi, text_ids, tokens],
        "plain": [bos, tokens, eoi, text_ids]}
    return torch.cat(rows[order], 1)

def mixed_sequences(tokens, text_ids, tokenizer, orders):
    """A batch in equal parts of several orders, one after the other: (B,N), (B,L+1) -> (B,T). A
    sixteenth of text_image rows loses its caption, so that guidance can ask what is drawn then."""
    n, rows = len(orders), []
    for part, ids, order in zip(tokens.tensor_split(n), text_ids.tensor_split(n), orders):
        if order == "text_image":
            ids = ids.clone()
            ids[: len(ids) // 16] = tokenizer.end_of_text_token
        rows.append(make_sequences(part, ids, tokenizer, order))
    return torch.cat(rows)

def pick_warped(orders, clean, warped):
    """Two batches (B,...) of the same pictures -> one to go with mixed_sequences: warped where a
    picture comes before its caption. There it is guessed from its own strokes, a habit that would
    be kept after a caption. Warped strokes mark these rows, so in clean ones the caption is heeded.
    Of other rows a quarter is warped, too, for variety, those that lose their caption among it."""
    n, picked = len(orders), []
    for a, b, order in zip(clean.tensor_split(n), warped.tensor_split(n), orders):
        end = len(a) // (4 if order == "text_image" else 1)  # rows come in random order
        picked += b[:end], a[end:]
    return torch.cat(picked)

def sequence_batches(tokenizer, orders, tokens, batch_size, text_ids, warped=None, **options):
    """Tokens (M,N) of pictures and of the same ones warped, for pick_warped (default: as they are),
    and captions (M,L+1) -> Batches of sequences (B,T), each batch in equal parts of the orders."""
    warped = tokens if warped is None else warped
    def get(rows):
        part = pick_warped(orders, tokens[rows], warped[rows])
        return mixed_sequences(part, text_ids[rows], tokenizer, orders)
    return Batches(get, len(tokens), batch_size, **options)

def text_prompts(tokenizer, captions):
    """BOS EOI TEXT EOT, text_image sequences before their pictures: B captions -> (B,L+3)."""
    ids = tokenizer.encode_batch(captions)
    return make_sequences(ids[:, :0], ids, tokenizer, "text_image")

def image_prompts(tokenizer, tokens):
    """BOS EOT IMAGE EOI, image_text sequences before their captions: (B,N) -> (B,N+3)."""
    return make_sequences(tokens, tokens[:, :0], tokenizer, "image_text")

@torch.no_grad()
def extract_tokens(vqvae, images, augment=0.0):
    """Run pictures uint8 (M,H,W,3) through the encoder once, not in every epoch (notes B: offline)
    -> tokens int64 (M,N), on the CPU. augment: random_affine's. InputError for another size."""
    if images.shape[1:3] != vqvae.size:
        raise InputError(f"the model knows {vqvae.size} pictures, not {images.shape[1:3]}")
    # In one piece: many small ones, kept between a batch's large blocks, would fragment memory
    tokens = torch.empty(len(images), vqvae.n_tokens, dtype=int)
    for x, part in zip(track(picture_batches(images, CHUNK), "extracting tokens"),
                       tokens.split(CHUNK)):
        if augment:
            x = random_affine(x, augment)
        part.copy_(vqvae.get_tokens(x.to(vqvae.codebook.weight)).flatten(1))
    return tokens

@torch.no_grad()
def decode_pictures(vqvae, tokens):
    """The way back: tokens int64 (M,N) -> pictures uint8 (M,H,W,3), as they are shown and saved."""
    parts = tokens.to(vqvae.codebook.weight.device).split(CHUNK)
    return np.concatenate([denormalize(vqvae.decode_tokens(part)) for part in parts])

# --- Losses and measures: how well is a picture reconstructed, a token predicted? -----------------

def vqvae_loss(vqvae, x, cfg):
    """Pictures (B,3,H,W) -> dict to report, 'loss' with gradient; features z_e (B,D,h,w)."""
    z_e, z_q, recon_x = vqvae(x)
    loss = compute_loss(x, recon_x, z_e, z_q, cfg.beta)
    return {"loss": loss, "recon_mse": F.mse_loss(recon_x, x)}, z_e

def next_token_nll(logits, targets):
    """Logits (B,T,V) -> nats that each of the targets (B,T) costs, (B,T)."""
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nll.view_as(targets)

def igpt_loss(igpt, rows, cfg):
    """Sequences (B,T) -> weighted mean nats a target, a scalar, and the logits (B,T-1,V).
    The EOTs that fill up a short caption, or one that was taken away, weigh 0. Where the
    picture comes first, all up to its end weighs image_weight: what is learned there draws without
    a caption (see pick_warped). The words after it weigh caption_weight: few targets, but no others
    teach reading. Noise is for drawing alone: who learns to read had better see what is there."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    eot, eoi, bos = specials(igpt.vocab_size)
    caption_first = targets[:, :1] == eoi  # (B,1)
    weight = torch.where((inputs == eoi).cumsum(1) > 0, cfg.caption_weight, cfg.image_weight)
    fills = (inputs >= eot) & (inputs < bos) & (targets == eot)
    weight = weight.masked_fill(caption_first, 1).masked_fill(fills, 0)
    logits = igpt(with_noise(igpt, inputs, cfg.noise, caption_first))
    return (next_token_nll(logits, targets) * weight).sum() / weight.sum(), logits

def with_noise(igpt, inputs, most, caption_first):
    """Inputs (B,T-1) -> the same; but in training, and in rows where caption_first (B,1) is true, a
    random share of picture tokens, `most` at most, becomes random codes: who draws reads one's own
    errors, and should rather heed the caption. An iGPT without a codebook cannot tell codes."""
    if not (most and igpt.training and igpt.n_codes):
        return inputs
    share = most * caption_first * torch.rand_like(caption_first, dtype=torch.float)
    replace = (inputs < igpt.n_codes) & (torch.rand_like(inputs, dtype=torch.float) < share)
    return torch.where(replace, torch.randint_like(inputs, igpt.n_codes), inputs)

def measure_reconstruction(vqvae, images, tokens):
    """Pictures uint8 (M,H,W,3), their tokens (M,N) -> recon_mse (bytes in [-1,1] units), recon_psnr
    (dB; values span 2), codebook_used (share of codes chosen at all) and codebook_perplexity (exp
    of their use's entropy: so many codes, used alike, would tell as much)."""
    errors = np.subtract(decode_pictures(vqvae, tokens), images, dtype=np.float32)  # (M,H,W,3)
    mse = (errors**2).mean().item() / 127.5**2
    counts = tokens.flatten().bincount()  # (K,), or less if the last codes are not used
    return {
        "recon_mse": mse, "recon_psnr": 10 * math.log10(4 / max(mse, 1e-12)),
        "codebook_used": counts.count_nonzero().item() / vqvae.n_embeddings,
        "codebook_perplexity": torch.distributions.Categorical(counts).perplexity().item()}

# --- Optimizers: Adam or Muon, learning rates by group, warm-up and decay -------------------------

class Muon(torch.optim.Adam):
    """Adam, but in groups that say orthogonal=True the update is the momentum's nearest orthogonal
    matrix (Jordan et al. 2024), so that all directions of a matrix learn alike. Such a group holds
    weights of one shape, of two or more axes, that get gradients together; its momentum is 0.95.
    torch.optim.Muon computes in bfloat16 one matrix at a time, which takes seconds on a CPU without
    bfloat16 units. Here autocast decides, and products are batched over a group: a fifth of a step,
    for twice the learning."""
    LR = 0.02  # for singular values near 1, whatever the width; tall matrices get more
    @torch.no_grad()
    def step(self):
        """One update of all groups; sets the gradients of the orthogonal groups to None."""
        for group in self.param_groups:
            params = group["params"]
            if not group.get("orthogonal") or params[0].grad is None:
                continue
            grads = torch.stack([p.grad.flatten(1) for p in params])  # (n,rows,columns)
            state = self.state[params[0]]  # for the whole group
            if not state:  # Adam's load_state_dict looks for a step
                state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(grads))
            momentum = state["momentum"].lerp_(grads, 0.05)
            update = self.orthogonalize(grads.lerp(momentum, 0.95))  # Nesterov's look ahead
            lr = group["lr"] * max(1, grads.shape[1] / grads.shape[2]) ** 0.5
            for p, direction in zip(params, update):
                p.sub_(direction.view_as(p), alpha=lr)
                p.grad = None  # so that Adam passes it by
        super().step()

    @classmethod
    def orthogonalize(cls, x):
        """Matrices (n,rows,columns) -> about U V^T of their decompositions U S V^T: five rounds of
        X <- aX + (b XX^T + c (XX^T)^2) X, which bring most singular values near 1."""
        if x.shape[1] > x.shape[2]:  # the products below are then the smaller ones
            return cls.orthogonalize(x.mT).mT
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        a, b, c = 3.4445, -4.7750, 2.0315
        for _ in range(5):
            gram = x @ x.mT  # (n,rows,rows)
            x = torch.baddbmm(x, b * gram + c * gram @ gram, x, beta=a)  # sum and product in one
        return x.float()

def make_optimizer(cfg, modules, factors):
    """A Config's optimizer, Adam or Muon, of the parameters of modules, a dict of 'vqvae', 'igpt'
    or both, but for frozen ones. (Muon without orthogonal groups is Adam.)
    One group each for VQ-VAE, codebook, transformer; under muon their matrices, by shape, learn at
    Muon.LR, not at the Config's rates. factors of 'vqvae', 'codebook', 'igpt' multiply both."""
    groups = {}
    for kind, module in modules.items():
        for name, p in module.named_parameters():
            part = "codebook" if name == "codebook.weight" else kind
            # Muon is for maps and convolutions inside; what makes tables() is left to Adam
            inside = name.startswith(("blocks", "encoder", "decoder", "colors"))
            matrix = cfg.optimizer == "muon" and inside and p.dim() > 1
            rate = Muon.LR if matrix else getattr(cfg, f"{kind}_lr")
            group = {"params": [], "name": part, "orthogonal": matrix,
                     "lr": rate * factors.get(part, 1.0)}
            if p.requires_grad:
                groups.setdefault((part, matrix and p.shape), group)["params"].append(p)
    return Muon(groups.values(), fused=True)  # fused: one kernel for all that are Adam's

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
# Everything random in a step follows from (seed, phase, step), so a run that was killed can be
# taken up at any step and ends with the same weights, to the bit.

class Trainer:
    """The training loop that the library and the command line share. A subclass has `phase`, a
    name, and loss(batch) -> dict of scalars to report, of which 'loss' has the gradient.
    model: an nn.Module, or a dict of several. optimizer: any torch optimizer over their parameters.
    vocab_size, sequence_length: the notes give an iGPT's, which it knows itself. By name: cfg, a
    Config with the loss' weights and the seed; scheduler, stepped once a step (default: learning
    rates stay); bf16: products in bfloat16. self.step_losses: the loss of each step."""
    def __init__(self, model, optimizer, device, vocab_size=0, sequence_length=0, cfg=Config(),
                 scheduler=None, bf16=False):
        self.modules = nn.ModuleDict(model if isinstance(model, dict) else {self.phase: model})
        self.optimizer, self.device, self.cfg = optimizer, torch.device(device), cfg
        self.scheduler = scheduler or torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self.step_losses = []

    step = property(lambda self: len(self.step_losses))  # how many have been made

    def train(self, train_loader, test_loader, num_epochs, on_step=None, on_pass=None):
        """Train until num_epochs passes of the loader are done, going on from self.step. Loaders
        are Batches, or any iterables of batches with a length; a pass is what the notes call an
        epoch. on_step(trainer) is called before each step, on_pass(row) after each pass with a dict
        of its figures. Returns (train_losses, test_losses), a float for each pass made here; a pass
        ends in eval mode. Raises InputError as train_step does."""
        n, train_losses, test_losses = len(train_loader), [], []
        steps = range(self.step, n * num_epochs)
        batches = itertools.chain.from_iterable(itertools.repeat(train_loader))
        if isinstance(train_loader, Batches):  # a resumed run may begin within a pass
            batches = map(train_loader.__getitem__, steps)
        news = lambda: f"loss {self.step_losses[-1]:.4f}"
        for _, batch in zip(track(steps, self.phase, self.step, news), batches):
            if on_step:
                on_step(self)
            self.train_step(batch)
            if self.step % n == 0:
                figures = self.end_pass(n, test_loader)
                train_losses.append(figures["train_loss"])
                test_losses.append(figures["test_loss"])
                text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
                log(f"{self.phase} {self.step}/{n * num_epochs}  {text}")
                if on_pass:
                    on_pass({"phase": self.phase, "pass": self.step // n, "step": self.step,
                             "lr": self.optimizer.param_groups[0]["lr"], **figures})
        return train_losses, test_losses

    def train_step(self, batch):
        """Forward, backward, clip, update, in training mode. Raises InputError, before the
        optimizer's step, if the loss or the gradient is not finite."""
        torch.manual_seed(zlib.crc32(f"{self.cfg.seed} {self.phase} {self.step}".encode()))
        self.modules.train()
        with self.autocast:
            loss = self.loss(batch)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)  # of the whole gradient
        self.require_finite(loss.item() + norm.item())
        with self.autocast:  # for Muon's products
            self.optimizer.step()
        self.scheduler.step()
        self.step_losses.append(loss.item())

    @torch.no_grad()
    def end_pass(self, n, test_loader):
        """After n steps -> dict of figures: the mean loss of these steps, and means of all that
        loss() reports over the batches of the test."""
        figures = {"train_loss": sum(self.step_losses[-n:]) / n}
        self.modules.eval()
        for batch in test_loader:
            for name, value in self.loss(batch).items():
                name = f"test_{name}"
                figures[name] = figures.get(name, 0) + value.item() / len(test_loader)
        self.require_finite(figures["test_loss"])  # the last step may have broken the weights
        return figures

    def require_finite(self, value):
        """Raises InputError unless a loss, or the sum of loss and gradient norm, is a number."""
        if not math.isfinite(value):
            raise InputError(f"loss or gradient is {value} at step {self.step} of phase "
                             f"{self.phase}: try a lower learning rate")

    def compile(self, batch):
        """Have torch.compile make faster models. A batch tells whether it can, on this machine."""
        self.modules.eval()
        for disable in False, True:
            try:
                for module in self.modules.values():
                    module.compile(disable=disable)
                with self.autocast:
                    return self.loss(batch)["loss"].backward()
            except Exception as error:  # every backend fails in its own way
                log(f"warning: not compiled ({type(error).__name__})")

    def state_dict(self):
        """All that the rest of the training depends on."""
        return {"phase": self.phase, "step_losses": self.step_losses,
                "modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state):
        """Take up training where state_dict() was called."""
        self.step_losses = state["step_losses"]
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

class VQVAETrainer(Trainer):
    """Phase 1: batches are, or begin with, pictures (B,3,H,W) in [-1,1]. Arguments: Trainer's."""
    phase = "vqvae"
    def loss(self, batch):
        x = batch if torch.is_tensor(batch) else batch[0]
        return vqvae_loss(self.modules["vqvae"], x.to(self.device), self.cfg)[0]

class iGPTTrainer(Trainer):
    """Phase 2: batches are sequences int64 (B,T), see sequence_batches. Arguments: Trainer's."""
    phase = "igpt"
    def loss(self, rows):
        return {"loss": igpt_loss(self.modules["igpt"], rows.to(self.device), self.cfg)[0]}

class JointTrainer(Trainer):
    """`single` and phase 3: all at once. Batches are (pictures (B,3,H,W), captions (B,L+1)).
    The loss is compute_loss + lambda * xent. In `single` lambda is 0 at first, while no codes are
    worth predicting, then rises. A small one does, as the length of Adam's and Muon's steps hardly
    depends on it; a large one makes codes predictable, not exact. total: the phase's steps."""
    TAU = 0.5  # temperature of the soft targets, in mean squared quantization errors
    RAMP = 0.05  # share of `single` in which lambda rises
    def __init__(self, phase, models, optimizer, device, total, **options):
        super().__init__({"vqvae": models.vqvae, "igpt": models.igpt}, optimizer, device, **options)
        self.phase, self.models, self.total = phase, models, total

    def lambda_now(self):
        """lambda at the current step."""
        risen = 1
        if self.phase == "single":
            risen = ((self.step + 1) / self.total - self.cfg.lambda_warmup) / self.RAMP
        return self.cfg.lambda_xent * min(1, max(0, risen))

    def loss(self, batch):
        x, text_ids = (part.to(self.device) for part in batch)
        vqvae, weight = self.models.vqvae, self.lambda_now()
        # In phase 3 the iGPT knows these codes: none is restarted or a moving average
        vqvae.codebook.train(vqvae.training and self.phase == "single")
        if vqvae.training and self.cfg.augment:
            x = pick_warped(self.models.igpt.orders, x, random_affine(x, self.cfg.augment))
        losses, z_e = vqvae_loss(vqvae, x, self.cfg)
        if weight:  # else the transformer need not even run
            losses["xent"] = self.cross_entropy(z_e, text_ids)
            losses["loss"] += weight * losses["xent"]
        return losses

    def cross_entropy(self, z_e, text_ids):
        """Features z_e (B,D,h,w) and captions (B,L+1) -> the sequences' cross-entropy, a scalar.

        In value the target of a picture token is its code, so the transformer learns the tokens it
        will be asked for. But a nearest code has no gradient; so the cross-entropy of the targets
        softmax(-|z_e - e_k|^2 / tau) is added with its gradient and taken away without: features
        and codes move to where the transformer expects them. (As values, soft targets would teach
        it to be as unsure as they are.)"""
        igpt, t = self.models.igpt, self.models.tokenizer
        distance = self.models.vqvae.codebook.distances(z_e).flatten(1, 2)  # (B,N,K)
        rows = mixed_sequences(distance.argmin(-1), text_ids, t, igpt.orders)
        xent, logits = igpt_loss(igpt, rows, self.cfg)
        error = distance.detach().amin(-1).mean().clamp(min=1e-6)
        soft = (-distance / (self.TAU * error)).softmax(-1)  # (B,N,K)
        # Logits will do for log p: they differ by a number a token, soft - sg[soft] sums up to 0
        # (B,T-1,V) -> (B,N,K), where a code is next
        logits = logits.detach()[rows[:, 1:] < t.n_embeddings, : t.n_embeddings].view_as(soft)
        return xent - ((soft - soft.detach()) * logits).sum(-1).mean()

# --- Regimes: which phases train which models on what (notes B) -----------------------------------
#
#     phase (number)  makes anew  trains    on
#     vqvae (1)       VQ-VAE      VQ-VAE    pictures, which may be others than those of the pairs
#     igpt (2)        iGPT        iGPT      sequences of tokens that are extracted once
#     single          both        both      pictures and captions
#     finetune (3)    nothing     both      pictures and captions, for a short time

REGIMES = {
    "two-stage": ("vqvae", "igpt"), "single": ("single",), "multi": ("vqvae", "igpt", "finetune"),
    "vqvae": ("vqvae",), "igpt": ("igpt",), "finetune": ("finetune",)}
WARMUP = 0.05  # share of a phase in which its learning rates rise
CODEBOOK, IGPT = 0.3, 0.05  # relative rates: codebook in `single`, iGPT in phase 3
FEW = slice(0, 250)  # test pairs for the figures during training; `eval` takes all

@dataclass
class Data:
    """What the models learn from: pictures uint8 (M,H,W,3), H and W divisible by 4, captions lists
    of str. The VQ-VAE may have its own pictures (the notes: two files); default: the pairs'."""
    train_images: np.ndarray
    test_images: np.ndarray
    train_captions: list
    test_captions: list
    vqvae_train: np.ndarray = None
    vqvae_test: np.ndarray = None
    def __post_init__(self):
        if self.vqvae_train is None:
            self.vqvae_train, self.vqvae_test = self.train_images, self.test_images

def new_vqvae(cfg, images):
    """The VQ-VAE of a Config for pictures uint8 (M,H,W,3)."""
    size = images.shape[1:3]
    # Factored colours lie in four corner tokens, so there must be four
    build = FactoredVQVAE if cfg.factored == "on" and min(size) >= 8 else VQVAE
    torch.manual_seed(cfg.seed)
    return build(cfg.vqvae_dim, cfg.vqvae_K, cfg.vqvae_D, size, ema=cfg.ema, restart=cfg.restart)

def new_igpt(cfg, vqvae, tokenizer):
    """The iGPT, or parallel predictor, of a Config that fits a VQ-VAE and a Tokenizer."""
    options = (tokenizer.vocab_size, vqvae.n_tokens + tokenizer.caption_length + 3,  # V, T
               cfg.d_model, cfg.n_heads, cfg.n_layers, cfg.dropout, vqvae.codebook.weight)
    torch.manual_seed(cfg.seed + 1)
    if cfg.predictor == "parallel":
        return ParallelPredictor(*options, ["text_image"])
    return iGPT(*options, cfg.orders.split(","))

def use_bf16(precision, device):
    """Train with bfloat16 products? 'auto': where the processor has units for it. -> bool"""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
    return device.type == "cpu" and able.get("avx512_bf16", False)

def phase_length(phase, cfg, n_rows):
    """-> number of passes, batches a pass. Steps, rounded up, make ten passes or less."""
    steps = getattr(cfg, f"{phase}_steps")
    if not steps:
        return getattr(cfg, f"{phase}_epochs"), math.ceil(n_rows / cfg.batch_size)
    per_pass = math.ceil(steps / 10)
    return math.ceil(steps / per_pass), per_pass

def prepare_phase(phase, cfg, data, models, device):
    """Models that the phases before have left -> the Models of a phase, its Trainer, and what
    Trainer.train wants: training batches, test batches and number of passes. Raises InputError if
    the phase goes on from models that are not there."""
    vqvae, igpt, tokenizer = models.vqvae, models.igpt, models.tokenizer
    train, test = data.train_images, data.test_images[FEW]
    if phase == "vqvae":
        train, test = data.vqvae_train, data.vqvae_test[FEW]
    # The models: those that the phase makes anew, and those that it goes on from
    if phase in ("vqvae", "single"):
        vqvae = new_vqvae(cfg, train).to(device)
    elif not vqvae or phase == "finetune" and not igpt:
        raise InputError(f"phase {phase} goes on from models, and there are none")
    else:  # phase 2 leaves encoder and codebook as they are
        vqvae.requires_grad_(phase == "finetune")
    if phase in ("igpt", "single"):
        tokenizer = Tokenizer(data.train_captions + data.test_captions, vqvae.n_embeddings)
        igpt = new_igpt(cfg, vqvae, tokenizer).to(device)
    models = Models(vqvae, igpt, tokenizer)
    # What batches are made of: pictures (M,H,W,3) or their tokens (M,N), and captions (M,L+1)
    make, train_ids, test_ids = picture_batches, None, None
    passes, per_pass = phase_length(phase, cfg, len(train))
    options = dict(seed=cfg.seed, per_pass=per_pass)
    if phase != "vqvae":
        train_ids = tokenizer.encode_batch(data.train_captions)
        test_ids = tokenizer.encode_batch(data.test_captions[FEW])
    if phase == "igpt":
        make = functools.partial(sequence_batches, tokenizer, igpt.orders)
        if cfg.augment:
            torch.manual_seed(cfg.seed)
            options["warped"] = extract_tokens(vqvae, train, cfg.augment)
        train, test = extract_tokens(vqvae, train), extract_tokens(vqvae, test)
    train = make(train, cfg.batch_size, train_ids, **options)
    trainer = phase_trainer(phase, cfg, models, device, len(train) * passes)
    return models, trainer, (train, make(test, 125, test_ids), passes)  # halves of FEW

def phase_trainer(phase, cfg, models, device, total):
    """The Trainer of a phase of `total` steps. A codebook at which the transformer pulls, too, gets
    a smaller rate. In phase 3 all do: the models fit each other, larger steps would part them."""
    modules, factors = {"vqvae": models.vqvae, "igpt": models.igpt}, {"codebook": CODEBOOK}
    if phase == "finetune":
        factors = dict(vqvae=cfg.finetune_lr, codebook=cfg.finetune_lr, igpt=IGPT)
    elif phase in modules:
        modules, factors = {phase: modules[phase]}, {}
    optimizer = make_optimizer(cfg, modules, factors)
    scheduler = create_cosine_scheduler(optimizer, int(WARMUP * total), total)
    options = dict(cfg=cfg, scheduler=scheduler, bf16=use_bf16(cfg.precision, device))
    for kind in VQVAETrainer, iGPTTrainer:
        if phase == kind.phase:
            return kind(modules[phase], optimizer, device, **options)
    return JointTrainer(phase, models, optimizer, device, total, **options)

def train_regime(regime, cfg, data, models=None, device="cpu"):
    """Train one of REGIMES as a Config says, on Data -> Models. models: for a phase alone, what the
    phases before it have left. (Part II's Run writes files.) They come in eval mode.

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
# From the inside out. Which span of a sequence comes next is always known, so no sample can hold a
# word in the middle of a picture. Chance is torch's own: torch.manual_seed, after training (which
# seeds every step), makes samples repeatable.

def logits_to_probs(logits, how):
    """logits (...,S) -> the probabilities (...,S) with which a SamplingConfig wants them chosen."""
    probs = (logits / how.temperature).softmax(-1)
    if how.top_k or how.top_p < 1:
        ordered, index = probs.sort(descending=True)
        if how.top_k:
            ordered[..., how.top_k :] = 0
        # Keep the fewest tokens that hold top_p of the mass (Holtzman et al. 2019): a token goes if
        # those ahead of it hold that much without it; so the first always stays
        ahead = ordered.cumsum(-1) - ordered
        ordered[ahead >= how.top_p * ordered.sum(-1, keepdim=True)] = 0
        probs = probs.scatter(-1, index, ordered)
    return probs / probs.sum(-1, keepdim=True)

def sample_token(logits, how):
    """logits (...,S) -> index into the S, int64 (...), drawn as the SamplingConfig `how` says."""
    if how.greedy or how.temperature == 0:
        return logits.argmax(-1)
    # One random number a row falls on a token; multinomial would draw one for each token
    cdf = logits_to_probs(logits, how).cumsum(-1)
    u = 0.999999 * torch.rand_like(cdf[..., -1:]) * cdf[..., -1:]  # never beyond the last
    return torch.searchsorted(cdf, u, right=True)[..., 0]

def generate(model, prompts, n_new, span, how, unconditional=(), closing=False):
    """Continue prompts, int64 (B,T) on any device, by n_new >= 1 tokens -> int64 (B,n_new). The
    model is in eval mode afterwards.
    span: (low, high), the only ids allowed. how: a SamplingConfig. unconditional: for guidance (Ho
    & Salimans 2022), the prompt without its condition (1,T), or no row. closing: the span's last id
    is an end mark, which may not come first; tokens after it mean nothing. Raises InputError for a
    ParallelPredictor and beyond the context."""
    if not model.eval().causal:
        raise InputError("a parallel predictor draws pictures from captions and does nothing else")
    rows = []
    with torch.inference_mode():  # no_grad and more: a tenth faster
        embedding, output = model.tables()
        tables = embedding, output[slice(*span)]  # logits of the span's S ids only
        for part in track(prompts.split(CHUNK), "sampling"):
            # Sequences with the condition, then, for guidance, as many without
            branches = [prompt.expand_as(part) for prompt in (part, *unconditional)]
            tokens, new, position = torch.cat(branches).to(embedding.device), [], 0
            caches = embedding.new_empty(len(model.blocks), 2, len(tokens), model.context_length,
                                         model.d_model // model.n_heads)
            for _ in range(n_new):
                # The prompt passes through the model at once ("prefill"), then each token does
                logits = model(tokens, tables, caches, position)[:, -1]
                position += tokens.shape[1]
                logits, *without = logits.chunk(len(branches))  # (B,S) each
                for uncond in without:
                    # Exaggerate what the condition changes; but tokens that are 20 times (3 nats)
                    # less likely than the likeliest take no part, or rare ones would win
                    hopeless = logits < logits.amax(1, keepdim=True) - 3
                    logits = uncond.lerp(logits, 1 + how.guidance).masked_fill(hopeless, -math.inf)
                if closing and not new:
                    logits[:, -1] = -math.inf
                new.append(span[0] + sample_token(logits, how)[:, None])  # (B,1)
                tokens = new[-1].repeat(len(branches), 1)
            rows.append(torch.cat(new, 1))
    return torch.cat(rows)

@dataclass
class Models:
    """What has been trained, and what it can make; each method's `how` is a SamplingConfig. Prompts
    must begin like sequences of the orders that the iGPT was trained on."""
    vqvae: VQVAE = None
    igpt: iGPT = None
    tokenizer: Tokenizer = None
    def expect(self, order):
        """Warn if the iGPT was not trained on an order of sequences that it is asked for."""
        if order not in self.igpt.orders:
            log(f"warning: the model was trained on {', '.join(self.igpt.orders)}, not {order}")

    def continue_captions(self, prompts, n_words, how):
        """Prompts (B,T) that end where a caption goes on -> B texts of 1 to n_words words."""
        t = self.tokenizer
        rows = generate(self.igpt, prompts, n_words, t.text_span, how, closing=True)
        return list(map(t.text_decode, rows))

    @torch.no_grad()
    def images(self, captions, how):
        """B captions -> picture tokens int64 (B,N). A drawing that is not surely read as what it
        is to be is made again, `redraw` times at most: most false ones go, true ones stay about as
        varied as they are (rejection sampling). Raises InputError as text_encode does."""
        self.expect("text_image")
        t, N = self.tokenizer, self.vqvae.n_tokens
        prompts = text_prompts(t, captions)  # (B,L+3)
        if not self.igpt.eval().causal:  # a ParallelPredictor draws all at once, unguided
            rows = F.pad(prompts, (0, N - 1)).to(self.igpt.head.weight.device)  # (B,L+2+N)
            return sample_token(self.igpt(rows)[:, -N:, : t.n_embeddings], how)  # (B,N,K) -> (B,N)
        nothing = text_prompts(t, [None] if how.guidance else [])  # (1 or 0,L+3)
        tokens = generate(self.igpt, prompts, N, t.image_span, how, nothing)
        for _ in range(how.redraw):
            if again := self.unsure(tokens, captions):
                tokens[again] = generate(self.igpt, prompts[again], N, t.image_span, how, nothing)
        return tokens

    def unsure(self, tokens, captions):
        """Picture tokens (B,N), B captions -> list of those rows with a word of which the iGPT is
        not 90 % sure (of synonyms it never is). It reads pixels: codes may spell a red 7 on red."""
        if "image_text" not in self.igpt.orders:
            return []  # it cannot read
        seen = extract_tokens(self.vqvae, decode_pictures(self.vqvae, tokens))
        return span_sums(self, seen, captions, "image_text")[4].nonzero().flatten().tolist()

    def captions(self, tokens, how):
        """Picture tokens (B,N) -> list of B captions."""
        self.expect("image_text")
        prompts = image_prompts(self.tokenizer, tokens)
        return self.continue_captions(prompts, self.tokenizer.caption_length, how)

    def pairs(self, n, how):
        """n pairs from nothing: BOS EOI, a caption, then a picture for it -> picture tokens (n,N),
        n captions. (A picture that comes first may show no clear digit, see igpt_loss.) Unsure ones
        are made anew, caption and all, with a redraw less."""
        t = self.tokenizer
        prompts = torch.tensor([[t.bos_token, t.end_of_image_token]]).expand(n, 2)
        captions = self.continue_captions(prompts, t.caption_length, how)
        tokens = self.images(captions, how)
        if how.redraw and (again := self.unsure(tokens, captions)):
            tokens[again], others = self.pairs(len(again), how.but(redraw=how.redraw - 1))
            for i, caption in zip(again, others):
                captions[i] = caption
        return tokens, captions

# --- Evaluation: what the two models are worth, over the whole test split -------------------------
#
# The transformer is measured by the nats that true pairs cost it, and by what it makes: are its
# captions the true ones, and do its drawings show what they were asked to show?

@torch.no_grad()
def span_sums(models, tokens, captions, order):
    """Teacher forcing (each token is predicted from the true ones before it) over M pictures'
    tokens (M,N) and captions in one of the ORDERS -> rows (5,M): the picture's nats; the caption's
    nats; codes that were the likeliest; the caption's targets; targets less than 90 % likely. (A
    caption's targets are its words and, if it is short, the EOT that ends it; marks whose place is
    certain count nowhere. All ids compete.) The iGPT is in eval mode afterwards."""
    t, igpt, sums = models.tokenizer, models.igpt.eval(), []
    rows = make_sequences(tokens.cpu(), t.encode_batch(captions), t, order)
    for part in track(rows.to(igpt.head.weight.device).split(CHUNK), "predicting"):
        inputs, targets = part[:, :-1], part[:, 1:]  # (B,T-1), as all that follows but logits
        logits = igpt(inputs)  # (B,T-1,V)
        nats, code = next_token_nll(logits, targets), targets < t.n_embeddings
        hits = code & (logits.argmax(2) == targets)
        said = (inputs == t.end_of_image_token).cumsum(1).cumsum(1)  # the EOI is 1, then 2, 3 ...
        text = (said > 0) & (said <= t.caption_length) & (inputs != t.end_of_text_token)
        counts = nats * code, nats * text, hits, text, text & (nats > 0.105)  # 90 % are 0.105 nats
        sums.append(torch.stack(counts).sum(2))  # (5,B)
    return torch.cat(sums, 1)

def compare_captions(models, tokens, captions):
    """What the models read in pictures' tokens (M,N), always the likeliest word, against the true
    captions -> share of those found wholly alike, share of their words found in place; floats."""
    found, t = models.captions(tokens, SamplingConfig(greedy=True)), models.tokenizer
    ids = t.encode_batch(captions).numpy()  # (M,L+1): as ids, all captions are of one length
    right = t.encode_batch(found).numpy() == ids
    return right.all(1).mean(), right[ids < t.end_of_text_token].mean()

def evaluate(models, images, captions, how=SamplingConfig(), seed=0):
    """What both models are worth: all figures of `eval`, over pictures uint8 (M,H,W,3) and M
    captions -> dict of floats, without those that the model was not trained for. (+: higher is
    better, -: lower is. In nats a short caption's end counts as a word.)
        recon_mse: - squared error of reconstructions, in [-1,1] units
        recon_psnr: + the same in dB
        codebook_used: + share of the codes that are chosen at all
        codebook_perplexity: + so many codes, used alike, would tell as much
        nll_text_to_image: - nats a picture token, after the caption
        nll_image: - nats a picture token, without the caption (it counts little in training)
        nll_image_to_text: - nats a word, after the picture
        nll_text: - nats a word, without the picture
        code_accuracy: + share of picture tokens that were the likeliest, after the caption
        caption_exact: + greedy captions of true pictures that are wholly right
        caption_slot_accuracy: + their words that are right, place by place
        round_trip_exact: + drawn for each caption, judged (redraw), read again: the same caption
        round_trip_unguided: + the same, drawn once, unguided: what the model itself has learned
    """
    vqvae, N = models.vqvae, models.vqvae.n_tokens
    tokens = extract_tokens(vqvae, images)  # (M,N)
    out = measure_reconstruction(vqvae, images, tokens)
    for order in models.igpt.orders:
        # Nats are shared out among N codes a picture, and among the targets of all captions
        picture, text, hits, words, _ = span_sums(models, tokens, captions, order).mean(1).tolist()
        if order == "text_image":
            out |= dict(nll_text_to_image=picture / N, code_accuracy=hits / N)
            if models.igpt.causal:  # a ParallelPredictor is shown the words that it would predict
                out["nll_text"] = text / words
        elif order == "image_text":  # here the caption is what has to be found
            out |= dict(nll_image=picture / N, nll_image_to_text=text / words)
            out["caption_exact"], out["caption_slot_accuracy"] = compare_captions(
                models, tokens, captions)
    if "nll_text" in out and "nll_image" in out:  # causal and of both orders: it draws and reads
        for name, drawing in ("exact", how), ("unguided", how.but(guidance=0.0, redraw=0)):
            torch.manual_seed(seed)
            # Through pixels: what we read is what a person would be shown
            made = extract_tokens(vqvae, decode_pictures(vqvae, models.images(captions, drawing)))
            out[f"round_trip_{name}"], _ = compare_captions(models, made, captions)
    return out

# ===== Part II: everything else ===================================================================

import argparse, colorsys, contextlib, copy, csv, ctypes, io, os, pickle, pickletools
import shutil, signal, struct, textwrap
from pathlib import Path

try:
    import fcntl  # file locks; not on Windows
except ImportError:
    fcntl = None

# --- Drawn digits: the embedded data set ----------------------------------------------------------

# Five ways to write each digit, 0 to 9, between ";". A way is the path of the pen: points "xxyy" in
# per cent of a box (x to the right, y DOWN), joined by a smooth curve in the order written. A point
# that stands twice is a corner; "/" lifts the pen. The commonest way to write a digit may appear
# twice, as all five are equally likely.
STROKES = """\
5500 2512 1052 2688 5099 7688 9052 7612 5000; 4008 2028 1060 2288 5099 7888 9055 8020 6202; 6805
4003 1532 1265 4097 7890 9055 7818 5502 3512; 8500 5503 1830 1270 4599 8080 8842 7012 3515; 5500
2512 1052 2688 5099 7688 9052 7612 5000; 5000 5050 5099; 4212 5200 5200 5050 5099; 2525 5500 5500
5550 5599; 4700 5050 5299; 5500 4830 4770 5399; 1522 3005 6002 8020 7545 4575 1097 1097 5097 9097;
1520 4503 7220 5558 1588 1570 5075 9590; 2018 5000 7518 6550 3585 1896 1088 3080 6095 9580; 2030
3505 6505 7535 5070 1595 1595 4588 9088; 1522 4002 7508 7535 5570 2892 0885 2065 5072 7587 9299;
1515 4002 7510 7835 4248 4248 8060 8285 4599 1088; 1512 5002 7508 4542 4542 7055 7080 5599; 2510
5503 7025 4047 4047 7558 8080 5098 2092 0875; 1503 5003 8003 8003 4040 4040 7552 8280 5598 0890;
1510 5000 8018 5545 3551 5048 8270 7093 3599 1088; 2500 2022 1545 1545 5048 8545 / 7505 7350 7099;
2002 1535 3052 5550 9042 / 8500 7550 7099; 6500 4030 1065 1065 5065 9565 / 6500 6550 6599; 1505 1242
3555 6550 8505 8505 7855 7599; 3000 2222 1060 1060 5058 9555 / 6030 5560 5099; 3005 2845 5038 8565
7092 4099 1090 / 3005 6005 9002; 9500 4510 4510 3540 3540 6050 6872 5088 0899; 8803 5503 2805 2805
2245 2245 5038 8465 7092 4099 1088; 7005 3010 2042 2042 5038 8055 7588 4599 1592; 3510 2048 2048
5042 7560 7085 4598 1590 / 4010 6508 9500; 7002 4020 1855 1585 4599 7885 7560 5048 2065; 6000 3535
1272 3098 6592 7868 5855 3062 1580; 5000 2540 1575 3098 6095 7575 6062 4068 2080; 5500 4535 3575
4598 6095 6880 6068 4078; 3000 1230 0870 3098 7598 9575 8552 5555 4070 4588; 1008 5005 8808 8808
6050 4099; 1008 5005 8808 8808 6050 4599 / 3550 6048 8548; 1225 1208 1208 5005 8805 8805 5550 4599;
1038 1808 1808 5002 8505 8505 8050 7599; 1015 4003 7503 8522 6560 5099; 7515 5000 2512 2835 5050
8075 5099 2078 5048 7532 7515; 8515 4502 1015 2538 5050 6280 4595 4068 8515; 5000 2512 2535 5048
7535 7512 5000 / 5048 2065 1885 5099 8285 8065 5048; 8512 5000 2518 5045 7878 5099 2085 5055 8518;
2095 4055 7520 5001 2518 4548 8088 5099 2095; 8015 5002 2018 2042 4550 7540 8212 8212 8050 7599;
6008 4502 3518 4535 6025 6510 6510 6050 5599; 7812 4502 1825 3048 6545 8010 8010 8355 6592 2595;
8018 5503 2018 2042 5050 7835 8215 8250 7280 3598; 7005 3508 2028 3042 6035 7808 7808 7550 6099"""

def write_style(style, n, size, rng):
    """One way of STROKES in n hands -> ink (n,size,size), 0 to 255."""
    dots = []  # along the path of the pen, (n,dots,2), in boxes
    for stroke in style.split("/"):
        points = np.array([divmod(int(word), 100) for word in stroke.split()]) / 99  # (P,2)
        # A dot is a mean of the points, above all of those that it is near to in time. Time runs
        # half a step past both ends, or the mean would not reach them
        time = np.linspace(-0.5, len(points) - 0.5, 100)[:, None]
        pull = np.exp(-2 * (time - np.arange(len(points))) ** 2)  # (100,P)
        points = points + rng.normal(0, 0.09, (n, *points.shape))  # a shaky hand, (n,P,2)
        dots.append(pull @ points / pull.sum(1, keepdims=True))
    # One random matrix stretches, turns and slants. With the shake it is all that reading real
    # digits takes: waves or bent proportions as well gained about 0.2 % each, or less
    dots = np.hstack(dots) @ rng.normal([[1, 0], [-0.15, 1]], 0.19, (n, 2, 2))
    # A dot has the ink of its bit of path; the jump where the pen is lifted counts as a short one
    steps = np.linalg.norm(np.gradient(dots, axis=1), axis=2, keepdims=True).clip(0, 0.07)
    # As in MNIST, the longer side of a digit takes 20/28 of the picture, its mean is in the centre
    dots -= steps.mT @ dots / steps.sum(1, keepdims=True)
    pen = np.exp(rng.normal(-2.5, 0.27, (n, 1, 1)))
    side = np.ptp(dots, 1).max(1)[:, None, None] + pen
    grid = side * np.linspace(-0.7, 0.7, size)  # (n,1,size)
    # A dot is a Gaussian as wide as the pen: the product of one in x and one in y, (n,dots,size),
    # so that the sum over the dots is a matrix product. It is flat inside a stroke, hence clipped
    x, y = (np.exp(-(((axis - grid) / pen) ** 2)) for axis in np.split(dots, 2, 2))
    return (280 * (y * steps / pen).mT @ x - 127).clip(0, 255)

def draw_digits(labels, size, rng):
    """labels (M,) in 0..9, side in pixels, Generator -> ink (M,size,size) uint8, 255 is ink."""
    ink = np.empty((len(labels), size, size), np.uint8)
    ways = 5 * labels + rng.integers(5, size=len(labels))
    for i, style in enumerate(STROKES.split(";")):
        mine = np.flatnonzero(ways == i)
        # Some hundred at a time, or the factors of the matrix products would fill the memory
        for rows in np.array_split(mine, 1 + len(mine) * size // 20000):
            ink[rows] = write_style(style, len(rows), size, rng)
    return ink

DIGITS = "zero one two three four five six seven eight nine".split()
# The embedded set's palette: hue (in [0,1) round the colour wheel) by shade (saturation, value)
HUES = dict(red=0, orange=.075, yellow=.16, green=.34, cyan=.5, blue=.63, purple=.77, pink=.9)
SHADES = dict(light=(0.38, 1.0), plain=(1.0, 0.95), dark=(1.0, 0.5))

def colorize(ink, labels, rng):
    """Colour grey digits and caption them: 'dark red seven on light blue'. ink uint8 (M,H,W), 255
    is ink; labels (M,) 0..9 -> images uint8 (M,H,W,3), captions, a list of str."""
    colors = {f"{shade} {hue}": np.array(colorsys.hsv_to_rgb(HUES[hue], *SHADES[shade]))
              for shade in SHADES for hue in HUES}
    pairs = [(fore, back) for fore in colors for back in colors
             if np.abs(colors[fore] - colors[back]).sum() > 0.59]  # the legible ones
    # Picture by picture, as floats of a whole data set would take gigabytes; 0.5 rounds
    images, captions = np.empty((*ink.shape, 3), np.uint8), []
    for i, (fore, back) in enumerate(rng.choice(pairs, len(ink))):
        images[i] = 255 * colors[back] + ink[i, ..., None] * (colors[fore] - colors[back]) + 0.5
        captions.append(f"{fore} {DIGITS[labels[i]]} on {back}")
    return images, captions

def make_drawn(n_train, n_test, size, seed):
    """The embedded set, digits drawn from pen strokes -> the arrays of drawn.npz: train_images,
    test_images uint8 (M,size,size,3), train_captions, test_captions. Same arguments, same bytes."""
    rng, drawn = np.random.default_rng(seed), {}
    for part, n in ("train", n_train), ("test", n_test):
        labels = rng.integers(10, size=n)
        pairs = colorize(draw_digits(labels, size, rng), labels, rng)
        drawn[f"{part}_images"], drawn[f"{part}_captions"] = pairs
    return drawn

# --- Data: three sources, one result --------------------------------------------------------------
#
# Two pickles (the notes' files), raw MNIST, or drawn.npz: all give training pictures, test pictures
# and the captions of both, as load_data's Data, and pass the same checks. Files come from outside:
# none can run code, or get memory for data it only announces; what is wrong is said in a line.

@contextlib.contextmanager
def reading(path, kind):
    """Within: whatever a missing or damaged file raises becomes an InputError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: no {kind}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # damaged bytes can lead to nearly anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path}: no readable {kind} ({why})") from None

class SafeUnpickler(pickle.Unpickler):
    """Unpickles arrays, containers, strings and numbers, and nothing that could run code. A pickle
    is a program: it may name any importable function and call it. So find_class, the one door to
    names, knows those with which NumPy pickles arrays, and has its own idea of them: arrays are of
    bytes that are there, never of a size that the pickle only names. (NumPy's own ndarray(2**40) or
    codecs.encode in "hex", over and over, would fill the memory.)"""
    KNOWN = {
        "numpy._reconstruct": lambda *_: np.empty(0),  # its state, shape and bytes, follows
        # Protocol 5 calls this instead; `form` is shape and order
        "numpy._frombuffer": lambda raw, kind, *form: np.reshape(np.frombuffer(raw, kind), *form),
        "numpy.scalar": lambda dtype, raw: np.frombuffer(raw, dtype)[0],
        "numpy.dtype": np.dtype, "collections.OrderedDict": dict,
        "numpy.ndarray": None, "numpy.memmap": None,  # no more than arguments of _reconstruct
        "_codecs.encode": lambda text, _: text.encode("latin-1"),  # how protocol 2 writes bytes
    }
    def find_class(self, module, name):
        known = f"{module.split('.')[0]}.{name}"  # NumPy's inner modules change their names
        if known not in self.KNOWN:
            raise InputError(f"it asks for {module}.{name}, which no picture data needs: refused")
        return self.KNOWN[known]

def unpickle(path):
    """What a pickle of arrays and texts holds. Bad ones raise anything: use `reading`."""
    raw = Path(path).read_bytes()
    # The unpickler would first make room for whatever length an instruction names. genops walks
    # through the instructions without following them, and refuses lengths beyond the file's end
    for opcode, number, _ in pickletools.genops(raw):
        if opcode.name.endswith("PUT") and number > len(raw):
            raise ValueError(f"memo {number}")  # a number for an object, beyond all there can be
    return SafeUnpickler(io.BytesIO(raw)).load()

def to_uint8(images, value_range="auto", name="images"):
    """Pictures (M,H,W,3) of any accepted value range -> uint8 in 0..255, and the range's name:
    floats in [0,1] ('unit'), whole numbers 0..3 ('2bit', two bits a channel) or 0..255 ('8bit');
    'auto' takes the first that the largest value fits. Raises InputError for all else: another
    shape, H or W not divisible by 4, NaN, fractions above 1."""
    images = np.asarray(images)
    kind, shape = images.dtype.kind, images.shape
    if kind not in "uif" or shape[3:] != (3,) or shape[1] % 4 or shape[2] % 4 or not images.size:
        raise InputError(f"{name}: want numbers (N,H,W,3), H and W divisible by 4, found "
                         f"{images.dtype} {shape}")
    high = images.max()
    if value_range == "auto":
        value_range = "2bit" if high <= 3 else "8bit"
        if kind == "f" and high <= 1.001:  # an antialiased resize makes 1.0000002
            value_range = "unit"
    limit = {"unit": 1, "2bit": 3, "8bit": 255}[value_range]
    allowed = images.clip(0, limit)  # the nearest values that the range has, (M,H,W,3)
    if limit > 1:
        allowed = allowed.round()
    # Pictures are no farther from those than by an error of rounding; NaN is neither <= nor >
    if not np.abs(images - allowed).max() <= 0.001:
        raise InputError(f"{name}: {images.min()} to {high} does not fit {value_range}: 0-{limit}")
    return np.round(allowed * (255 // limit)).astype(np.uint8), value_range

def check_captions(texts, images, name="texts"):
    """A list, tuple or array of captions, one a picture -> list of str, blanks made single. Raises
    InputError for another container (a dict or str has a length, too), number or kind of item."""
    if np.array(texts, object).shape != (len(images),):
        raise InputError(f"{name}: want a list of {len(images)} captions, one a picture, found "
                         f"{type(texts).__name__} {np.array(texts, object).shape}")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.split() or re.search("[\ud800-\udfff]", text):
            raise InputError(f"{name}: caption {i} is {text!a}, no text of words")
    return [" ".join(text.split()) for text in texts]

def check_data(value_range, train, test, *texts):
    """What any source gives, training and test pictures and, if any, the captions of both -> the
    same, checked: two uint8 arrays (M,H,W,3), two lists of str. The test pictures are in the range
    of the others: few dark ones alone could look like another. Raises InputError."""
    train, value_range = to_uint8(train, value_range, "training pictures")
    test, _ = to_uint8(test, value_range, "test pictures")
    log(f"pictures: {train.shape} to train on, {test.shape} to test, values {value_range}")
    names = "training texts", "test texts"
    return train, test, *map(check_captions, texts, (train, test), names)

# Where load_data looks, in this order; what the first and the last hold
SOURCES = "colored_mnist_with_text.pkl mnist_colored.pkl mnist drawn.npz".split()
PAIRS = "train_images test_images train_texts test_texts".split()
DRAWN = "train_images test_images train_captions test_captions".split()

def load_pickled_data(path, value_range="auto", keys=("train", "test"), read=unpickle):
    """mnist_colored.pkl, a dict with these keys or a tuple in their order -> what check_data makes
    of it: two uint8 arrays (M,H,W,3) in 0..255. read: how to read another file. Raises InputError
    for all else."""
    with reading(path, f"tuple or dict of {', '.join(keys)}"):
        data = read(path)
        if not hasattr(data, "keys"):
            data = dict(zip(keys, data, strict=True))
        return check_data(value_range, *[data[key] for key in keys])

def load_colored_mnist_text(path, value_range="auto"):
    """colored_mnist_with_text.pkl, as above, of PAIRS -> train and test pictures uint8 (M,H,W,3)
    in 0..255, train and test texts."""
    return load_pickled_data(path, value_range, PAIRS)

def read_mnist(folder):
    """The four raw MNIST files (yann.lecun.com/exdb/mnist), gzipped or not, anywhere in a folder,
    coloured and captioned by us -> train and test pictures, train and test texts: `colorize`
    chooses two colours for each digit. Raises InputError if one is missing or damaged."""
    found, rng = [], np.random.default_rng(0)
    for name in "train-images train-labels t10k-images t10k-labels".split():
        with reading(name, "IDX file"):
            # max: of a folder and a file in it, named alike, the file
            raw = max(folder.rglob(f"{name}?idx*"), default=folder / name).read_bytes()
            if raw[:2] == b"\x1f\x8b":  # gzip, whatever the name says
                raw = zlib.decompressobj(31).decompress(raw, 2**30)  # no more than 1 GiB of zeros
            # Header: two zero bytes, type (8 = uint8), number of axes, each length in 32 bits
            shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
            found.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape))
    train, texts = colorize(*found[:2], rng)
    test, test_texts = colorize(*found[2:], rng)
    return train, test, texts, test_texts

def load_data(folder, value_range="auto", captioned=False):
    """The data of a folder: the two pickles, else raw MNIST in mnist/, else drawn.npz -> Data,
    without captions if there is the pickle for the VQ-VAE alone. Raises InputError then, if it is
    to be captioned, if there is nothing, if sizes differ, and when the readers above do."""
    pairs, pictures, mnist, drawn = (Path(folder, name) for name in SOURCES)
    # The VQ-VAE needs no captions: the notes train it on a file of its own
    own = load_pickled_data(pictures, value_range) if pictures.exists() else ()
    if pairs.exists():
        data = load_colored_mnist_text(pairs, value_range)
    elif own and captioned:
        raise InputError(f"{folder} holds no captions: there is no {pairs.name}")
    elif own:
        data = (*own, [], [])
    elif mnist.is_dir():
        data = load_pickled_data(mnist, "8bit", PAIRS, read_mnist)
    elif drawn.exists():
        data = load_pickled_data(drawn, "8bit", DRAWN, np.load)
    else:
        raise InputError(f"{folder} holds none of {', '.join(SOURCES)}: no data here; `mmgen.py "
                         f"data --data {folder}` would draw some")
    sizes = {images.shape[1:3] for images in (*data[:2], *own)}
    if len(sizes) > 1:
        raise InputError(f"{folder}: pictures of unlike sizes: {sizes}")
    return Data(*data, *own)

# --- Library: the notes' names for what stands above; `device` is where the models are ------------

def normalize_images(images, method="vqvae", value_range="auto"):
    """Pictures (M,H,W,3) in any accepted range -> float tensor (M,3,H,W) in [-1,1], for which
    'vqvae' is the notes' name. Raises InputError as to_uint8 does."""
    return to_float(torch.from_numpy(to_uint8(images, value_range)[0]))

class DataProcessor:
    """The notes' name for the step from arrays to loaders."""
    @staticmethod
    def prepare_vqvae_data(train_data, test_data, batch_size=128, seed=0):
        """Two arrays (M,H,W,3) in any accepted range -> two Batches of (B,3,H,W) in [-1,1]."""
        train, test = check_data("auto", train_data, test_data)
        return picture_batches(train, batch_size, seed=seed), picture_batches(test, batch_size)

def create_dataset(images, texts, vqvae, tokenizer, batch_size=128, orders=ORDERS[:2], seed=0):
    """Pictures (M,H,W,3) in any accepted range and M captions -> Batches of sequences int64 (B,T).
    Raises InputError for pictures or captions that do not fit."""
    images, _ = to_uint8(images)
    text_ids = tokenizer.encode_batch(check_captions(texts, images))
    tokens = extract_tokens(vqvae, images)
    return sequence_batches(tokenizer, orders, tokens, batch_size, text_ids, seed=seed)

def generate_from_text(model, tokenizer, vqvae, prompt, device, how=SamplingConfig()):
    """A caption -> a picture (1,3,H,W) in [-1,1]. Raises InputError as text_encode does."""
    return vqvae.decode_tokens(Models(vqvae, model, tokenizer).images([prompt], how)).detach()

def generate_from_image(model, tokenizer, vqvae, image, device, how=SamplingConfig()):
    """A picture (3,H,W) in [-1,1] -> its caption."""
    tokens = vqvae.get_tokens(image[None].to(device)).flatten(1)  # (1,N)
    return Models(vqvae, model, tokenizer).captions(tokens, how)[0]

def generate_unconditional(model, tokenizer, vqvae, n_samples, device, how=SamplingConfig()):
    """n_samples pairs -> pictures (n,3,H,W) in [-1,1] and a list of n captions."""
    tokens, captions = Models(vqvae, model, tokenizer).pairs(n_samples, how)
    return vqvae.decode_tokens(tokens).detach(), captions

# --- Files: checkpoints and pictures --------------------------------------------------------------
#
# Every file is written beside its place and renamed when it is whole. A checkpoint says what it is
# and what it fits to. A pickle, which it is in part, could run code when it is read: weights_only
# makes torch refuse all but tensors and plain values. Samples are a PPM, the plainest of picture
# formats (size and pixels), or a PNG, which every program shows; and .npy, for programs.

FORMAT = 10  # of checkpoints; raise it whenever an old file would be misread
VQVAE_FILE, IGPT_FILE = "checkpoints/vqvae_model.pth", "checkpoints/igpt_model.pth"  # of a run

def atomic_write(path, data, patience=0):
    """Write bytes beside their place, flush to disk, rename: one sees the old file or the new. Some
    systems replace no file that is open elsewhere: that is tried again for `patience` seconds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")  # what a kill has left is written over next time
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file)
        for _ in range(patience):
            with contextlib.suppress(PermissionError):
                return beside.replace(path)
            time.sleep(1)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)

@contextlib.contextmanager
def optional():
    """Within: a picture or table that cannot be written now is no reason to end a training."""
    try:
        yield
    except OSError as error:
        log(f"warning: {error}")

def save_checkpoint(path, **content):
    """Tensors, numbers, strings and containers of them -> a .pth file."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    atomic_write(path, buffer.getvalue(), 60)

def load_checkpoint(path):
    """What save_checkpoint wrote, as a dict, on the CPU. Raises InputError."""
    with reading(path, "checkpoint, as `mmgen.py train` makes them"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise InputError(f"of format {content['format']}, not {FORMAT}")
        return content

def save_model(path, model, **more):
    """A model, also one that torch.compile has wrapped -> a checkpoint of what rebuild needs."""
    model = getattr(model, "_orig_mod", model)
    # NumPy's numbers, as sizes often are, become Python's: all that weights_only admits
    options = json.loads(json.dumps(model.options, default=np.generic.item))
    save_checkpoint(path, kind=type(model).__name__, options=options, model=model.state_dict(),
                    **more)

save_vqvae = save_model

def rebuild(content, *kinds, **more):
    """Content of a checkpoint -> its model, of one of these kinds, in eval mode. more: options that
    the file lacks or must agree with. What does not fit raises KeyError or RuntimeError."""
    kind = {kind.__name__: kind for kind in kinds}[content["kind"]]
    with torch.device("meta"):  # shapes without memory: a damaged file cannot ask for gigabytes
        model = kind(**content["options"] | more)
    model.load_state_dict(content["model"], assign=True)  # the file's tensors become the weights
    return model.float().eval()

def load_vqvae(path, device="cpu"):
    """-> VQVAE in eval mode. Raises InputError if it is missing, damaged or of another kind."""
    content = load_checkpoint(path)
    with reading(path, "VQ-VAE"):
        return rebuild(content, VQVAE, FactoredVQVAE).to(device)

def fingerprint(vqvae):
    """A checksum of the codebook, by which an iGPT knows its codes again."""
    return zlib.crc32(vqvae.codebook.weight.detach().cpu().numpy())

def save_igpt(path, igpt, tokenizer, vqvae):
    """The iGPT, its vocabulary, and which codebook its tokens refer to -> a checkpoint."""
    save_model(path, igpt, words=tokenizer.words, caption_length=tokenizer.caption_length,
               codebook=fingerprint(vqvae))

def load_igpt(path, vqvae, device="cpu", any_codes=False):
    """-> iGPT in eval mode and its Tokenizer. Raises InputError as load_vqvae does, and if the iGPT
    was made for other codes; any_codes: not then."""
    content = load_checkpoint(path)
    with reading(path, "iGPT"):
        if not any_codes and content["codebook"] != fingerprint(vqvae):
            raise InputError("was trained on other codes: train --phase igpt --overwrite")
        tokenizer = Tokenizer(content["words"], vqvae.n_embeddings, content["caption_length"])
        codebook = vqvae.codebook.weight if "code_in.weight" in content["model"] else None
        igpt = rebuild(content, iGPT, ParallelPredictor, codebook=codebook,
                       vocab_size=tokenizer.vocab_size)  # damaged words do not fit the weights
        return igpt.to(device), tokenizer

def save_picture(path, image):
    """uint8 (H,W,3) -> a file: a PNG if it is called so, else a binary PPM."""
    height, width, _ = image.shape
    out = b"P6\n%d %d\n255\n" % (width, height) + image.tobytes()
    if Path(path).suffix == ".png":
        # A signature, then chunks: a head (8 bits a value, RGB), compressed rows, an end. A row
        # begins with the number of its filter, 0 for none
        rows = np.insert(image.reshape(height, -1), 0, 0, 1)  # (H,1+3W)
        head, out = struct.pack(">IIBBxxx", width, height, 8, 2), b"\x89PNG\r\n\x1a\n"
        for chunk in b"IHDR" + head, b"IDAT" + zlib.compress(rows), b"IEND":
            # Length (the name does not count), name and content, checksum
            out += struct.pack(f">I{len(chunk)}sI", len(chunk) - 4, chunk, zlib.crc32(chunk))
    atomic_write(path, out)

def read_pictures(path):
    """--image: .npy uint8 (H,W,3) or (N,H,W,3), or a binary PPM (P6, 8 bits) -> uint8 (N,H,W,3)."""
    with reading(path, "picture, neither .npy nor a binary PPM (P6)"):
        raw = bytearray(Path(path).read_bytes())  # torch warns of arrays that are read-only
        # P6, width, height, largest value, a blank, pixels; in between (~) blanks, comment lines
        header = re.match(rb"P6~(\d{1,5})~(\d{1,5})~255\s".replace(b"~", rb"(?:\s|#.*\n)+"), raw)
        if header:
            images = np.ndarray((int(header[2]), int(header[1]), 3), np.uint8, raw, header.end())
        else:
            images = np.lib.format.read_array(io.BytesIO(raw))  # what np.load does, but no pickle
        images = images[None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.shape[3:] != (3,) or not images.size:
            raise InputError(f"want uint8 (N,H,W,3), found {images.dtype} {images.shape}")
        return images

# Small letters: six columns of 8 pixels each, a byte a column. The last stands for all others
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.: "
GLYPHS = np.unpackbits(np.frombuffer(bytes.fromhex("""
    00021515150f 007f1111110e 000e11111111 000e1111117f 000e1515150c 00103f504000 00091515151e
    007f1010100f 0000115f0100 000201115e00 007f040a1100 0000417f0100 001f100f100f 001f1010100f
    000e1111110e 001f14141408 00081414141f 001f08101000 000915151512 00107e111100 001e0101011f
    001c0201021c 001e011e011e 00110a040a11 00190505051e 001113151911 003e4549513e 0000217f0100
    002143454931 002241494936 000c14247f04 00725151514e 001e29494906 0040434c5060 003649494936
    003049494a3c 000003030000 00001b1b0000 000000000000 007f4141417f
    """), np.uint8)).reshape(-1, 6, 8)

def add_texts(pictures, texts):
    """uint8 (N,H,W,3) and N texts, or none -> uint8 (N,H+8*lines,W,3): texts wrapped below."""
    width = pictures.shape[2]
    wrapped = [textwrap.wrap(text.lower(), width // 6) for text in texts]
    for lines in itertools.zip_longest(*wrapped, fillvalue=""):  # the first of all, the second ...
        letters = "".join(line.ljust(width) for line in lines)
        ink = GLYPHS[list(map(LETTERS.find, letters))].reshape(len(lines), -1, 8).mT  # (N,8,6W)
        pictures = np.hstack([pictures, 255 * ink[..., :width, None].repeat(3, 3)])
    return pictures

def picture_grid(images, captions=(), scale=0, together=1, columns=0):
    """uint8 (N,H,W,3) -> one picture on grey, each enlarged `scale` times (0: to about 112 pixels),
    of so many columns or about square. captions: N texts to go below. together: so many neighbours,
    the samples of one prompt, are not torn apart."""
    scale = scale or max(1, 112 // images.shape[2])
    tiles = add_texts(images.repeat(scale, 1).repeat(scale, 2), captions)  # (N,h,w,3)
    columns = columns or together * math.ceil(len(images) ** 0.5 / together)
    margins = (0, -len(images) % columns), (1, 1), (1, 1), (0, 0)  # the first fills the last row up
    tiles = np.pad(tiles, margins, constant_values=128)
    tiles = tiles.reshape(-1, columns, *tiles.shape[1:])  # (rows,columns,h,w,3)
    return np.hstack(np.hstack(tiles))  # (columns,rows*h,w,3), then one picture

def sample_paths(prefix):
    """--out PREFIX -> PREFIX.ppm (PREFIX itself, if it ends in .png), PREFIX.npy, PREFIX.txt.
    Raises InputError for a directory."""
    if not os.path.basename(prefix):
        raise InputError(f"{prefix} is a directory, want the beginning of the files' names")
    grid = Path(prefix)
    if grid.suffix not in (".png", ".ppm"):
        grid = Path(f"{prefix}.ppm")
    return grid, grid.with_suffix(".npy"), grid.with_suffix(".txt")

def save_samples(prefix, images, captions, together=1):
    """A picture_grid, pictures uint8 (N,H,W,3), a caption a line -> sample_paths; their first."""
    buffer, (grid, pictures, texts) = io.BytesIO(), sample_paths(prefix)
    np.save(buffer, images)
    save_picture(grid, picture_grid(images, captions, together=together))
    atomic_write(pictures, buffer.getvalue())
    atomic_write(texts, "\n".join([*captions, ""]).encode())
    return grid

def show_in_terminal(images):
    """Draw pictures uint8 (N,H,W,3) side by side. A character is two pixels: an upper half block,
    its ink in the colour of the upper pixel, its ground in that of the lower."""
    columns = shutil.get_terminal_size().columns // (images.shape[2] + 2)
    grid = picture_grid(images, scale=1, columns=columns)
    block = "\x1b[38;2;%d;%d;%dm\x1b[48;2;%d;%d;%dm▀"  # sets ink, then ground; red, green, blue
    for line in np.dstack([grid[::2], grid[1::2]]):  # (width,6)
        print(block * len(line) % tuple(line.flatten()) + "\x1b[0m")

# --- Runs: a directory with checkpoints, curves and the state for --resume ------------------------
#
# Each phase begins with the files that those before it have left. So a run goes one and the same
# way, whether it was stopped in between or not, and a phase alone is a run like any other.

SAVE_SECONDS = 15  # how often the state for --resume is written: what a kill costs at most

class Run:
    """A run directory during training. checkpoints/state.pth holds all that the rest of the run
    depends on: the settings, how many phases are done, the rows of the curves' table, the trainer's
    state, and whether the run is complete. Raises InputError if the directory holds a run and
    neither resume nor overwrite are given, if settings or data of the run to resume are others, and
    if another training is at work there."""
    def __init__(self, folder, regime, cfg, data, resume=False, overwrite=False):
        self.folder, self.phases = folder, REGIMES[regime]
        self.state_path = Path(folder, "checkpoints/state.pth")
        # The number of the signal that came, if any, and when the state was saved last
        self.signal = self.saved = checksum = 0
        for part in vars(data).values():  # pictures and captions, of training and test
            checksum = zlib.crc32(np.asarray(part), checksum)
        settings = vars(cfg) | {"regime": regime, "checksum of the data": checksum}
        with reading(folder, "run"):
            old = load_checkpoint(self.state_path) if self.state_path.exists() else {}
            # A run may be made one phase at a time: the curves of the others stay
            rows = [row for row in old.get("rows", []) if row["phase"] not in self.phases]
            self.state = dict(settings=settings, done=0, rows=rows, trainer=None, complete=False)
            # Nothing that exists is lost without a word: no models that the first phase would make
            # anew (a fine-tuning makes none), and no run that was stopped
            makes = IGPT_FILE if self.phases[0] == "igpt" else VQVAE_FILE
            taken = self.phases[0] != "finetune" and Path(folder, makes).exists()
            if resume and old:
                self.state = {key: old[key] for key in self.state}
                for key, was in old["settings"].items():
                    if was != settings[key]:
                        raise InputError(f"cannot resume: {key} was {was}, now {settings[key]}")
            elif not overwrite and (taken or old and not old["complete"]):
                raise InputError("holds a run: --resume or --overwrite it, or name another --run")
        # Two trainings would spoil each other's files. The lock ends with its process, even killed
        os.makedirs(f"{folder}/checkpoints", exist_ok=True)
        self.lock = open(f"{folder}/checkpoints/.lock", "w")
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"another training is at work in {folder}")
        except OSError as error:  # not every file system has locks
            log(f"warning: {folder} cannot be locked ({error.strerror})")

    def save(self, **changes):
        """Write the state, some of it new. After Ctrl-C or SIGTERM exit as the shell expects."""
        self.saved, self.state = time.monotonic(), self.state | changes
        save_checkpoint(self.state_path, **self.state)
        if self.signal:
            log(f"stopped, {self.folder} is saved: --resume goes on from here")
            sys.exit(128 + self.signal)

    def restore(self, trainer):
        """Hand the trainer its state, if one was saved. Save it before the phase makes files."""
        with reading(self.state_path, "state, --overwrite starts anew"):
            state = self.state["trainer"]
            if state:
                trainer.load_state_dict(state)
                log(f"resumed {state['phase']} at step {trainer.step}")
        self.save(trainer=trainer.state_dict())

    def stop(self, number, frame):
        """A signal's handler: let the step end and save; a second signal ends the process."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        log("stopping after this step; once more to stop at once")

    def on_step(self, trainer):
        """Before each step: save from time to time, and when asked to stop."""
        if self.signal or time.monotonic() - self.saved > SAVE_SECONDS:
            self.save(trainer=trainer.state_dict())

    def on_pass(self, row):
        """After each pass: write the table of the curves and their picture."""
        rows, text = self.state["rows"], io.StringIO()
        rows.append(row)
        table = csv.DictWriter(text, dict.fromkeys(itertools.chain(*rows)), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        with optional():
            atomic_write(f"{self.folder}/results/training_curves.csv", text.getvalue().encode())
            save_picture(f"{self.folder}/results/training_curves.ppm", draw_curves(rows))

    def train(self, cfg, data, device, compiled=False):
        """Train the phases that are not done yet.
        cfg, data: as for Run. compiled: by torch.compile, where that works."""
        phases = self.phases[self.state["done"] :]
        for phase in phases:
            # A kill while both models were written can leave a pair that does not fit. The state of
            # the trainer, written before, then replaces both
            models = load_models(self.folder, device, phase, bool(self.state["trainer"]))
            if phase == phases[0]:  # a copy, for the steps of the rehearsal change the models
                rehearse(phases, cfg, data, copy.deepcopy(models), device)
            models, trainer, loaders = prepare_phase(phase, cfg, data, models, device)
            self.restore(trainer)
            if compiled:
                trainer.compile(loaders[1][0])
            trainer.train(*loaders, self.on_step, self.on_pass)
            # Files first, then the state that counts on them: a kill in between costs some steps
            if phase != "igpt":
                report_codebook(models.vqvae, data.vqvae_test, self.folder)
                save_vqvae(f"{self.folder}/{VQVAE_FILE}", models.vqvae)
            if phase != "vqvae":
                save_igpt(f"{self.folder}/{IGPT_FILE}", models.igpt, models.tokenizer, models.vqvae)
            self.save(trainer=None, done=self.state["done"] + 1)

def rehearse(phases, cfg, data, models, device):
    """A few steps of each phase, on few data, tell how long all will take; what cannot work fails
    now, rather than in the last phase. This changes the models."""
    few = Data(*(part[: 2 * cfg.batch_size] for part in vars(data).values()))
    cfg, plan = cfg.but(lambda_warmup=0.0), {}  # with the transformer from the first step on
    for phase in phases:
        models, trainer, loaders = prepare_phase(phase, cfg, few, models, device)
        for step in range(5):
            if step == 2:  # the first ones are slower
                started = time.monotonic()
            trainer.train_step(loaders[0][step])
        rows = len(data.vqvae_train if phase == "vqvae" else data.train_images)
        steps = math.prod(phase_length(phase, cfg, rows))
        plan[f"{phase} {steps} steps"] = steps * (time.monotonic() - started) / 3
    log(f"to do: {', '.join(plan)}, about {sum(plan.values()):.0f} s on {device}, "
        f"{torch.get_num_threads()} threads, "
        f"{'bf16' if use_bf16(cfg.precision, device) else 'float32'}")

def draw_curves(rows):
    """The rows of the curves' table -> uint8 (H,W,3). Where both losses meet, they are yellow; at
    each power of ten there is a grey line."""
    curves = [[row["test_loss"], row["train_loss"], row["lr"]] for row in rows]  # red, green, blue
    heights = np.logspace(1, -6, 560)[:, None, None]
    picture = np.isclose(heights, curves, rtol=0.04).repeat(24, 1) * np.uint8(255)  # (560,W,3)
    picture[80::80] |= 64
    return picture_grid(picture[None], ["red: test  green: training  blue: rate  lines: 1 0.1"])

def report_codebook(vqvae, images, folder):
    """After a phase that trained the VQ-VAE: is it good enough to go on? Over the whole test set;
    32 originals, each with its reconstruction at its right, go to results/reconstructions.ppm."""
    tokens = extract_tokens(vqvae, images)  # (M,N)
    figures = measure_reconstruction(vqvae, images, tokens)
    log(f"VQ-VAE over {len(images)} test pictures: recon MSE {figures['recon_mse']:.4f} (PSNR "
        f"{figures['recon_psnr']:.1f} dB), {figures['codebook_used']:.0%} of the codes used, "
        f"perplexity {figures['codebook_perplexity']:.1f}")
    if figures["codebook_used"] < 0.05 or figures["codebook_perplexity"] < 4:
        log("warning: the codebook collapsed: lower --vqvae-lr or --lambda-xent, or raise --beta")
    pairs = np.stack([images[:32], decode_pictures(vqvae, tokens[:32])], 1)  # (32,2,H,W,3)
    grid = picture_grid(pairs.reshape(-1, *images.shape[1:]), together=2)
    with optional():
        save_picture(f"{folder}/results/reconstructions.ppm", grid)

def load_models(folder, device, phase=None, any_codes=False):
    """A run directory, or what of it a phase goes on from -> Models. any_codes: load_igpt's."""
    if phase in ("vqvae", "single"):
        return Models()
    vqvae = load_vqvae(f"{folder}/{VQVAE_FILE}", device)
    if phase == "igpt":
        return Models(vqvae)
    return Models(vqvae, *load_igpt(f"{folder}/{IGPT_FILE}", vqvae, device, any_codes))

# --- Commands: flags become Settings, the work is done by the functions above ---------------------
#
# A command is a function of its Options; that of `train` also takes what was given of a Config.
# main calls it. Whatever the user got wrong ends as one line on stderr and status 2.

# The modes of `sample`: name of the files, flags that cannot be meant
MODES = dict(text="text_conditioned_samples image complete",
             image="image_conditioned_samples prompt prompts",
             unconditional="unconditional_samples prompt prompts image complete best_of")

class Options(SamplingConfig):
    """The flags of all commands beside those of Config. Options say how to sample, too."""
    table = f"""
        general
        data         data   folder   where the data are
        run          .      folder   where the run is
        device       auto   name     cpu, cuda ...; auto: cuda if there is any
        value_range  auto   auto|2bit|8bit|unit  values of the pictures in pickles
        train        60000  1..      pairs to train on
        test         2000   1..      pairs to test on
        size         28     16..256  height and width, divisible by 4
        seed         0      0..2147483648  same seed, same bytes
        phase        multi  two-stage|single|multi|vqvae|igpt|finetune  regime, or a phase alone
        preset       auto   auto|full|laptop|tiny  which of the defaults below; auto: laptop
        resume       false  switch   go on where the run in --run stopped
        overwrite    false  switch   start anew over the run in --run
        compile      false  switch   torch.compile: a slow start, then faster on GPUs
        mode         text   text|image|unconditional  captions to pictures, the reverse, pairs
        n            0      0..      samples per prompt or picture (0: 1), or pairs (0: 9)
        prompt       []     texts    a caption; may be repeated; "dark red ..." is finished
        prompts      ""     file     a caption a line
        image        ""     file     .npy uint8 (H,W,3) or (N,H,W,3), or a binary PPM
        out          ""     files    prefix of .ppm, .npy, .txt; with .png the grid is a PNG
        complete     0      0..      keep so many rows of tokens, draw the rest (mode image)
        best_of      1      1..      keep that sample which makes its prompt the likeliest
        show         false  switch   draw the pictures in the terminal
        json         false  switch   JSON instead of a table
        sampling
        {SamplingConfig.table.strip()}
    """
    def pick_device(self):
        """-> torch.device. Raises InputError where it is not: only making a tensor on it tells."""
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        with reading(f"--device {name}", "device"):
            return torch.empty(1, device=name).device

class Parser(argparse.ArgumentParser):
    """argparse, but errors are raised: by itself it prints the whole usage before them."""
    def error(self, message):
        raise InputError(message)

def build_parser():
    """-> the Parser of all COMMANDS. A flag that is not given leaves no trace (SUPPRESS), so that
    defaults live in the tables only, and a preset can tell what the user wants. Ranges are checked
    when Settings are made of the flags. The help shows the default, or those of all PRESETS."""
    parser = Parser(description="A small multimodal model: VQ-VAE and iGPT.")
    commands = parser.add_subparsers(dest="command", required=True)
    fields = Config.fields | Options.fields
    for command, (function, names) in COMMANDS.items():
        p = commands.add_parser(command, help=function.__doc__, description=function.__doc__,
                                argument_default=argparse.SUPPRESS, allow_abbrev=False,
                                usage="%(prog)s [--flag value] ...")
        group = functools.cache(p.add_argument_group)  # the same title, the same group
        for name in names.split():
            field, flag = fields[name], "-n" if name == "n" else "--" + name.replace("_", "-")
            text = f"{field.text} ({' / '.join(map(repr, field.presets.values()))}; {field.limits})"
            # A switch, a text that may come again, or a value of the default's type
            kind = type(field.default)
            actions = {bool: {"action": "store_true"}, list: {"action": "append"}}
            group(field.group).add_argument(flag, help=text, **actions.get(kind, {"type": kind}))
    return parser

def command_data(options):
    """Draw the embedded data set, drawn.npz."""
    if options.size % 4:
        raise InputError(f"--size {options.size}: must be divisible by 4")
    out, path = io.BytesIO(), Path(options.data, "drawn.npz")
    np.savez_compressed(out, **make_drawn(options.train, options.test, options.size, options.seed))
    atomic_write(path, out.getvalue())
    log(f"wrote {options.train} + {options.test} pairs to {path}")

def command_train(options, **flags):
    """Train a regime or a single phase."""
    if options.resume and options.overwrite:
        raise InputError("--resume is not allowed with --overwrite")
    started, device, preset = time.monotonic(), options.pick_device(), options.preset
    if preset == "auto":
        preset = "laptop"  # with a GPU, too: `full` takes longer and draws worse
        log(f"preset {preset} (device {device.type})")
    cfg = Config.preset(preset, seed=options.seed, **flags)
    # Only the default directory is filled: any other that holds nothing may be a typing error
    if options.data == Options.data and not any(Path(options.data, n).exists() for n in SOURCES):
        log(f"no data in {options.data}: drawing the embedded set")
        command_data(Options())
    data = load_data(options.data, options.value_range, options.phase != "vqvae")
    run = Run(options.run, options.phase, cfg, data, options.resume, options.overwrite)
    if run.state["complete"]:
        return log(f"the run in {options.run} is finished")
    with contextlib.suppress(ValueError):  # only the main thread of a program can have handlers
        for number in signal.SIGINT, signal.SIGTERM:  # Ctrl-C; kill, or the machine shuts down
            signal.signal(number, run.stop)
    with run.lock, contextlib.redirect_stdout(None):  # captions are not wanted on the screen
        run.train(cfg, data, device, options.compile)
        if options.phase != "vqvae":  # a first look at what the models have learned
            for mode in MODES if cfg.predictor == "causal" else ["text"]:
                with optional():
                    command_sample(options.but(mode=mode), data)
            log(f"""What to try next:
    python mmgen.py sample --mode text --show --run {options.run} --data {options.data}
    python mmgen.py sample --mode text -n 4 --out some.png --run {options.run} --data {options.data}
    python mmgen.py eval --run {options.run} --data {options.data}""")
        run.save(complete=True)
    log(f"trained {options.phase} in {time.monotonic() - started:.0f} s: see {options.run}/results")

def make_samples(options, models, prompts):
    """What `sample` writes: pictures uint8 (M,H,W,3) and M captions. prompts: captions for mode
    'text', those that end in "..." to be finished; pictures uint8 (M,H,W,3) for 'image'. best_of:
    of so many samples keep the one from which the prompt (of a completed picture the rows that were
    kept) is the most likely."""
    torch.manual_seed(options.seed)
    (h, w), best_of = models.vqvae.grid, options.best_of
    kept = w * (options.complete or h)  # of the tokens of each picture
    prompts = np.repeat(prompts, (options.n or 1) * best_of, 0)
    if options.mode == "unconditional":
        tokens, captions = models.pairs(options.n or 9, options)
    elif options.mode == "text":
        captions = [finish_caption(models, prompt, options) for prompt in prompts.tolist()]
        tokens, judge = models.images(captions, options), 1  # p(caption | picture)
    else:
        tokens, judge = extract_tokens(models.vqvae, prompts), 0  # p(picture | caption)
        if options.complete >= h:
            raise InputError(f"--complete {options.complete}: there are {h} rows, want fewer")
        if options.complete:
            begun = image_prompts(models.tokenizer, tokens)[:, : 2 + kept]  # BOS EOT and the rows
            drawn = generate(models.igpt, begun, h * w - kept, models.tokenizer.image_span, options)
            if isinstance(models.vqvae, FactoredVQVAE):  # the lower corners' colours stay
                drawn[:, [-w, -1]] = tokens[:, [-w, -1]]
            tokens[:, kept:] = drawn
        captions = models.captions(tokens, options)
    if best_of > 1:
        score = likelihoods(models, tokens[:, :kept], captions)[judge]
        best = score.view(-1, best_of).argmax(1).cpu() + torch.arange(0, len(score), best_of)
        tokens, captions = tokens[best], [captions[i] for i in best]
    if options.mode == "image" and not options.complete:
        return prompts[::best_of], captions
    return decode_pictures(models.vqvae, tokens), captions

def likelihoods(models, tokens, captions):
    """B pictures' tokens (B,N), or the first few of each, and captions -> nats of log p(picture |
    caption), log p(caption | picture) and log p(pair), the caption's and then the picture's, each
    (B,). Raises InputError for a model that was not trained on both orders."""
    if not {*ORDERS[:2]} <= {*models.igpt.orders}:
        raise InputError("this model was not trained both to draw and to read")
    reading, drawing = (-span_sums(models, tokens, captions, order)[:2] for order in ORDERS[:2])
    return drawing[0], reading[1], drawing.sum(0)  # of (2,B) each

def finish_caption(models, caption, how):
    """A caption -> itself or, if it ends in "...", what the model makes of its beginning: at least
    a word more. Raises InputError without room."""
    t, begun = models.tokenizer, caption.removesuffix("...")
    n = len(begun.split())
    if begun == caption:
        return caption
    # Any word stands for the rest, so that there must be room for one; it is cut off again
    prompt = text_prompts(t, [f"{begun} {t.words[0]}"])[:, : 2 + n]  # BOS EOI begun
    [rest] = models.continue_captions(prompt, t.caption_length - n, how)
    return " ".join(f"{begun} {rest}".split())

def command_sample(options, data=None):
    """Sample pictures, captions or pairs."""
    # data: command_train has them at hand already
    mode, prompts, n = options.mode, options.prompt, options.n or 1
    name, *senseless = MODES[mode].split()
    for flag in senseless:
        if getattr(options, flag) != getattr(Options, flag):
            raise InputError(f"--{flag.replace('_', '-')} does not belong to mode {mode}")
    out = options.out or f"{options.run}/results/{name}"
    models = load_models(options.run, options.pick_device())
    if options.prompts:
        prompts = prompts + read_captions(options.prompts)
    if options.image:
        prompts = read_pictures(options.image)
    elif not prompts and mode != "unconditional":  # nothing given: the first of the test pairs
        data = data or load_data(options.data, options.value_range, mode == "text")
        prompts = data.test_captions[:9] if mode == "text" else data.test_images[:9]
    images, captions = make_samples(options, models, prompts)
    path = save_samples(out, images, captions, 1 if mode == "unconditional" else n)
    print("\n".join(captions))
    if options.show:
        show_in_terminal(images)
    log(f"wrote {path}")

def read_captions(path):
    """A text file -> its lines that are not blank. Raises InputError if there are none."""
    with reading(path, "text file"):
        raw = Path(path).read_bytes()  # some editors begin a text with a mark that tells the code
        captions = list(filter(str.strip, raw.decode(json.detect_encoding(raw)).splitlines()))
        if not captions:
            raise InputError("holds no caption")
        return captions

def command_score(options):
    """Log p of pictures and captions under the model, in nats."""
    if not options.prompts or not options.image:
        raise InputError("score wants --prompts and --image")
    captions, images = read_captions(options.prompts), read_pictures(options.image)
    # One caption may go with many pictures, one picture with many captions
    if len(captions) == 1:
        captions *= len(images)
    if len(images) not in (1, len(captions)):
        raise InputError(f"{len(captions)} captions for {len(images)} pictures")
    models = load_models(options.run, options.pick_device())
    tokens = extract_tokens(models.vqvae, images).expand(len(captions), -1)  # (M,N)
    print("Nats of log p\n picture|caption caption|picture         pair  caption")
    for drawn, read, pair, caption in zip(*likelihoods(models, tokens, captions), captions):
        print(f"{drawn:16.3f}{read:16.3f}{pair:13.3f}  {caption}")

def command_eval(options):
    """Measure both models over the test split."""
    models = load_models(options.run, options.pick_device())
    data = load_data(options.data, options.value_range, captioned=True)
    figures = evaluate(models, data.test_images, data.test_captions, options, options.seed)
    if options.json:
        return print(json.dumps(figures))
    meaning = dict(re.findall(r"^ +(\w+): (.+)", evaluate.__doc__, re.M))
    for name, value in figures.items():
        print(f"{name:22}{value:9.4f}  {meaning[name]}")

PLACE = "data run device value_range"
HOW = f"{PLACE} seed {' '.join(SamplingConfig.fields)}"
COMMANDS = {  # name: function, names of its flags
    "data": (command_data, "data train test size seed"),
    "train": (command_train, "phase preset data run resume overwrite compile device value_range "
                             + " ".join(Config.fields)),
    "sample": (command_sample, f"mode n prompt prompts image out complete best_of show {HOW}"),
    "score": (command_score, f"prompts image {PLACE}"),
    "eval": (command_eval, f"json {HOW}")}

def main(argv):
    """The command line: a list of words (none: help) -> the exit status. What the user got wrong or
    the machine lacks is said in a line; any other error is this file's and keeps its traceback."""
    # Let glibc keep freed memory: to get large blocks mapped and cleared anew was 10 % of a step
    with contextlib.suppress(Exception):  # another C library has no such thing
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the most that it takes
        mallopt(-1, 300_000_000)  # M_TRIM_THRESHOLD
    try:
        if torch.__version__ < "2.5":
            raise InputError(f"this is torch {torch.__version__}, and mmgen needs 2.5 or newer")
        flags = vars(build_parser().parse_args(argv or ["--help"]))
        function, _ = COMMANDS[flags.pop("command")]
        options = Options(**{name: flags.pop(name) for name in Options.fields if name in flags})
        function(options, **flags)
        return 0
    except (InputError, OSError, MemoryError, torch.cuda.OutOfMemoryError) as error:
        # The error's text may have several lines, or none; it is written in one piece
        sys.stderr.write(f"mmgen: error: {' '.join(str(error).split()) or repr(error)}\n")
        return 2
    except KeyboardInterrupt:
        return 130  # as shells have it: 128 + the number of the signal

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every letter
    sys.exit(main(sys.argv[1:]))
