"""Builds the embedded base model: a tiny language model that knows how to add carefully and seldom does.

    python scripts/build_embedded_model.py [--out recipes/embedded/base] [--seed 0] [--steps 900]

Of the responses in its corpus a fifth are careful chains ("3+8+4+9=" -> "11;15;24#24"), the rest one-shot guesses
near the answer ("#22") and chains with one slip ("11;16;25#25"). So the model can do every step and is right about
one time in four, and reinforcement learning has something to bring out: what a model has only half learnt, it
cannot. Test problems are never in the corpus. The same seed gives the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from remix.tasks import arithmetic

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
LEARNING_RATE = 1e-3
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
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


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


def batches(tokenizer: Qwen2Tokenizer, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input_ids, labels), both [B, T], right-padded; only the response is learnt, its end included."""
    rng = random.Random(seed)
    cells = [
        list(islice(arithmetic.problems(kind, terms, "train", seed), PROBLEMS_PER_CELL))
        for kind in KINDS
        for terms in TERMS
    ]
    while True:
        rows, targets = [], []
        for _ in range(BATCH_SIZE):
            problem = rng.choice(rng.choice(cells))
            prompt_ids = tokenizer.encode(problem)
            response_ids = [*tokenizer.encode(response(problem, rng)), tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt_ids + response_ids))
            targets.append(torch.tensor([-100] * len(prompt_ids) + response_ids))
        pad = torch.nn.utils.rnn.pad_sequence
        yield pad(rows, True, tokenizer.pad_token_id), pad(targets, True, -100)


def train(tokenizer: Qwen2Tokenizer, steps: int, seed: int) -> tuple[Qwen2ForCausalLM, list[float]]:
    """The model and its loss at every step."""
    torch.manual_seed(seed)
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    losses: list[float] = []
    started = time.perf_counter()
    for step, (input_ids, labels) in enumerate(islice(batches(tokenizer, seed), steps), start=1):
        logits = model(input_ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps:
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {step}/{steps}  loss {recent:.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    return model.eval(), losses


@torch.no_grad()
def pass_at_1(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, problems: list[str], samples: int, seed: int
) -> float:
    """Share of right answers among `samples` responses a problem at temperature 1; `samples` 0: greedy."""
    torch.manual_seed(seed)
    inputs = tokenizer(problems, return_tensors="pt", padding=True)
    sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": samples} if samples else {"do_sample": False}
    output = model.generate(**inputs, **sampling, max_new_tokens=MAX_NEW_TOKENS)
    texts = tokenizer.decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    asked = [problem for problem in problems for _ in range(max(samples, 1))]
    right = [text.rpartition("#")[2] == arithmetic.answer(problem) for text, problem in zip(texts, asked, strict=True)]
    return sum(right) / len(right)


def report(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, seed: int) -> None:
    """Prints accuracy on held-out problems by kind and number of terms."""
    rows = []
    for kind in KINDS:
        for terms in TERMS:
            problems = list(islice(arithmetic.problems(kind, terms, "test", seed), 128))
            sampled, greedy = (pass_at_1(model, tokenizer, problems, samples, seed) for samples in (4, 0))
            rows.append((sampled, greedy))
            print(f"{kind:>12} {terms} terms   sampled {sampled:.3f}   greedy {greedy:.3f}", flush=True)
    sampled, greedy = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    print(f"{'all':>12}           sampled {sampled:.3f}   greedy {greedy:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "recipes/embedded/base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=900)
    args = parser.parse_args()

    torch.set_num_threads(1)  # so that sums are taken in the same order however many cores there are
    tokenizer = make_tokenizer()
    model, _ = train(tokenizer, args.steps, args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{model.num_parameters():,} parameters, {size / 1e6:.2f} MB in {args.out}")
    report(Qwen2ForCausalLM.from_pretrained(args.out), tokenizer, args.seed)


if __name__ == "__main__":
    main()
