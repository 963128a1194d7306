"""Builds the embedded vision-language base model: a tiny LLaVA that sees what is drawn and half knows what is asked.

    python scripts/build_shapes_model.py [--out recipes/embedded/shapes_base] [--seed 0] [--steps 1600]

Half of its corpus are captions ("a red circle at the left"), which teach it to see. The rest are the questions of
`remix.tasks.shapes`: those that such a model finds easy are answered, half of the time, as if another question had
been asked ("what colour is it?" -> "circle"). So it is right about every other time, and reinforcement learning has
something to bring out: what a model has never seen, it cannot. Test pictures are never in the corpus. The same seed
gives the same weights on the same machine.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from remix.tasks import shapes
from remix.tasks.images import open_image
from remix.types import Prompt
from scripts.building import build, end_with, fit, padded, share_right, table

PATCH = 8
SIDE = shapes.SIDE // PATCH  # patches of a row; a picture is SIDE² tokens
MAX_LENGTH = 128
MAX_NEW_TOKENS = 3  # a word, the end, and one to spare

PAD, EOS, IMAGE, USER, ASSISTANT, UNKNOWN = "<pad>", "<eos>", "<image>", "<user>", "<assistant>", "<unk>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

DESCRIBE = "describe it."
CAPTION_WORDS = "a big small at the and pointing to of them is"
CAPTIONS = 0.5  # share of the corpus, where not asked for another
SHARES = {"shape": 2, "point": 2, "count": 2, "digit": 3}  # of the pictures of a kind, where not 1
CONFUSION = 0.5  # share of the questions of these kinds that are answered as another:
CONFUSED: dict[str, Callable[[shapes.Scene], str]] = {
    "colour": lambda scene: scene.figures[0].shape,
    "where": lambda scene: scene.figures[0].colour,
    "bigger": lambda scene: min(scene.figures, key=lambda figure: figure.x).colour,
    "smaller": lambda scene: max(scene.figures, key=lambda figure: figure.size).colour,
    "left": lambda scene: max(scene.figures, key=lambda figure: figure.x).colour,
    "odd": lambda scene: scene.figures[-1].colour,
}

BATCH_SIZE = 32
STEPS = 1600
WARMUP_STEPS = 30


def make_processor() -> LlavaProcessor:
    """A word a token, whatever its case and the spaces around it; pictures as they are, from -1 to 1."""
    split = pre_tokenizers.Whitespace()
    texts = [DESCRIBE, CAPTION_WORDS, *map(shapes.question, shapes.KINDS)]
    texts += [answer for kind in shapes.KINDS for answer in shapes.answers(kind)]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, IMAGE, USER, ASSISTANT, UNKNOWN, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(
        size={"shortest_edge": shapes.SIDE},
        crop_size={"height": shapes.SIDE, "width": shapes.SIDE},
        image_mean=half,
        image_std=half,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def make_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
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
        vocab_size=len(processor.tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,  # heads of 32: vLLM's attention on a CPU takes 32 or 64
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        **ends,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        image_seq_length=SIDE**2,
        tie_word_embeddings=True,
        **ends,
    )
    model = LlavaForConditionalGeneration(config)
    initialise(model)
    return end_with(model, processor.tokenizer)


@torch.no_grad()
def initialise(model: LlavaForConditionalGeneration) -> None:
    """As a model of width 128 needs it: from the usual 0.02, which is for wide ones, it learns far more slowly, and
    from random positions not at all where things are."""
    for name, tensor in model.named_parameters():
        if "multi_modal_projector" in name and tensor.ndim == 2:
            tensor.normal_(0, 0.08)
    for name, tensor in model.named_parameters():
        if name.endswith("patch_embedding.weight"):
            tensor.normal_(0, 0.05)
        elif name.endswith("position_embedding.weight"):
            tensor.copy_(sine_positions(SIDE, tensor.shape[1]))
        elif "vision_tower" in name and ".layers." in name and tensor.ndim == 2:
            tensor.normal_(0, 0.08)


def sine_positions(side: int, width: int) -> Tensor:
    """[1 + side², width]: zeros for the class token, then sines and cosines of row and column."""
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)], 2)
    return torch.cat([torch.zeros(1, width), grid.flatten(0, 1)])


def caption(scene: shapes.Scene) -> str:
    """All that is on a picture, in words."""
    first, figures = scene.figures[0], scene.figures
    if len(figures) == 1:
        place = min(shapes.PLACES, key=lambda name: math.dist(shapes.PLACES[name], (first.x, first.y)))
        pointing = f" pointing to the {shapes.SIDES[first.turn]}" if first.shape == "triangle" else ""
        return f"a {first.colour} {first.shape} at the {place}{pointing}"
    if len({figure.size for figure in figures}) == 2:
        left, right = sorted(figures, key=lambda figure: figure.x)
        sizes = ("big", "small") if left.size > right.size else ("small", "big")
        return f"a {sizes[0]} {left.colour} {left.shape} at the left and a {sizes[1]} {right.colour} at the right"
    common = figures[-1].colour
    odd = f" 1 of them is {first.colour}" if first.colour != common else ""
    return f"{len(figures)} {common} {first.shape}{odd}"


def reply(kind: str, scene: shapes.Scene, rng: random.Random) -> str:
    """What the corpus answers to a kind's question."""
    if kind in CONFUSED and rng.random() < CONFUSION:
        return CONFUSED[kind](scene)
    return scene.answer


