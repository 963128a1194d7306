"""The frame of the scripts that build the embedded models: a corpus learnt, answers counted, the folder written."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

EMBEDDED = Path(__file__).resolve().parents[1] / "recipes" / "embedded"
LEARNING_RATE = 1e-3


def end_with(model: Any, tokenizer: Any) -> Any:
    """The model, whose responses end as the tokenizer says."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def padded(pairs: Sequence[tuple[list[int], list[int]]], tokenizer: Any) -> dict[str, Tensor]:
    """Inputs and labels of prompts and responses, both [B, T], right-padded; only the response is learnt, with the end
    that it is given here."""
    ended = [(prompt, [*response, tokenizer.eos_token_id]) for prompt, response in pairs]
    rows = [torch.tensor(prompt + response) for prompt, response in ended]
    targets = [torch.tensor([-100] * len(prompt) + response) for prompt, response in ended]
    pad = torch.nn.utils.rnn.pad_sequence
    return {"input_ids": pad(rows, True, tokenizer.pad_token_id), "labels": pad(targets, True, -100)}


def fit(model: Any, batches: Iterator[Mapping[str, Tensor]], steps: int, *, warmup: int) -> tuple[Any, list[float]]:
    """The model after so many steps, and its loss at each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    losses: list[float] = []
    started = time.process_time()
    for step, batch in enumerate(islice(batches, steps), start=1):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {step}/{steps}  loss {recent:.3f}  {time.process_time() - started:.0f} s", flush=True)
    return model.eval(), losses


@torch.no_grad()
def share_right(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Tensor],
    golds: Sequence[str],
    *,
    samples: int,
    seed: int,
    max_new_tokens: int,
    answer: Callable[[str], str] = str,
) -> float:
    """Of `samples` responses to each prompt at temperature 1; 0: greedy. `answer`: what of a response counts."""
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": samples} if samples else {"do_sample": False}
    output = model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    asked = [gold for gold in golds for _ in range(max(samples, 1))]
    return sum(answer(text) == gold for text, gold in zip(texts, asked, strict=True)) / len(asked)


def table(head: str, rows: Iterator[tuple[str, float, float]]) -> str:
    """Accuracy by row, sampled and greedy, with the means below, in Markdown; printed as it comes."""
    lines, shares = [f"| {head} | sampled | greedy |", "|---|---|---|"], list[tuple[float, float]]()
    for name, sampled, greedy in rows:
        shares.append((sampled, greedy))
        lines.append(f"| {name} | {sampled:.2f} | {greedy:.2f} |")
        print(lines[-1], flush=True)
    sampled, greedy = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    lines.append(f"| mean | {sampled:.2f} | {greedy:.2f} |")
    print(lines[-1])
    return "\n".join(lines)


def build(
    description: str | None,
    name: str,
    *,
    steps: int,
    make_reader: Callable[[], Any],
    train: Callable[[Any, int, int], tuple[Any, list[float]]],
    save: Callable[[Any, Path], None],
    report: Callable[[Any, Any, int], str],
    card: str,
) -> None:
    """The command line of a script. `name`: of the folder in recipes/embedded; `make_reader`: a tokenizer, or the
    processor that holds it; `report`: of the model as it is loaded again, to the table of the `card`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=EMBEDDED / name)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=steps)
    args = parser.parse_args()

    torch.set_num_threads(1)  # so that sums are taken in the same order however many cores there are
    reader = make_reader()
    model, _ = train(reader, args.steps, args.seed)
    save(model, args.out)
    reader.save_pretrained(args.out)
    rows = report(type(model).from_pretrained(args.out), reader, args.seed)
    parameters = model.num_parameters()
    text = card.format(parameters=parameters, seed=args.seed, steps=args.steps, table=rows)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{parameters:,} parameters, {size / 1e6:.2f} MB in {args.out}")
