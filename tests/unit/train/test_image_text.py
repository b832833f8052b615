"""Adapters for vision-language models: tokens of images, whose words are learned, which parts are adapted, answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import weft
from weft.data import load_examples
from weft.data.talks import TalkCollator, encode_talks
from weft.errors import BaseError, DataError, RecipeError
from weft.models.targets import in_parts

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|user|>",
    "<|assistant|>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|video_pad|>",
]


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: number for number, token in enumerate([*SPECIAL, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    made.chat_template = TEMPLATE
    return made


TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 300, "max_position_embeddings": 256, "tie_word_embeddings": False, "pad_token_id": 0}  # fmt: skip


def llava(folder):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=5, vision_feature_layer=-1
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size)
    processor = LlavaProcessor(
        pixels,
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder, processor


def idefics(folder):
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, LlamaConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 2,
    }
    config = Idefics3Config(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=5, scale_factor=2, pad_token_id=0
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    pixels = Idefics3ImageProcessorPil(
        size={"longest_edge": 8}, max_image_size={"longest_edge": 8}, do_image_splitting=False, return_row_col_info=True
    )
    processor = Idefics3Processor(pixels, tokenizer(), image_seq_len=4, chat_template=TEMPLATE)
    processor.save_pretrained(folder)
    return folder, processor


def smolvlm(folder):
    """With the processor of Idefics3, which writes the same; its own needs packages for videos."""
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    _, processor = idefics(folder)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
              "patch_size": 2}  # fmt: skip
    config = SmolVLMConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=5, scale_factor=2, pad_token_id=0
    )
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    return folder, processor


def qwen(folder):
    """Patches of an image as rows, as many as the image is large; positions in three dimensions."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
              "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [0]}  # fmt: skip
    start, image, end, video = range(len(SPECIAL) - 4, len(SPECIAL))
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=start, image_token_id=image, vision_end_token_id=end,
        video_token_id=video,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    pixels = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=512)
    return model, Patches(pixels)


class Patches:
    """What Qwen's processor does with text and images; its own needs torchvision, for videos."""

    image_token = "<|image_pad|>"

    def __init__(self, image_processor):
        self.image_processor, self.tokenizer = image_processor, tokenizer()
        self.chat_template = TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")

    def __call__(self, text, images=None, add_special_tokens=False, return_tensors=None):
        pictures = [image for several in images or [] for image in several]
        found = dict(self.image_processor(images=pictures, return_tensors="pt")) if pictures else {}
        counts = [int(grid.prod()) // 4 for grid in found.get("image_grid_thw", ())]
        pieces = text[0].split(self.image_token)
        grown = "".join(
            piece + (self.image_token * counts[at] if at < len(pieces) - 1 else "") for at, piece in enumerate(pieces)
        )
        ids = self.tokenizer(grown, add_special_tokens=False)["input_ids"]
        kinds = [int(token == self.tokenizer.convert_tokens_to_ids(self.image_token)) for token in ids]
        rows = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "mm_token_type_ids": [kinds]}
        return found | ({name: torch.tensor(row) for name, row in rows.items()} if return_tensors else rows)


MAKERS = {"llava": llava, "idefics": idefics, "smolvlm": smolvlm, "qwen": qwen}


@pytest.fixture
def images(tmp_path):
    for index in range(6):
        height, width = np.random.randint(6, 20, 2)
        values = np.random.randint(0, 256, (height, width, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / "images" / f"{index}.png")
    return tmp_path / "images"


def conversations():
    image = {"type": "image"}
    text = [{"type": "text", "text": "what"}]
    yes = {"role": "assistant", "content": "a cat"}
    return [
        {"messages": [{"role": "user", "content": [{**image, "image": "0.png"}, *text]}, yes]},
        {"messages": [{"role": "user", "content": "and"}, yes], "image": "1.png"},
        {"messages": [{"role": "user", "content": "<image>\nor <image>"}, yes, {"role": "user", "content": "why"}, yes], "images": ["2.png", "3.png"]},
        {"messages": [{"role": "user", "content": "no image"}, yes]},
        {"image": "4.png", "prompt": "say", "completion": "done"},
        {"image": "gone.png", "prompt": "say", "completion": "done"},
    ]  # fmt: skip


def written(tmp_path, rows=None):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows if rows is not None else conversations()[:4])))
    return path