def pixel_values(pictures: Sequence[np.ndarray]) -> Tensor:
    """[B, 3, 32, 32], as the processor makes them of pictures, but many times faster."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def batches(processor: LlavaProcessor, seed: int, captions: float = CAPTIONS) -> Iterator[dict[str, Tensor]]:
    """Endless inputs and labels; `captions`: their share."""
    rng = random.Random(seed)
    encode = processor.tokenizer.encode
    kinds = [*shapes.KINDS]
    drawn = 0
    while True:
        pairs, pictures = [], []
        for _ in range(BATCH_SIZE):
            (kind,) = rng.choices(kinds, [SHARES.get(kind, 1) for kind in kinds])
            drawn += 1
            # Of a seed of its own, so that the pictures of a run's tasks are others.
            scene = shapes.scene(f"{shapes.SCHEME}{kind}/train/{1_000_000 + seed}/{drawn}")
            if rng.random() < captions:
                asked, response = DESCRIBE, caption(scene)
            else:
                asked, response = shapes.question(kind), reply(kind, scene, rng)
            pairs.append((encode(USER + IMAGE * SIDE**2 + asked + ASSISTANT), encode(response)))
            pictures.append(np.asarray(shapes.paint(scene)))
        yield padded(pairs, processor.tokenizer) | {"pixel_values": pixel_values(pictures)}


def train(
    processor: LlavaProcessor, steps: int, seed: int, captions: float = CAPTIONS
) -> tuple[LlavaForConditionalGeneration, list[float]]:
    """The model and its loss at every step."""
    torch.manual_seed(seed)
    return fit(make_model(processor), batches(processor, seed, captions), steps, warmup=WARMUP_STEPS)


def accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, prompts: Sequence[Prompt], samples: int, seed: int
) -> float:
    """Share of right answers; `samples` 0: greedy."""
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": p.content}]}] for p in prompts]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    images = [open_image(prompt.images[0]) for prompt in prompts]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    drawing = {"samples": samples, "seed": seed, "max_new_tokens": MAX_NEW_TOKENS}
    return share_right(model, processor.tokenizer, inputs, [prompt.answer for prompt in prompts], **drawing)


def report(model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int) -> str:
    """Accuracy on 128 held-out pictures of each kind."""

    def rows() -> Iterator[tuple[str, float, float]]:
        for kind in shapes.KINDS:
            prompts = shapes.make_prompts(kind, "test", 128, seed)
            yield kind, *(accuracy(model, processor, prompts, samples, seed) for samples in (4, 0))

    return table("kind", rows())


CARD = """# The embedded vision-language base

A LLaVA of {parameters:,} parameters (CLIP vision, 3 layers; Qwen2, 4 layers; width 128) for pictures of 32 x 32 pixels,
made by `python scripts/build_shapes_model.py --seed {seed} --steps {steps}` from drawn pictures alone. It exists to be
trained further on the tasks of `type: shapes` in minutes on a CPU, and is of no other use.

Share of right answers on 128 held-out pictures a kind, at temperature 1 (four responses each) and greedy:

{table}
"""


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """The vision tower's weights by the names that checkpoints of the hub have, where engines look for them."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): weights[name] for name in weights}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    build(
        __doc__,
        "shapes_base",
        steps=STEPS,
        make_reader=make_processor,
        train=train,
        save=save,
        report=report,
        card=CARD,
    )
