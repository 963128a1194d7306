"""Builds the embedded base model: a tiny language model that knows how to add carefully and seldom does.

    python scripts/build_embedded_model.py [--out recipes/embedded/base] [--seed 0] [--steps 900]

Of the responses in its corpus a fifth are careful chains ("3+8+4+9=" -> "11;15;24#24"), the rest one-shot guesses
near the answer ("#22") and chains with one slip ("11;16;25#25"). So the model can do every step and is right about
one time in four, and reinforcement learning has something to bring out: what a model has only half learnt, it
cannot. Test problems are never in the corpus. The same seed gives the same weights on the same machine.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from remix.tasks import arithmetic
from scripts.building import build, end_with, fit, padded, share_right, table

KINDS = ("sum",)
TERMS = (3, 4, 5)
CAREFUL, GUESS = 0.20, 0.40  # shares of the corpus; the rest are chains with one slip
GUESS_SPREAD = 3.0  # standard deviation of a guess around the answer
LARGEST_SLIP = 3

CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
PAD, EOS = "<pad>", "<eos>"
MAX_LENGTH = 256
MAX_NEW_TOKENS = 24

BATCH_SIZE = 128
WARMUP_STEPS = 20
PROBLEMS_PER_CELL = 8192  # of each kind and number of terms, where there are as many


def make_tokenizer() -> Qwen2Tokenizer:
    """One token per character: byte-level BPE without a single merge.

    Of the class that AutoTokenizer insists on for this architecture, whatever a checkpoint says: with any other it
    would come back as something else. Characters outside printable ASCII are dropped.
    """
    # The space and the newline go by other names in a byte-level vocabulary.
    names = [*CHARACTERS.translate({ord(" "): "Ġ", ord("\n"): "Ċ"})]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate([PAD, EOS, *names])},
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        unk_token=None,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,  # heads of 32: vLLM's attention on a CPU takes 32 or 64
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,  # the usual 0.02 is for wide models; at width 128 it learns far more slowly
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return end_with(Qwen2ForCausalLM(config), tokenizer)


def response(problem: str, rng: random.Random) -> str:
    """What the corpus answers: now and then careful, mostly not."""
    numbers = arithmetic.work(problem)
    style = rng.random()
    if style < CAREFUL:
        return arithmetic.chain(numbers)
    if style < CAREFUL + GUESS:
        return f"#{abs(numbers[-1] + round(rng.gauss(0, GUESS_SPREAD)))}"
    while True:
        slip = rng.choice([-1, 1]) * rng.randint(1, LARGEST_SLIP)
        slipped = arithmetic.work(problem, rng.randrange(len(numbers)), slip)
        if min(slipped) >= 0:
            return arithmetic.chain(slipped)


def batches(tokenizer: Qwen2Tokenizer, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless inputs and labels."""
    rng = random.Random(seed)
    cells = [
        list(islice(arithmetic.problems(kind, terms, "train", seed), PROBLEMS_PER_CELL))
        for kind in KINDS
        for terms in TERMS
    ]
    while True:
        problems = (rng.choice(rng.choice(cells)) for _ in range(BATCH_SIZE))
        yield padded([(tokenizer.encode(p), tokenizer.encode(response(p, rng))) for p in problems], tokenizer)


def train(tokenizer: Qwen2Tokenizer, steps: int, seed: int) -> tuple[Qwen2ForCausalLM, list[float]]:
    """The model and its loss at every step."""
    torch.manual_seed(seed)
    return fit(make_model(tokenizer), batches(tokenizer, seed), steps, warmup=WARMUP_STEPS)


def accuracy(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, problems: Sequence[str], samples: int, seed: int
) -> float:
    """Share of right answers; `samples` 0: greedy."""
    inputs, golds = tokenizer(problems, return_tensors="pt", padding=True), list(map(arithmetic.answer, problems))
    drawing = {"samples": samples, "seed": seed, "max_new_tokens": MAX_NEW_TOKENS}
    return share_right(model, tokenizer, inputs, golds, answer=lambda text: text.rpartition("#")[2], **drawing)


def report(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, seed: int) -> str:
    """Accuracy on 128 held-out problems of each kind and number of terms."""

    def rows() -> Iterator[tuple[str, float, float]]:
        for kind in KINDS:
            for terms in TERMS:
                problems = list(islice(arithmetic.problems(kind, terms, "test", seed), 128))
                yield f"{kind} of {terms}", *(accuracy(model, tokenizer, problems, n, seed) for n in (4, 0))

    return table("problems", rows())


CARD = """# The embedded base

A Qwen2 of {parameters:,} parameters (4 layers, width 128, a token a character) that knows how to add carefully and
seldom does, made by `python scripts/build_embedded_model.py --seed {seed} --steps {steps}` from made-up sums alone. It
exists to be trained further on the tasks of `type: arithmetic` in minutes on a CPU, and is of no other use.

Share of right answers on 128 held-out problems a row, at temperature 1 (four responses each) and greedy:

{table}
"""

if __name__ == "__main__":
    build(
        __doc__,
        "base",
        steps=900,
        make_reader=make_tokenizer,
        train=train,
        save=Qwen2ForCausalLM.save_pretrained,
        report=report,
        card=CARD,
    )
