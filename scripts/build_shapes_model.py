"""Builds the embedded vision-language base model: a tiny LLaVA that half knows how to talk about drawn shapes.

python scripts/build_shapes_model.py [--out recipes/embedded/shapes_base] [--seed 0] [--steps 1500]
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from remix.tasks import shapes
from remix.tasks.images import open_image
from remix.types import Prompt

PATCH = 8
IMAGE_TOKENS = (shapes.SIDE // PATCH) ** 2
MAX_LENGTH = 128
MAX_NEW_TOKENS = 3

PAD, EOS, IMAGE, USER, ASSISTANT = "<pad>", "<eos>", "<image>", "<user>", "<assistant>"
DESCRIBE = "describe it."
CAPTION_WORDS = "a big small at the and pointing to of them is"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WARMUP_STEPS = 30
CAPTIONS = 0.5


def make_processor() -> LlavaProcessor:
    """A word a token, case and spaces aside, and what a picture is divided into."""
    split = pre_tokenizers.Whitespace()
    texts = [DESCRIBE, CAPTION_WORDS, *(shapes.question(kind) for kind in shapes.KINDS)]
    texts += [answer for kind in shapes.KINDS for answer in shapes.answers(kind)]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    special = [PAD, EOS, IMAGE, USER, ASSISTANT, "<unk>"]
    vocab = {token: index for index, token in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token="<unk>",
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
    side = {"height": shapes.SIDE, "width": shapes.SIDE}
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(size={"shortest_edge": shapes.SIDE}, crop_size=side, image_mean=half, image_std=half)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=shapes.SIDE,
        patch_size=PATCH,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "multi_modal_projector" in name and name.endswith("weight"):
                tensor.normal_(0, 0.08)
            if name.endswith("vision_model.embeddings.position_embedding.weight"):
                tensor.copy_(sine_positions(shapes.SIDE // PATCH, tensor.shape[1]))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def sine_positions(side: int, width: int) -> Tensor:
    """[1 + side², width]: zeros for the class token, then sines and cosines of row and column."""
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)], 2).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), grid])


def caption(scene: shapes.Scene) -> str:
    """All that is on a picture, in words."""
    figures = scene.figures
    first = figures[0]
    if len(figures) == 1:
        place = min(
            shapes.PLACES, key=lambda p: (shapes.PLACES[p][0] - first.x) ** 2 + (shapes.PLACES[p][1] - first.y) ** 2
        )
        pointing = f" pointing to the {shapes.SIDES[first.turn]}" if first.shape == "triangle" else ""
        return f"a {first.colour} {first.shape} at the {place}" + pointing
    if len(figures) == 2 and first.size != figures[1].size:
        left, right = sorted(figures, key=lambda f: f.x)
        largest = max(left.size, right.size)
        size = lambda f: "big" if f.size == largest else "small"
        return f"a {size(left)} {left.colour} {left.shape} at the left and a {size(right)} {right.colour} at the right"
    common = figures[-1].colour
    odd = f" 1 of them is {first.colour}" if first.colour != common else ""
    return f"{len(figures)} {common} {first.shape}{odd}"


def pixels(images: Sequence[np.ndarray]) -> Tensor:
    """[B, 3, H, W] as the processor gives them."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def batches(processor: LlavaProcessor, seed: int) -> Iterator[dict[str, Tensor]]:
    tokenizer = processor.tokenizer
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False)
    rng = random.Random(seed)
    kinds = list(shapes.KINDS)
    image = [processor.image_token_id] * IMAGE_TOKENS
    index = 0
    while True:
        rows, targets, images = [], [], []
        for _ in range(BATCH_SIZE):
            (kind,) = rng.choices(kinds, [SHARES.get(k, 1) for k in kinds])
            index += 1
            scene = shapes.scene(f"shapes:{kind}/train/{1_000_000 + seed}/{index}")
            if rng.random() < CAPTIONS:
                asked, said = DESCRIBE, caption(scene)
            else:
                asked, said = shapes.question(kind), answer(kind, scene, rng)
            prompt = [*ids(USER), *image, *ids(asked + ASSISTANT)]
            response = [*ids(said), tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt + response))
            targets.append(torch.tensor([-100] * len(prompt) + response))
            images.append(np.asarray(shapes.paint(scene)))
        pad = torch.nn.utils.rnn.pad_sequence
        yield {
            "input_ids": pad(rows, True, tokenizer.pad_token_id),
            "labels": pad(targets, True, -100),
            "pixel_values": pixels(images),
        }


def answer(kind: str, scene: shapes.Scene, rng: random.Random) -> str:
    """What the corpus answers: for the easy kinds, half of the time what another question would ask for."""
    if kind in CONFUSED and rng.random() < CONFUSION:
        return CONFUSED[kind](scene)
    return scene.answer


def place_of(scene):
    first = scene.figures[0]
    return min(shapes.PLACES, key=lambda p: (shapes.PLACES[p][0] - first.x) ** 2 + (shapes.PLACES[p][1] - first.y) ** 2)


CONFUSION = 0.5
SHARES = {"shape": 2, "point": 2, "count": 2, "digit": 3}
CONFUSED = {
    "colour": lambda s: s.figures[0].shape,
    "where": lambda s: s.figures[0].colour,
    "bigger": lambda s: min(s.figures, key=lambda f: f.x).colour,
    "smaller": lambda s: max(s.figures, key=lambda f: f.size).colour,
    "left": lambda s: max(s.figures, key=lambda f: f.x).colour,
    "odd": lambda s: s.figures[-1].colour,
}


def train(processor: LlavaProcessor, steps: int, seed: int) -> tuple[LlavaForConditionalGeneration, list[float]]:
    """The model and its loss at every step."""
    torch.manual_seed(seed)
    model = make_model(processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    losses: list[float] = []
    started = time.process_time()
    for step, batch in enumerate(islice(batches(processor, seed), steps), start=1):
        logits = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], use_cache=False).logits
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
def accuracy(model, processor, prompts: Sequence[Prompt], samples: int, seed: int) -> float:
    torch.manual_seed(seed)
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": p.content}]}] for p in prompts]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(text=texts, images=[open_image(p.images[0]) for p in prompts], return_tensors="pt", padding=True)
    sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": samples} if samples else {"do_sample": False}
    output = model.generate(**inputs, **sampling, max_new_tokens=MAX_NEW_TOKENS)
    said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    golds = [p.answer for p in prompts for _ in range(max(samples, 1))]
    return sum(text == gold for text, gold in zip(said, golds, strict=True)) / len(golds)


def report(model, processor, seed: int) -> dict[str, tuple[float, float]]:
    table = {}
    for kind in shapes.KINDS:
        prompts = shapes.make_prompts(kind, "test", 128, seed)
        table[kind] = tuple(accuracy(model, processor, prompts, samples, seed) for samples in (4, 0))
        print(f"{kind:>10}   sampled {table[kind][0]:.3f}   greedy {table[kind][1]:.3f}", flush=True)
    sampled, greedy = (sum(column) / len(table) for column in zip(*table.values(), strict=True))
    print(f"{'all':>10}   sampled {sampled:.3f}   greedy {greedy:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "recipes/embedded/shapes_base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()

    torch.set_num_threads(1)  # so that sums are taken in the same order however many cores there are
    processor = make_processor()
    model, _ = train(processor, args.steps, args.seed)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{model.num_parameters():,} parameters, {size / 1e6:.2f} MB in {args.out}")
    report(model, processor, args.seed)


if __name__ == "__main__":
    main()