@pytest.mark.parametrize("name", MAKERS)
def test_images_grow_and_the_assistants_words_alone_are_learned(name, images, tmp_path):
    _, processor = MAKERS[name](tmp_path / "base")
    examples = load_examples(str(written(tmp_path)), images=images)
    assert examples.kind == "image-text"
    encoded = encode_talks(examples, processor, max_length=400)
    assert len(encoded) == 4
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    for index, (count, said) in enumerate(
        zip((1, 1, 2, 0), ("a cat</s>", "a cat</s>", "a cat</s>a cat</s>", "a cat</s>"), strict=True)
    ):
        item = encoded[index]
        learned = item["labels"][item["labels"] >= 0]
        assert processor.tokenizer.decode(learned) == said
        assert len(item["images"]) == count
        pixels = processor.image_processor(images=item["images"], return_tensors="pt") if count else {}
        grown = (
            sum(int(grid.prod()) // 4 for grid in pixels["image_grid_thw"]) if "image_grid_thw" in pixels else 4 * count
        )
        assert (item["input_ids"] == image).sum() == grown
    everything = encode_talks(examples, processor, max_length=400, mask_prompt=False)
    for index in range(4):
        item = everything[index]
        assert not (item["labels"] == image).any()
        assert (item["labels"] >= 0).sum() > (encoded[index]["labels"] >= 0).sum()
    batch = TalkCollator(processor)([encoded[index] for index in range(4)])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize("name", MAKERS)
def test_training_evaluation_and_an_answer(name, images, tmp_path):
    base, processor = MAKERS[name](tmp_path / "base")
    base = str(base) if name != "qwen" else (base, processor)
    data = written(tmp_path)
    recipe = weft.Recipe().replace(max_steps=6, batch_size=2, learning_rate=2e-2, targets="default", rank=2, eval_every=6,
                                   vision={"projector": True, "vision": True})  # fmt: skip
    run = weft.train(
        base=base,
        data=str(data),
        eval_data=str(data),
        images=images,
        recipe=recipe,
        out=tmp_path / "run",
        progress=False,
    )
    assert run.report.adapter["loss"] < run.report.base["loss"]
    sites = " ".join(run.adapter.factors)
    assert "vision" in sites or "visual" in sites
    assert any(word in sites for word in ("connector", "projector", "merger"))
    assert "lm_head" not in sites
    found = weft.evaluate(base=base, adapter=run.path, data=str(data), images=images, progress=False)
    assert found.adapter["loss"] == pytest.approx(run.report.adapter["loss"], rel=1e-3)
    from weft.train import Sampling, generate

    asked = {
        "base": base,
        "prompts": ["what"],
        "images": [[str(images / "0.png")]],
        "sampling": Sampling(max_new_tokens=4),
    }
    assert len(generate(**asked, adapter=run.path)) == 1
    assert len(generate(**asked)) == 1
    assert len(generate(base=base, adapter=run.path, prompts=["no image"], sampling=Sampling(max_new_tokens=2))) == 1


def test_what_does_not_fit_or_can_not_be_read_is_counted(images, tmp_path):
    _, processor = llava(tmp_path / "base")
    rows = [*conversations(), {"messages": [{"role": "user", "content": "x"}], "image": "0.png"}]
    encoded = encode_talks(load_examples(rows, images=images), processor, max_length=200)
    assert encoded.account.broken.first == [6]
    assert encoded.account.empty.first == [7]
    assert encoded.account.kept == 5
    short = encode_talks(load_examples(rows[:3], images=images), processor, max_length=26)
    assert short.account.kept + short.account.masked.count == 3
    assert all(len(item["input_ids"]) <= 26 for item in short)
    with pytest.raises(DataError, match="left to learn"):
        encode_talks(load_examples(rows[5:6], images=images), processor, max_length=99)


def test_each_part_has_its_switch(tmp_path):
    base, _ = llava(tmp_path / "base")
    model, _ = weft.load_base(str(base), task="image-text")
    spec = weft.LoraSpec(rank=2, targets="default")
    parts = {name: set(in_parts(model, spec, **{"language": False, "vision": False, "projector": False, name: True}).targets)
             for name in ("language", "vision", "projector")}  # fmt: skip
    assert all(parts.values())
    assert all("vision" in path for path in parts["vision"])
    assert all("projector" in path for path in parts["projector"])
    assert not parts["language"] & (parts["vision"] | parts["projector"])
    assert len(parts["language"]) == 7
    everywhere = weft.LoraSpec(rank=2)
    assert set(in_parts(model, everywhere, language=True, vision=False, projector=False).targets) == parts["language"]


def test_mistakes_are_said(images, tmp_path):
    for rows, words in (
        ([{"messages": [{"role": "user", "content": "<image>"}], "images": ["0.png", "1.png"]}], "places for 1 images"),
        ([{"image": "0.png", "label": "a"}], "image-text"),
        ([{"messages": [{"role": "user", "content": [{"type": "video"}]}]}], "part of type 'video'"),
        ([{"messages": [{"role": "assistant", "content": "a"}], "image": "0.png"}], "no message of the user"),
    ):
        with pytest.raises(DataError, match=words):
            load_examples(rows, kind="image-text", images=images)
    with pytest.raises(BaseError, match="reads text alone"):
        weft.train(data=conversations()[:1], images=images, out=tmp_path / "a", progress=False)
    base, _ = llava(tmp_path / "base")
    with pytest.raises(BaseError, match="image-text"):  # text alone, on a base that sees
        weft.train(base=str(base), data=[{"prompt": "a", "completion": "b"}], out=tmp_path / "b", progress=False)
    with pytest.raises(RecipeError, match="names no sites"):
        weft.train(
            base=str(base),
            data=conversations()[:1],
            images=images,
            recipe=weft.Recipe().replace(targets=["q_proj"], vision={"vision": True}),
            out=tmp_path / "d",
            progress=False,
        )
    with pytest.raises(RecipeError, match="packed"):
        weft.train(
            base=str(base),
            data=conversations()[:1],
            images=images,
            recipe=weft.Recipe(batching="packed"),
            out=tmp_path / "c",
            progress=False,
        )
